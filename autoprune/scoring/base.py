"""What a criterion is, and the arithmetic that all criteria share. Each criterion is one file beside this one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from autoprune.moments import Moments, readers_of
from autoprune.structure import Group, Removal, Slice, Structure, Weakest
from autoprune.structure.masks import runs, tile_sums

__all__ = [
    "Criterion",
    "Evidence",
    "Orders",
    "Scores",
    "ascending",
    "per_element",
    "removal_orders",
    "removals",
    "sum_of_weights",
]

Scores = Mapping[str, torch.Tensor]
"""Group name → `(size,)` float, or of weights that are zeroed one float a weight, in their shape; higher means keep."""

Orders = Mapping[str, Sequence[int] | torch.Tensor]
"""Group name → elements, least important first; of weights that are zeroed their scores, which say as much."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a criterion may look at besides the weights.

    Attributes:
        batches: Augmented training batches `(inputs, targets)`.
        loss: Per-sample loss, `(outputs, targets) -> (n,)`.
        seed: Randomness, for criteria that use any.
        known: Moments of the network's layers, where they have been collected already.
    """

    batches: Sequence[tuple[torch.Tensor, torch.Tensor]]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    seed: int
    known: Callable[[], Moments] | None = None

    def moments(self, model: nn.Module, structure: Structure) -> Moments:
        """Return second moments of what the readers of all groups read."""
        if self.known is not None:
            return self.known()
        return Moments.collect(model, self.batches, readers_of(structure), seed=self.seed)


class Criterion(Protocol):
    """Tells which elements of a group matter least."""

    def score(self, model: nn.Module, structure: Structure, evidence: Evidence) -> Scores:
        """Score every element of every group; called once a search, on the dense network, which must not change."""
        ...


def per_element(values: torch.Tensor, part: Slice) -> torch.Tensor:
    """Sum a tensor over everything but a group's elements.

    Args:
        values: The shape of the tensor that `part` names.
        part: Where the elements lie in it.

    Returns:
        `(size,)`.
    """
    others = [dim for dim in range(values.dim()) if dim != part.dim]
    along = values.sum(others) if others else values
    return along[part.positions.to(along.device)].sum(1)


def sum_of_weights(model: nn.Module, group: Group, transform: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Sum transformed weights over all that a coupled group holds of each element.

    These are its filters in every layer that writes it and the columns of every layer that reads it, without biases
    and norms. A single weight is all there is of it; and all parameters of a block are.

    Args:
        model: The dense network.
        group: One of its groups.
        transform: Elementwise, for example `torch.abs`.

    Returns:
        `(size,)`; for weights that are zeroed the shape of the weight.
    """
    parameters = dict(model.named_parameters())
    if group.pattern is not None:
        return transform(parameters[group.pattern.tensor].detach())
    if group.block is not None:
        inside = model.get_submodule(group.block).parameters()
        sums = [transform(parameter.detach()).sum().float() for parameter in inside if parameter.dim() > 1]
        return torch.stack([torch.zeros(()), *(one.cpu() for one in sums)]).sum().reshape(1)
    touched = [(parameters[part.tensor].detach(), part) for part in group.slices if part.tensor in parameters]
    return torch.stack([per_element(transform(weight), part) for weight, part in touched if weight.dim() > 1]).sum(0)


def removal_orders(scores: Scores) -> dict[str, list[int] | torch.Tensor]:
    """Return every group's elements, least important first; ties go by number, so the order is the same everywhere.

    Weights that are zeroed keep their scores, since how many go of which run or tile depends on what else goes.
    """
    return {
        name: torch.argsort(score, stable=True).tolist() if score.dim() == 1 else score
        for name, score in scores.items()
    }


def removals(structure: Structure, orders: Orders, removed: Mapping[str, int]) -> dict[str, Removal]:
    """Return what goes when so many elements of every group do, the least important first (for `structure.plan`)."""
    result: dict[str, Removal] = {}
    for name, number in removed.items():
        order = orders[name]
        weighs = structure[name].pattern is not None
        result[name] = Weakest(number, torch.as_tensor(order)) if weighs else order[:number]
    return result


def ascending(group: Group, score: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return the scores of a group's elements in the order in which they go.

    Args:
        group: One of the network's groups.
        score: What a criterion says of it: `(size,)`, or of weights that are zeroed one number a weight.

    Returns:
        `(size,)`, never falling. Of tiles the sums of their weights'; of N:M patterns, where an element is one weight
        of every run, the means over the runs.
    """
    score = score.detach().cpu()
    if group.pattern is not None and group.pattern.run > 0:
        score = runs(group.pattern, score).sort(1).values.double().mean(0)
    elif group.pattern is not None and group.pattern.tile != (1, 1):
        score = tile_sums(group.pattern, score)
    return np.sort(score.flatten().double().numpy())
