"""How agents stand after the same number of evaluations, over seeds: means, intervals, tests, and words.

Pure arithmetic on what each search saw; who searched what, and where it lies, is elsewhere. What is called noise here
is that of agents' seeds: task and validation split are one and the same for all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from autoprune.errors import ConfigError
from autoprune.pareto import Direction, dominates, hypervolume

__all__ = [
    "LEVEL",
    "NEARLY",
    "RANDOM",
    "Contrasts",
    "Difference",
    "Interval",
    "Standing",
    "Standings",
    "Trace",
    "holm",
    "paired",
    "standings",
    "t_interval",
]

LEVEL: Final = 0.95
"""Of intervals; and 1 minus it is the level of tests."""
NEARLY: Final = 0.99
"""Share of the final accuracy up to which evaluations are counted."""
RANDOM: Final = "random"
"""The agent that every other is compared with."""
_OBJECTIVES: Final[Mapping[str, Direction]] = {"accuracy": "max", "macs": "min"}


class Interval(NamedTuple):
    """A mean over seeds and its interval; the bounds are None where there is one seed."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Trace:
    """What one search saw, in the order in which its agent proposed.

    Attributes:
        accuracies: One for each distinct policy; NaN for one that failed or is over the budget.
        macs: Likewise.
        seconds: That the agent and its evaluations took, one after another.
    """

    accuracies: tuple[float, ...]
    macs: tuple[float, ...]
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if len(self.accuracies) != len(self.macs):
            raise ConfigError(
                f"a trace has an accuracy and MACs for every policy, but got {len(self.accuracies)} and "
                f"{len(self.macs)}"
            )


