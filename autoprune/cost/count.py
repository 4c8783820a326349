"""Counting a built network: one multiply-add is one MAC, seen operator by operator as the network runs.

The numbers of `formula.py` are checked against these. What carries no multiply-accumulate by convention (activations,
norms, pooling, views) counts nothing; an operator that is in neither table is listed, never guessed.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
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
    with torch.no_grad(), _plain_attention(), counter:
        counted(example_input[:1])
    parameters = list(model.parameters())
    tensors = parameters + list(model.buffers())
    cost = Cost(
        macs=sum(counter.macs_of.values()) + sum(counter.unattributed.values()),
        params=sum(p.numel() for p in parameters),
        bytes=sum(t.numel() * t.element_size() for t in tensors),
    )
    return Count(cost, dict(counter.macs_of), dict(counter.unattributed), dict(counter.unknown))


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Make attention run as matrix products, which can be counted, in place of fused operators."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _convolution(args: Sequence[Any], output: torch.Tensor) -> int:
    inputs, weight, transposed = args[0], args[1], args[6]
    positions: torch.Tensor = inputs if transposed else output  # each of them meets each of a filter's weights once
    filters: int = weight.numel()
    return positions.numel() // positions.shape[1] * filters


def _product(first: torch.Tensor, second: torch.Tensor) -> int:
    return first.numel() * (second.shape[-1] if second.dim() > 1 else 1)


# Which arguments of an operator that multiplies and adds are its two operands.
_OPERANDS = {
    "aten::convolution": (0, 1),
    "aten::mm": (0, 1),
    "aten::mv": (0, 1),
    "aten::bmm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addmv": (1, 2),
    "aten::baddbmm": (1, 2),
}

# Without the underscore at the end that marks an operator as in-place.
_FREE_NAMES = """
    _adaptive_avg_pool2d _adaptive_avg_pool3d _log_softmax _native_batch_norm_legit_no_training _prelu_kernel
    _safe_softmax _softmax _to_copy _unsafe_view _weight_norm_interface abs adaptive_max_pool2d add addcdiv addcmul
    alias amax amin any arange argmax argmin as_strided avg_pool1d avg_pool2d avg_pool3d bernoulli bitwise_and
    bitwise_not bitwise_or cat ceil channel_shuffle clamp clamp_min clone constant_pad_nd copy cos cudnn_batch_norm
    cumsum detach div dropout elu embedding empty empty_like eq erf exp expand fill flip floor full full_like ge
    gelu glu gt hardsigmoid hardswish hardtanh index index_select le leaky_relu lift_fresh log log1p
    log_sigmoid_forward logical_and logical_not logical_or lt masked_fill max max_pool2d_with_indices
    max_pool3d_with_indices maximum mean min minimum miopen_batch_norm mish mul native_batch_norm
    native_channel_shuffle native_dropout native_group_norm native_layer_norm ne neg new_empty new_full new_ones
    new_zeros ones ones_like permute pixel_shuffle pixel_unshuffle pow prelu reciprocal reflection_pad1d
    reflection_pad2d relu repeat replication_pad1d replication_pad2d roll rsqrt rsub scalar_tensor select sigmoid
    sign silu sin slice softplus split split_with_sizes sqrt square squeeze stack std sub sum t tanh threshold topk
    transpose tril triu unbind unfold unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_nearest1d
    upsample_nearest2d var var_mean view where zero zeros zeros_like
"""
_FREE = frozenset(f"aten::{name}" for name in _FREE_NAMES.split())


@dataclass
class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own has no types
    names: Mapping[int, str]  # the data pointer of a parameter's storage → its name
    macs_of: Counter[str] = field(default_factory=Counter)
    unattributed: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        operator = function._schema.name
        if operator in _OPERANDS:
            operands = [args[place] for place in _OPERANDS[operator]]
            macs = _convolution(args, output) if operator == "aten::convolution" else _product(*operands)
            storages = (operand.untyped_storage().data_ptr() for operand in operands)
            weight = next((self.names[storage] for storage in storages if storage in self.names), None)
            if weight is not None:
                self.macs_of[weight] += macs
            else:
                self.unattributed[operator] += macs
        elif operator.rstrip("_") not in _FREE:
            self.unknown[operator] += 1
        return output
