"""The cost of any policy from a formula in the element counts, with no network built.

A removed element takes fixed numbers of indices off fixed dimensions of fixed tensors, so a tensor's size is a product
of affine functions of the counts removed, and the multiply-adds of a layer are its weight's size times the number of
positions it is applied at. Removing channels changes that number only where the channels are themselves positions (a
linear layer over pixels, a product with a constant); how much one element changes is measured, once for each group.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from autoprune.cost.count import Cost, Count, count
from autoprune.structure.groups import Structure
from autoprune.structure.surgery import remove

__all__ = ["CostModel", "Removed"]

Removed = npt.NDArray[np.int64]
"""`(groups,)`: how many elements of every group go, in the structure's order."""


class CostModel:
    """Multiply-adds, parameters and bytes of a network under any policy, exact to the unit.

    Args:
        model: The dense network; it runs once, and once without one element of each group. It is not changed.
        example_input: `(batch, ...)`.
        structure: Its groups.

    Attributes:
        dense: The dense network's cost.
        unknown: Operators that the count does not know; their cost is not in any number here.
    """

    def __init__(self, model: nn.Module, example_input: torch.Tensor, structure: Structure) -> None:
        counted = count(model, example_input)
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        tensors = {**parameters, **buffers}
        rows = {name: row for row, name in enumerate(tensors)}
        dims = max((t.dim() for t in tensors.values()), default=0)
        self._sizes = np.ones((len(tensors), dims), dtype=np.int64)
        self._taken = np.zeros((len(tensors), dims, len(structure)), dtype=np.int64)
        for name, tensor in tensors.items():
            self._sizes[rows[name], : tensor.dim()] = tensor.shape
        for column, group in enumerate(structure):
            for part in group.slices:
                self._taken[rows[part.tensor], part.dim, column] += part.positions.shape[1]
        self._bytes_each = np.array([t.element_size() for t in tensors.values()], dtype=np.int64)
        self._is_parameter = np.array([name in parameters for name in tensors], dtype=np.int64)
        self._positions = _positions(model, counted, rows)
        self._positions_taken = np.zeros((len(tensors) + 1, len(structure)), dtype=np.int64)
        for column, group in enumerate(structure):
            smaller = remove(model, structure, {group.name: [0]})
            left = _positions(smaller, count(smaller, example_input), rows)
            self._positions_taken[:, column] = self._positions - left
        self._structure = structure
        self._layer_macs = dict(counted.macs_of)
        self.dense = counted.cost
        self.unknown: Mapping[str, int] = counted.unknown

    def cost(self, removed: Removed | Mapping[str, int]) -> Cost:
        """Return the cost after removing so many elements of every group.

        Args:
            removed: `(groups,)` counts in the structure's order, or a map from group name to count.
        """
        if isinstance(removed, Mapping):
            removed = np.array([removed.get(name, 0) for name in self._structure.names], dtype=np.int64)
        numel = np.prod(self._sizes - self._taken @ removed, axis=1)
        return Cost(
            macs=int((self._positions - self._positions_taken @ removed) @ np.append(numel, 1)),
            params=int(self._is_parameter @ numel),
            bytes=int(self._bytes_each @ numel),
        )

    def macs_share(self, name: str) -> float:
        """Return the share of the dense multiply-adds in the layers that write or read a group; shares overlap."""
        weights = {part.tensor for part in self._structure[name].slices}
        return sum(self._layer_macs.get(weight, 0) for weight in weights) / max(1, self.dense.macs)


def _positions(model: nn.Module, counted: Count, rows: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """Return at how many positions the tensor of each row is applied, and last the multiply-adds without a tensor."""
    parameters = dict(model.named_parameters())
    positions = np.zeros(len(rows) + 1, dtype=np.int64)
    positions[-1] = sum(counted.unattributed.values())
    for name, macs in counted.macs_of.items():
        positions[rows[name]], rest = divmod(macs, parameters[name].numel())
        positions[-1] += rest
    return positions
