"""Coupled channels, found with Torch-Pruning's dependency graph and turned into `Group` records.

The one file that imports torch_pruning (Fang et al. 2023, DepGraph, https://arxiv.org/abs/2301.12900). Its graph says
which channel of which layer goes with which. Here every channel of every layer becomes a node of a union-find, so that
an *element* is a connected set of channels, and a *group* is the set of elements that touch the same tensors. That
splits a residual stream rightly where a network widens it by zero padding (the option-A shortcut of He et al. 2016):
Torch-Pruning takes padding for an element-wise operator, so the padding's index map is put into its graph first.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.overrides import TorchFunctionMode

from autoprune.errors import StructureError
from autoprune.structure.groups import Group, LockedGroup, Role, Slice

__all__ = ["find_channels"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PER_CHANNEL = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.PReLU,
)


def find_channels(model: nn.Module, example_input: torch.Tensor) -> tuple[list[Group], list[LockedGroup]]:
    """Find the coupled channel groups of a network, not yet proven.

    Args:
        model: Any network; it is copied, not changed.
        example_input: `(batch, ...)`, an input that the network runs on.

    Returns:
        Groups in the order of execution, and those known to be impossible to slice, with the reason.

    Raises:
        StructureError: The dependency graph can't be built.
    """
    traced = copy.deepcopy(model).eval()
    for parameter in traced.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    trace = _Trace()
    with _watched(traced, trace), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of parameters outside modules; here the proof judges those
        try:
            graph = _Graph(trace.paddings).build_dependency(traced, example_inputs=(example_input,), verbose=False)
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), "no message")
            raise StructureError(
                f"the dependencies of {type(model).__name__} can't be traced: {type(error).__name__}: {first_line}"
            ) from error
        graph.map_paddings()
        elements = _connect(graph, traced)
    return _collect(traced, elements, trace.rank)


# -- tracing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Padding:
    """One call that pads the channel dimension with constants.

    Attributes:
        grad_fn: The call's node in the autograd graph.
        channels: How many channels come in; they land at `left` to `left + channels - 1`.
        left: How many constant channels come before them.
        width: How many channels go out.
        owner: The module that made the call, if it keeps the padding as buffers `left` and `right`; or None.
    """

    grad_fn: Any
    channels: int
    left: int
    width: int
    owner: str | None


@dataclass(slots=True)
class _Trace:
    """What one forward pass tells: the order in which modules run, and the paddings of channels."""

    rank: dict[str, int] = field(default_factory=dict)
    paddings: list[_Padding] = field(default_factory=list)


@contextmanager
def _watched(model: nn.Module, trace: _Trace) -> Iterator[None]:
    active: list[tuple[str, nn.Module]] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: object) -> None:
            trace.rank.setdefault(name, len(trace.rank))
            active.append((name, module))

        return hook

    def leave(*_: object) -> None:
        active.pop()

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            if function is nn.functional.pad and output.grad_fn is not None:
                source, pad = args[0], tuple(args[1] if len(args) > 1 else (kwargs or {})["pad"])
                at = 2 * (source.dim() - 2)  # the last dimension's pair comes first, dimension 1's has this offset
                if len(pad) >= at + 2 and min(pad[at : at + 2]) >= 0 and max(pad[at : at + 2]) > 0:
                    name, module = active[-1]
                    buffers = dict(module.named_buffers(recurse=False))
                    owner = name if {"left", "right"} <= set(buffers) else None
                    trace.paddings.append(_Padding(output.grad_fn, source.shape[1], pad[at], output.shape[1], owner))
            return output

    handles = [m.register_forward_pre_hook(enter(name)) for name, m in model.named_modules()]
    handles += [m.register_forward_hook(leave) for m in model.modules()]
    try:
        with Recorder():
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Shift:
    """Torch-Pruning's index map of a padding: `offset` added, indices outside `[low, high)` dropped."""

    def __init__(self, offset: int, low: int, high: int) -> None:
        self._offset, self._low, self._high = offset, low, high

    def __call__(self, indices: list[Any]) -> list[Any]:
        kept = (i for i in indices if self._low <= i.idx < self._high)
        return [type(i)(idx=i.idx + self._offset, root_idx=i.root_idx) for i in kept]


class _Graph(tp.DependencyGraph):  # type: ignore[misc]  # Torch-Pruning has no types
    """Torch-Pruning's graph, told of the paddings, which it takes for element-wise operators."""

    def __init__(self, paddings: list[_Padding]) -> None:
        super().__init__()
        self._paddings = paddings

    def padding(self, node: Any) -> _Padding | None:
        """Return the padding that a node of the graph stands for."""
        grad_fn = getattr(node, "grad_fn", None)
        return next((p for p in self._paddings if p.grad_fn is grad_fn), None)

    def get_out_channels(self, module_or_node: Any) -> int | None:
        """Return a node's number of output channels; Torch-Pruning asks when it works out shapes."""
        padding = self.padding(module_or_node)
        channels: int | None = padding.width if padding else super().get_out_channels(module_or_node)
        return channels

    def map_paddings(self) -> None:
        """Give the padding nodes, which count in output channels, the map from and to their inputs."""
        for node in self.module2node.values():
            padding = self.padding(node)
            if padding is None:
                continue
            inputs = set(node.inputs)
            for dependency in node.dependencies:
                if dependency.target in inputs:
                    low = padding.left
                    dependency.index_mapping[0] = _Shift(-low, low, low + padding.channels)
            for source in inputs:
                for dependency in source.dependencies:
                    if dependency.target is node:
                        dependency.index_mapping[0] = _Shift(padding.left, 0, padding.channels)


# -- elements ---------------------------------------------------------------------------------------------------------

