"""Policies from predicted losses alone; what is measured of them then tunes the groups' coefficients in the sum."""

from typing import ClassVar, final

from autoprune.agents.base import Objectives
from autoprune.agents.coefficients import search_coefficients
from autoprune.analytic import POWER
from autoprune.environment import PruningEnv
from autoprune.errors import ConfigError

__all__ = ["AnalyticAgent"]

_POWERS = (POWER, 1.0, 2.0)


@final
class AnalyticAgent:
    """Solves the search from moments, without evaluating; what evaluations there are correct the solution.

    The first policy is that of least predicted loss (see `autoprune.analytic`); with one evaluation there is no other.
    Then come other exponents of the groups' losses, and then coefficients of the groups in the sum, as in SPDY (see
    `autoprune.agents.coefficients`). See `Agent` for the contract.

    Args:
        step: Standard deviation of a change of the coefficients' logarithms.

    Raises:
        ConfigError: `step` is not positive, or the environment has no predicted losses.
    """

    objectives: ClassVar[Objectives] = "one"

    def __init__(self, *, step: float = 0.7) -> None:
        if not step > 0:
            raise ConfigError(f"`step > 0` must hold, but got step={step}")
        self.step = step

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent, or nothing new is to be found."""
        predicted = env.predicted
        if predicted is None:
            raise ConfigError(
                "the analytic agent needs to see what the groups' readers read, and saw none; use another agent"
            )
        names = env.feasible.structure.names
        alternatives = [[predicted.loss_of(name, power) for name in names] for power in _POWERS]
        search_coefficients(env, alternatives, unknown=predicted.missing, step=self.step, seed=seed)
