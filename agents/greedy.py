"""NetAdapt: step by step, the group that gives something up at the least loss gives it up."""

import math
from typing import ClassVar, final

import numpy as np

from autoprune.agents.base import Objectives, in_turn, spend_is_free
from autoprune.cost import FeasibleSet, Removed
from autoprune.environment import Proposed, PruningEnv
from autoprune.policy import Policy

__all__ = ["GreedyAgent", "lowered"]


@final
class GreedyAgent:
    """Walks from the dense network to the budget in equal steps of the cost, each by one group.

    Yang et al. 2018, NetAdapt, https://arxiv.org/abs/1804.03230, algorithm 1: in every step each group in turn gives up
    just enough to save the step's share of the cost, all these networks are evaluated, and the most accurate is where
    the next step begins. Where it differs:

    * Networks on the way cost more than the budget, and are nothing that a search could hand back. So every one is
      completed before it is evaluated: what is left to save is shared out among all groups, each moving the same
      fraction of the way to its upper bound (`FeasibleSet.project`). Only what the group gave up is kept. What is
      compared so is not the network on the way, but what can still be made of it; and it may be stopped at any time.
    * There are as many steps as the evaluations allow: a step saves what is left to save, divided by the evaluations
      that are left for each group that can still give something up, rounded down. (The paper has steps of a fixed size,
      and fine-tunes in between; recovery is the evaluator's here.) Groups that touch many multiply-adds are tried
      first, in case there are fewer evaluations than groups.
    * A group that can't save the whole step gives up all it may, and is a candidate nevertheless: completed, it costs
      what the others do.

    Where the share of the budget is free, as where a drop of accuracy is tolerated, what meets the budget is not
    completed, and only groups that can save the step are candidates, if any can: the walk goes on towards the smallest
    network, always to the most accurate, until the value falls. Draws nothing at random; see `Agent` for the contract.
    """

    objectives: ClassVar[Objectives] = "one"

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Walk until the budget is met, or the evaluations are spent."""
        feasible, free = env.feasible, spend_is_free(env)
        end = feasible.utilisation(feasible.upper) if free else 1.0
        submitted: dict[Policy, Proposed] = {}
        standing, highest = feasible.lower.copy(), -math.inf

        def begun(given_up: Removed) -> tuple[Removed, Proposed]:
            over = feasible.utilisation(given_up) > 1
            whole = given_up if free and not over else feasible.project(given_up / feasible.sizes)
            policy = feasible.policy(whole)
            if policy not in submitted:
                submitted[policy] = env.submit(policy)
            return given_up, submitted[policy]

        def able() -> list[int]:
            indices = np.flatnonzero(standing < feasible.upper).tolist()
            return sorted(indices, key=lambda index: -feasible.costs.macs_share(feasible.structure.names[index]))

        if feasible.utilisation(standing) <= end or not able():
            begun(standing)
        while feasible.utilisation(standing) > end and (indices := able()):
            steps = max(1, (env.evaluations - len(submitted)) // len(indices))
            used = feasible.utilisation(standing)
            target = used + (end - used) / steps
            best, value, accuracy = standing, -math.inf, -math.inf
            tried = [lowered(feasible, standing, index, target) for index in indices]
            if free:
                tried = [counts for counts in tried if feasible.utilisation(counts) <= target] or tried
            for given_up, candidate in in_turn(env, map(begun, tried)):
                reached = env.value(candidate)
                preferred = candidate.accuracy if free and candidate.failure is None else reached
                if preferred > accuracy:
                    best, value, accuracy = given_up, reached, preferred
            if free and value < highest:
                return
            standing, highest = best, value


def lowered(feasible: FeasibleSet, removed: Removed, index: int, target: float) -> Removed:
    """Return the counts once one group has lost just enough for a target, or all that it may.

    Args:
        feasible: Bounds, and the budget of which the target is a share.
        removed: `(groups,)`; it is left as it is.
        index: Of the group.
        target: Share of the budget to use at most; above 1 on the way to it.
    """
    counts = removed.copy()
    fewest, _ = feasible.limited(target).interval(counts, index, np.zeros(len(counts), dtype=np.bool_))
    counts[index] = max(int(counts[index]), fewest)
    return counts
