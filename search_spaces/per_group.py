"""One sparsity a group: the largest space, and the one that layer-wise search is about."""

from collections.abc import Sequence
from typing import final

from autoprune.cost import FeasibleSet
from autoprune.policy import Policy
from autoprune.search_spaces.base import TiedRatios

__all__ = ["PerGroup"]


@final
class PerGroup:
    """A coordinate a group; see `SearchSpace` for the contract.

    Args:
        feasible: The policies to choose from.
        spend: Range of the share of the budget that is used.
    """

    def __init__(self, feasible: FeasibleSet, *, spend: tuple[float, float]) -> None:
        ties = {group.name: [index] for index, group in enumerate(feasible.structure)}
        self._ratios = TiedRatios(feasible, ties, spend=spend)
        self.dimensions = self._ratios.dimensions

    def decode(self, point: Sequence[float]) -> Policy:
        """Return the policy that a point stands for."""
        return self._ratios.decode(point)

    def encode(self, policy: Policy) -> list[float]:
        """Return a point for a policy."""
        return self._ratios.encode(policy)
