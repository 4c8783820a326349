"""An agent of your own: one class with one method, handed to `search` as it is."""

import sys
from typing import ClassVar

import numpy as np

import autoprune as ap
from autoprune.agents.base import Objectives
from autoprune.environment import PruningEnv


class HillClimber:
    """Tries points near the best one found, and stays where it is better."""

    objectives: ClassVar[Objectives] = "one"

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the environment raises `SearchOver`."""
        rng = np.random.default_rng(seed)
        best = rng.random(len(env.space.dimensions))
        highest = env.value(env.evaluate(env.space.decode(best)))
        while True:
            point = np.clip(best + rng.normal(0, 0.2, len(best)), 0, 1)
            value = env.value(env.evaluate(env.space.decode(point)))
            if value > highest:
                best, highest = point, value


if __name__ == "__main__":
    from own_model import make_task  # beside this file

    out = sys.argv[1] if len(sys.argv) > 1 else "runs/own_agent"
    result = ap.search(make_task(), agent=HillClimber(), budget="macs<=40%", candidates=8, finetune_steps=10, out=out)
    print(f"picked {result.to_dict()['picked']['accuracy']:.1%}, uniform {result.summary['uniform']['accuracy']:.1%}")
