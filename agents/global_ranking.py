"""Global ranking: the least important elements of the whole network go, whatever group they are in."""

from collections.abc import Sequence
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt

from autoprune import separable
from autoprune.agents.base import Objectives, budgets, plane, scores_of, spend_is_free
from autoprune.environment import PruningEnv
from autoprune.policy import Policy

__all__ = ["GlobalRankingAgent", "normalised"]

Array = npt.NDArray[np.float64]


@final
class GlobalRankingAgent:
    """One threshold on the scores of all elements, normalised by group; then other ways to make groups comparable.

    Molchanov et al. 2019, Importance Estimation for Neural Network Pruning, https://arxiv.org/abs/1906.10771, rank all
    neurons by Taylor scores as they are; magnitudes are comparable between groups only once they are normalised, as
    Molchanov et al. 2017 do with the groups' norms (https://arxiv.org/abs/1611.06440, section 2.2), where also the cost
    of an element is taken into account. Elements go one by one there, with scores anew in between; here scores are
    those of the search's criterion, on the dense network. The criterion `obs` says in which order elements go, and
    nothing that could be compared between groups: with it, every group loses the same share.

    The first policy ranks scores relative to their group's mean, so that a large group's elements are not taken for
    less important (the groups' norms, of 2017, make them so); with one evaluation there is no other. Each further
    evaluation is of a policy that lies, in an even sequence over all combinations,

    * between scores relative to their group's mean and scores as they are;
    * between the score itself and the score for what the removal of an element saves.

    Draws nothing at random; where the share of the budget is free, there is a policy of the first kind for each of
    evenly smaller shares. What a search finds on top of it is the agent `legr`'s. See `Agent` for the contract.

    Raises:
        ConfigError: The elements were not scored.
    """

    objectives: ClassVar[Objectives] = "one"

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Evaluate until the evaluations are spent, or normalisations lead to nothing new."""
        scores = scores_of(env)
        if spend_is_free(env):
            for feasible in budgets(env):
                env.submit(separable.ranking(feasible, normalised(scores)))
            return
        saved = np.array([env.feasible.costs.macs_share(group.name) / group.size for group in env.feasible.structure])
        saved = np.maximum(saved, 1e-12)
        seen: set[Policy] = set()
        for as_they_are, by_cost in plane(env.evaluations):
            ranked = [
                score * scale for score, scale in zip(normalised(scores, 1 - as_they_are), saved**-by_cost, strict=True)
            ]
            policy = separable.ranking(env.feasible, ranked)
            if policy not in seen:
                seen.add(policy)
                env.submit(policy)


def normalised(scores: Sequence[Array], power: float = 1.0) -> list[Array]:
    """Return the scores of every group, divided by a power of their mean magnitude: 1 divides by it, 0 by nothing."""
    means = [float(np.abs(score).mean()) or 1.0 for score in scores]
    return [score / mean**power for score, mean in zip(scores, means, strict=True)]
