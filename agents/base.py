'''What an agent is. The agents themselves are one file each, and the registry names them.

A whole agent that tries policies near the best one so far, under the name "hill" once it is in the registry::

    class HillAgent:
        """Moves one coordinate of the best point."""

        objectives: ClassVar[Objectives] = "one"

        def __init__(self, *, step: float = 0.2) -> None:
            self.step = step

        def run(self, env: PruningEnv, *, seed: int) -> None:
            """Search until the evaluations are spent."""
            rng = np.random.default_rng(seed)
            best = rng.random(len(env.space.dimensions))
            highest = env.value(env.evaluate(env.space.decode(best)))
            while True:
                point = best.copy()
                index = rng.integers(len(point))
                point[index] = np.clip(point[index] + rng.normal(0, self.step), 0, 1)
                value = env.value(env.evaluate(env.space.decode(point)))
                if value > highest:
                    best, highest = point, value

An agent that decides group by group uses `env.reset` and `env.step` instead. Both wait for each candidate; to keep
several workers busy, an agent proposes with `env.submit` or `env.decide` and takes the results `in_turn`.
`autoprune.testing.AgentContract` checks an agent; another package offers one through the entry-point group
`autoprune.agents`.
'''

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Literal, Protocol, TypeVar

from autoprune.environment import PruningEnv
from autoprune.evaluation import Candidate, Result

__all__ = ["Agent", "Objectives", "in_turn"]

T = TypeVar("T")
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
        same results must lead to the same policies, in any process: a search is resumed by running the agent again.

        Args:
            env: What to search; `env.evaluations` says how many evaluations there are to plan for.
            seed: The only source of randomness; global generators stay as they are.
        """
        ...


def in_turn(env: PruningEnv, begun: Iterable[tuple[T, Result]]) -> Iterator[tuple[T, Candidate]]:
    """Yield candidates in the order in which they were begun, with `env.at_once` of them under way.

    So what an agent knows when it proposes does not depend on which evaluation was the fastest: a search with several
    workers can be repeated.

    Args:
        env: Says how many are under way.
        begun: Begins an evaluation whenever it is asked for the next, `(what to remember, what waits for it)`.
    """
    under_way = deque[tuple[T, Result]]()
    for one in begun:
        under_way.append(one)
        if len(under_way) >= env.at_once:
            remembered, result = under_way.popleft()
            yield remembered, result()
    for remembered, result in under_way:
        yield remembered, result()
