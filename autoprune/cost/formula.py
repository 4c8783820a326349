"""The cost of any policy from a formula in the element counts, with no network built.

A trace of the network (see `autoprune.structure.trace`) says of every product and every activation which of its
positions belong to which element. So each of their sizes is a product of a few affine functions of the counts removed,
and so is that of every parameter. A block that goes takes its products and activations with it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from autoprune.cost.count import Cost, unknown_operators
from autoprune.errors import StructureError
from autoprune.inputs import each_tensor, first_sample
from autoprune.structure.groups import Structure
from autoprune.structure.labels import Area, Labels
from autoprune.structure.masks import zeros
from autoprune.structure.seen import Block, Trace
from autoprune.structure.surgery import aliases
from autoprune.structure.trace import trace

if TYPE_CHECKING:
    from autoprune.cost.latency_table import LatencyTable

__all__ = ["Call", "CostModel", "Removed"]

Removed = npt.NDArray[np.int64]
"""`(groups,)`: how many elements of every group go, in the structure's order."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module that calls no other.

    Attributes:
        module: Its name.
        inputs: Shape of every tensor it is given, for one sample.
    """

    module: str
    inputs: tuple[tuple[int, ...], ...]


class CostModel:
    """Multiply-adds, memory and time of a network under any policy; all but the time exact to the unit.

    Args:
        model: The dense network; it runs once and is left as it was.
        example_input: What it runs on (see `autoprune.inputs`).
        structure: Its groups.
        precision: Of the weights, for `Cost.bytes`; by default the network's own. Integers keep their size.

    Attributes:
        dense: The dense network's cost.
        unknown: How often each operator ran that is not known; their cost is not in any number here.

    Raises:
        StructureError: The network does not run on the input, or a group's elements differ in what they cost.
    """

    def __init__(
        self, model: nn.Module, example_input: Any, structure: Structure, *, precision: torch.dtype | None = None
    ) -> None:
        traced = trace(model, each_tensor(first_sample(example_input), torch.clone))
        self._structure = structure
        self._columns = {name: column for column, name in enumerate(structure.names)}
        self._sizes = _Sizes()
        elements = _Elements(traced, structure, self._sizes)
        of_block = {group.block: column for column, group in enumerate(structure) if group.block is not None}
        blocks = [(of_block[block.module], block) for block in traced.blocks if block.module in of_block]

        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        tensors = {**parameters, **buffers}
        whole = _only_in_blocks(model, of_block)
        self._rows = {name: row for row, name in enumerate(tensors)}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        taken = _taken(structure)
        self._dims = {
            name: [self._sizes.axis(size, taken.get((name, dim), {})) for dim, size in enumerate(tensor.shape)]
            for name, tensor in tensors.items()
        }
        gates = {name: [self._sizes.axis(1, {of_block[its[0]]: 1})] for name, its in whole.items() if len(its) == 1}
        self._numels = _Products([(1, [*axes, *gates.get(name, ())]) for name, axes in self._dims.items()])
        self._shared = [(self._rows[name], [of_block[b] for b in its]) for name, its in whole.items() if len(its) > 1]
        itemsizes = [_itemsize(tensor, precision) for tensor in tensors.values()]
        self._bytes_each = np.array(itemsizes, dtype=np.int64)
        self._is_parameter = np.array([name in parameters for name in tensors], dtype=np.int64)

        def gated(at: int) -> list[int]:
            inside = (column for column, block in blocks if block.start <= at < block.end)
            return [self._sizes.axis(1, {column: 1}) for column in inside]

        areas = [(elements.area(product.macs), gated(product.at)) for product in traced.products]
        self._macs = _Products([(fixed, [*axes, *gates]) for (fixed, axes), gates in areas])
        self._weight_of = [product.parameter for product in traced.products]
        self._patterns = [
            (column, group, self._rows[group.pattern.tensor])
            for column, group in enumerate(structure)
            if group.pattern is not None
        ]
        self._memory = _Memory(traced, elements, blocks, self._sizes)
        self._calls = [
            (call.module, [(shape, elements.dims(shape, area)) for shape, area in call.inputs], gated(call.at))
            for call in traced.calls
        ]
        self._latency: LatencyTable | None = None
        self.unknown: Mapping[str, int] = unknown_operators(traced.operators)
        dense_macs = self._macs.values(self._sizes.values(np.zeros(len(structure), np.int64)))
        self._layer_macs: dict[str, int] = {}
        for name, macs in zip(self._weight_of, dense_macs.tolist(), strict=True):
            if name is not None:
                self._layer_macs[name] = self._layer_macs.get(name, 0) + macs
        self._block_macs = dict.fromkeys((column for column, _ in blocks), 0)
        for product, macs in zip(traced.products, dense_macs.tolist(), strict=True):
            for column, block in blocks:
                self._block_macs[column] += macs if block.start <= product.at < block.end else 0
        self.dense = self.cost({})

    @property
    def latency(self) -> "LatencyTable | None":
        """What predicts the time of a policy; None until one is measured and set."""
        return self._latency

    @latency.setter
    def latency(self, table: "LatencyTable | None") -> None:
        self._latency = table
        self.dense = self.cost({})

    def cost(self, removed: Removed | Mapping[str, int]) -> Cost:
        """Return the cost after removing so many elements of every group.

        Args:
            removed: `(groups,)` counts in the structure's order, or a map from group name to count.
        """
        counts = self._counts(removed)
        sizes = self._sizes.values(counts)
        numels = self._numels.values(sizes)
        for row, columns in self._shared:
            numels[row] *= not counts[columns].all()
        macs = self._macs.values(sizes)
        zeroed = self._zeroed(counts, sizes, numels)
        params = int(self._is_parameter @ numels)
        total = int(macs.sum())
        idle = 0
        if zeroed:
            for name, of_product in zip(self._weight_of, macs.tolist(), strict=True):
                if name in zeroed and of_product:
                    idle += of_product * zeroed[name] // int(numels[self._rows[name]])
        cost = Cost(
            macs=total,
            params=params,
            bytes=int(self._bytes_each @ numels),
            activations=self._memory.peak(counts, sizes),
            nonzero_params=params - sum(zeroed.values()),
            nonzero_macs=total - idle,
        )
        return cost if self._latency is None else replace(cost, latency_ms=self._latency.predict(counts))

    def used(self, metric: str, removed: Removed) -> float:
        """Return one number of a cost; a search asks for one a hundred times as often as for all.

        Args:
            metric: One of `autoprune.cost.METRICS`.
            removed: `(groups,)` counts in the structure's order.

        Raises:
            BudgetError: It is the latency, and none was predicted.
        """
        if metric == "macs":
            return float(self._macs.values(self._sizes.values(removed)).sum())
        if metric == "params" and not self._shared:
            return float(self._is_parameter @ self._numels.values(self._sizes.values(removed)))
        number: float = getattr(self.cost(removed), metric)
        return number

    def used_by(self, metric: str, removed: Removed) -> npt.NDArray[np.float64]:
        """Return one number of the costs of several policies, as `used` does; of multiply-adds and parameters at once.

        Args:
            metric: One of `autoprune.cost.METRICS`.
            removed: `(policies, groups)` counts in the structure's order.

        Returns:
            `(policies,)`.

        Raises:
            BudgetError: It is the latency, and none was predicted.
        """
        used: npt.NDArray[np.float64]
        if metric == "macs":
            used = self._macs.values(self._sizes.values(removed)).sum(1).astype(np.float64)
        elif metric == "params" and not self._shared:
            used = (self._numels.values(self._sizes.values(removed)) @ self._is_parameter).astype(np.float64)
        else:
            used = np.array([self.used(metric, one) for one in removed])
        return used

    def _counts(self, removed: Removed | Mapping[str, int]) -> Removed:
        if isinstance(removed, Mapping):
            return np.array([removed.get(name, 0) for name in self._structure.names], dtype=np.int64)
        return removed

    def _zeroed(self, counts: Removed, sizes: Removed, numels: Removed) -> dict[str, int]:
        """Return how many weights of every tensor patterns keep at zero."""
        zeroed = {}
        for column, group, row in self._patterns:
            pattern = group.pattern
            if pattern is not None and counts[column] and numels[row]:
                shape = [int(sizes[axis]) for axis in self._dims[pattern.tensor]]
                zeroed[pattern.tensor] = zeros(pattern, shape, int(counts[column]), group.size)
        return zeroed

    def shape(self, tensor: str, removed: Removed | Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of a parameter or buffer under counts."""
        sizes = self._sizes.values(self._counts(removed))
        return tuple(int(sizes[axis]) for axis in self._dims[tensor])

    def calls(self, removed: Removed | Mapping[str, int]) -> tuple[Call, ...]:
        """Return the calls of modules that call no other, in the order of execution, but those in removed blocks."""
        sizes = self._sizes.values(self._counts(removed))
        return tuple(
            Call(module, tuple(tuple(int(sizes[axis]) for axis in axes) for _, axes in inputs))
            for module, inputs, gates in self._calls
            if all(sizes[gate] for gate in gates)
        )

    def macs_share(self, name: str) -> float:
        """Return the share of the dense multiply-adds in what a group touches; shares overlap."""
        group = self._structure[name]
        weights = {part.tensor for part in group.slices} | ({group.pattern.tensor} if group.pattern else set())
        macs = self._block_macs.get(self._columns[name], 0) + sum(self._layer_macs.get(w, 0) for w in weights)
        return float(macs / max(1, self.dense.macs))


