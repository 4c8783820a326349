"""How many threads suit a network, and work side by side: threads that share an operator lose much by waiting."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Final, TypeVar

import torch

from autoprune.devices import exact

__all__ = ["SMALL_MACS", "side_by_side", "suited_threads"]

T = TypeVar("T")

SMALL_MACS: Final = 5_000_000
"""Multiply-adds a sample below which one thread is used.

A training step of such a network takes milliseconds, of which several threads save little on a quiet machine, and where
another process holds a core they wait for each other at every operator: a hundred steps of a network of 0.8 M
multiply-adds took 0.8 s with one thread and over 10 s with two, beside one busy process on two cores.
"""


@contextmanager
def suited_threads(macs: int, *, repeatable: bool = True) -> Iterator[None]:
    """Use one thread inside a `with` if the network is small, else as many as torch is set to; restore it afterwards.

    The rule looks at the network alone and never at the clock, so that results do not depend on what else runs.

    Args:
        macs: Multiply-adds of the dense network for one sample.
        repeatable: Whether CUDA computes the same each time (see `autoprune.devices.exact`); not where a network is
            timed as its user will run it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if macs < SMALL_MACS else threads)
    try:
        with exact() if repeatable else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(works: Sequence[Callable[[], T]]) -> list[T]:
    """Run functions at the same time, each in a thread of its own in which torch uses one; return what they return.

    Whole batches side by side keep processors busier than one batch that is split inside every operator. A single
    function runs here, with the threads that torch has. What a function raises is raised when all have ended.
    """
    if len(works) == 1:
        return [works[0]()]
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(len(works), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return [future.result() for future in [pool.submit(work) for work in works]]
    finally:
        torch.set_num_threads(threads)  # threads that begin later take the number that was set last, by whomever
