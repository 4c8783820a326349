"""How many threads suit a network: small ones lose more by waiting for each other than they gain."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

__all__ = ["SMALL_MACS", "suited_threads"]

SMALL_MACS: Final = 5_000_000
"""Multiply-adds a sample below which one thread is used.

A training step of such a network takes milliseconds, of which several threads save little on a quiet machine, and where
another process holds a core they wait for each other at every operator: a hundred steps of a network of 0.8 M
multiply-adds took 0.8 s with one thread and over 10 s with two, beside one busy process on two cores.
"""


@contextmanager
def suited_threads(macs: int) -> Iterator[None]:
    """Use one thread inside a `with` if the network is small, else as many as torch is set to; restore it afterwards.

    The rule looks at the network alone and never at the clock, so that results do not depend on what else runs.

    Args:
        macs: Multiply-adds of the dense network for one sample.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if macs < SMALL_MACS else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