@dataclass(frozen=True, slots=True)
class Standing:
    """What one agent reached, a number for each seed.

    Attributes:
        agent: Its name.
        accuracies: Of the pick: the best that it proposed; 0 where nothing was measured.
        hypervolumes: That its policies dominate, in accuracy and the share of MACs saved (see `autoprune.pareto`).
        nearly: Evaluations until the best so far had `NEARLY` of its final accuracy.
        used: Evaluations that it asked for.
        seconds: That it and its evaluations took, one after another.
        tuned: Accuracy of the picks on the validation split after full fine-tuning, where that was done.
        tests: On the test split.
    """

    agent: str
    accuracies: tuple[float, ...]
    hypervolumes: tuple[float, ...]
    nearly: tuple[int, ...]
    used: tuple[int, ...]
    seconds: tuple[float, ...]
    tuned: tuple[float, ...] | None = None
    tests: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object: for each number its mean, its interval, and the values."""
        numbers = {
            "accuracy": self.accuracies,
            "hypervolume": self.hypervolumes,
            "evaluations_to_99": self.nearly,
            "evaluations": self.used,
            "seconds": self.seconds,
            "finetuned": self.tuned,
            "test": self.tests,
        }
        told = {
            name: t_interval(values)._asdict() | {"values": list(values)}
            for name, values in numbers.items()
            if values is not None
        }
        return {"agent": self.agent, **told}


@dataclass(frozen=True, slots=True)
class Difference:
    """What one agent has more than another, in pairs of the same seed.

    Attributes:
        agent: The one.
        other: The other.
        by: The mean difference and its own interval.
        p: Of a two-sided paired t test; None where there is one seed.
        corrected: The same by Holm, for all differences to this other.
    """

    agent: str
    other: str
    by: Interval
    p: float | None
    corrected: float | None

    @property
    def clear(self) -> bool:
        """Whether it is larger than the noise."""
        return self.corrected is not None and self.corrected < 1 - LEVEL

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        tested = {"p": self.p, "p_holm": self.corrected, "clear": self.clear}
        return {"agent": self.agent, "other": self.other, **self.by._asdict(), **tested}


@dataclass(frozen=True, slots=True)
class Contrasts:
    """All agents against random, and against the best, by one measure.

    Attributes:
        best: The agent with the highest mean.
        to_random: Of every other agent, the highest mean first.
        to_best: Likewise.
    """

    best: str
    to_random: tuple[Difference, ...]
    to_best: tuple[Difference, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        lists = {"to_random": self.to_random, "to_best": self.to_best}
        return {"best": self.best} | {name: [one.to_dict() for one in several] for name, several in lists.items()}


@dataclass(frozen=True, slots=True)
class Standings:
    """The outcome of a comparison.

    Attributes:
        evaluations: That every search had.
        seeds: How many.
        table: The agents, the highest mean accuracy first.
        curves: Agent → "accuracy" and "hypervolume" → the best so far after 1, 2, … evaluations, over seeds.
        picked: Differences of the picked accuracy; None where random is not among the agents.
        dominated: Of the hypervolume, likewise.
        tested: Differences on the test split, where it was read.
        words: What can and can't be concluded.
    """

    evaluations: int
    seeds: int
    table: tuple[Standing, ...]
    curves: Mapping[str, Mapping[str, tuple[Interval, ...]]]
    picked: Contrasts | None
    dominated: Contrasts | None
    tested: Contrasts | None
    words: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "evaluations": self.evaluations,
            "seeds": self.seeds,
            "table": [standing.to_dict() for standing in self.table],
            "differences": {
                name: None if found is None else found.to_dict()
                for name, found in (
                    ("picked", self.picked),
                    ("hypervolume", self.dominated),
                    ("test", self.tested),
                )
            },
            "words": list(self.words),
            "curves": {
                agent: {
                    name: {bound: [getattr(one, bound) for one in course] for bound in Interval._fields}
                    for name, course in courses.items()
                }
                for agent, courses in self.curves.items()
            },
        }


def t_interval(values: Sequence[float]) -> Interval:
    """Return the mean and Student's t interval of 95 %, from the standard deviation over the values.

    Raises:
        ConfigError: There is no value.
    """
    if not values:
        raise ConfigError("a mean needs a value, but got none")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, None, None)
    from scipy.stats import t  # loads slowly

    reach = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * _error(values)
    return Interval(mean, mean - reach, mean + reach)


def paired(mine: Sequence[float], theirs: Sequence[float], samples: int = 0) -> tuple[Interval, float | None]:
    """Return the mean of `mine - theirs` with its t interval, and the p of a two-sided paired t test.

    Where the difference is the same for every seed, p is 0, or 1 if there is none. With one seed there is no p.

    Args:
        mine: One value for each seed.
        theirs: Likewise.
        samples: From which each is a share, as an accuracy is of right ones. Differences of a few samples may be equal
            for all seeds by rounding alone, so the standard deviation is taken to be no less than that of rounding two
            values to 1 of so many. 0: they are exact.

    Raises:
        ConfigError: They are not as many.
    """
    if len(mine) != len(theirs):
        raise ConfigError(f"pairs need as many values on both sides, but got {len(mine)} and {len(theirs)}")
    differences = [_rounded(a - b) for a, b in zip(mine, theirs, strict=True)]
    by = t_interval(differences)
    if by.low is None:
        return by, None
    from scipy.stats import t  # loads slowly

    freedom = len(differences) - 1
    error = _error(differences)
    least = 1 / (samples * math.sqrt(6 * len(differences))) if samples else 0.0  # of two roundings, uniform each
    if error < least:
        error, reach = least, least * float(t.ppf((1 + LEVEL) / 2, freedom))
        by = Interval(by.mean, by.mean - reach, by.mean + reach)
    if error == 0:
        return by, 1.0 if by.mean == 0 else 0.0
    return by, float(2 * t.sf(abs(by.mean) / error, freedom))


def holm(probabilities: Sequence[float]) -> list[float]:
    """Return p-values corrected for being several.

    Holm 1979, "A simple sequentially rejective multiple test procedure".
    The smallest is multiplied by how many there are, the next by one less, and so on; none is smaller than one that
    was smaller before.
    """
    corrected = [1.0] * len(probabilities)
    highest = 0.0
    for place, index in enumerate(sorted(range(len(probabilities)), key=lambda index: probabilities[index])):
        highest = max(highest, min(1.0, probabilities[index] * (len(probabilities) - place)))
        corrected[index] = highest
    return corrected


def standings(
    traces: Mapping[str, Sequence[Trace]],
    evaluations: int,
    dense_macs: float,
    *,
    tuned: Mapping[str, Sequence[float]] | None = None,
    tests: Mapping[str, Sequence[float]] | None = None,
    samples: tuple[int, int] = (0, 0),
) -> Standings:
    """Return how agents stand.

    Args:
        traces: Agent → one for each seed, in the same order for all.
        evaluations: That every search had; one that ended earlier keeps what it had.
        dense_macs: Of the dense network, from which the hypervolume counts.
        tuned: Agent → accuracy of each seed's pick after full fine-tuning, on the validation split.
        tests: Agent → the same on the test split.
        samples: Of the validation and the test split; 0 where accuracies are exact (see `paired`).

    Raises:
        ConfigError: There is no agent or no seed, agents have other numbers of seeds, or a search has more evaluations.
    """
    counts = {len(several) for several in traces.values()}
    if len(counts) != 1 or not min(counts):
        raise ConfigError(f"every agent needs as many searches as the others, at least one, but got {sorted(counts)}")
    most = max(len(trace.macs) for several in traces.values() for trace in several)
    if most > evaluations:
        raise ConfigError(f"searches of {evaluations} evaluations are compared, but one has {most}")
    table: list[Standing] = []
    curves: dict[str, dict[str, tuple[Interval, ...]]] = {}
    for agent, several in traces.items():
        best = [_best_so_far(trace, evaluations) for trace in several]
        volume = [_volume_so_far(trace, evaluations, dense_macs) for trace in several]
        curves[agent] = {"accuracy": _over_seeds(best), "hypervolume": _over_seeds(volume)}
        table.append(
            Standing(
                agent,
                accuracies=tuple(course[-1] for course in best),
                hypervolumes=tuple(course[-1] for course in volume),
                nearly=tuple(_nearly_there(course) for course in best),
                used=tuple(len(trace.macs) for trace in several),
                seconds=tuple(trace.seconds for trace in several),
                tuned=None if tuned is None else tuple(tuned[agent]),
                tests=None if tests is None else tuple(tests[agent]),
            )
        )
    table.sort(key=lambda standing: (-t_interval(standing.accuracies).mean, standing.agent))
    picked = _contrasts({standing.agent: standing.accuracies for standing in table}, samples[0])
    # an area over at most the whole cost: of accuracies that are rounded, it is known at least as well as they are
    dominated = _contrasts({standing.agent: standing.hypervolumes for standing in table}, samples[0])
    tested = None if tests is None else _contrasts({s.agent: s.tests for s in table if s.tests is not None}, samples[1])
    words = _words(table, picked, dominated, tested, evaluations)
    return Standings(evaluations, counts.pop(), tuple(table), curves, picked, dominated, tested, tuple(words))


# -- courses --------------------------------------------------------------------------------------------------------


class _Point(NamedTuple):
    accuracy: float
    macs: float


def _best_so_far(trace: Trace, evaluations: int) -> list[float]:
    best: list[float] = []
    for accuracy in trace.accuracies:
        best.append(max([*best[-1:], 0.0 if math.isnan(accuracy) else accuracy]))
    return _stretched(best, evaluations)


def _volume_so_far(trace: Trace, evaluations: int, dense_macs: float) -> list[float]:
    members: list[_Point] = []
    volume: list[float] = []
    for point in map(_Point, trace.accuracies, trace.macs):
        if not math.isnan(point.accuracy) and not any(dominates(one, point, _OBJECTIVES) for one in members):
            members = [*(one for one in members if not dominates(point, one, _OBJECTIVES)), point]
        volume.append(hypervolume(members, {"accuracy": 0.0, "macs": dense_macs}))
    return _stretched(volume, evaluations)


def _stretched(course: list[float], evaluations: int) -> list[float]:
    """Return a course that goes on as it ended."""
    return course + (course[-1:] or [0.0]) * (evaluations - len(course))


def _nearly_there(course: Sequence[float]) -> int:
    return next(number for number, value in enumerate(course, 1) if value >= NEARLY * course[-1])


def _over_seeds(courses: Sequence[Sequence[float]]) -> tuple[Interval, ...]:
    return tuple(t_interval(values) for values in zip(*courses, strict=True))


# -- differences ----------------------------------------------------------------------------------------------------


def _contrasts(values: Mapping[str, Sequence[float]], samples: int) -> Contrasts | None:
    if RANDOM not in values:
        return None
    ordered = sorted(values, key=lambda agent: (-t_interval(values[agent]).mean, agent))
    best = ordered[0]
    return Contrasts(best, _differences(values, ordered, RANDOM, samples), _differences(values, ordered, best, samples))


def _differences(
    values: Mapping[str, Sequence[float]], ordered: Sequence[str], other: str, samples: int
) -> tuple[Difference, ...]:
    agents = [agent for agent in ordered if agent != other]
    found = [paired(values[agent], values[other], samples) for agent in agents]
    known = [p for _, p in found if p is not None]
    corrected: Sequence[float | None] = holm(known) if known else [None] * len(found)
    return tuple(
        Difference(agent, other, by, p, one) for agent, (by, p), one in zip(agents, found, corrected, strict=True)
    )


def _error(values: Sequence[float]) -> float:
    """Return the standard error of a mean."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _rounded(difference: float) -> float:
    """Return a difference without what subtracting floats adds: the same for all seeds must not look like noise."""
    return round(difference, 12)


