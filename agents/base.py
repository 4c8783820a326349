'''What an agent is. The agents themselves are one file each, and the registry names them.

A whole agent that tries policies near the best one so far, under the name "hill" once it is in the registry::

    class HillAgent:
        """Moves every coordinate of the best point a little."""

        objectives: ClassVar[Objectives] = "one"

        def __init__(self, *, step: float = 0.2) -> None:
            self.step = step

        def run(self, env: PruningEnv, *, seed: int) -> None:
            """Search until the evaluations are spent."""
            rng = np.random.default_rng(seed)
            best = rng.random(len(env.space.dimensions))
            highest = env.value(env.evaluate(env.space.decode(best)))
            while True:
                point = np.clip(best + rng.normal(0, self.step, len(best)), 0, 1)
                value = env.value(env.evaluate(env.space.decode(point)))
                if value > highest:
                    best, highest = point, value

An agent that decides group by group uses `env.reset` and `env.step` instead. Both wait for each candidate; to keep
several workers busy, an agent proposes with `env.submit` or `env.decide` and takes the results `in_turn`.
`autoprune.testing.AgentContract` checks an agent; another package offers one through the entry-point group
`autoprune.agents`.
'''

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from autoprune.cost import FeasibleSet
from autoprune.environment import Proposed, PruningEnv
from autoprune.errors import ConfigError
from autoprune.evaluation import Candidate
from autoprune.scoring import ascending
from autoprune.sensitivity import SensitivityReport

__all__ = ["Agent", "Objectives", "budgets", "in_turn", "limited", "measured_by", "plane", "scores_of", "spend_is_free"]

T = TypeVar("T")
_SLACK = 1e-9  # share of the budget; less than any element costs, more than rounding errors
Objectives = Literal["one", "several"]
"""Whether an agent makes the best of the whole budget, or trades accuracy for cost below it as well."""


class Agent(Protocol):
    """Proposes policies; made with keyword settings only, all of which have defaults.

    A class variable is enough for `objectives`. "one": the search space always fills the budget, and `env.value` is
    what to raise. "several": the space has a dimension for the share of the budget, and `env.objectives` is what to
    trade.
    """

    @property
    def objectives(self) -> Objectives:
        """What the agent is after."""
        ...

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Propose policies to `env.evaluate` or `env.submit`, or step through `env`, until one raises `SearchOver`.

        Called once for a search. `SearchOver` must pass through; an agent may return earlier when it has nothing left
        to propose. A policy that was evaluated before costs nothing and gives the same candidate. The same seed and the
        same results must lead to the same policies, in any process: a search is resumed by running the agent again. An
        agent with a seed of its own, which ignores this one, says so, `ignores_seed = True`: it is not compared over
        several seeds.

        Args:
            env: What to search; `env.evaluations` says how many evaluations there are to plan for.
            seed: The only source of randomness; global generators stay as they are.
        """
        ...


def in_turn(env: PruningEnv, begun: Iterable[tuple[T, Proposed]]) -> Iterator[tuple[T, Candidate]]:
    """Yield candidates in the order in which they were begun, with `env.at_once` policies under way.

    So what an agent knows when it proposes does not depend on which evaluation was the fastest: a search with several
    workers can be repeated. A policy that comes again keeps no worker busy, and takes no place: one whose candidate was
    yielded before, by this call, is told at once, and one that is under way with the first; as whoever proposes it
    needs to learn something, what was begun first is waited for then.

    Args:
        env: Says how many are under way.
        begun: Begins an evaluation whenever it is asked for the next, `(what to remember, what was proposed)`.
    """
    under_way: dict[str, list[tuple[T, Proposed]]] = {}
    known: set[str] = set()

    def first() -> Iterator[tuple[T, Candidate]]:
        policy_id = next(iter(under_way))
        known.add(policy_id)
        for remembered, proposed in under_way.pop(policy_id):
            yield remembered, proposed()

    for remembered, proposed in begun:
        if proposed.id in known:
            yield remembered, proposed()
            continue
        again = proposed.id in under_way
        under_way.setdefault(proposed.id, []).append((remembered, proposed))
        if again or len(under_way) >= env.at_once:
            yield from first()
    while under_way:
        yield from first()


def spend_is_free(env: PruningEnv) -> bool:
    """Say whether policies may use less than the whole budget, as where a drop of accuracy is tolerated."""
    return "spend" in env.space.dimensions[-1:]


def limited(env: PruningEnv, share: float) -> FeasibleSet:
    """Return the policies that use a share of the budget at most.

    Args:
        env: What is searched.
        share: From 0, the smallest network that can be reached, to 1, the whole budget; what is outside is moved there.
    """
    smallest = env.feasible.utilisation(env.feasible.upper)
    return env.feasible.limited(min(1.0, smallest + max(0.0, share) * (1 - smallest) + _SLACK))


def budgets(env: PruningEnv) -> Iterator[FeasibleSet]:
    """Yield what an agent that solves a budget, rather than search, is to solve: one set of policies an evaluation.

    That is the whole budget; where its share is free, as many evenly smaller ones as there are evaluations.

    Args:
        env: What is searched.
    """
    if not spend_is_free(env):
        yield env.feasible
        return
    for share in np.linspace(1.0, 0.0, env.evaluations):
        yield limited(env, float(share))


def measured_by(env: PruningEnv) -> SensitivityReport:
    """Return what the analyzer measured.

    Args:
        env: What is searched.

    Raises:
        ConfigError: It measured nothing.
    """
    if env.measured is None or len(env.measured.missing(env.feasible.structure)) == len(env.feasible.structure):
        raise ConfigError(
            "this agent goes by the groups' sensitivity, and none was measured; measure some, or use another"
        )
    return env.measured


def scores_of(env: PruningEnv) -> list[npt.NDArray[np.float64]]:
    """Return how much the elements of each group matter, in the order in which they go (see `scoring.ascending`).

    Args:
        env: What is searched.

    Returns:
        `(size,)` for each group, in the structure's order.

    Raises:
        ConfigError: A group was not scored.
    """
    missing = [name for name in env.feasible.structure.names if name not in env.scores]
    if missing:
        raise ConfigError(f"this agent ranks elements by their scores, but group '{missing[0]}' has none; use another")
    return [ascending(group, env.scores[group.name]) for group in env.feasible.structure]


def plane(evaluations: int) -> Iterator[tuple[float, float]]:
    """Yield points of the unit square, the first of them (0, 0), spread evenly however many are taken (Halton's).

    Args:
        evaluations: There are four times as many points, of which an agent leaves out those that bring nothing new.
    """
    for number in range(4 * evaluations):
        yield _mirrored(number, 2), _mirrored(number, 3)


def _mirrored(number: int, base: int) -> float:
    """Return a number with its digits mirrored at the point: 0, 1/2, 1/4, 3/4, 1/8, ... in base 2."""
    result, digit = 0.0, 1.0
    while number:
        digit /= base
        number, rest = divmod(number, base)
        result += digit * rest
    return result
