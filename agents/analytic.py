"""Policies from predicted losses alone; what is measured of them then tunes the groups' weights in the sum."""

from collections.abc import Iterator
from typing import ClassVar, final

import numpy as np

from autoprune.agents.base import Objectives, in_turn
from autoprune.analytic import POWER, Analytic
from autoprune.environment import PruningEnv
from autoprune.errors import ConfigError
from autoprune.evaluation import Result
from autoprune.policy import Policy
from autoprune.separable import allocate

__all__ = ["AnalyticAgent"]

_POWERS = (POWER, 1.0, 2.0)
_WIDEST = 100.0  # times the step: where that leads to nothing new, there is nothing
_HEAVIEST = 20.0  # logarithm of a weight


@final
class AnalyticAgent:
    """Solves the search from moments, without evaluating; what evaluations there are correct the solution.

    The first policy is that of least predicted loss (see `autoprune.analytic`); with one evaluation there is no other.
    Then come other exponents of the groups' losses, and then weights of the groups in the sum: a random change of the
    best weights so far is kept if its policy measures better, in steps that shrink from `step` to a tenth of it, and
    grow where they lead to nothing new. SPDY (Frantar & Alistarh 2022, https://arxiv.org/abs/2201.13096, section 3.3)
    searches such weights too. See `Agent` for the contract.

    Args:
        step: Standard deviation of a change of the weights' logarithms.

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
        rng = np.random.default_rng(seed)
        best, power, highest = np.zeros(len(env.feasible.structure)), POWER, -np.inf
        seen: set[Policy] = set()

        def solved() -> Iterator[tuple[float, Result]]:
            for other in _POWERS:
                policy = predicted.allocate(env.feasible, other)
                seen.add(policy)
                yield other, env.submit(policy)

        for other, candidate in in_turn(env, solved()):
            value = env.value(candidate)
            if value > highest:
                power, highest = other, value

        def changed() -> Iterator[tuple[np.ndarray, Result]]:
            wider = 1.0
            while wider < _WIDEST:
                shrunk = self.step * wider * 0.1 ** min(1.0, len(seen) / max(1, env.evaluations))
                some = rng.random(len(best)) < max(0.3, 3 / len(best))
                weights = np.clip(best + rng.normal(0, shrunk, len(best)) * some, -_HEAVIEST, _HEAVIEST)
                policy = _weighted(env, predicted, power, weights)
                if policy in seen:
                    wider *= 1.1
                    continue
                wider = 1.0
                seen.add(policy)
                yield weights, env.submit(policy)

        for weights, candidate in in_turn(env, changed()):
            value = env.value(candidate)
            if value > highest:
                best, highest = weights, value


def _weighted(env: PruningEnv, predicted: Analytic, power: float, weights: np.ndarray) -> Policy:
    """Return the policy of least predicted loss with the groups' parts weighted by `exp(weights)`."""
    losses = [predicted.loss_of(group.name, power) for group in env.feasible.structure]
    scaled = [
        (lambda removed, loss=loss, scale=scale: scale * loss(removed))
        for loss, scale in zip(losses, np.exp(weights), strict=True)
    ]
    return allocate(env.feasible.without(predicted.missing), scaled)
