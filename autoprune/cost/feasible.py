"""`FeasibleSet`: the policies of one network that meet a budget within each group's bounds, as arithmetic on counts."""

from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from autoprune.cost.budget import Budget, Limit
from autoprune.cost.count import Cost
from autoprune.cost.formula import CostModel, Removed
from autoprune.errors import ConfigError, InfeasibleBudgetError
from autoprune.policy import Policy
from autoprune.structure.groups import Structure, nearest

__all__ = ["FeasibleSet"]

_STEPS = 40  # bisection steps: 2^-40 is finer than any element count


@dataclass(frozen=True, eq=False)
class FeasibleSet:
    """What may be removed, and what must be.

    More removed never costs more, so the set is bounded by the budget on one side and by the bounds on the other.

    Attributes:
        structure: The groups; every array here is in their order.
        costs: Prices counts.
        budget: The limits.
        lower: `(groups,)` fewest elements that go.
        upper: `(groups,)` most elements that go; below the group's size.
    """

    structure: Structure
    costs: CostModel
    budget: Budget
    lower: Removed
    upper: Removed

    @classmethod
    def build(
        cls,
        structure: Structure,
        costs: CostModel,
        budget: Budget,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        max_sparsity: float = 0.9,
    ) -> Self:
        """Make the set from sparsities.

        Args:
            structure: The groups.
            costs: Prices counts.
            budget: The limits.
            bounds: Lowest and highest sparsity of single groups.
            max_sparsity: Highest sparsity of the others.

        Raises:
            ConfigError: A bound is of an unknown group, or not `0 <= low <= high < 1`; or the highest is not below 1.
            InfeasibleBudgetError: Not even the highest sparsities meet the budget.
        """
        bounds = dict(bounds or {})
        unknown = [name for name in bounds if name not in structure.names]
        if unknown:
            reasons = {locked.name: f"it is locked: {locked.reason}" for locked in structure.locked}
            reason = reasons.get(unknown[0], f"the network's groups are {', '.join(structure.names)}")
            raise ConfigError(f"a bound is given for group '{unknown[0]}', but {reason}")
        for name, (low, high) in bounds.items():
            if not 0 <= low <= high < 1:
                raise ConfigError(f"`0 <= low <= high < 1` must hold for bounds, but got {name}=({low}, {high})")
        if not 0 <= max_sparsity < 1:
            raise ConfigError(f"`0 <= max_sparsity < 1` must hold, but got max_sparsity={max_sparsity}")
        pairs = [bounds.get(group.name, (0.0, max_sparsity)) for group in structure]
        lower = np.array([g.count(low) for g, (low, _) in zip(structure, pairs, strict=True)], dtype=np.int64)
        upper = np.array([g.count(high) for g, (_, high) in zip(structure, pairs, strict=True)], dtype=np.int64)
        feasible = cls(structure, costs, budget, lower, upper)
        if feasible.utilisation(upper) > 1:
            feasible._refuse()
        return feasible

    @cached_property
    def sizes(self) -> Removed:
        """`(groups,)` elements in every group."""
        return np.array([group.size for group in self.structure], dtype=np.int64)

    @cached_property
    def multiples(self) -> Removed:
        """`(groups,)` what stays of a group is a multiple of this."""
        return np.array([group.multiple for group in self.structure], dtype=np.int64)

    @cached_property
    def _least(self) -> Removed:
        return np.array([group.least for group in self.structure], dtype=np.int64)

    def settled(self, removed: npt.NDArray[np.floating[Any]]) -> Removed:
        """Return the nearest counts that groups allow, within the bounds."""
        counts = nearest(removed, self.sizes, self.multiples, self._least)
        settled: Removed = np.minimum(np.maximum(counts, self.lower), self.upper)
        return settled

    def fewer(self, removed: Removed) -> Removed:
        """Return for every group the next lower count that it allows, or 0."""
        lower = removed - self.multiples
        return np.where(lower < self.sizes % self.multiples, 0, lower)

    @property
    def smallest(self) -> Cost:
        """The smallest cost that can be reached."""
        return self.costs.cost(self.upper)

    def utilisation(self, removed: Removed) -> float:
        """Return the largest share of a limit that these counts use; at most 1 where the budget is met."""
        return max(self.costs.used(metric, removed) / allowed for metric, allowed in self._allowed)

    def utilisations(self, removed: Removed) -> npt.NDArray[np.float64]:
        """Return the same of several policies: `(policies,)` of counts `(policies, groups)`."""
        shares = np.stack([self.costs.used_by(metric, removed) / allowed for metric, allowed in self._allowed])
        largest: npt.NDArray[np.float64] = shares.max(axis=0)
        return largest

    @cached_property
    def _allowed(self) -> tuple[tuple[str, float], ...]:
        return tuple((limit.metric, limit.absolute(self.costs.dense)) for limit in self._limits)

    @property
    def _limits(self) -> tuple[Limit, ...]:
        return self.budget.limits or (Limit("macs", 1.0, relative=True),)

    def policy(self, removed: Removed) -> Policy:
        """Return counts as a policy."""
        return self.structure.policy(dict(zip(self.structure.names, removed.tolist(), strict=True)))

    def removed(self, policy: Mapping[str, float]) -> Removed:
        """Return a policy as counts, moved into the bounds."""
        return self.settled(np.array([policy.get(name, 0.0) for name in self.structure.names]) * self.sizes)

    def project(self, sparsities: npt.NDArray[np.float64], target: float = 1.0) -> Removed:
        """Return the counts nearest to the sparsities, on a line, that use just the target share of the budget.

        From where they stand all sparsities move by the same fraction of the way to their upper bounds, if they cost
        too much, or to their lower bounds, if they cost less than the target.

        Args:
            sparsities: `(groups,)`.
            target: Share of the budget to use; the result uses at most this, where the upper bounds allow.
        """
        start = np.clip(sparsities * self.sizes, self.lower, self.upper)

        def at(move: float) -> Removed:
            end = self.upper if move > 0 else self.lower
            return self.settled(start + abs(move) * (end - start))

        low, high = (0.0, 1.0) if self.utilisation(at(0.0)) > target else (-1.0, 0.0)
        if self.utilisation(at(low)) <= target:
            return at(low)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.utilisation(at(middle)) > target else (low, middle)
        return at(high)

    def uniform(self, target: float = 1.0) -> Removed:
        """Return the counts of the lowest sparsity, the same for all groups within their bounds, that uses no more.

        Several groups round to another count at the same sparsity, which may save more than is asked for; those then
        keep their element, in order, whose removal is not needed, so that uniform is compared at its full cost. Blocks
        have no sparsity to share: they stay, unless the target can't be met with them.

        Args:
            target: Share of the budget to use at most.
        """
        blocks = np.array([group.block is not None for group in self.structure])
        if (blocks & (self.lower < self.upper)).any():
            whole = replace(self, upper=np.where(blocks, self.lower, self.upper))
            if whole.utilisation(whole.upper) <= target:
                return whole.uniform(target)

        def at(sparsity: float) -> Removed:
            return self.settled(sparsity * self.sizes)

        low, high = 0.0, 1.0
        if self.utilisation(at(low)) <= target:
            return at(low)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.utilisation(at(middle)) > target else (low, middle)
        counts, looser = at(high), at(low)
        for index in np.flatnonzero(looser < counts).tolist():
            trial = counts.copy()
            trial[index] = looser[index]
            counts = trial if self.utilisation(trial) <= target else counts
        return counts

    def target(self, share: float) -> float:
        """Return the utilisation at a share of the way from the smallest network, 0, to the whole budget, 1."""
        return (1 - share) * self.utilisation(self.upper) + share

    def interval(
        self, removed: Removed, index: int, undecided: npt.NDArray[np.bool_], target: float = 1.0
    ) -> tuple[int, int]:
        """Return the fewest and most elements that group `index` may lose, given what is decided.

        The fewest is what still meets the budget when all other undecided groups lose the most they may.

        Args:
            removed: `(groups,)` counts; those of undecided groups are not looked at.
            index: The group to decide.
            undecided: `(groups,)` whether a group is still to be decided.
            target: Share of the budget to use at most.
        """
        counts = np.where(undecided, self.upper, removed)

        def fits(count: int) -> bool:
            counts[index] = count
            return self.utilisation(counts) <= target

        lowest, high = int(self.lower[index]), int(self.upper[index])
        if fits(lowest):
            return lowest, high
        allowed = self._above(index)
        place = bisect_left(allowed, True, key=fits)
        return (allowed[place] if place < len(allowed) else high), high

    def allowed(self, index: int) -> Removed:
        """Return the counts that group `index` may lose, the fewest first."""
        return np.array([self.lower[index], *self._above(index)], dtype=np.int64)

    def _above(self, index: int) -> range:
        lowest, multiple = int(self.lower[index]), int(self.multiples[index])
        first = lowest + multiple if lowest else int(self.sizes[index]) % multiple or multiple
        return range(first, int(self.upper[index]) + 1, multiple)

    def limited(self, share: float) -> Self:
        """Return the set under a share of the budget; it may be empty: see `utilisation` of the upper bounds."""
        return replace(self, budget=Budget(tuple(replace(limit, value=share * limit.value) for limit in self._limits)))

    def without(self, groups: Collection[str]) -> Self:
        """Return the set in which these groups lose as little as they may, if the budget can be met so; else this."""
        stays = np.array([name in groups for name in self.structure.names])
        less = replace(self, upper=np.where(stays, self.lower, self.upper))
        return less if less.utilisation(less.upper) <= 1 else self

    def _refuse(self) -> None:
        for limit in self.budget.limits:
            dense, allowed = limit.used(self.costs.dense), limit.absolute(self.costs.dense)
            reached = limit.used(self.smallest)
            if reached > allowed:
                unit = "ms latency" if limit.metric == "latency" else limit.metric
                locked = ", ".join(group.name for group in self.structure.locked) or "none"
                raise InfeasibleBudgetError(
                    f"the budget {limit} allows {allowed:,.10g} {unit}, but the smallest network within the "
                    f"bounds has {reached:,.10g} ({reached / dense:.1%} of {dense:,.10g}); "
                    f"raise the budget or the bounds' highest sparsity (locked groups: {locked})"
                )
