"""One threshold on what a group may lose alone, as FastNAS, PaddleSlim and AIMET choose, and other measures of it."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import ClassVar, final

import numpy as np

from autoprune import separable
from autoprune.agents.base import Objectives, budgets, measured_by, plane, spend_is_free
from autoprune.environment import PruningEnv
from autoprune.policy import Policy
from autoprune.sensitivity import Curve
from autoprune.separable import Loss

__all__ = ["ThresholdAgent"]


@final
class ThresholdAgent:
    """Removes from every group as much as costs it the same alone; then tries other measures of what it costs.

    FastNAS (NVIDIA ModelOpt, `modelopt/torch/prune/fastnas.py`), PaddleSlim, and AIMET in what it calls greedy
    selection (`aimet_common/comp_ratio_select.py`) measure each group alone, and find by bisection the largest drop
    that, allowed to every group, just meets the budget. None looks at a whole policy.
    That policy comes first here, with the drop of the loss, which is less noisy than that of the accuracy; with one
    evaluation there is no other. Each further evaluation is of a policy that one threshold gives on another measure:

    * between the loss and the accuracy that is lost, each relative to the most that a group can lose of it;
    * between the drop itself and the drop for the share of the multiply-adds that the group touches, so that a group
      that saves more may lose more, as in the knapsack.

    The two are taken from an even sequence over all combinations. Draws nothing at random; where the share of the
    budget is free, there is a policy of the first measure for each of evenly smaller shares. See `Agent` for the
    contract.

    Raises:
        ConfigError: No sensitivity was measured.
    """

    objectives: ClassVar[Objectives] = "one"

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Evaluate until the evaluations are spent, or the measures lead to nothing new."""
        measured = measured_by(env)
        if spend_is_free(env):
            for feasible in budgets(env):
                env.submit(measured.threshold(feasible))
            return
        seen: set[Policy] = set()
        for policy in _thresholds(env):
            if policy not in seen:
                seen.add(policy)
                env.submit(policy)


def _thresholds(env: PruningEnv) -> Iterator[Policy]:
    """Yield the policies of equal drops, by one measure after another."""
    measured, structure = measured_by(env), env.feasible.structure
    whole = env.feasible.without(measured.missing(structure))
    drops = [_drops(measured.curve(group.name)) for group in structure]
    most_loss, most_accuracy = np.max(
        [drop(top) for drop, top in zip(drops, whole.upper.tolist(), strict=True)], axis=0
    )
    shares = [max(env.feasible.costs.macs_share(group.name), 1e-9) for group in structure]

    def measure(index: int, of_accuracy: float, of_cost: float) -> Loss:
        scale = math.pow(shares[index], -of_cost)

        def lost(removed: float) -> float:
            loss, accuracy = drops[index](removed)
            relative = loss / (most_loss or 1.0)
            if most_accuracy:
                relative += of_accuracy * (accuracy / most_accuracy - relative)
            return float(scale * relative)

        return lost

    for of_accuracy, of_cost in plane(env.evaluations):
        yield separable.threshold(whole, [measure(index, of_accuracy, of_cost) for index in range(len(structure))])


def _drops(curve: Curve) -> Callable[[float], tuple[float, float]]:
    """Return what removing so many elements alone loses, of the loss and of the accuracy."""

    @functools.cache
    def drops(removed: float) -> tuple[float, float]:
        return curve.loss_at(removed) - curve.loss_at(0), curve.drop_at(removed)

    return drops
