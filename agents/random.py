"""Random search: a point of the space, uniformly, again and again. The control that every agent has to beat."""

from typing import ClassVar, final

import numpy as np

from autoprune.agents.base import Objectives
from autoprune.environment import PruningEnv

__all__ = ["RandomAgent"]


@final
class RandomAgent:
    """Draws points uniformly; see `Agent` for the contract."""

    objectives: ClassVar[Objectives] = "one"

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""
        rng = np.random.default_rng(seed)
        while True:
            env.submit(env.space.decode(rng.random(len(env.space.dimensions)).tolist()))
