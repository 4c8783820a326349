"""LeGR: a learned global ranking, one scale and one shift a group, which serves every budget."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt

from autoprune import separable
from autoprune.agents.base import Objectives, in_turn, limited, scores_of, spend_is_free
from autoprune.agents.global_ranking import normalised
from autoprune.cost import FeasibleSet
from autoprune.environment import Proposed, PruningEnv
from autoprune.errors import ConfigError
from autoprune.policy import Policy
from autoprune.scoring import Scores, ascending

__all__ = ["LeGRAgent", "ranked"]

Array = npt.NDArray[np.float64]

_POPULATION = 0.16  # of the evaluations: 64 of 400 in the paper
_TOURNAMENT = 0.25  # of the population: 16 of 64
_MUTATED = 0.1  # of the groups
_TRIES = 50  # rankings in a row that lead to policies known already, before there is nothing left to find


@dataclass(frozen=True, slots=True, eq=False)
class _Individual:
    scales: Array
    shifts: Array
    share: float  # of the budget


@final
class LeGRAgent:
    """Learns how to compare elements of different groups; see `Agent` for the contract.

    Chin et al. 2020, Towards Efficient Model Compression via Learned Global Ranking, https://arxiv.org/abs/1904.12368,
    section 3 and algorithm 1: the score of an element becomes `scale · score + shift`, both its group's own, and the
    lowest of the whole network go until the budget is met. Scales and shifts are found by regularised evolution
    (Real et al. 2019): the best of a random quarter is mutated, and replaces the oldest, not the worst.
    As in the paper's code the logarithm of a scale has the standard deviation 1, and a shift that of the group's
    scores; a mutation changes a tenth of the groups, its factors shrink to a fifth, and population and tournament keep
    their proportion to the evaluations, 64 and 16 of 400. Where it differs:

    * Scores are those of the search's criterion relative to their group's mean; in the paper squared norms of filters.
      Coupled layers have one score, where the paper's code adds up what each says.
    * The ranking that changes nothing comes first, not last of the first population: it is the agent `global`'s first.
    * At least one group is mutated, and a ranking whose policy is known already is not evaluated.

    Args:
        population: Rankings alive together. None: 16 % of the evaluations, at least 4.

    Attributes:
        ranking: Group name → its scale and shift in the best ranking of the last run, for scores relative to the
            group's mean; empty before. `ranked` applies it, to any budget.

    Raises:
        ConfigError: `population` is below 2, or the elements were not scored.
    """

    objectives: ClassVar[Objectives] = "one"

    def __init__(self, *, population: int | None = None) -> None:
        if population is not None and population < 2:
            raise ConfigError(f"`population >= 2` must hold, but got population={population}")
        self.population = population
        self.ranking: Mapping[str, tuple[float, float]] = {}

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent, or no mutation leads to a new policy."""
        rng = np.random.default_rng(seed)
        scores = normalised(scores_of(env))
        spreads = np.array([float(score.std()) for score in scores])
        groups, free = len(scores), spend_is_free(env)
        size = self.population if self.population is not None else max(4, round(_POPULATION * env.evaluations))
        alive = deque[tuple[float, _Individual]](maxlen=size)  # the oldest leaves
        seen: set[Policy] = set()
        highest = -np.inf
        self.ranking = {}

        def drawn() -> _Individual:
            share = rng.random() if free else 1.0
            return _Individual(np.exp(rng.normal(0, 1, groups)), rng.normal(0, 1, groups) * spreads, share)

        def mutated(wider: int) -> _Individual:
            rivals = rng.integers(len(alive), size=max(2, round(_TOURNAMENT * len(alive))))
            _, parent = max((alive[rival] for rival in rivals.tolist()), key=lambda one: one[0])
            progress = len(seen) / (1.25 * max(1, env.evaluations))
            number = min(groups, max(1, round(_MUTATED * groups)) + wider)
            chosen = np.isin(np.arange(groups), rng.choice(groups, number, replace=False))
            factors = np.exp(rng.normal(0, max(0.2, 1 - progress), groups))
            shifts = rng.normal(0, 1, groups) * spreads
            share = min(1.0, max(0.0, parent.share + rng.normal(0, 0.1))) if free else 1.0
            return _Individual(
                np.where(chosen, parent.scales * factors, parent.scales),
                np.where(chosen, parent.shifts + shifts, parent.shifts),
                share,
            )

        def begun() -> Iterator[tuple[_Individual, Proposed]]:
            tries = 0
            individual = _Individual(np.ones(groups), np.zeros(groups), 1.0)
            while tries < _TRIES:
                feasible = limited(env, individual.share) if free else env.feasible
                policy = separable.ranking(feasible, _transformed(scores, individual.scales, individual.shifts))
                tries += 1
                if policy not in seen:
                    tries = 0
                    seen.add(policy)
                    yield individual, env.submit(policy)
                individual = drawn() if len(seen) < size or not alive else mutated(tries // 10)

        for individual, candidate in in_turn(env, begun()):
            value = env.value(candidate)
            alive.append((value, individual))
            if value > highest:
                highest = value
                pairs = zip(individual.scales.tolist(), individual.shifts.tolist(), strict=True)
                self.ranking = dict(zip(env.feasible.structure.names, pairs, strict=True))


def ranked(feasible: FeasibleSet, scores: Scores, ranking: Mapping[str, tuple[float, float]]) -> Policy:
    """Return the policy that a learned ranking gives for a budget, any budget.

    Args:
        feasible: The budget and the bounds.
        scores: Of each element, as the search that learned it had them.
        ranking: Group name → scale and shift, for scores relative to the group's mean.
    """
    sorted_scores = normalised([ascending(group, scores[group.name]) for group in feasible.structure])
    scales, shifts = np.array([ranking[name] for name in feasible.structure.names]).T
    return separable.ranking(feasible, _transformed(sorted_scores, scales, shifts))


def _transformed(scores: Sequence[Array], scales: Array, shifts: Array) -> list[Array]:
    return [scale * score + shift for score, scale, shift in zip(scores, scales, shifts, strict=True)]
