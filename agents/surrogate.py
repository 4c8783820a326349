"""Evolution that asks a model first: of many level switches, the one of which most is expected is evaluated."""

import bisect
from collections.abc import Iterator
from typing import ClassVar, Final, final

import numpy as np
import numpy.typing as npt

from autoprune.agents.base import Objectives, in_turn, spend_is_free
from autoprune.agents.evolution import neighbour
from autoprune.agents.regression import GaussianProcess, Kernel
from autoprune.analytic import POWER
from autoprune.cost import Removed
from autoprune.environment import Proposed, PruningEnv
from autoprune.errors import ConfigError
from autoprune.policy import Policy
from autoprune.separable import Loss

__all__ = ["SurrogateAgent"]

_FEWEST: Final = 6  # values to expect anything from; until then a switch is as good as another
_MOST: Final = 200  # values, the best ones, that are gone by: time grows with their cube
_GROWN: Final = 1.1  # times as many values as when the hyperparameters were chosen: they are chosen anew


@final
class SurrogateAgent:
    """Draws many level switches of the best policies, and evaluates the most promising; see `Agent` for the contract.

    The mutation is that of `evolution` (EvoPress, Sieberling et al. 2024, https://arxiv.org/abs/2410.14649): what some
    groups lose more, others get back. But an evaluation takes a second where drawing takes a millisecond, so a Gaussian
    process (see `autoprune.agents.regression`) that has learnt from all evaluations so far says what to expect of each
    draw, and the one with the highest upper confidence bound is evaluated (Srinivas et al. 2010,
    https://arxiv.org/abs/0912.3995); the next is drawn with that one known.

    A policy is told to the process as the square roots of its groups' losses, since a difference matters as much as
    what it does to the network, and, as a trend, as the logarithm of their sum. The losses are those that moments
    predict; where there are none, those of single groups that were measured; and else as the square of the sparsity.

    The first policies are the warm starts; without any, the uniform one.

    Args:
        drawn: Switches of which one is evaluated.
        survivors: How many of the best are switched from.
        optimism: Standard deviations above what is expected that count.
        step: Largest share of a group's range that one switch moves it.
        warm_start: Whether the first policies are what the analyzer suggests.

    Raises:
        ConfigError: A setting is not positive; `optimism` may be 0.
    """

    objectives: ClassVar[Objectives] = "one"

    def __init__(
        self,
        *,
        drawn: int = 100,
        survivors: int = 4,
        optimism: float = 1.0,
        step: float = 0.3,
        warm_start: bool = True,
    ) -> None:
        for name, value in {"drawn": drawn, "survivors": survivors, "step": step}.items():
            if not value > 0:
                raise ConfigError(f"`{name} > 0` must hold, but got {name}={value}")
        if not optimism >= 0:
            raise ConfigError(f"`optimism >= 0` must hold, but got optimism={optimism}")
        self.drawn = drawn
        self.survivors = survivors
        self.optimism = optimism
        self.step = step
        self.warm_start = warm_start

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent, or no switch of any policy leads to a new one."""
        rng = np.random.default_rng(seed)
        learnt = _Learnt(env)
        seen: set[Policy] = set()

        def begun(removed: Removed) -> tuple[Removed, Proposed]:
            policy = env.feasible.policy(removed)
            seen.add(policy)
            return removed, env.submit(policy)

        def started() -> Iterator[tuple[Removed, Proposed]]:
            starts = [env.feasible.removed(policy) for policy in env.warm_starts] if self.warm_start else []
            for removed in starts or [env.feasible.uniform()]:
                if env.feasible.policy(removed) not in seen:
                    yield begun(removed)

        def switched() -> Iterator[tuple[Removed, Proposed]]:
            while True:
                parents = learnt.best(self.survivors)
                draws: dict[Policy, Removed] = {}
                for number in range(self.drawn if len(learnt) >= _FEWEST else 1):
                    found = neighbour(env, parents[number % len(parents)], rng, seen, step=self.step, tries=1)
                    if found is not None:
                        draws[env.feasible.policy(found)] = found
                if not draws:  # all near to the best is known
                    further = (neighbour(env, removed, rng, seen, step=self.step) for removed in learnt.best())
                    found = next((removed for removed in further if removed is not None), None)
                    if found is None:
                        return
                    draws[env.feasible.policy(found)] = found
                chosen = learnt.most_promising(list(draws.values()), self.optimism)
                learnt.under_way.append(chosen)
                yield begun(chosen)

        for proposals in (started(), switched()):
            for removed, candidate in in_turn(env, proposals):
                learnt.add(removed, env.value(candidate))


@final
class _Learnt:
    """What was evaluated, and what to expect of what was not.

    Attributes:
        under_way: Counts of policies whose value is not known yet.
    """

    def __init__(self, env: PruningEnv) -> None:
        self.under_way: list[Removed] = []
        self._losses = _losses(env)
        self._scale = max([loss(top) for loss, top in zip(self._losses, env.feasible.upper.tolist(), strict=True)])
        self._cost = env.feasible.utilisation if spend_is_free(env) else None
        self._removed: list[Removed] = []
        self._values: list[float] = []
        self._order: list[int] = []  # of them, the best first; of equal ones, what was first evaluated
        self._kernel: Kernel | None = None
        self._chosen_of = 0

    def add(self, removed: Removed, value: float) -> None:
        """Learn the value of a policy."""
        self.under_way = [other for other in self.under_way if not np.array_equal(other, removed)]
        self._removed.append(removed)
        self._values.append(value)
        bisect.insort(self._order, len(self._values) - 1, key=lambda index: -self._values[index])

    def __len__(self) -> int:
        return len(self._values)

    def best(self, number: int | None = None) -> list[Removed]:
        """Return the best of what was evaluated, so many at most, the best first."""
        return [self._removed[index] for index in self._order[:number]]

    def most_promising(self, draws: list[Removed], optimism: float) -> Removed:
        """Return the counts with the highest upper confidence bound.

        Args:
            draws: At least one `(groups,)`.
            optimism: Standard deviations above what is expected.
        """
        if len(draws) == 1:
            return draws[0]
        told = self._order[:_MOST]
        points, trend = self._told([self._removed[index] for index in told])
        if len(self._values) >= _GROWN * self._chosen_of:
            self._kernel, self._chosen_of = None, len(self._values)
        process = GaussianProcess(points, trend, np.array([self._values[index] for index in told]), self._kernel)
        self._kernel = process.kernel
        if self.under_way:
            process.believe(*self._told(self.under_way))
        expected, deviation = process.predict(*self._told(draws))
        bounds = np.round(expected + optimism * deviation, 9)  # the first of equals, however they were rounded
        return draws[int(bounds.argmax())]

    def _told(self, several: list[Removed]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return what the process is told of policies: coordinates, and the trend."""
        losses = np.array(
            [[loss(count) for loss, count in zip(self._losses, r.tolist(), strict=True)] for r in several]
        )
        losses = np.maximum(losses, 0.0) / (self._scale or 1.0)
        points = np.sqrt(losses)
        if self._cost is not None:
            points = np.column_stack([points, [self._cost(removed) for removed in several]])
        return points, np.log((losses ** (POWER / 2)).sum(1) + 1e-9)


def _losses(env: PruningEnv) -> list[Loss]:
    """Return every group's loss by the number of elements removed: predicted, or measured, or the sparsity squared.

    Groups of which nothing is known lose as much as the average of the others, if they go as far.
    """
    structure = env.feasible.structure
    known: dict[str, Loss] = {}
    predicted, measured = env.predicted, env.measured
    if predicted is not None:
        known = {name: predicted.loss_of(name, 1.0) for name in structure.names if name not in predicted.missing}
    if not known and measured is not None:
        missing = measured.missing(structure)
        known = {name: measured.loss_of(name) for name in structure.names if name not in missing}
    highest = [known[group.name](group.size) for group in structure if group.name in known]
    typical = float(np.mean(highest)) if highest and np.mean(highest) > 0 else 1.0
    return [known.get(group.name) or _square(group.size, typical) for group in structure]


def _square(size: int, highest: float) -> Loss:
    return lambda removed: highest * (removed / size) ** 2