class _Sizes:
    """Numbers of the form `size − Σ each · removed`, every one of them kept once."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
        self._table: tuple[Removed, ...] | None = None

    def axis(self, size: int, taken: Mapping[int, int]) -> int:
        """Return the number of such a number; `taken` is how much one element of a group takes, by column."""
        self._table = None
        return self._numbers.setdefault((size, tuple(sorted(taken.items()))), len(self._numbers))

    def values(self, removed: Removed) -> Removed:
        """Return all of them under counts `(..., groups)`; one more, at the end, is 1."""
        if self._table is None:
            terms = [(row, *term) for row, (_, taken) in enumerate(self._numbers) for term in taken]
            of, columns, each = np.array(terms, dtype=np.int64).reshape(-1, 3).T
            rows, starts = np.unique(of, return_index=True)
            whole = np.array([size for size, _ in self._numbers] + [1], dtype=np.int64)
            self._table = whole, rows, starts, columns, each
        whole, rows, starts, columns, each = self._table
        values = np.empty((*removed.shape[:-1], len(whole)), dtype=np.int64)
        values[...] = whole
        if len(rows):
            values[..., rows] -= np.add.reduceat(each * removed[..., columns], starts, axis=-1)
        return values


class _Products:
    """Products of a fixed number and some sizes each."""

    def __init__(self, products: Sequence[tuple[int, Sequence[int]]]) -> None:
        width = max((len(axes) for _, axes in products), default=0)
        self._fixed = np.array([fixed for fixed, _ in products], dtype=np.int64)
        padded = [[*axes, *[-1] * (width - len(axes))] for _, axes in products]
        self._axes = np.array(padded, dtype=np.int64).reshape(len(products), width)

    def values(self, sizes: Removed) -> Removed:
        """Return `(..., products)`, given what `_Sizes.values` returned."""
        values: Removed = self._fixed * np.prod(sizes[..., self._axes], axis=-1)
        return values


class _Elements:
    """Says of the positions of a trace which group's elements they belong to."""

    def __init__(self, traced: Trace, structure: Structure, sizes: _Sizes) -> None:
        self._sizes = sizes
        self._structure = structure
        nodes = traced.nodes
        starts = dict(zip(nodes.sides, nodes.starts, strict=True))
        components = nodes.components()
        width = max((group.size for group in structure), default=1)
        of_component = np.full(int(components.max(initial=0)) + 1, -1, dtype=np.int64)
        for column, group in enumerate(structure):
            for part in group.slices:
                if (part.tensor, part.dim) in starts:
                    rows = np.arange(group.size)[:, None] + column * width
                    own = components[starts[part.tensor, part.dim] + part.positions.numpy()]
                    of_component[own] = np.broadcast_to(rows, own.shape)
        self._element = of_component[components]
        self._element[0] = -1
        self._width = width

    def area(self, area: Area) -> tuple[int, list[int]]:
        """Return an area as a fixed number and sizes; of maps along one dimension the one that says more counts."""
        lengths: dict[int, int] = {}
        lines: list[tuple[list[int], Labels]] = []
        for dims, labels in area.maps:
            of, left = self._element[labels], list(dims)
            for place in reversed(range(of.ndim)):
                lengths[dims[place]] = labels.shape[place]
                if (of == np.take(of, [0], axis=place)).all():
                    of = np.take(of, 0, axis=place)
                    left.pop(place)
            lines.append((left, of))
        axes: list[int] = []
        for left, of in sorted(lines, key=lambda line: -len(line[0])):
            if left and all(dim in lengths for dim in left):
                axes.append(self._axis(of))
                lengths = {dim: length for dim, length in lengths.items() if dim not in left}
        return area.fixed * math.prod(lengths.values()), axes

    def dims(self, shape: Sequence[int], area: Area) -> list[int]:
        """Return the size of every dimension of a tensor."""
        lines = {dims[0]: self._element[labels] for dims, labels in area.maps if len(dims) == 1}
        return [self._axis(lines[d]) if d in lines else self._sizes.axis(n, {}) for d, n in enumerate(shape)]

    def _axis(self, of: Labels) -> int:
        found, counts = np.unique(of[of >= 0], return_counts=True)
        columns = found // self._width
        taken = {}
        for column in np.unique(columns).tolist():
            each = counts[columns == column]
            group = self._structure.groups[column]
            if len(each) < group.size or (each != each[0]).any():
                raise StructureError(f"elements of group '{group.name}' differ in what they cost")
            taken[column] = int(each[0])
        return self._sizes.axis(int(of.size), taken)


