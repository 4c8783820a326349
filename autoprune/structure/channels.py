"""Coupled channels and heads: a trace's labels sorted into elements, and the elements into groups.

Nodes that belong together are one *element*; elements that touch the same tensors the same number of times are one
*group*. So a residual stage is one group, and a stream that a network widens by padding (the option-A shortcut of He
et al. 2016) is as many as the stream has parts of different reach. Attention needs no rule of its own here: products
that run over several heads at once have tied the channels of each head (see `tracer.py`).
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from torch import nn

from autoprune.structure.groups import Attribute, Group, LockedGroup, Slice
from autoprune.structure.labels import Labels, distinct
from autoprune.structure.seen import Trace

__all__ = ["Found", "find_channels", "unseen_layers"]

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)


@dataclass(frozen=True, slots=True)
class Found:
    """What a trace says can be removed, not yet proven.

    Attributes:
        groups: In the order of execution.
        locked: What is known to be impossible, with the reason.
        owners: Of a group of heads, the module that mixes them.
        notes: Group name → what the network's code does with its elements, to explain a proof that fails.
    """

    groups: tuple[Group, ...]
    locked: tuple[LockedGroup, ...]
    owners: Mapping[str, str]
    notes: Mapping[str, str]


def find_channels(model: nn.Module, traced: Trace, *, multiple: int = 1, normalised: bool = False) -> Found:
    """Sort a trace's labels into groups.

    Args:
        model: The network that was traced.
        traced: What was seen.
        multiple: The channels that stay are a multiple of this.
        normalised: Whether to offer groups that a norm runs across.
    """
    elements = _Elements(traced)
    groups: list[Group] = []
    locked: dict[tuple[str, str], LockedGroup] = {}
    owners: dict[str, str] = {}
    notes: dict[str, str] = {}
    namesakes: Counter[str] = Counter()
    for alike in sorted(elements.classes(), key=lambda one: one.rank):
        positions = elements.positions(alike.members, alike.sides)
        first = next(side for side in alike.sides if side == alike.written[0])
        in_order = np.argsort(positions[first][:, 0], kind="stable")
        layers = tuple(dict.fromkeys(_owner(elements.name(side)) for side in alike.written))
        reads = [side for side in alike.sides if side in elements.read]
        readers = tuple(dict.fromkeys(_owner(elements.name(side)) for side in reads))
        size = len(in_order)
        reason = alike.blocked
        if reason is None and alike.norm is not None and not normalised:
            reason = (
                f"{alike.norm} normalises across it, so that removing is not the same as zeroing "
                "(offered on request, as a normalised group)"
            )
        kind = "channels" if alike.heads is None else "heads"
        each = positions[first].shape[1]
        step = multiple // gcd(multiple, each) if kind == "channels" else 1
        if reason is None and size < 2:
            reason = "it has one element only, and a layer is never emptied"
        if reason is None and step >= size:
            reason = f"it has {size * each} channels, and no smaller multiple of {multiple}"
        if reason is not None:
            before = locked.get((layers[0], reason))
            locked[layers[0], reason] = LockedGroup(
                before.name if before else _numbered(layers[0], namesakes),
                kind,
                size + (before.size if before else 0),
                tuple(dict.fromkeys((*before.layers, *layers))) if before else layers,
                reason,
            )
            continue
        name = _numbered(layers[0], namesakes)
        slices = tuple(_slices(elements, {side: rows[in_order] for side, rows in positions.items()}))
        attributes = tuple(_attributes(traced, slices))
        groups.append(
            Group(
                name,
                kind,
                size,
                slices,
                layers,
                readers,
                multiple=step,
                normalised=alike.norm is not None,
                attributes=attributes,
            )
        )
        if alike.heads is not None:
            owners[name] = alike.heads
        if alike.note is not None:
            notes[name] = alike.note
    modules = dict(model.named_modules())
    reason = "the network does not use it when it runs on the example input"
    unseen = [LockedGroup(n, "channels", _width(modules[n]), (n,), reason) for n in unseen_layers(model, traced)]
    everything = (*locked.values(), *unseen)
    return Found(tuple(groups), everything, owners, notes)


def _slices(elements: "_Elements", positions: Mapping[int, Labels]) -> Iterator[Slice]:
    """Yield the slices of a group; those with equal positions share them."""
    shared: dict[tuple[int, bytes], torch.Tensor] = {}
    for side, rows in positions.items():
        same = shared.setdefault((rows.shape[1], rows.tobytes()), torch.from_numpy(np.ascontiguousarray(rows)))
        yield Slice(*elements.name(side), same, "read" if side in elements.read else "written")


def _numbered(layer: str, namesakes: Counter[str]) -> str:
    namesakes[layer] += 1
    return layer if namesakes[layer] == 1 else f"{layer}#{namesakes[layer]}"


def _owner(side: tuple[str, int]) -> str:
    """Return the module that a tensor belongs to; a parameter of the network itself stands for itself."""
    tensor = side[0].partition(".parametrizations.")[0] + ".weight" if ".parametrizations." in side[0] else side[0]
    return tensor.rpartition(".")[0] or side[0]


def _attributes(traced: Trace, slices: tuple[Slice, ...]) -> list[Attribute]:
    """Return the numbers in modules that count a group's elements, such as the groups of a convolution."""
    sized = [(traced.sized[part.tensor], part) for part in slices if part.dim == 0 and part.tensor in traced.sized]
    return [
        Attribute(module, attribute, part.positions.shape[1] // positions)
        for (module, attribute, positions), part in sized
    ]


def unseen_layers(model: nn.Module, traced: Trace) -> list[str]:
    """Return the layers whose weights took no part in a trace."""
    seen = {tensor for tensor, _ in traced.nodes.sides}
    first_names = {id(tensor): name for name, tensor in model.named_parameters()}
    weights = {
        name: module._parameters.get("weight") for name, module in model.named_modules() if isinstance(module, _LAYERS)
    }
    return [n for n, weight in weights.items() if weight is not None and first_names[id(weight)] not in seen]


def _width(layer: nn.Module) -> int:
    weight = layer._parameters["weight"]
    return 0 if weight is None else int(weight.shape[1 if isinstance(layer, nn.Embedding) else 0])


@dataclass(frozen=True, slots=True)
class _Alike:
    """Elements that touch the same sides the same number of times, for better or worse.

    Attributes:
        members: Numbers of the elements.
        sides: All sides they touch.
        written: Those that layers produce, in the order of execution.
        rank: Where in that order the first one stands.
        blocked: Why they can't leave.
        norm: The norm that runs across them.
        heads: The module that mixes them as heads.
        note: What the code does with them.
    """

    members: Labels
    sides: tuple[int, ...]
    written: tuple[int, ...]
    rank: int
    blocked: str | None
    norm: str | None
    heads: str | None
    note: str | None


class _Elements:
    """The components of a trace's nodes, as arrays."""

    def __init__(self, traced: Trace) -> None:
        nodes = traced.nodes
        self._nodes = nodes
        self._starts = np.array(nodes.starts, dtype=np.int64)
        self._of = nodes.components()
        everything = np.arange(1, len(nodes))
        side = self._sides_of(everything)
        order = np.lexsort((everything, side, self._of[1:]))
        self._sorted_nodes = everything[order]
        self._sorted_sides = side[order]
        element = self._of[1:][order]
        # rows: one for every element and side it touches, with the number of nodes
        opens = np.flatnonzero(np.diff(element, prepend=-1) | np.diff(self._sorted_sides, prepend=-1))
        self._row_sides = self._sorted_sides[opens]
        self._row_counts = np.diff(opens, append=len(element))
        self._row_elements = element[opens]
        count = int(self._of.max(initial=0)) + 1
        self._first_node = np.searchsorted(element, np.arange(count))
        self._first_row = np.searchsorted(self._row_elements, np.arange(count))
        self._last_row = np.searchsorted(self._row_elements, np.arange(count), side="right")
        self.read = {int(s) for labels in nodes.read for s in np.unique(self._sides_of(labels))}
        self._rank: dict[int, int] = {}
        for place, labels in enumerate(nodes.wrote):
            for s in np.unique(self._sides_of(labels)).tolist():
                self._rank.setdefault(s, place)

    def _sides_of(self, labels: Labels) -> Labels:
        return np.searchsorted(self._starts, labels, side="right") - 1

    def name(self, side: int) -> tuple[str, int]:
        """Return a side's tensor and dimension."""
        return self._nodes.sides[side]

    def classes(self) -> list[_Alike]:
        """Return all elements that layers write, sorted by what they touch."""
        written = np.unique(self._of[np.concatenate([*self._nodes.wrote, np.zeros(0, np.int64)])])
        written = written[written != self._of[0]]
        blocked = [*self._nodes.blocked, *self._misfits()]
        lists = (blocked, self._nodes.norms, self._nodes.heads, self._nodes.notes)
        marks = [self._marks(listed) for listed in lists]
        alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for element in written.tolist():
            rows = slice(self._first_row[element], self._last_row[element])
            blocked, norm, heads, _ = (mark[element] for mark in marks)
            signature = (self._row_sides[rows].tobytes(), self._row_counts[rows].tobytes())
            alike[(*signature, blocked, norm >= 0, heads >= 0)].append(element)
        return [self._alike(np.array(members), lists, marks) for members in alike.values()]

    def _misfits(self) -> list[tuple[Labels, str]]:
        """Return nodes whose element is neither whole rows nor whole columns of a grid that a reshape makes.

        Without such an element what is left is no grid any more.
        """
        misfits = []
        for grid, text in self._nodes.grids:
            _, of, counts = np.unique(self._of[grid], return_inverse=True, return_counts=True)
            of = of.reshape(grid.shape)
            reach = np.ones((grid.ndim, len(counts)), dtype=np.int64)  # along each dimension, of how many indices
            for dim, size in enumerate(grid.shape):
                cells = np.unique(np.moveaxis(of, dim, 0).reshape(size, -1) * size + np.arange(size)[:, None])
                reach[dim] = np.bincount(cells // size, minlength=len(counts))
            partial = (reach < np.array(grid.shape)[:, None]).sum(axis=0)
            misfit = (reach.prod(axis=0) != counts) | (partial > 1)
            nodes = distinct(grid[misfit[of]])
            if nodes.size:
                misfits.append((nodes, f"{text}, of which it is neither whole rows nor whole columns"))
        return misfits

    def _marks(self, listed: list[tuple[Labels, str]]) -> Labels:
        """Return for every element the first entry of a list that names one of its nodes, or −1."""
        marks = np.full(len(self._first_node), -1, dtype=np.int64)
        texts: dict[str, int] = {}
        for place, (_, text) in enumerate(listed):
            texts.setdefault(text, place)
        for nodes, text in reversed(listed):
            marks[self._of[nodes]] = texts[text]
        return marks

    def _alike(self, members: Labels, lists: tuple[list[tuple[Labels, str]], ...], marks: list[Labels]) -> _Alike:
        one = int(members[0])
        sides = self._row_sides[self._first_row[one] : self._last_row[one]].tolist()
        written = sorted((s for s in sides if s in self._rank), key=lambda s: self._rank[s])
        texts = [listed[mark[one]][1] if mark[one] >= 0 else None for listed, mark in zip(lists, marks, strict=True)]
        return _Alike(members, tuple(sides), tuple(written), self._rank[written[0]], *texts)

    def positions(self, members: Labels, sides: tuple[int, ...]) -> dict[int, Labels]:
        """Return by side `(elements, k)` indices along its dimension."""
        one = int(members[0])
        counts = self._row_counts[self._first_row[one] : self._last_row[one]]
        columns = np.arange(int(counts.sum()))
        table = self._sorted_nodes[self._first_node[members][:, None] + columns[None, :]]
        parts = np.split(table, np.cumsum(counts)[:-1], axis=1)
        return {side: part - self._starts[side] for side, part in zip(sides, parts, strict=True)}
