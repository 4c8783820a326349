"""Randomness as a value: seeds split by name, and a place where torch's global generator is used and restored."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["derive", "seeded_torch"]


def derive(seed: int, *names: object) -> int:
    """Return a seed below 2^31 for one purpose, the same in every process.

    Args:
        seed: The search's seed.
        names: What it is for, for example `"agent"`, or `"fine-tuning", policy.id`.
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Seed torch's global generator (dropout draws from it) inside a `with`, and restore it afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