# -- words ----------------------------------------------------------------------------------------------------------


def _words(
    table: Sequence[Standing],
    picked: Contrasts | None,
    dominated: Contrasts | None,
    tested: Contrasts | None,
    evaluations: int,
) -> list[str]:
    lead = table[0]
    by = t_interval(lead.accuracies)
    seeds = len(lead.accuracies)
    if by.low is None or by.high is None:
        words = [
            f"{lead.agent} picks best with this seed: {_percent(by.mean)} %.",
            "With one seed there are no intervals, and nothing says which differences are larger than the noise; "
            "compare with more seeds.",
        ]
    else:
        words = [
            f"{lead.agent} picks best on average over {seeds} seeds: {_percent(by.mean)} % ({_percent(by.low)} to "
            f"{_percent(by.high)})."
        ]
        if picked is not None:
            words += _verdicts(picked, "picks")
        if dominated is not None and dominated.to_random:
            words.append(_of_volumes(dominated.to_random))
    if tested is not None:
        best = next(standing.tests for standing in table if standing.agent == tested.best)
        assert best is not None
        words.append(
            f"Fine-tuned alike, {tested.best}'s picks are the best on the test split: "
            f"{_percent(t_interval(best).mean)} %."
        )
        if by.low is not None:
            words += [f"On the test split, {word}" for word in _verdicts(tested, "has")]
    for standing in table:
        if min(standing.used) < evaluations:
            fewest, most = min(standing.used), max(standing.used)
            asked = f"{most}" if fewest == most else f"{fewest} to {most}"
            words.append(f"{standing.agent} proposed {asked} policies of {evaluations}, and had no more to propose.")
    return words


