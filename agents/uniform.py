"""Uniform sparsity: the same for all groups, at the budget and below. What hand-made pruning does."""

from typing import ClassVar, final

import numpy as np

from autoprune.agents.base import Objectives
from autoprune.environment import PruningEnv
from autoprune.search_spaces.uniform import Uniform

__all__ = ["UniformAgent"]


@final
class UniformAgent:
    """Evaluates one sparsity for all at the whole budget, then at evenly smaller shares of it; draws nothing at random.

    The search space is not looked at. See `Agent` for the contract.
    """

    objectives: ClassVar[Objectives] = "one"

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Evaluate as many shares as there are evaluations, and return."""
        space = Uniform(env.feasible, spend=(0.0, 1.0))
        for share in np.linspace(1.0, 0.0, env.evaluations):
            env.submit(space.decode([float(share)]))
