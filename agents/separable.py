"""The separable solution: one policy from the measured losses of single groups, and no search."""

from typing import ClassVar, final

from autoprune.agents.base import Objectives, budgets, measured_by
from autoprune.environment import PruningEnv

__all__ = ["SeparableAgent"]


@final
class SeparableAgent:
    """Evaluates the policy that would be best if groups did not interact, and returns.

    The knapsack of SPDY (Frantar & Alistarh 2022, https://arxiv.org/abs/2201.13096, section 3.2) over the curves that
    the analyzer measured, made convex and interpolated: the least sum of losses under the budget, by dynamic
    programming (`autoprune.separable.allocate` says what becomes of costs that do not add up). A search on top of it is
    the agent `spdy`.

    Where the share of the budget is free, there is a policy for each of evenly smaller shares. Draws nothing at random;
    see `Agent` for the contract.

    Raises:
        ConfigError: No sensitivity was measured.
    """

    objectives: ClassVar[Objectives] = "one"

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Evaluate one policy a budget, and return."""
        measured = measured_by(env)
        for feasible in budgets(env):
            env.submit(measured.allocate(feasible))
