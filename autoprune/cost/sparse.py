"""Masked weights in sparse storage, and whether that is any faster: measured, never derived from the number of zeros.

In dense execution a zero costs what any number does. Where a device has kernels for a pattern, N:M or blocks, the
weights of linear layers can be stored so that zeros are skipped. Convolutions have no such kernels in torch.
"""

import copy
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from autoprune.cost.latency import Clock, Latency, compare
from autoprune.errors import ConfigError, UnknownNameError

__all__ = ["SparseSpeed", "compare_sparse", "sparse_execution"]

_FORMS = ("2:4", "bsr")


@dataclass(frozen=True, slots=True)
class SparseSpeed:
    """Whether sparse storage helped.

    Attributes:
        form: "2:4" or "bsr".
        dense: Latency of the network without masks.
        masked: Of the masked network in dense execution.
        sparse: Of the masked network with its weights in sparse storage.
    """

    form: str
    dense: Latency
    masked: Latency
    sparse: Latency

    @property
    def speedup(self) -> float:
        """How many times as fast as in dense execution the masked network is in sparse storage."""
        return self.masked.median_ms / self.sparse.median_ms

    @property
    def helped(self) -> bool:
        """Whether it is faster by more than the two latencies' half spreads."""
        noise = (self.masked.spread_ms + self.sparse.spread_ms) / 2
        return self.masked.median_ms - self.sparse.median_ms > noise

    def __str__(self) -> str:
        verdict = f"{self.speedup:.2f} times as fast" if self.helped else "no speed-up"
        return f"dense {self.dense}, masked {self.masked}, as {self.form} {self.sparse}: {verdict}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {**asdict(self), "speedup": self.speedup, "helped": self.helped}


def sparse_execution(
    model: nn.Module, tensors: Iterable[str], form: str = "2:4", tile: tuple[int, int] = (16, 16)
) -> nn.Module:
    """Return a copy of a masked network with weights of linear layers in sparse storage.

    The copy can't be trained, and block-sparse weights do not run in torch's inference mode (use `torch.no_grad`).

    Args:
        model: A network whose masked weights are zero, on the device where it is to run.
        tensors: The weights' names.
        form: "2:4", torch's semi-structured tensors, which skip two of every four neighbours along the inputs (Mishra
            et al. 2021, arXiv:2104.08378): CUDA devices of compute capability 8.0 or higher. Or "bsr", which stores
            only blocks that are not zero: on the CPU square ones in float32 or float64.
        tile: Rows and columns of a block, for "bsr".

    Raises:
        UnknownNameError: There is no such form.
        ConfigError: A tensor is no linear layer's weight or not zero in the pattern, or the device has no kernels.
    """
    if form not in _FORMS:
        raise UnknownNameError("sparse form", form, _FORMS)
    memo: dict[int, Any] = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(beta state|prototype stage)", category=UserWarning)
        for name in tensors:
            weight = _weight(model, name)
            stored = _semi_structured(name, weight) if form == "2:4" else _blocks(name, weight, tile)
            memo[id(weight)] = nn.Parameter(stored, requires_grad=False)
        return copy.deepcopy(model, memo)


def compare_sparse(
    dense: nn.Module,
    masked: nn.Module,
    tensors: Iterable[str],
    example_input: Any,
    *,
    form: str = "2:4",
    tile: tuple[int, int] = (16, 16),
    warmup: int = 5,
    repeats: int = 30,
    clock: Clock = time.perf_counter,
) -> SparseSpeed:
    """Measure a network dense, masked, and masked in sparse storage, alternately.

    Args:
        dense: The network without masks.
        masked: The same with masked weights at zero.
        tensors: The weights to store sparse, by name.
        example_input: What they are called with, on their device.
        form: As for `sparse_execution`.
        tile: As for `sparse_execution`.
        warmup: Calls of each that are not timed.
        repeats: Calls of each that are timed.
        clock: Returns seconds.

    Raises:
        ConfigError: As for `sparse_execution` and `compare`.
    """
    models = {"dense": dense, "masked": masked, "sparse": sparse_execution(masked, tensors, form, tile)}
    return SparseSpeed(form, **compare(models, example_input, warmup=warmup, repeats=repeats, clock=clock))


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    modules = dict(model.named_modules())
    module = modules.get(owner)
    if not isinstance(module, nn.Linear) or leaf != "weight":
        linear = ", ".join(f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Linear))
        raise ConfigError(f"only weights of linear layers can be stored sparse, not '{name}'; there are {linear}")
    return module.weight


def _semi_structured(name: str, weight: torch.Tensor) -> torch.Tensor:
    has_kernels = weight.is_cuda and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    if not has_kernels:
        raise ConfigError(
            f"2:4 runs sparse on CUDA devices of compute capability 8.0 or higher only, but '{name}' is on "
            f"{weight.device}; as masks it runs at dense speed"
        )
    if weight.shape[1] % 4 or (weight.reshape(-1, 4) != 0).sum(dim=1).max() > 2:
        raise ConfigError(f"'{name}' is not 2:4: of some 4 neighbours along its inputs more than 2 are not zero")
    try:
        return torch.sparse.to_sparse_semi_structured(weight.detach())
    except (RuntimeError, ValueError) as error:
        raise _no_kernel(name, weight, "2:4", error) from error


def _blocks(name: str, weight: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    rows, columns = tile
    if rows < 1 or columns < 1 or weight.shape[0] % rows or weight.shape[1] % columns:
        raise ConfigError(
            f"'{name}' of shape {tuple(weight.shape)} is not made of {rows}x{columns} blocks; choose others"
        )
    stored = weight.detach().to_sparse_bsr(tile)
    try:
        functional.linear(weight.new_zeros(1, weight.shape[1]), stored)
    except (RuntimeError, ValueError) as error:
        raise _no_kernel(name, weight, f"{rows}x{columns} blocks", error) from error
    return stored


def _no_kernel(name: str, weight: torch.Tensor, form: str, error: Exception) -> ConfigError:
    first_line = next(iter(str(error).splitlines()), "no message")
    return ConfigError(
        f"torch has no kernel on {weight.device.type} for '{name}' ({str(weight.dtype).removeprefix('torch.')}, "
        f"{tuple(weight.shape)}) as {form}: {first_line}"
    )
