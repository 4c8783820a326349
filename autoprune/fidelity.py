"""How well what is known early of a candidate ranks it: Kendall's tau with what was measured last.

A search that measures cheaply is worth as much as its order of the candidates is, most of all its order of the better
half, where a pick is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from autoprune.evaluation import Candidate

__all__ = ["FEWEST", "Agreement", "Tau", "agreements", "kendall"]

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
        last: The fidelity that it is compared with.
        candidates: How many.
        all: Over all of them.
        better: Over those that are at least at the median at the last fidelity.
    """

    known: str
    last: str
    candidates: int
    all: Tau
    better: Tau

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
    drawn = [kendalltau(a[rows], b[rows]).statistic for rows in rng.integers(len(a), size=(draws, len(a)))]
    known = [value for value in drawn if not np.isnan(value)]
    low, high = np.quantile(known, (0.025, 0.975)) if known else (np.nan, np.nan)
    return Tau(float(kendalltau(a, b).statistic), float(low), float(high))


def agreements(candidates: Sequence[Candidate], known: Mapping[str, Sequence[float]]) -> tuple[Agreement, ...]:
    """Return how all that was known of candidates early ranks them, the least first.

    Args:
        candidates: Measured ones; those at a lower fidelity than most are left out.
        known: What is known besides measurements, by name: a value for every candidate, higher is better.
    """
    last = max((c.fidelity for c in candidates), key=[c.fidelity for c in candidates].count, default="none")
    chosen = [number for number, candidate in enumerate(candidates) if candidate.fidelity == last]
    if len(chosen) < FEWEST:
        return ()
    accuracies = np.array([candidates[number].accuracy for number in chosen])
    sources = {name: [values[number] for number in chosen] for name, values in known.items()}
    for rung in dict.fromkeys(m.fidelity for number in chosen for m in candidates[number].measurements[:-1]):
        measured = [candidates[number].at(rung) for number in chosen]
        if all(m is not None for m in measured):
            sources[rung] = [m.accuracy for m in measured if m is not None]
    better = accuracies >= np.median(accuracies)
    return tuple(
        Agreement(
            name,
            last,
            len(chosen),
            kendall(values, accuracies.tolist()),
            kendall(np.asarray(values)[better].tolist(), accuracies[better].tolist()),
        )
        for name, values in sources.items()
    )
