"""Which layers of a network are measured, at which sizes, and how one call of each is made and timed.

Convolutions and linear layers are narrowed to any pair of widths. Everything else is taken as it is found in networks
that are cut evenly. What is made of the times is in `latency_table.py`.
"""

import bisect
import copy
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Protocol, Self, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from autoprune.cost.latency import Clock, timed
from autoprune.inputs import call, each_tensor, evaluating
from autoprune.structure.groups import Structure
from autoprune.structure.surgery import remove
from autoprune.structure.trace import plain_attention

__all__ = ["Arguments", "Call", "Entry", "Job", "Plan", "Removed", "Shapes", "Site", "keyed", "without"]

Removed = npt.NDArray[np.int64] | Mapping[str, int]
"""How many elements of every group go: `(groups,)` in the structure's order, or by the group's name."""

_FRACTIONS: Final = (0.125, 0.25, 0.5, 0.75, 1.0)  # of a layer's widths, at which it is measured
_SAMPLES: Final = 20  # at most, of one size in one round
_SAMPLE_SECONDS: Final = 1e-3  # a layer is called as often as fills this, or `_CALLS` times, in one sample
_CALLS: Final = 20


class Call(Protocol):
    """One call of a leaf module."""

    @property
    def module(self) -> str:
        """The module's name."""

    @property
    def inputs(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of its tensor arguments, for a batch of one."""


class Shapes(Protocol):
    """What a latency table asks of a cost model: which leaf modules run on what, under any policy."""

    def calls(self, removed: Removed) -> Sequence[Call]:
        """Return the calls of leaf modules in the order of execution."""

    def shape(self, tensor: str, removed: Removed) -> tuple[int, ...]:
        """Return the shape of a parameter or buffer."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The times of one kind of call over its sizes.

    Attributes:
        layer: What is called, in words.
        sizes: Where it was measured, increasing, along two axes; an axis that no policy changes has one size.
        times_ns: `times_ns[i][j]` is its time at `sizes[0][i]`, `sizes[1][j]`, in nanoseconds; never less at a larger
            size.
    """

    layer: str
    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    times_ns: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, layer: str, sizes: Sequence[Sequence[int]], times_ns: Sequence[Sequence[int]]) -> Self:
        """Make an entry from lists, as JSON has them."""
        first, second = map(tuple, sizes)
        return cls(layer, (first, second), tuple(map(tuple, times_ns)))

    def numerator(self, first: int, second: int) -> tuple[int, int]:
        """Return the time between the sizes measured, bilinear, as a fraction; sizes beyond them count as the nearest.

        It is a fraction of whole numbers so that a smaller size never costs more, not by the last bit either.
        """
        rows, height = _weights(self.sizes[0], first)
        columns, width = _weights(self.sizes[1], second)
        return sum(a * b * self.times_ns[i][j] for i, a in rows for j, b in columns), height * width


def _weights(sizes: Sequence[int], size: int) -> tuple[list[tuple[int, int]], int]:
    """Return which sizes to interpolate between, each with its weight, and the sum of the weights."""
    size = min(max(size, sizes[0]), sizes[-1])
    after = bisect.bisect_left(sizes, size)
    if sizes[after] == size:
        return [(after, 1)], 1
    low, high = sizes[after - 1], sizes[after]
    return [(after - 1, high - size), (after, size - low)], high - low


@dataclass(frozen=True, slots=True)
class Site:
    """Where in the network an entry applies: one call of a leaf module.

    Attributes:
        module: The module's name.
        nth: The how-manieth of its calls.
        entry: Position of its entry.
        weight: The tensor whose first two dimensions are the entry's sizes. None where there is one size only, the
            numbers in the arguments and in `matrices`.
        matrices: Parameters of two or more dimensions, where there is no `weight`.
        channels: The dimension of the first argument, counted from behind, that is not a position; where there is a
            `weight`. The time is proportional to the number of positions.
        positions: Their number in the dense network.
    """

    module: str
    nth: int
    entry: int
    weight: str | None
    matrices: tuple[str, ...] = ()
    channels: int = 0
    positions: int = 1

    def sizes(self, made: Call, shape: Callable[[str], tuple[int, ...]]) -> tuple[int, int]:
        """Return the sizes of a call."""
        if self.weight is not None:
            first, second, *_ = shape(self.weight)
            return first, second
        return sum(map(math.prod, made.inputs)) + sum(math.prod(shape(name)) for name in self.matrices), 1

    def positions_of(self, made: Call) -> int:
        """Return at how many positions a call applies the weight."""
        if self.weight is None:
            return 1
        return math.prod(made.inputs[0]) // max(1, made.inputs[0][self.channels])


def keyed(calls: Sequence[Call]) -> Iterator[tuple[tuple[str, int], Call]]:
    """Yield every call with its module's name and how often that was called before."""
    seen: Counter[str] = Counter()
    for made in calls:
        yield (made.module, seen[made.module]), made
        seen[made.module] += 1


@dataclass(frozen=True, slots=True)
class Arguments:
    """A module with the arguments it was called with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(slots=True)
class Job:
    """One size of one entry."""

    entry: int
    place: tuple[int, int]
    make: Callable[[], Arguments]
    samples: list[float] = field(default_factory=list)

    def run(self, seconds: float, device: torch.device, clock: Clock) -> None:
        """Take samples for about so long; one at least."""
        made = self.make()
        end = clock() + seconds

        def sample(calls: int) -> float:
            # Fresh copies: what works in place would take its own output, and end in numbers too small to be normal.
            args, kwargs = each_tensor((made.args, made.kwargs), torch.clone)
            return timed(lambda: made.module(*args, **kwargs), device, clock, calls)

        sample(1)
        calls = min(_CALLS, max(1, math.ceil(_SAMPLE_SECONDS / max(sample(1), 1e-9))))
        for number in range(_SAMPLES):
            if number and clock() >= end:
                break
            self.samples.append(sample(calls))


@dataclass(frozen=True, slots=True)
class _Evenly:
    """A network of which a fraction of every group is left."""

    counts: dict[str, int]
    network: nn.Module
    calls: Mapping[tuple[str, int], Call]
    captured: Mapping[tuple[str, int], Arguments]
    costs: Shapes

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self.costs.shape(tensor, self.counts)


class Plan:
    """Which entries a network needs, and the jobs that measure them.

    Args:
        model: The dense network; it runs once, as do networks that are cut evenly.
        example_input: What it is called with.
        structure: Its groups.
        costs: Its cost model.

    Attributes:
        whole: Networks to measure as a whole, with what is removed in them; the last is the dense one.
        jobs: What to run before `entries`; each at least once.
        sites: Where the entries apply.
        approximated: Layers whose time is known less well, with the reason.
    """

    def __init__(self, model: nn.Module, example_input: Any, structure: Structure, costs: Shapes) -> None:
        self.jobs: list[Job] = []
        self.sites: list[Site] = []
        self.approximated: list[str] = []
        self._labels: list[tuple[str, tuple[tuple[int, ...], tuple[int, ...]]]] = []
        self._known: dict[str, int] = {}
        cuts = []
        for fraction in _FRACTIONS:
            counts = _even(structure, fraction)
            network = model if fraction == 1 else without(model, structure, counts)
            calls = dict(keyed(costs.calls(counts)))
            cuts.append(_Evenly(counts, network, calls, _capture(network, example_input, set(calls)), costs))
        self.whole = [(even.network, even.counts) for even in cuts[::2]]
        for key, made in cuts[-1].calls.items():
            if key in cuts[-1].captured:
                self._add(key, made, cuts)
            else:
                self.approximated.append(f"{made.module}: not called when it was to be measured; part of the rest")

    def entries(self) -> tuple[Entry, ...]:
        """Return the entries, of what the jobs measured."""
        entries = []
        for number, (layer, sizes) in enumerate(self._labels):
            times = np.zeros(tuple(map(len, sizes)), dtype=np.int64)
            for job in self.jobs:
                if job.entry == number:
                    times[job.place] = round(statistics.median(job.samples) * 1e9)
            times = np.maximum.accumulate(np.maximum.accumulate(times, axis=0), axis=1)
            entries.append(Entry.read(layer, sizes, times.tolist()))
        return tuple(entries)

    def _add(self, key: tuple[str, int], made: Call, cuts: Sequence[_Evenly]) -> None:
        arguments = cuts[-1].captured[key]
        module = arguments.module
        sizes: tuple[tuple[int, ...], tuple[int, ...]]
        makers: dict[tuple[int, int], Callable[[], Arguments]]
        if _is_plain(module):
            weight = f"{made.module}.weight".removeprefix(".")
            shapes = [even.shape(weight) for even in cuts]
            sizes = (_grid([shape[0] for shape in shapes], _unit(module)), _grid([shape[1] for shape in shapes], 1))
            makers = {
                (i, j): partial(_narrowed, module, arguments, first, second)
                for (i, first), (j, second) in itertools.product(*map(enumerate, sizes))
            }
            site = Site(*key, 0, weight, channels=_channels(module))
        else:
            matrices = (name for name, tensor in module.named_parameters() if tensor.dim() > 1)
            site = Site(*key, 0, None, tuple(f"{made.module}.{name}".removeprefix(".") for name in matrices))
            found = {
                site.sizes(even.calls[key], even.shape)[0]: even.captured[key] for even in cuts if key in even.captured
            }
            sizes = (tuple(sorted(found)), (1,))
            makers = {(i, 0): partial(_as_it_is, found[size]) for i, size in enumerate(sizes[0])}
            if site.matrices and len(found) > 1:
                self.approximated.append(f"{made.module}: measured in evenly cut networks only, its widths together")
        layer, signature = _described(arguments)
        signature += f" {sizes}"
        if signature not in self._known:
            self._known[signature] = len(self._labels)
            self._labels.append((layer, sizes))
            self.jobs += [Job(self._known[signature], place, make) for place, make in makers.items()]
        self.sites.append(replace(site, entry=self._known[signature], positions=site.positions_of(made)))


def _even(structure: Structure, fraction: float) -> dict[str, int]:
    """Return counts that leave this fraction of every group, blocks and the shapes of masked weights as they are."""
    shrinking = [group for group in structure if group.block is None and group.pattern is None]
    return {group.name: group.nearest(group.size * (1 - fraction)) for group in shrinking}


def without(model: nn.Module, structure: Structure, counts: Mapping[str, int]) -> nn.Module:
    """Return a network without so many elements; which of them does not matter to its latency."""
    return remove(model, structure, {name: range(number) for name, number in counts.items()})


def _capture(model: nn.Module, example_input: Any, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], Arguments]:
    """Run a network once and return what each wanted call was given."""
    captured: dict[tuple[str, int], Arguments] = {}
    seen: Counter[str] = Counter()
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for name in {name for name, _ in wanted}:

            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                if (name, seen[name]) in wanted:
                    captured[name, seen[name]] = Arguments(module, args, kwargs)
                seen[name] += 1

            handle = modules[name].register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(plain_attention())
        stack.enter_context(torch.no_grad())
        call(model, example_input)
    return captured


_Plain = nn.modules.conv._ConvNd | nn.Linear
_Transposed = nn.modules.conv._ConvTransposeNd
_PLAIN_FORWARDS = {
    kind.forward
    for kind in (
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.Linear,
    )
}


def _is_plain(module: nn.Module) -> TypeGuard[_Plain]:
    """Say whether a module is a convolution or linear layer, with torch's own code, weight and bias and no more."""
    return (
        type(module).forward in _PLAIN_FORWARDS
        and module._parameters.keys() <= {"weight", "bias"}
        and module._parameters.get("weight") is not None
        and not module._buffers
    )


def _channels(module: _Plain) -> int:
    """Return the dimension of a plain module's argument that is not a position, counted from behind."""
    return -1 if isinstance(module, nn.Linear) else 1 - module.weight.dim()


def _unit(module: _Plain) -> int:
    """Return what the first dimension of a weight must be a multiple of."""
    groups = _groups(module)
    return module.weight.shape[0] // groups if _is_depthwise(module) else groups


def _groups(module: _Plain) -> int:
    return 1 if isinstance(module, nn.Linear) else module.groups


def _is_depthwise(module: _Plain) -> bool:
    return _groups(module) > 1 and module.weight.shape[1] == 1


def _grid(widths: Sequence[int], unit: int) -> tuple[int, ...]:
    """Return the widths to measure; `widths` are those of evenly cut networks, the last one the dense network's."""
    dense = widths[-1]
    if set(widths) == {dense}:
        return (dense,)
    return tuple(sorted({max(unit, unit * round(fraction * dense / unit)) for fraction in _FRACTIONS}))


def _as_it_is(arguments: Arguments) -> Arguments:
    return arguments


def _narrowed(module: _Plain, arguments: Arguments, first: int, second: int) -> Arguments:
    """Return a plain module whose weight is so long in its first two dimensions, with an argument to match."""
    groups = first // _unit(module) if _is_depthwise(module) else _groups(module)
    outer, inner = (second * groups, first) if isinstance(module, _Transposed) else (first, second * groups)
    memo: dict[int, Any] = {id(module.weight): nn.Parameter(_part(module.weight, {0: first, 1: second}), False)}
    if module.bias is not None:
        memo[id(module.bias)] = nn.Parameter(_part(module.bias, {0: outer}), False)
    small = copy.deepcopy(module, memo)
    if isinstance(small, nn.Linear):
        small.in_features, small.out_features = inner, outer
    else:
        small.in_channels, small.out_channels, small.groups = inner, outer, groups
    narrowed = {_channels(module): inner}
    args, kwargs = each_tensor((arguments.args, arguments.kwargs), lambda tensor: _part(tensor, narrowed))
    return Arguments(small, args, kwargs)


def _part(tensor: torch.Tensor, sizes: Mapping[int, int]) -> torch.Tensor:
    """Return the first indices along dimensions, with its own memory, laid out like the tensor's."""
    part = tensor.detach()
    for dim, size in sizes.items():
        part = part.narrow(dim, 0, size)
    if part.shape == tensor.shape:
        return part.clone()
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if channels_last is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=channels_last):
        channels_last = torch.contiguous_format
    return part.clone(memory_format=channels_last)


def _described(arguments: Arguments) -> tuple[str, str]:
    """Return a call in words, and a text that is the same for calls that do the same work."""
    module, leaves = arguments.module, tree_leaves((arguments.args, arguments.kwargs))
    settings = {
        name: value
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name != "training" and not isinstance(value, torch.Tensor)
    }
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    shapes = ", ".join("x".join(map(str, tensor.shape)) or "scalar" for tensor in tensors)
    values = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    told = f"{type(module).__name__}({values}) on {shapes}"
    layouts = [(tensor.dtype, tensor.stride()) for tensor in tensors]
    others = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
    parameters = [(tuple(parameter.shape), parameter.stride()) for parameter in module.parameters()]
    return told, f"{told} {type(module)} {layouts} {others} {parameters}"