class _Memory:
    """The peak memory of activations: storages, each born with one operator and freed after another."""

    def __init__(self, traced: Trace, elements: _Elements, blocks: Sequence[tuple[int, Block]], sizes: _Sizes) -> None:
        end = len(traced.operators)
        areas = [elements.area(storage.numel) for storage in traced.storages]
        self._numels = _Products(areas)
        self._itemsizes = np.array([storage.itemsize for storage in traced.storages], dtype=np.int64)
        self._born = np.array([max(storage.born, 0) for storage in traced.storages], dtype=np.int64)
        self._died = np.array([min(storage.died, end) for storage in traced.storages], dtype=np.int64)
        self._end = end
        self._blocks = sorted(blocks, key=lambda item: -item[1].start)

    def peak(self, counts: Removed, sizes: Removed) -> int:
        """Return the most bytes that are held at once."""
        held = self._numels.values(sizes) * self._itemsizes
        died = self._died
        for column, block in self._blocks:
            if counts[column]:
                inside = (self._born >= block.start) & (self._born < block.end)
                if died is self._died:
                    died = died.copy()
                died[block.source] = max(died[block.source], died[block.result])
                held = np.where(inside, 0, held)
        change = np.zeros(self._end + 1, dtype=np.int64)
        np.add.at(change, self._born, held)
        np.add.at(change, died, -held)
        return int(np.cumsum(change)[:-1].max(initial=0))


