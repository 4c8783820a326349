"""Counting a built network: one multiply-add is one MAC, seen operator by operator as the network runs.

The numbers of `formula.py` are checked against these. What carries no multiply-accumulate by convention (activations,
norms, pooling, views) counts nothing; an operator that is in neither table is listed, never guessed.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoprune.errors import BudgetError
from autoprune.inputs import call, each_tensor, first_sample
from autoprune.structure.trace import plain_attention

__all__ = ["Cost", "Count", "count", "unknown_operators"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network costs for one input.

    Attributes:
        macs: Multiply-adds of dense execution; zeros in a weight count like any number.
        params: Numbers in its parameters, each counted once however often it is used.
        bytes: Memory of its parameters and persistent or not persistent buffers.
        activations: Peak memory of activations, in bytes; 0 where it was not counted.
        nonzero_params: Parameters without those that masks keep at zero; as many as `params` unless given.
        nonzero_macs: Multiply-adds with weights that are not masked; as many as `macs` unless given. Theoretical: dense
            execution takes the time of `macs`.
        latency_ms: Time for one batch, in milliseconds, predicted from a `LatencyTable`; None without one.
    """

    macs: int
    params: int
    bytes: int
    activations: int = 0
    nonzero_params: int = -1
    nonzero_macs: int = -1
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        for name, dense in (("nonzero_params", self.params), ("nonzero_macs", self.macs)):
            if getattr(self, name) < 0:
                object.__setattr__(self, name, dense)

    @property
    def latency(self) -> float:
        """`latency_ms`, under the name of the budget's metric.

        Raises:
            BudgetError: There is no latency table to predict it from.
        """
        if self.latency_ms is None:
            raise BudgetError(
                "a latency budget needs a latency table: measure one with `LatencyTable.measure` and set it as the "
                "cost model's `latency`, or limit macs"
            )
        return self.latency_ms

    def to_dict(self) -> dict[str, int | float]:
        """Return the numbers by name; `latency_ms` only where there is one."""
        return {name: number for name in _NUMBERS if (number := getattr(self, name)) is not None}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote, from a mapping that may hold more."""
        return cls(**{name: line[name] for name in _NUMBERS if name in line})


_NUMBERS = tuple(number.name for number in fields(Cost))


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


def count(model: nn.Module, example_input: Any, zeroed: Collection[str] = ()) -> Count:
    """Count a network on one sample.

    Args:
        model: Any network; it runs once, in eval mode, on a copy.
        example_input: What it runs on (see `autoprune.inputs`); the counts are of one sample.
        zeroed: Tensors whose zeros count as removed, those that masks have made.
    """
    counted = copy.deepcopy(model).eval()
    shares = {
        name: (int(p.count_nonzero()) if name in zeroed else p.numel(), p.numel())
        for name, p in counted.named_parameters()
    }
    weights = {p.untyped_storage().data_ptr(): name for name, p in counted.named_parameters()}
    held = [tensor.untyped_storage()._cdata for tensor in (*counted.parameters(), *counted.buffers())]
    counter = _Counter(weights, shares, set(held))
    inputs = each_tensor(first_sample(example_input), torch.clone)  # a view holds the memory of the whole batch
    with torch.no_grad(), plain_attention():
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, torch.Tensor):
                counter.hold(tensor)
        with counter:
            call(counted, inputs)
    parameters = list(model.parameters())
    tensors = parameters + list(model.buffers())
    cost = Cost(
        macs=sum(counter.macs_of.values()) + sum(counter.unattributed.values()),
        params=sum(p.numel() for p in parameters),
        bytes=sum(t.numel() * t.element_size() for t in tensors),
        activations=counter.peak,
        nonzero_params=sum(nonzero for nonzero, _ in shares.values()),
        nonzero_macs=sum(counter.nonzero_macs_of.values()) + sum(counter.unattributed.values()),
    )
    return Count(cost, dict(counter.macs_of), dict(counter.unattributed), unknown_operators(counter.operators))


def unknown_operators(operators: Iterable[str]) -> dict[str, int]:
    """Return how often each operator ran that neither counts nor is known to cost nothing."""
    return dict(Counter(name for name in operators if name not in _OPERANDS and name.rstrip("_") not in _FREE))


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
    "aten::dot": (0, 1),
    "aten::mm": (0, 1),
    "aten::mv": (0, 1),
    "aten::bmm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addmv": (1, 2),
    "aten::baddbmm": (1, 2),
}

# Without the underscore at the end that marks an operator as in-place.
_FREE_NAMES = """
    _adaptive_avg_pool2d _adaptive_avg_pool3d _log_softmax _native_batch_norm_legit
    _native_batch_norm_legit_no_training _prelu_kernel _reshape_alias _safe_softmax _softmax _to_copy _unsafe_view
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa _weight_norm_interface abs adaptive_avg_pool1d
    adaptive_max_pool2d adaptive_max_pool3d add addcdiv addcmul alias all amax amin any arange argmax argmin
    as_strided atan2 avg_pool1d avg_pool2d avg_pool3d bernoulli bitwise_and bitwise_not bitwise_or cat ceil celu
    channel_shuffle clamp clamp_max clamp_min clone constant_pad_nd contiguous copy copysign cos cudnn_batch_norm
    cumsum detach diagonal div dropout elu embedding empty empty_like empty_strided eq erf exp expand expm1 fill
    flip floor fmod full full_like ge gelu glu gt hardshrink hardsigmoid hardswish hardtanh index index_select isnan
    le leaky_relu lerp lift_fresh linalg_vector_norm log log1p log2 log_sigmoid_forward logical_and logical_not
    logical_or logsumexp lt masked_fill max max_pool2d_with_indices max_pool3d_with_indices maximum mean min minimum
    miopen_batch_norm mish mul nan_to_num narrow native_batch_norm native_channel_shuffle native_dropout
    native_group_norm native_layer_norm ne neg new_empty new_empty_strided new_full new_ones new_zeros norm normal
    ones ones_like permute pixel_shuffle pixel_unshuffle pow prelu prod rand_like randn_like reciprocal
    reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 remainder repeat replication_pad1d
    replication_pad2d replication_pad3d reshape roll round rrelu_with_noise rsqrt rsub scalar_tensor select selu
    sigmoid sign silu sin slice softplus softshrink sort split split_with_sizes sqrt square squeeze stack std
    std_mean sub sum t tanh threshold topk transpose tril triu trunc unbind unfold uniform unsafe_split
    unsafe_split_with_sizes unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_trilinear3d var var_mean view where zero zeros zeros_like
