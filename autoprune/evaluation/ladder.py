"""The ladder of fidelities: many candidates are measured cheaply, few of them again after more and more fine-tuning.

Successive halving (Jamieson & Talwalkar 2016, https://arxiv.org/abs/1502.07943) after the agent has finished, so that
what an agent learns from is all of one fidelity. Nothing here evaluates.

Optuna's pruners are not what stops candidates: they need `report` on the one objective of a trial that runs, and stop
it in the middle. Here agents of all kinds, with one objective or several, learn from one fidelity, and candidates are
promoted after the search. Nor are `recalibrated` candidates promoted to `reconstructed`: a search uses one of the two
(`--recover`), and `benchmarks/closed_form.md` shows which ranks better, and which is better per second.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from autoprune.evaluation.candidate import Candidate
from autoprune.pareto import Direction, sorted_by_layers

__all__ = ["FEWEST", "FEWEST_SAMPLED", "HIGHEST", "Promotion", "Rung", "best", "promotion", "rungs", "sample"]

FEWEST: Final = 4
"""Candidates below which no rung is worth the time: measuring tells so few apart as they are."""
HIGHEST: Final = 0.5
"""Share of the candidates that climb, at most."""
FEWEST_SAMPLED: Final = 8
"""Candidates from which the agreement of two fidelities is told, at least."""
_SAMPLED = 12  # at most
_LOWEST = 0.1  # share that climbs, however well the fidelities agree
_SURE = 0.9  # how often the best of all climbs
_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Rung:
    """A fidelity above the first.

    Attributes:
        level: 1 for the lowest.
        steps: Gradient steps of fine-tuning.
        candidates: How many of the agent's are promoted to it, at most.
    """

    level: int
    steps: int
    candidates: int


def rungs(candidates: int, steps: int, promote: float) -> tuple[Rung, ...]:
    """Return the rungs that candidates climb: each has the share `promote` of them, for as much longer.

    So each takes about as long as the one below it. None, where all are fine-tuned as they are proposed.

    Args:
        candidates: On the ground.
        steps: Gradient steps of the first rung.
        promote: In (0, 0.5], or 1.
    """
    found: list[Rung] = []
    while steps > 0 and promote < 1 and (candidates := int(promote * candidates + 1e-9)) >= FEWEST:
        found.append(Rung(len(found) + 1, round(steps / promote ** len(found)), candidates))
    return tuple(found)


def best(
    candidates: Sequence[Candidate], number: int, aim: Callable[[Candidate], float] | Mapping[str, Direction]
) -> list[Candidate]:
    """Return the candidates to promote, the best first.

    Args:
        candidates: Measured ones.
        number: How many.
        aim: What is to be raised; or the objectives where they are traded for each other: then layer by layer of
            non-dominated ones (see `autoprune.pareto.sorted_by_layers`).
    """
    if isinstance(aim, Mapping):
        return sorted_by_layers(candidates, aim)[:number]
    return sorted(candidates, key=lambda candidate: (-aim(candidate), candidate.macs, candidate.id))[:number]


def sample(ranked: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates from which the agreement of two fidelities is told: evenly from the best to the worst.

    Args:
        ranked: The candidates, the best first; half of them are taken, 12 at most.
    """
    number = min(_SAMPLED, len(ranked) // 2)
    return [ranked[round(place)] for place in np.linspace(0, len(ranked) - 1, number)]


class Promotion(NamedTuple):
    """How many of the candidates climb.

    Attributes:
        share: Of all.
        holds: How often the best of all is then among them.
    """

    share: float
    holds: float


def promotion(tau: float, candidates: int) -> Promotion:
    """Return how many of the candidates have to climb for the best of all to be among them nine times in ten.

    As if both fidelities were jointly normal, whose correlation is sin(π τ / 2) (Greiner's relation; Kruskal 1958,
    "Ordinal measures of association", eq. 4.4). They are not: give a tau that errs on the low side
    (`autoprune.fidelity.Agreement.relied_on`).

    Args:
        tau: Kendall's tau between the fidelities.
        candidates: How many there are.

    Returns:
        Their share, in [0.1, 0.5], and of at least `FEWEST` candidates; half of them may hold the best less often.
    """
    correlation = math.sin(math.pi / 2 * min(1.0, max(0.0, tau)))
    rng = np.random.default_rng(0)
    early, other = rng.standard_normal((2, _DRAWS, candidates))
    late = correlation * early + math.sqrt(1 - correlation**2) * other
    places = (early >= np.take_along_axis(early, late.argmax(1)[:, None], 1)).sum(1)  # of the best at last, from 1
    share = min(HIGHEST, max(_LOWEST, FEWEST / candidates, float(np.quantile(places, _SURE)) / candidates))
    return Promotion(share, float((places <= int(share * candidates + 1e-9)).mean()))
