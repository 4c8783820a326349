"""Counting a built network: one multiply-add is one MAC, seen operator by operator as the network runs.

The numbers of `formula.py` are checked against these. What carries no multiply-accumulate by convention (activations,
norms, pooling, views) counts nothing; an operator that is in neither table is listed, never guessed.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Cost", "Count", "count"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network costs for one input.

    Attributes:
        macs: Multiply-adds.
        params: Numbers in its parameters, each counted once however often it is used.
        bytes: Memory of its parameters and persistent or not persistent buffers.
    """

    macs: int
    params: int
    bytes: int

    def to_dict(self) -> dict[str, int]:
        """Return the three numbers by name."""
        return {"macs": self.macs, "params": self.params, "bytes": self.bytes}


@dataclass(frozen=True, slots=True)
class Count:
    """A network's cost with its origin.

    Attributes:
        cost: The totals.
        macs_of: Multiply-adds by the parameter that takes part in them.
        unattributed: Multiply-adds between activations (attention), by operator.
        unknown: How often each operator ran that is in no table.
    """

    cost: Cost
    macs_of: Mapping[str, int]
    unattributed: Mapping[str, int]
    unknown: Mapping[str, int]


def count(model: nn.Module, example_input: torch.Tensor) -> Count:
    """Count a network on one input of the example's shape.

    Args:
        model: Any network; it runs once, in eval mode, on a copy.
        example_input: `(batch, ...)`; the counts are of one of the batch.
    """
    counted = copy.deepcopy(model).eval()
    counter = _Counter({p.untyped_storage().data_ptr(): name for name, p in counted.named_parameters()})
    with torch.no_grad(), counter:
        counted(example_input[:1])
    parameters = list(model.parameters())
    tensors = parameters + list(model.buffers())
    cost = Cost(
        macs=sum(counter.macs_of.values()) + sum(counter.unattributed.values()),
        params=sum(p.numel() for p in parameters),
        bytes=sum(t.numel() * t.element_size() for t in tensors),
    )
    return Count(cost, dict(counter.macs_of), dict(counter.unattributed), dict(counter.unknown))


def _convolution(args: tuple[Any, ...], output: torch.Tensor) -> int:
    weight, transposed = args[1], args[6]
    positions = args[0] if transposed else output  # every one of them meets each of a filter's weights once
    return positions.numel() // positions.shape[1] * weight.numel()


def _product(first: torch.Tensor, second: torch.Tensor) -> int:
    return first.numel() * second.shape[-1]


_MACS: dict[str, Callable[[tuple[Any, ...], Any], int]] = {
    "aten::convolution": _convolution,
    "aten::mm": lambda args, _: _product(args[0], args[1]),
    "aten::bmm": lambda args, _: _product(args[0], args[1]),
    "aten::addmm": lambda args, _: _product(args[1], args[2]),
    "aten::baddbmm": lambda args, _: _product(args[1], args[2]),
}

_FREE = {
    f"aten::{name}"
    for name in (
        "_adaptive_avg_pool2d _softmax _log_softmax _to_copy _unsafe_view abs adaptive_max_pool2d add add_ alias amax "
        "arange avg_pool1d avg_pool2d bernoulli_ bitwise_not cat ceil clamp clamp_ clone constant_pad_nd copy_ cumsum "
        "detach div div_ dropout elu embedding empty empty_like eq erf exp expand fill_ floor full full_like ge gelu "
        "gt hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_ index_select le leaky_relu leaky_relu_ "
        "lift_fresh log lt masked_fill max max_pool2d_with_indices maximum mean min minimum mul mul_ native_batch_norm "
        "_native_batch_norm_legit_no_training native_dropout native_group_norm native_layer_norm ne neg new_zeros ones "
        "ones_like permute pow prelu _prelu_kernel reciprocal relu relu_ repeat rsqrt rsub select sigmoid sigmoid_ "
        "sign silu silu_ slice softplus split split_with_sizes sqrt squeeze stack sub sub_ sum t tanh transpose "
        "unbind unsqueeze upsample_bilinear2d upsample_nearest2d var view where zero_ zeros zeros_like"
    ).split()
}


@dataclass
class _Counter(TorchDispatchMode):
    names: Mapping[int, str]
    macs_of: Counter[str] = field(default_factory=Counter)
    unattributed: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        operator = function._schema.name
        if operator in _MACS:
            macs = _MACS[operator](args, output)
            storages = (a.untyped_storage().data_ptr() for a in args[:3] if isinstance(a, torch.Tensor))
            weights = [self.names[s] for s in storages if s in self.names and self.names[s].rpartition(".")[2] != "bias"]
            if weights:
                self.macs_of[weights[0]] += macs
            else:
                self.unattributed[operator] += macs
        elif operator not in _FREE:
            self.unknown[operator] += 1
        return output
