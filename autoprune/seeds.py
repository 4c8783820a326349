"""Randomness as a value: seeds split by name, and a place where torch's global generator is used and restored."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

__all__ = ["derive", "kept_torch", "seeded_torch"]


def derive(seed: int, *names: object) -> int:
    """Return a seed below 2^31 for one purpose, the same in every process.

    Args:
        seed: The search's seed.
        names: What it is for, for example `"agent"`, or `"fine-tuning", policy.id`.
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


@contextmanager
def seeded_torch(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators (dropout draws from them) inside a `with`, and restore them afterwards.

    Args:
        seed: Below 2^31.
        device: Whose generator is seeded beside the CPU's; no other device is touched, which would claim memory on it.
    """
    with kept_torch(device):
        torch.default_generator.manual_seed(seed)
        if device is not None and device.type != "cpu":
            state = torch.Generator(device).manual_seed(seed).get_state()
            torch.get_device_module(device).set_rng_state(state, device)
        yield


def kept_torch(device: torch.device | None = None) -> AbstractContextManager[None]:
    """Return what restores the states of torch's global generators afterwards: the CPU's, and a device's."""
    if device is None or device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
