"""Labels on tensors: which removable unit every position of an activation or a weight belongs to.

The arithmetic of `tracer.py`, which knows no network. A *node* is one index along one dimension of one parameter or
buffer; a *map* is an integer tensor of the shape of the tensor it describes that holds, at every position, the node
that the position goes with, or 0 for none. Along most dimensions a map is constant: those have stride 0, so that a map
takes no memory worth mentioning and every view, permutation or window of the tensor is made of the map by the same
operator. A tensor has several maps where several of its dimensions can shrink on their own (a weight's two).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = ["Area", "Labels", "Maps", "Nodes", "compact", "distinct", "varying"]

Labels = npt.NDArray[np.int64]
Maps = tuple[torch.Tensor, ...]
"""The maps of one tensor, no two of which vary along the same dimension."""


def varying(label: torch.Tensor) -> tuple[int, ...]:
    """Return the dimensions along which a map is not constant."""
    return tuple(d for d in range(label.dim()) if label.shape[d] > 1 and label.stride(d) != 0)


def compact(label: torch.Tensor) -> torch.Tensor:
    """Return the same map with stride 0 along every dimension on which it is constant."""
    small = label
    for dim in varying(label):
        first = small.narrow(dim, 0, 1)
        if torch.equal(first.expand_as(small), small):
            small = first
    return small if small is label else small.expand(label.shape)


@dataclass(frozen=True, slots=True)
class Area:
    """How many positions something has: a fixed number times the positions of every map that stay.

    Attributes:
        fixed: Product of the sizes along which no map varies.
        maps: Labels by the dimensions that they vary along; the array has just these dimensions.
    """

    fixed: int
    maps: tuple[tuple[tuple[int, ...], Labels], ...]

    @classmethod
    def of(cls, shape: Sequence[int], maps: Iterable[torch.Tensor]) -> "Area":
        """Return the area of a shape whose positions carry the maps."""
        fixed = int(np.prod(shape, dtype=np.int64))
        parts = []
        for label in maps:
            dims = varying(label)
            if dims:
                small = label
                for dim in range(label.dim()):
                    if dim not in dims:
                        small = small.narrow(dim, 0, 1)
                parts.append((dims, small.reshape([label.shape[d] for d in dims]).numpy().copy()))
        for dim in {dim for dims, _ in parts for dim in dims}:
            fixed //= shape[dim]
        return cls(fixed, tuple(parts))


@dataclass(slots=True)
class Nodes:
    """All nodes of a network, and what is known of them.

    Attributes:
        sides: `(tensor, dim)` by number; a side's nodes are numbered from its entry in `starts` on.
        starts: The first node of every side; node 0 is none.
        read: Nodes that stand for what a layer consumes.
        wrote: Nodes that stand for what a layer produces, in the order of execution.
        heads: Nodes tied since a product runs over them, with the name of the module that ran.
        norms: Nodes that a norm runs across, with the name of the norm.
        notes: What the code does with nodes that may explain why they can't leave one by one.
        grids: Nodes of one dimension that a reshape lays out along several, with what the code does.
        blocked: Nodes that can't leave, with the reason.
    """

    sides: list[tuple[str, int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    read: list[Labels] = field(default_factory=list)
    wrote: list[Labels] = field(default_factory=list)
    heads: list[tuple[Labels, str]] = field(default_factory=list)
    norms: list[tuple[Labels, str]] = field(default_factory=list)
    notes: list[tuple[Labels, str]] = field(default_factory=list)
    grids: list[tuple[Labels, str]] = field(default_factory=list)
    blocked: list[tuple[Labels, str]] = field(default_factory=list)
    _first: list[Labels] = field(default_factory=list)
    _second: list[Labels] = field(default_factory=list)
    _next: int = 1

    def __len__(self) -> int:
        return self._next

    def side(self, tensor: str, dim: int, size: int) -> torch.Tensor:
        """Return the new nodes `(size,)` of one dimension of a tensor."""
        self.sides.append((tensor, dim))
        self.starts.append(self._next)
        self._next += size
        return torch.arange(self._next - size, self._next)

    def unite(self, first: torch.Tensor, second: torch.Tensor, reason: str) -> None:
        """Say that two maps, position by position, belong together.

        Where one of them has no node, the other's can't leave, for the reason.
        """
        a, b = _pairs(first, second)
        self.block(np.concatenate([a[b == 0], b[a == 0]]), reason)
        both = (a != 0) & (b != 0) & (a != b)
        self._first.append(a[both])
        self._second.append(b[both])

    def block(self, nodes: Labels | torch.Tensor, reason: str) -> None:
        """Say that nodes can't leave."""
        nodes = distinct(nodes)
        if nodes.size:
            self.blocked.append((nodes, reason))

    def mark(self, where: list[tuple[Labels, str]], nodes: torch.Tensor, text: str) -> None:
        """Put nodes on one of the lists above."""
        found = distinct(nodes)
        if found.size:
            where.append((found, text))

    def components(self) -> Labels:
        """Return `(nodes,)` numbers of the elements that the nodes belong to."""
        first = np.concatenate([*self._first, np.zeros(0, np.int64)])
        second = np.concatenate([*self._second, np.zeros(0, np.int64)])
        edges = coo_array((np.ones(first.size, np.int8), (first, second)), shape=(self._next, self._next))
        elements: Labels = connected_components(edges, directed=False)[1].astype(np.int64)
        return elements


def distinct(nodes: Labels | torch.Tensor) -> Labels:
    """Return the nodes that occur, without 0."""
    if isinstance(nodes, torch.Tensor):
        small = nodes
        for dim in range(nodes.dim()):
            if nodes.stride(dim) == 0 and nodes.shape[dim] > 1:
                small = small.narrow(dim, 0, 1)
        nodes = small.reshape(-1).numpy()
    found = np.unique(nodes)
    without: Labels = found[found != 0]
    return without


def _pairs(first: torch.Tensor, second: torch.Tensor) -> tuple[Labels, Labels]:
    """Return two maps of one shape as flat arrays, without repetition along dimensions where both are constant."""
    shape = np.broadcast_shapes(first.shape, second.shape)
    first, second = first.expand(shape), second.expand(shape)
    for dim in range(first.dim()):
        if first.shape[dim] > 1 and first.stride(dim) == 0 == second.stride(dim):
            first, second = first.narrow(dim, 0, 1), second.narrow(dim, 0, 1)
    return first.reshape(-1).numpy(), second.reshape(-1).numpy()
