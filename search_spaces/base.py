"""What a search space is, and the two pieces that ratio spaces are made of. The spaces themselves are one file each.

To write one: take a `FeasibleSet` and a `spend`, name the dimensions, and turn a point of the unit cube into a policy
that meets the budget, and back. A space proposes nothing and measures nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
import numpy.typing as npt

from autoprune.cost import FeasibleSet
from autoprune.errors import ConfigError
from autoprune.policy import Policy

__all__ = ["SearchSpace", "Spend", "TiedRatios", "checked_point"]

_SLACK = 1e-9  # share of the budget; less than any element costs, more than rounding errors


class SearchSpace(Protocol):
    """The unit cube, each point of which stands for a policy that meets the budget.

    A space is made as `Space(feasible, spend=(low, high))`: the range of the share of the budget that its policies use,
    from 0, the smallest network that can be reached, to 1, the whole budget. `(1.0, 1.0)` always fills the budget; a
    true range adds a last dimension "spend".

    Both methods are pure: they may be called in any order and any number of times.
    """

    @property
    def dimensions(self) -> tuple[str, ...]:
        """One name a coordinate; every coordinate lies in [0, 1]."""
        ...

    def decode(self, point: Sequence[float]) -> Policy:
        """Return the policy that a point stands for: within budget and bounds, sparsities of whole elements.

        Raises:
            ConfigError: The point has the wrong length, or a coordinate outside [0, 1].
        """
        ...

    def encode(self, policy: Policy) -> list[float]:
        """Return a point for a policy: `decode(encode(p)) == p` for every policy that `decode` can give.

        For any other policy it is a point nearby, so that warm starts can come from anywhere.
        """
        ...


def checked_point(point: Sequence[float], dimensions: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return a point as an array.

    Raises:
        ConfigError: It has the wrong length, or a coordinate outside [0, 1].
    """
    values = np.asarray(point, dtype=np.float64)
    if values.shape != (len(dimensions),) or not np.all((values >= 0) & (values <= 1)):
        raise ConfigError(f"a point of this space has {len(dimensions)} coordinates in [0, 1], but got {list(point)}")
    return values


@final
@dataclass(frozen=True, slots=True)
class Spend:
    """How much of a budget is used: a fixed share, or a range that one coordinate chooses from.

    Attributes:
        smallest: Utilisation of the smallest network that can be reached.
        low: Lowest share of the way from `smallest` to the whole budget.
        high: Highest share.
    """

    smallest: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ConfigError(f"`0 <= low <= high <= 1` must hold for `spend`, but got ({self.low}, {self.high})")

    @property
    def names(self) -> tuple[str, ...]:
        """The dimension that it adds to a space, if any."""
        return ("spend",) if self.low < self.high else ()

    def target(self, coordinate: float) -> float:
        """Return the utilisation that a coordinate in [0, 1] asks for; a fixed share ignores it."""
        share = self.low + coordinate * (self.high - self.low)
        return min(1.0, (1 - share) * self.smallest + share + _SLACK)

    def coordinates(self, utilisation: float) -> list[float]:
        """Return the coordinate, if there is one, that asks for a utilisation."""
        if not self.names:
            return []
        share = (utilisation - self.smallest) / max(1 - self.smallest, _SLACK)
        return [min(1.0, max(0.0, (share - self.low) / (self.high - self.low)))]


@final
class TiedRatios:
    """One coordinate for each set of groups that are pruned alike; what ratio spaces are made of.

    A coordinate u asks for `lower + u (upper - lower)` of each of its groups. Asked as a whole, that rarely costs what
    the budget allows, so all groups then move by the same fraction of the way to their bounds (`FeasibleSet.project`).

    Args:
        feasible: The policies to choose from.
        ties: Name of a coordinate to the positions of its groups; every group is in just one.
        spend: Range of the share of the budget that is used.
    """

    def __init__(self, feasible: FeasibleSet, ties: Mapping[str, Sequence[int]], *, spend: tuple[float, float]) -> None:
        self._feasible = feasible
        self._spend = Spend(feasible.utilisation(feasible.upper), *spend)
        self._tie = np.zeros(len(feasible.structure), dtype=np.int64)
        for coordinate, groups in enumerate(ties.values()):
            self._tie[list(groups)] = coordinate
        self._ties = len(ties)
        self._range = feasible.upper - feasible.lower
        self.dimensions = (*ties, *self._spend.names)

    def decode(self, point: Sequence[float]) -> Policy:
        """Return the policy that a point stands for."""
        values = checked_point(point, self.dimensions)
        counts = self._feasible.lower + values[self._tie] * self._range
        target = self._spend.target(float(values[-1]) if self._spend.names else 0.0)
        return self._feasible.policy(self._feasible.project(counts / self._feasible.sizes, target))

    def encode(self, policy: Policy) -> list[float]:
        """Return a point from which the projection leads to the policy.

        On the way to the lower bounds from `u`, all coordinates pass at once, after a fraction `margin` of it, the
        places where the policy's counts change. Those before cost too much, so the projection stops there.
        """
        removed = self._feasible.removed(policy)
        middle = (removed + self._feasible.fewer(removed)) / 2
        changes = np.where(removed > self._feasible.lower, middle - self._feasible.lower, 0.0)
        changes = changes / np.maximum(self._range, 1)
        last = np.zeros(self._ties)
        np.maximum.at(last, self._tie, changes)
        spend = self._spend.coordinates(self._feasible.utilisation(removed))
        point: list[float] = []
        for margin in (0.49, 0.47, 0.43):  # one is enough, unless rounding in the last place splits the passage
            point = [*np.minimum(1.0, last / (1 - margin / max(1, int(self._range.max())))).tolist(), *spend]
            if self.decode(point) == policy:
                break
        return point