_Side = tuple[str, str]  # a tensor's owner, and its side: "out", "in", "left", "right", "param:DIM", "blocked:REASON"
_Channel = tuple[_Side, int]


class _UnionFind:
    def __init__(self) -> None:
        self.parent: dict[_Channel, _Channel] = {}

    def find(self, channel: _Channel) -> _Channel:
        root = channel
        while self.parent.setdefault(root, root) != root:
            root = self.parent[root]
        while self.parent[channel] != root:
            self.parent[channel], channel = root, self.parent[channel]
        return root

    def union(self, first: _Channel, second: _Channel) -> None:
        self.parent[self.find(second)] = self.find(first)


def _connect(graph: _Graph, model: nn.Module) -> list[list[_Channel]]:
    """Return every element as the list of channels that it is made of."""
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    channels = _UnionFind()

    def side(dependency: Any, index: int) -> _Channel | None:
        node, module = dependency.target, dependency.target.module
        padding = graph.padding(node)
        if padding is not None and module not in names:
            if padding.left <= index < padding.left + padding.channels:
                return None
            if padding.owner is None:
                return ("", "blocked:their number is fixed by a call of `pad` in the network's code"), index
            if index < padding.left:
                return (padding.owner, "left"), index
            return (padding.owner, "right"), index - padding.left - padding.channels
        if isinstance(module, nn.Parameter):
            return (parameters[id(module)], f"param:{node.pruning_dim % module.dim()}"), index
        if module not in names:
            return None  # an operator without tensors
        name = names[module]
        if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)) and module.groups > 1:
            if module.groups == module.in_channels == module.out_channels:
                return (name, "out"), index
            return (name, f"blocked:`{name}` is a grouped convolution, whose channels can't leave one by one"), index
        if isinstance(module, _PER_CHANNEL):
            return (name, "out"), index
        if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear, nn.Embedding)):
            return (name, "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"), index
        return (name, f"blocked:`{name}` is a {type(module).__name__}, which can't be sliced"), index

    for module in list(graph.module2node):
        if not isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)):
            continue
        size = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        if all(((names[module], "out"), index) in channels.parent for index in range(size)):
            continue  # every channel came with an earlier layer's
        write = graph.get_pruner_of_module(module).prune_out_channels
        group = graph.get_pruning_group(module, write, list(range(size)))
        for item in group:
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                channel = side(item.dep, index)
                if channel is not None:
                    channels.union(((names[module], "out"), root), channel)
    elements: dict[_Channel, list[_Channel]] = defaultdict(list)
    for channel in channels.parent:
        elements[channels.find(channel)].append(channel)
    return list(elements.values())


def _collect(
    model: nn.Module, elements: list[list[_Channel]], rank: dict[str, int]
) -> tuple[list[Group], list[LockedGroup]]:
    """Sort elements that touch the same sides the same number of times into groups."""
    modules = dict(model.named_modules())

    def writes(side: _Side) -> bool:
        module = modules.get(side[0])
        return side[1] == "out" and isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear, nn.Embedding))

    def order(side: _Side) -> tuple[int, str]:
        return rank.get(side[0], len(rank)), side[0]

    alike: dict[tuple[tuple[_Side, int], ...], list[dict[_Side, list[int]]]] = defaultdict(list)
    for element in elements:
        places: dict[_Side, list[int]] = defaultdict(list)
        for side, index in sorted(element):
            places[side].append(index)
        signature = tuple((side, len(indices)) for side, indices in places.items())
        alike[signature].append(places)

    groups: list[Group] = []
    locked: list[LockedGroup] = []
    taken: set[str] = set()
    by_execution = sorted(alike.items(), key=lambda item: min(order(side) for side, _ in item[0] if writes(side)))
    for signature, members in by_execution:
        sides = sorted((side for side, _ in signature), key=order)
        layers = tuple(side[0] for side in sides if writes(side))
        readers = tuple(side[0] for side in sides if side[1] == "in")
        members.sort(key=lambda places: places[(layers[0], "out")])  # noqa: B023 - sorted at once
        twins = sum(name.partition("#")[0] == layers[0] for name in taken)
        name = f"{layers[0]}#{twins + 1}" if twins else layers[0]
        taken.add(name)
        blocked = [side[1].removeprefix("blocked:") for side in sides if side[1].startswith("blocked:")]
        if blocked:
            locked.append(LockedGroup(name, "channels", len(members), layers, blocked[0]))
            continue
        slices = tuple(s for side in sides for s in _slices(modules, side, [places[side] for places in members]))
        groups.append(Group(name, "channels", len(members), slices, layers, readers))
    return groups, locked


def _slices(modules: dict[str, nn.Module], side: _Side, indices: list[list[int]]) -> list[Slice]:
    """Return the tensors, with their dimensions, that one side of one module stands for."""
    name, which = side
    positions = torch.tensor(indices, dtype=torch.int64)
    prefix = f"{name}." if name else ""
    if which.startswith("param:"):
        return [Slice(name, int(which.removeprefix("param:")), positions, "written")]
    if which in ("left", "right"):
        return [Slice(prefix + which, 0, positions, "written")]
    module = modules[name]
    role: Role = "read" if which == "in" else "written"
    if isinstance(module, _PER_CHANNEL):
        tensors = [(t, 0) for t in ("weight", "bias", "running_mean", "running_var")]
    else:
        flipped = isinstance(module, (*_TRANSPOSED, nn.Embedding)) and getattr(module, "groups", 1) == 1
        tensors = [("weight", int((which == "in") != flipped))] + ([("bias", 0)] if which == "out" else [])
    return [Slice(prefix + t, dim, positions, role) for t, dim in tensors if getattr(module, t, None) is not None]
