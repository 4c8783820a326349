"""Coupled channels, found with Torch-Pruning's dependency graph and turned into `Group` records.

The one file that imports torch_pruning (Fang et al. 2023, DepGraph, https://arxiv.org/abs/2301.12900). Its graph says
which channel of which layer goes with which. Here every channel of every layer becomes a node of a union-find, so that
an *element* is a connected set of channels, and a *group* is the set of elements that touch the same tensors. That
splits a residual stream rightly where a network widens it by zero padding (the option-A shortcut of He et al. 2016):
Torch-Pruning takes padding for an element-wise operator, so the padding's index map is put into its graph first.
"""

import copy
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from autoprune.errors import StructureError
from autoprune.structure.groups import Group, LockedGroup, Role, Slice

__all__ = ["find_channels"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
"""What writes channels, besides embeddings."""
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
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_BLOCKED = "blocked:"


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
    try:
        traced = copy.deepcopy(model).eval()
    except RuntimeError as error:
        raise StructureError(
            f"{type(model).__name__} can't be copied ({_first_line(error)}); if some of its weights are computed from "
            "others, as by weight norm or pruning masks, make them plain parameters first"
        ) from error
    for parameter in traced.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    trace = _Trace()
    with _watched(traced, trace), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of parameters outside modules; here the proof judges those
        try:
            with torch.no_grad():
                traced(example_input)  # Torch-Pruning would try another call where this fails, and hide the reason
            graph = _Graph(trace.paddings)
            graph.build_dependency(traced, (example_input,), output_transform=_differentiable, verbose=False)
            graph.map_paddings()
            elements = _connect(graph, traced)
        except Exception as error:  # whatever the network's own code raises, and Torch-Pruning of what it can't follow
            raise StructureError(
                f"the dependencies of {type(model).__name__} can't be traced: "
                f"{type(error).__name__}: {_first_line(error)}"
            ) from error
    groups, locked = _collect(traced, elements, trace.rank)
    written = {layer for layers in ([g.layers for g in groups] + [g.layers for g in locked]) for layer in layers}
    return groups, locked + _uncalled(traced, written)


def _differentiable(outputs: object) -> list[torch.Tensor]:
    """Return what Torch-Pruning can follow among a network's outputs, which may be nested and of any kind."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")


def _uncalled(model: nn.Module, written: Set[str]) -> list[LockedGroup]:
    """Return the layers that are not in `written`, so that none goes unlisted."""
    reason = "the network does not call it as a module when it runs on the example input"
    return [
        LockedGroup(name, "channels", _width(module), (name,), reason)
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS) and name not in written
    ]


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

    def place(self, index: int) -> "_Channel | None":
        """Return which tensor holds an output channel: a constant's belongs to the padding, the others have none."""
        if self.left <= index < self.left + self.channels:
            return None
        if self.owner is None:
            return ("", f"{_BLOCKED}their number is fixed by a call of `pad` in the network's code"), index
        if index < self.left:
            return (self.owner, "left"), index
        return (self.owner, "right"), index - self.left - self.channels


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

_Side = tuple[str, str]
"""A tensor's owner, and its side: "out", "in", "left", "right", "param:DIM", or "blocked:REASON"."""
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

    def places(dependency: Any, indices: list[int]) -> list[_Channel | None]:
        node, module = dependency.target, dependency.target.module
        padding = graph.padding(node)
        if padding is not None and module not in names:
            return [padding.place(index) for index in indices]
        if isinstance(module, nn.Parameter):
            side = parameters[id(module)], f"param:{node.pruning_dim % module.dim()}"
        elif module not in names or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
            return [None] * len(indices)  # an operator without a tensor of channels
        else:
            writes = graph.is_out_channel_pruning_fn(dependency.handler)
            side = names[module], _which_side(module, names[module], writes)
        return [(side, index) for index in indices]

    for module in list(graph.module2node):
        if not isinstance(module, _LAYERS):
            continue
        written = [((names[module], "out"), index) for index in range(_width(module))]
        if all(channel in channels.parent for channel in written):
            continue  # every channel came with an earlier layer's
        write = graph.get_pruner_of_module(module).prune_out_channels
        for item in graph.get_pruning_group(module, write, list(range(len(written)))):
            for root, channel in zip(item.root_idxs, places(item.dep, item.idxs), strict=True):
                if channel is not None:
                    channels.union(written[root], channel)
    elements: dict[_Channel, list[_Channel]] = defaultdict(list)
    for channel in channels.parent:
        elements[channels.find(channel)].append(channel)
    return list(elements.values())


def _width(layer: nn.Module) -> int:
    """Return how many channels a layer writes."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def _which_side(module: nn.Module, name: str, writes: bool) -> str:
    """Return which side of a module holds the channels that a dependency names, or why they can't be sliced."""
    own = {key for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    for key in _TENSORS:
        if key not in own and getattr(module, key, None) is not None:
            return f"{_BLOCKED}the {key} of `{name}` is computed from other tensors"
    if isinstance(module, _PER_CHANNEL):
        return "out"
    if not isinstance(module, (*_LAYERS, nn.Embedding)):
        return f"{_BLOCKED}`{name}` is a {type(module).__name__}, which can't be sliced"
    if getattr(module, "groups", 1) == 1:
        return "out" if writes else "in"
    if module.groups == module.in_channels == module.out_channels:
        return "out"
    return f"{_BLOCKED}`{name}` is a grouped convolution, whose channels can't leave one by one"


def _collect(
    model: nn.Module, elements: list[list[_Channel]], rank: dict[str, int]
) -> tuple[list[Group], list[LockedGroup]]:
    """Sort elements that touch the same sides the same number of times into groups."""
    modules = dict(model.named_modules())

    def writes(side: _Side) -> bool:
        return side[1] == "out" and isinstance(modules.get(side[0]), (*_LAYERS, nn.Embedding))

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
    namesakes: Counter[str] = Counter()
    for members in sorted(alike.values(), key=lambda members: min(order(side) for side in members[0] if writes(side))):
        sides = sorted(members[0], key=order)
        layers = tuple(side[0] for side in sides if writes(side))
        readers = tuple(side[0] for side in sides if side[1] == "in")
        namesakes[layers[0]] += 1
        name = layers[0] if namesakes[layers[0]] == 1 else f"{layers[0]}#{namesakes[layers[0]]}"
        reasons = [side[1].removeprefix(_BLOCKED) for side in sides if side[1].startswith(_BLOCKED)]
        if reasons:
            locked.append(LockedGroup(name, "channels", len(members), layers, reasons[0]))
            continue
        in_order = sorted(members, key=itemgetter((layers[0], "out")))
        slices = [s for side in sides for s in _slices(model, side, [places[side] for places in in_order])]
        groups.append(Group(name, "channels", len(members), _distinct(slices), layers, readers))
    return groups, locked


def _slices(model: nn.Module, side: _Side, indices: list[list[int]]) -> list[Slice]:
    """Return the tensors, with their dimensions, that one side of one module stands for."""
    owner, which = side
    positions = torch.tensor(indices, dtype=torch.int64)
    if which.startswith("param:"):
        return [Slice(owner, int(which.removeprefix("param:")), positions, "written")]
    module = model.get_submodule(owner)
    if which in ("left", "right"):
        dims = {which: 0}
    elif isinstance(module, _PER_CHANNEL):
        dims = dict.fromkeys(_TENSORS, 0)
    else:
        flipped = isinstance(module, (*_TRANSPOSED, nn.Embedding)) and getattr(module, "groups", 1) == 1
        dims = {"weight": int((which == "in") != flipped)} | ({"bias": 0} if which == "out" else {})
    role: Role = "read" if which == "in" else "written"
    first_names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    tensors = ((getattr(module, key, None), dim) for key, dim in dims.items())
    return [Slice(first_names[id(tensor)], dim, positions, role) for tensor, dim in tensors if tensor is not None]


def _distinct(slices: list[Slice]) -> tuple[Slice, ...]:
    """Leave out repetitions, which layers that share a tensor make."""
    distinct: list[Slice] = []
    for part in slices:
        same = (o for o in distinct if (o.tensor, o.dim, o.role) == (part.tensor, part.dim, part.role))
        if not any(torch.equal(other.positions, part.positions) for other in same):
            distinct.append(part)
    return tuple(distinct)
