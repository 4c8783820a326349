"""One sparsity a stage: few coordinates for deep networks, whose blocks of one stage are alike."""

from collections.abc import Sequence
from typing import final

from autoprune.cost import FeasibleSet
from autoprune.policy import Policy
from autoprune.search_spaces.base import TiedRatios
from autoprune.structure import Structure

__all__ = ["PerStage", "stages"]


def stages(structure: Structure) -> dict[str, list[int]]:
    """Return the positions of each stage's groups.

    A stage is the groups of the same size within the same top-level module, which is what stands before the first dot
    of a group's name; groups whose names have no dot share one. So `layer1.0.conv1` and `layer1.1.conv1`, both with 16
    elements, are the stage "layer1/16"; twenty layers `conv1` to `conv20` in a flat network are one stage a width.
    """
    found: dict[str, list[int]] = {}
    for index, group in enumerate(structure):
        module, dot, _ = group.name.partition(".")
        found.setdefault(f"{module}/{group.size}" if dot else f"/{group.size}", []).append(index)
    return found


@final
class PerStage:
    """A coordinate a stage; see `stages` for what one is, and `SearchSpace` for the contract.

    Args:
        feasible: The policies to choose from.
        spend: Range of the share of the budget that is used.
    """

    def __init__(self, feasible: FeasibleSet, *, spend: tuple[float, float]) -> None:
        self._ratios = TiedRatios(feasible, stages(feasible.structure), spend=spend)
        self.dimensions = self._ratios.dimensions

    def decode(self, point: Sequence[float]) -> Policy:
        """Return the policy that a point stands for."""
        return self._ratios.decode(point)

    def encode(self, policy: Policy) -> list[float]:
        """Return a point for a policy."""
        return self._ratios.encode(policy)
