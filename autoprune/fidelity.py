"""How well what is known early of a candidate ranks it: Kendall's tau with what was measured last.

A search that measures cheaply is worth as much as its order of the candidates is, most of all its order of the better
half, where a pick is made.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from autoprune.evaluation import Candidate

__all__ = ["FEWEST", "Agreement", "Tau", "agreement", "agreements", "kendall"]

FEWEST = 8
"""Candidates below which nothing is said."""
_DRAWS = 400  # of the bootstrap


class Tau(NamedTuple):
    """Kendall's tau-b, and the bounds of its bootstrap interval of 95 %; NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """How one kind of knowledge ranks candidates.

    Attributes:
        known: What is known: "predicted" (from moments), "sensitivity" (from one-group cells), or a fidelity.
        steps: Gradient steps before it was measured.
        seconds: Time that a candidate took from the dense network to there, median; None where that is not known.
        last: The fidelity that it is compared with.
        last_steps: Gradient steps before that.
        last_seconds: Time that a candidate took to there, median.
        candidates: How many.
        all: Over all of them.
        better: Over those that are at least at the median at the last fidelity.
    """

    known: str
    steps: int
    seconds: float | None
    last: str
    last_steps: int
    last_seconds: float | None
    candidates: int
    all: Tau
    better: Tau

    @property
    def relied_on(self) -> float:
        """The tau that may be relied on: the lower bound over all, or that of the better half where it is lower.

        The bound, since a dozen candidates tell tau to within 0.3, and one that is too high loses the best where one
        that is too low costs time. The better half, since the best has to be told from the next best, and there the
        order is often weaker; half a dozen candidates leave it no interval worth the name. 0 where neither is defined.
        """
        return min((tau for tau in (self.all.low, self.better.value) if not np.isnan(tau)), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        values = asdict(self)
        return values | {key: [None if np.isnan(v) else round(v, 4) for v in values[key]] for key in ("all", "better")}


def kendall(values: Sequence[float], last: Sequence[float], draws: int = _DRAWS) -> Tau:
    """Return Kendall's tau-b between two lists, the interval from lists drawn with replacement.

    Kendall 1938; tau-b, which allows for ties.
    """
    from scipy.stats import kendalltau  # loads slowly

    a, b = np.asarray(values, dtype=np.float64), np.asarray(last, dtype=np.float64)
    rng = np.random.default_rng(0)
    draw = rng.integers(len(a), size=(draws, len(a)))
    drawn = [kendalltau(a[rows], b[rows], method="asymptotic").statistic for rows in draw]  # no exact p-value: slow
    known = [value for value in drawn if not np.isnan(value)]
    low, high = np.quantile(known, (0.025, 0.975)) if known else (np.nan, np.nan)
    return Tau(float(kendalltau(a, b).statistic), float(low), float(high))


def agreements(rungs: Sequence[Sequence[Candidate]], known: Mapping[str, Sequence[float]]) -> tuple[Agreement, ...]:
    """Return how all that was known of candidates early ranks them on the first rung, and each rung on those above it.

    Args:
        rungs: The measured candidates of each rung of the ladder, the first one's first, matched by their ids; on that
            one, those at a lower fidelity than most are left out.
        known: What is known of the first rung's besides measurements, by name: a value for every candidate, higher is
            better.
    """
    found = list(_on_the_first(rungs[0], known)) if rungs else []
    for level, upper in enumerate(rungs):
        for lower in rungs[:level]:
            there = {candidate.id: candidate for candidate in lower}
            found += _agreement([(there[candidate.id], candidate) for candidate in upper if candidate.id in there])
    return tuple(found)


def agreement(
    pairs: Sequence[tuple[Candidate, Candidate]], values: Sequence[float], last: Sequence[float]
) -> Agreement:
    """Return how candidates' values on one rung rank those on a later one.

    Args:
        pairs: Each candidate, as it is on the two rungs; one at least.
        values: Its value on the first, higher is better.
        last: On the second.
    """
    lower, upper = pairs[0]
    return Agreement(
        lower.fidelity,
        lower.steps,
        _seconds([candidate for candidate, _ in pairs]),
        upper.fidelity,
        upper.steps,
        _seconds([candidate for _, candidate in pairs]),
        len(pairs),
        *_taus(values, last),
    )


def _on_the_first(candidates: Sequence[Candidate], known: Mapping[str, Sequence[float]]) -> Iterator[Agreement]:
    last = max((c.fidelity for c in candidates), key=[c.fidelity for c in candidates].count, default="none")
    chosen = [number for number, candidate in enumerate(candidates) if candidate.fidelity == last]
    if len(chosen) < FEWEST:
        return
    accuracies = [candidates[number].accuracy for number in chosen]
    sources = {(name, 0): [values[number] for number in chosen] for name, values in known.items()}
    for rung in dict.fromkeys(m.fidelity for number in chosen for m in candidates[number].measurements[:-1]):
        measured = [m for number in chosen if (m := candidates[number].at(rung)) is not None]
        if len(measured) == len(chosen):
            sources[rung, measured[0].steps] = [m.accuracy for m in measured]
    steps, seconds = candidates[chosen[0]].steps, _seconds([candidates[number] for number in chosen])
    for (name, before), values in sources.items():
        yield Agreement(name, before, None, last, steps, seconds, len(chosen), *_taus(values, accuracies))


def _agreement(pairs: Sequence[tuple[Candidate, Candidate]]) -> list[Agreement]:
    """Return how accuracies on one rung rank those on a later one; nothing of a few candidates."""
    if len(pairs) < FEWEST:
        return []
    return [agreement(pairs, [lower.accuracy for lower, _ in pairs], [upper.accuracy for _, upper in pairs])]


def _taus(values: Sequence[float], last: Sequence[float]) -> tuple[Tau, Tau]:
    """Return Kendall's tau over all, and over those that are at least at the median at last."""
    better = np.asarray(last) >= np.median(last)
    return kendall(values, last), kendall(np.asarray(values)[better].tolist(), np.asarray(last)[better].tolist())


def _seconds(candidates: Sequence[Candidate]) -> float:
    return round(median(candidate.seconds for candidate in candidates), 4)