def _only_in_blocks(model: nn.Module, blocks: Iterable[str]) -> dict[str, list[str]]:
    """Return the tensors that no module outside of blocks holds: first name → the blocks that do."""
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    holders: dict[int, list[str]] = {}
    for name, tensor in everything:
        holders.setdefault(id(tensor), []).append(name)
    first_names = {id(tensor): name for name, tensor in reversed(everything)}
    prefixes = {f"{name}.": block for block in blocks for name in aliases(model, block)}
    inside: dict[str, list[str]] = {}
    for key, names in holders.items():
        within = [next((b for prefix, b in prefixes.items() if name.startswith(prefix)), None) for name in names]
        if None not in within:
            inside[first_names[key]] = [block for block in dict.fromkeys(within) if block is not None]
    return inside


def _taken(structure: Structure) -> dict[tuple[str, int], dict[int, int]]:
    """Return how many indices one element of each group takes off a tensor's dimension, by column."""
    taken: dict[tuple[str, int], dict[int, int]] = {}
    for column, group in enumerate(structure):
        for part in group.slices:
            there = taken.setdefault((part.tensor, part.dim), {})
            there[column] = there.get(column, 0) + part.positions.shape[1]
    return taken


def _itemsize(tensor: torch.Tensor, precision: torch.dtype | None) -> int:
    return precision.itemsize if precision is not None and tensor.is_floating_point() else tensor.element_size()