"""
_FREE = frozenset(f"aten::{name}" for name in _FREE_NAMES.split())


@dataclass
class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own has no types
    weights: Mapping[int, str]  # data pointer of a parameter's storage → its name
    shares: Mapping[str, tuple[int, int]]  # how many of a parameter's numbers are not masked, and how many there are
    held: set[int]  # storages that are there all the time, or counted as there
    macs_of: Counter[str] = field(default_factory=Counter)
    nonzero_macs_of: Counter[str] = field(default_factory=Counter)
    unattributed: Counter[str] = field(default_factory=Counter)
    operators: list[str] = field(default_factory=list)
    live: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the memory of an activation until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.held:
            return
        self.held.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def free() -> None:
            self.held.discard(key)
            self.live -= size

        weakref.finalize(storage, free).atexit = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        operator = function._schema.name
        self.operators.append(operator)
        if operator in _OPERANDS:
            operands = [args[place] for place in _OPERANDS[operator]]
            macs = _convolution(args, output) if operator == "aten::convolution" else _product(*operands)
            storages = (operand.untyped_storage().data_ptr() for operand in operands)
            name = next((self.weights[storage] for storage in storages if storage in self.weights), None)
            if name is not None:
                nonzero, numel = self.shares[name]
                self.macs_of[name] += macs
                self.nonzero_macs_of[name] += macs - macs * (numel - nonzero) // numel
            else:
                self.unattributed[operator] += macs
        return output
