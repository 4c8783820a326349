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

An agent that decides group by group uses `env.reset` and `env.step` instead. `autoprune.testing.AgentContract` checks
an agent; another package offers one through the entry-point group `autoprune.agents`.
'''

from typing import ClassVar, Literal, Protocol

from autoprune.environment import PruningEnv

__all__ = ["Agent", "Objectives"]

Objectives = Literal["one", "several"]
"""Whether an agent makes the best of the whole budget, or trades accuracy for cost below it as well."""


class Agent(Protocol):
    """Proposes policies; made with keyword settings only, all of which have defaults.

    Attributes:
        objectives: "one": the search space always fills the budget, and `env.value` is what to raise. "several": the
            space has a dimension for the share of the budget, and `env.objectives` is what to trade.
    """

    objectives: ClassVar[Objectives]

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Propose policies to `env.evaluate`, or step through `env`, until either raises `SearchOver`.

        Called once for a search. `SearchOver` must pass through; an agent may return earlier when it has nothing left
        to propose. A policy that was evaluated before costs nothing and gives the same candidate. The same seed and the
        same results must lead to the same policies, in any process: a search is resumed by running the agent again.

        Args:
            env: What to search; `env.evaluations` says how many evaluations there are to plan for.
            seed: The only source of randomness; global generators stay as they are.
        """
        ...