def _verdicts(contrasts: Contrasts, verb: str) -> list[str]:
    """Return which differences are larger than the noise, and which are not."""
    words = []
    families = [(contrasts.to_random, RANDOM)]
    if contrasts.best != RANDOM:
        rest = tuple(one for one in contrasts.to_best if one.agent != RANDOM)
        families.append((rest, contrasts.best))
    for differences, other in families:
        if differences and other != RANDOM:
            words.append(f"{other} is the best by these same numbers, which favours it in what follows.")
        for one in differences:
            if one.clear:
                much, bounds = _by(one.by)
                words.append(f"{one.agent} {verb} {much} than {other} {bounds}.")
        unclear = [_unclear(one) for one in differences if not one.clear]
        if unclear:
            words.append(f"{_listed(unclear)} can't be told apart from {other}.")
    return words


def _of_volumes(to_random: Sequence[Difference]) -> str:
    """Return in one sentence which hypervolumes are larger than random's, and which are smaller."""
    groups: dict[str, list[str]] = {"ahead": [], "behind": [], "can't be told apart": []}
    for one in to_random:
        side = ("ahead" if one.by.mean > 0 else "behind") if one.clear else "can't be told apart"
        low, high = one.by.low or 0.0, one.by.high or 0.0
        by = _signed(one.by.mean, plus="+", text=_volume)
        groups[side].append(f"{one.agent} ({by}, {_signed(low, text=_volume)} to {_signed(high, text=_volume)})")
    clauses = []
    for side, agents in groups.items():
        verb = "" if side.startswith("can't") else "is " if len(agents) == 1 else "are "
        clauses += [f"{_listed(agents)} {verb}{side}"] if agents else []
    return f"In hypervolume against {RANDOM}, {'; '.join(clauses)}."


def _by(by: Interval) -> tuple[str, str]:
    """Return how much more or less, and the interval seen from that side."""
    size = _points(abs(by.mean))
    low, high = sorted((by.low or 0.0, by.high or 0.0), reverse=by.mean < 0)
    sign = -1 if by.mean < 0 else 1
    much = f"{size} {'point' if size == '1.0' else 'points'} {'less' if by.mean < 0 else 'more'}"
    return much, f"({_signed(sign * low)} to {_signed(sign * high)})"


def _unclear(one: Difference) -> str:
    low, high = one.by.low or 0.0, one.by.high or 0.0
    return f"{one.agent} ({_signed(one.by.mean, plus='+')} points, {_signed(low)} to {_signed(high)})"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(difference: float) -> str:
    """Return points with a digit more where one would show nothing."""
    points = 100 * difference
    return f"{points:.1f}" if points == 0 or abs(points) >= 0.095 else f"{points:.2f}"


def _volume(difference: float) -> str:
    return f"{difference:.3f}"


def _signed(difference: float, plus: str = "", text: Callable[[float], str] = _points) -> str:
    size = text(abs(difference))
    if float(size) == 0:
        return size
    return f"{'−' if difference < 0 else plus}{size}"
