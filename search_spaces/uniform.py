"""One sparsity for all groups: what every other space has to beat."""

from collections.abc import Sequence
from typing import final

from autoprune.cost import FeasibleSet
from autoprune.policy import Policy
from autoprune.search_spaces.base import Spend, checked_point

__all__ = ["Uniform"]


@final
class Uniform:
    """The same sparsity for every group, as far as its bounds allow, and as low as the budget allows.

    The budget decides the sparsity, so under a fixed `spend` there is no dimension and a single point, the empty one;
    else "spend" is the only dimension. See `SearchSpace` for the contract.

    Args:
        feasible: The policies to choose from.
        spend: Range of the share of the budget that is used.
    """

    def __init__(self, feasible: FeasibleSet, *, spend: tuple[float, float]) -> None:
        self._feasible = feasible
        self._spend = Spend(feasible.utilisation(feasible.upper), *spend)
        self.dimensions = self._spend.names

    def decode(self, point: Sequence[float]) -> Policy:
        """Return the policy that a point stands for."""
        values = checked_point(point, self.dimensions)
        target = self._spend.target(float(values[0]) if self._spend.names else 0.0)
        return self._feasible.policy(self._feasible.uniform(target))

    def encode(self, policy: Policy) -> list[float]:
        """Return a point for a policy."""
        return self._spend.coordinates(self._feasible.utilisation(self._feasible.removed(policy)))
