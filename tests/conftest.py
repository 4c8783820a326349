"""What every test gets: a folder of its own, a clean environment, no network. And where real data lies, if it does."""

import ipaddress
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# The networks here are tiny: several threads would only wait for each other. The same everywhere, as sums depend on it.
torch.set_num_threads(1)


class NetworkBlockedError(RuntimeError):
    """A test reached for another machine. Not an OSError, so that no handling of broken connections hides it."""


def is_loopback(address: Any) -> bool:
    """Say whether a socket's address stays on this machine: a loopback host, or the path of a Unix socket."""
    if not isinstance(address, tuple):
        return True
    host = address[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def rng_states() -> list[bytes]:
    """Return the states of the global generators of torch, numpy and random."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - the global one is what is watched
    return [torch.get_rng_state().numpy().tobytes(), repr(numpy_state).encode(), repr(random.getstate()).encode()]


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in its own folder, with nothing of the caller's settings, and off the network."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "AUTOPRUNE_")) and not name.startswith("AUTOPRUNE_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("DO_NOT_TRACK", "true")  # MLflow's own usage statistics

    for method in ("connect", "connect_ex"):
        real = getattr(socket.socket, method)

        def guarded(self: socket.socket, address: Any, real: Any = real) -> Any:
            if not is_loopback(address):
                raise NetworkBlockedError(f"tests stay on this machine, but one reached for {address}")
            return real(self, address)

        monkeypatch.setattr(socket.socket, method, guarded)


@pytest.fixture
def global_rng_untouched() -> Iterator[None]:
    """Fail a test that leaves a global generator in another state than it found."""
    before = rng_states()
    yield
    names = ("torch", "numpy", "random")
    moved = [name for name, old, new in zip(names, before, rng_states(), strict=True) if old != new]
    if moved:
        pytest.fail(f"global generators were used: {', '.join(moved)}")


def folder_in(variable: str) -> Path:
    """Return the folder that an environment variable names; skip the test when there is none."""
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set")
    folder = Path(os.environ[variable])
    if not folder.is_dir():
        pytest.skip(f"{variable} is {folder}, which is no folder")
    return folder


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The root that torchvision's CIFAR10, MNIST and FashionMNIST read, from AUTOPRUNE_TEST_DATA."""
    return folder_in("AUTOPRUNE_TEST_DATA")


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """The folder of published CIFAR-10 checkpoints, from AUTOPRUNE_TEST_WEIGHTS."""
    return folder_in("AUTOPRUNE_TEST_WEIGHTS")
