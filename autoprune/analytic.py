"""Predicted losses of any policy, from moments alone: nothing is evaluated, and thousands of policies take a second."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from autoprune import separable
from autoprune.cost import FeasibleSet
from autoprune.moments import Moments
from autoprune.moments.readers import Readers
from autoprune.policy import Policy
from autoprune.scoring import Orders
from autoprune.structure import Group, Structure
from autoprune.structure.masks import mask

__all__ = ["POWER", "Analytic"]

POWER: Final = 1.5
"""Exponent of each group's loss before losses are added up."""

_DRAWN = 33  # points of a curve that a report keeps
_POINTS = 64  # of a curve of weights that are zeroed, which have a count for each of millions


@dataclass(frozen=True, slots=True, eq=False)
class Analytic:
    """What each group's removal does to the layers that read it, after the best compensation.

    The loss of a group is the squared error of its readers' outputs, each weighted by how much of the power of the
    network's outputs it changes (see `autoprune.moments.influence`), and the loss of a policy the sum of the groups'
    losses, each to the power of `POWER`: a sum takes groups for independent, and the power makes up for errors that
    grow on each other.

    Attributes:
        structure: The groups.
        counts: Group name → `(k,)` numbers of elements removed, from 0 to all.
        losses: Group name → `(k,)` losses, from 0, never falling; groups whose readers were not seen are missing.
    """

    structure: Structure
    counts: Mapping[str, npt.NDArray[np.float64]]
    losses: Mapping[str, npt.NDArray[np.float64]]
    _missing: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        missing = tuple(name for name in self.structure.names if name not in self.losses)
        object.__setattr__(self, "_missing", missing)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        structure: Structure,
        orders: Orders,
        moments: Moments,
        influence: Mapping[str, torch.Tensor] | None = None,
    ) -> Self:
        """Make the curves.

        Args:
            model: The dense network.
            structure: Its groups.
            orders: In which order elements go.
            moments: Of the groups' readers.
            influence: Of the readers' outputs on the network's; without it losses are relative to the power of each
                reader's outputs.
        """
        readers = Readers(model, moments, influence)
        curves = {group.name: _curve(readers, group, orders[group.name]) for group in structure}
        known = {name: curve for name, curve in curves.items() if curve is not None}
        return cls(structure, {n: c for n, (c, _) in known.items()}, {n: v for n, (_, v) in known.items()})

    @property
    def missing(self) -> tuple[str, ...]:
        """Groups of which nothing is known."""
        return self._missing

    def loss_of(self, group: str, power: float = POWER) -> separable.Loss:
        """Return a group's part of the sum, by the number of elements removed; 0 where nothing is known."""
        if group in self._missing:
            return lambda _: 0.0
        counts, values = self.counts[group], self.losses[group] ** power
        lower = separable.hull(counts, values)
        return lambda removed: float(np.interp(removed, counts[lower], values[lower]))

    def points(self, group: str) -> tuple[tuple[int, float], ...]:
        """Return some points of a group's curve, as a report keeps them: elements removed, and the loss."""
        if group in self._missing:
            return ()
        counts = self.counts[group]
        wanted = np.unique(np.rint(np.linspace(0, counts[-1], min(len(counts), _DRAWN)))).tolist()
        return tuple((int(count), float(np.interp(count, counts, self.losses[group]))) for count in wanted)

    def predict(self, removed: npt.NDArray[Any], power: float = POWER) -> npt.NDArray[np.float64]:
        """Return the losses of policies.

        Args:
            removed: `(..., groups)` numbers of elements, in the structure's order.
            power: Exponent of each group's loss.

        Returns:
            `(...)`; lower is better.
        """
        total = np.zeros(np.shape(removed)[:-1])
        for index, name in enumerate(self.structure.names):
            if name in self.losses:
                total += np.interp(removed[..., index], self.counts[name], self.losses[name]) ** power
        return total

    def allocate(self, feasible: FeasibleSet, power: float = POWER) -> Policy:
        """Return the policy that meets a budget at the least predicted loss (see `autoprune.separable.allocate`).

        Groups of which nothing is known stay whole, if the budget can be met without them.
        """
        whole = feasible.without(self._missing)
        return separable.allocate(whole, [self.loss_of(group.name, power) for group in feasible.structure])


def _curve(
    readers: Readers, group: Group, order: Any
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    if group.block is not None:
        return None
    if group.pattern is None:
        losses = readers.losses(group, torch.as_tensor(order))
        return None if losses is None else (np.arange(group.size + 1.0), losses.numpy())
    saliency = readers.saliency(group.pattern.tensor)
    if saliency is None:
        return None
    counts = np.unique(np.rint(np.linspace(0, group.size, _POINTS + 1)))
    scores = torch.as_tensor(order).to(saliency.device)
    gone = [~mask(group.pattern, scores, int(count), group.size) for count in counts]
    values = np.array([float(saliency[one].sum()) for one in gone])
    return counts, np.maximum.accumulate(values)
