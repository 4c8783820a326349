"""SPDY: the separable solution over measured losses, and a search over one coefficient a group on top of it."""

from typing import ClassVar, final

from autoprune.agents.base import Objectives, measured_by
from autoprune.agents.coefficients import search_coefficients
from autoprune.environment import PruningEnv
from autoprune.errors import ConfigError

__all__ = ["SPDYAgent"]

_POWERS = (1.0, 1.5, 2.0)


@final
class SPDYAgent:
    """Corrects the measured losses of single groups by what whole policies measure; see `Agent` for the contract.

    The paper is Frantar & Alistarh 2022, https://arxiv.org/abs/2201.13096; the search is in
    `autoprune.agents.coefficients`, with where it differs. The first policy is the agent `separable`'s. Then come
    exponents of the groups' losses above 1, as errors grow on each other where several groups are pruned, and then
    coefficients. The paper's search (section 3.3) takes each layer's loss for a coefficient times the square of the
    sparsity; where curves were measured, their shape is known better than that.

    Args:
        step: Standard deviation of a change of the coefficients' logarithms.

    Raises:
        ConfigError: `step` is not positive, or no sensitivity was measured.
    """

    objectives: ClassVar[Objectives] = "one"

    def __init__(self, *, step: float = 0.7) -> None:
        if not step > 0:
            raise ConfigError(f"`step > 0` must hold, but got step={step}")
        self.step = step

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent, or nothing new is to be found."""
        measured, structure = measured_by(env), env.feasible.structure
        alternatives = [[measured.loss_of(name, power) for name in structure.names] for power in _POWERS]
        search_coefficients(env, alternatives, unknown=measured.missing(structure), step=self.step, seed=seed)
