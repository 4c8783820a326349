"""The search over coefficients that SPDY puts on top of a separable solution; agents hand in whose losses they weigh.

SPDY (Frantar & Alistarh 2022, https://arxiv.org/abs/2201.13096, section 3.3) does not search over policies but over one
coefficient a group: the losses, each times its coefficient, are added up, the policy of the least sum under the budget
is solved for, and that is evaluated. Whatever is proposed so fills the budget, and a change of one coefficient moves
sparsity between all groups in the best way that the losses know.

It differs here, because a search has tens of evaluations where SPDY has about a thousand:

* It starts from what the losses say as they are, not from the best of 100 random coefficients.
* A change is a factor drawn from a normal distribution of its logarithm, whose spread shrinks, where SPDY draws some
  coefficients anew from [0, 1], ever fewer of them.
* A change that leads to a policy which is known already is not evaluated; the next is wider.
* SPDY's dynamic program takes costs for a sum over layers, which the multiply-adds of neighbours are not; here it is
  solved again around each solution, with what single groups save there, and meets the exact budget
  (`autoprune.separable.allocate`).
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from autoprune.agents.base import in_turn, limited, spend_is_free
from autoprune.environment import Proposed, PruningEnv
from autoprune.policy import Policy
from autoprune.separable import Loss, allocate

__all__ = ["search_coefficients"]

_WIDEST = 100.0  # times the step: where that leads to nothing new, there is nothing
_HEAVIEST = 20.0  # logarithm of a coefficient
_SHARES = (1.0, 0.75, 0.5, 0.25)  # of the budget, where it is free how much of it is used

_Point = tuple[npt.NDArray[np.float64], float]  # logarithms of the coefficients, share of the budget


def search_coefficients(
    env: PruningEnv,
    alternatives: Sequence[Sequence[Loss]],
    *,
    unknown: Collection[str],
    step: float,
    seed: int,
) -> None:
    """Search until the evaluations are spent, or nothing new is to be found.

    First comes the policy of each alternative as it is; the coefficients then weigh the best one's losses. A random
    change of the best coefficients so far is kept if its policy measures better.

    Args:
        env: What to search. Where the share of the budget is free, it is one more coordinate.
        alternatives: Losses of all groups, in the structure's order; the most trusted come first.
        unknown: Groups of which the losses know nothing; they stay whole, if the budget can be met without them.
        step: Standard deviation of a change of the coefficients' logarithms; it shrinks to a tenth.
        seed: Of the changes.
    """
    rng = np.random.default_rng(seed)
    free = spend_is_free(env)
    groups = len(env.feasible.structure)
    best: _Point = (np.zeros(groups), 1.0)
    losses, highest = alternatives[0], -np.inf
    seen: set[Policy] = set()

    def solve(weighed: Sequence[Loss], point: _Point) -> Policy:
        feasible = limited(env, point[1]) if free else env.feasible
        return allocate(feasible.without(unknown), _scaled(weighed, np.exp(point[0])))

    def solved() -> Iterator[tuple[tuple[Sequence[Loss], float], Proposed]]:
        for share in _SHARES if free else (1.0,):
            for weighed in alternatives if share == 1.0 else alternatives[:1]:
                policy = solve(weighed, (np.zeros(groups), share))
                seen.add(policy)
                yield (weighed, share), env.submit(policy)

    for (weighed, share), candidate in in_turn(env, solved()):
        value = env.value(candidate)
        if value > highest:
            losses, best, highest = weighed, (best[0], share), value

    def changed() -> Iterator[tuple[_Point, Proposed]]:
        wider = 1.0
        while wider < _WIDEST:
            shrunk = step * wider * 0.1 ** min(1.0, len(seen) / max(1, env.evaluations))
            some = rng.random(groups) < max(0.3, 3 / groups)
            logs = np.clip(best[0] + rng.normal(0, shrunk, groups) * some, -_HEAVIEST, _HEAVIEST)
            share = min(1.0, max(0.0, best[1] + rng.normal(0, 0.2 * shrunk))) if free else 1.0
            policy = solve(losses, (logs, share))
            if policy in seen:
                wider *= 1.1
                continue
            wider = 1.0
            seen.add(policy)
            yield (logs, share), env.submit(policy)

    for point, candidate in in_turn(env, changed()):
        value = env.value(candidate)
        if value > highest:
            best, highest = point, value


def _scaled(losses: Sequence[Loss], factors: npt.NDArray[np.float64]) -> list[Loss]:
    def times(loss: Loss, factor: float) -> Callable[[float], float]:
        return lambda removed: factor * loss(removed)

    return [times(loss, factor) for loss, factor in zip(losses, factors.tolist(), strict=True)]
