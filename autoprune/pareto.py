"""The front of non-dominated candidates, its hypervolume, and picking one of it; pure functions on plain numbers.

How a candidate was measured, and what a budget means, belongs elsewhere: a budget arrives here as a predicate.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, Protocol, TypeVar

import numpy as np

from autoprune.errors import ConfigError

__all__ = [
    "OBJECTIVES",
    "Direction",
    "Measured",
    "dominates",
    "front",
    "hypervolume",
    "knee",
    "pick",
    "sorted_by_layers",
]

Direction = Literal["max", "min"]

OBJECTIVES: Mapping[str, Direction] = MappingProxyType({"accuracy": "max", "macs": "min", "params": "min"})
"""What a search is after: the name of each objective and its direction."""

_ROUNDING = 1e-9  # 0.97 - 0.01 and 0.96 are the same accuracy


class Measured(Protocol):
    """What picking needs to know of a candidate."""

    @property
    def id(self) -> str:
        """Tells candidates apart; the last tie-breaker."""

    @property
    def accuracy(self) -> float:
        """Fraction of validation inputs classified rightly."""

    @property
    def macs(self) -> float:
        """Multiply-adds for one input."""

    @property
    def params(self) -> float:
        """Number of parameters."""


P = TypeVar("P", bound=Measured)


def dominates(a: object, b: object, objectives: Mapping[str, Direction] = OBJECTIVES) -> bool:
    """Return whether `a` is at least as good as `b` in every objective and better in one.

    Args:
        a: Anything with an attribute for each objective.
        b: Likewise.
        objectives: Attribute name to direction.
    """
    return _beats(_gains(a, objectives), _gains(b, objectives))


def front(points: Iterable[P], objectives: Mapping[str, Direction] = OBJECTIVES) -> list[P]:
    """Return the points that no other dominates, by MACs ascending; of equal points all are kept.

    The order does not depend on the order of `points`. O(n log n) for two objectives; for more, a pass over the points
    in NumPy for each one on the front.

    Raises:
        ConfigError: An objective of a point is not a finite number (leave failed candidates out).
    """
    return next(_layers(points, objectives), [])


def sorted_by_layers(points: Iterable[P], objectives: Mapping[str, Direction] = OBJECTIVES) -> list[P]:
    """Return all points, the front first, then the front of the rest, and so on; within each, the loneliest first.

    Non-dominated sorting and crowding distance of NSGA-II (Deb et al. 2002, sections III-A and III-B): the distance is
    the sum over the objectives of how far apart a point's neighbours are, as a share of the layer's range; the ends of
    a layer come first. O(n log n) for two objectives; for more, a pass in NumPy for each point.

    Raises:
        ConfigError: An objective of a point is not a finite number (leave failed candidates out).
    """
    found = list[P]()
    for layer in _layers(points, objectives):
        crowding = {id(point): 0.0 for point in layer}
        for name in objectives:
            ordered = sorted(layer, key=lambda point: (getattr(point, name), point.id))
            values = [float(getattr(point, name)) for point in ordered]
            for point in (ordered[0], ordered[-1]):
                crowding[id(point)] = math.inf
            for before, point, after in zip(values, ordered[1:-1], values[2:], strict=False):
                crowding[id(point)] += (after - before) / ((values[-1] - values[0]) or 1.0)
        found += sorted(layer, key=lambda point: (-crowding[id(point)], -point.accuracy, point.id))
    return found


def hypervolume(points: Iterable[object], reference: Mapping[str, float]) -> float:
    """Return the exact volume that the points dominate, in [0, 1]; larger is better.

    Accuracy counts from the reference upwards, a cost as the saved fraction of the reference cost, so with accuracy 0
    and the dense costs as the reference the best conceivable set has volume 1. A point that is worse than the
    reference in some objective adds nothing. Dimension sweep (Fonseca, Paquete and López-Ibáñez 2006, "An improved
    dimension-sweep algorithm for the hypervolume indicator", without its data structure): O(n² log n).

    Args:
        points: Anything with an attribute for each key of `reference`.
        reference: Two or three of `OBJECTIVES` and the worst value of each.

    Raises:
        ConfigError: Another number of objectives, an unknown one, or a reference that leaves no room for improvement.
    """
    if len(reference) not in (2, 3) or not reference.keys() <= OBJECTIVES.keys():
        raise ConfigError(
            f"a hypervolume has two or three objectives of {', '.join(OBJECTIVES)}, but got {', '.join(reference)}"
        )
    for name, worst in reference.items():
        if not (0.0 <= worst < 1.0 if name == "accuracy" else 0.0 < worst < math.inf):
            rule = "0 <= accuracy < 1" if name == "accuracy" else f"{name} > 0"
            raise ConfigError(
                f"`{rule}` must hold for the reference, but got {name}={worst:g}; use the dense network's"
            )
    boxes = [tuple(_gain(point, name, worst) for name, worst in reference.items()) for point in points]
    inside = [box for box in boxes if min(box) > 0.0]
    return _area(inside) if len(reference) == 2 else _volume(inside)


def knee(points: Iterable[P]) -> P:
    """Return the point of the front farthest above the chord between its cheapest and its most accurate point.

    Accuracy and MACs are scaled to [0, 1] between those two, so that units do not matter (Das 1999, "On characterizing
    the 'knee' of the Pareto curve"). Where nothing lies above the chord, the most accurate point is the answer.

    Raises:
        ConfigError: There are no points.
    """
    members = front(points, {"accuracy": "max", "macs": "min"})
    if not members:
        raise ConfigError("no candidate was measured, so there is none to pick; let the search evaluate at least one")
    low, high = members[0], members[-1]
    if low.macs == high.macs:
        return high

    def height(point: P) -> float:
        accuracy = (point.accuracy - low.accuracy) / (high.accuracy - low.accuracy)
        return accuracy - (point.macs - low.macs) / (high.macs - low.macs)

    return max(members, key=lambda point: (round(height(point), 9), point.accuracy))


def pick(
    points: Iterable[P],
    *,
    max_drop: float | None = None,
    dense_accuracy: float | None = None,
    fits: Callable[[P], bool] | None = None,
    budget_text: str = "the budget",
    reward: Callable[[P], float] | None = None,
    reward_text: str = "reward",
) -> tuple[P, str]:
    """Return the candidate to keep and, in one phrase, the rule that chose it.

    With `max_drop` the cheapest (in MACs; of equal ones the most accurate) that loses no more than that; with `fits`
    the most accurate (of equal ones the cheapest) that meets the budget; with both the cheapest that does both; with
    neither the knee of the front. With `reward` the highest (of equal ones the cheapest), of all or of those that meet
    the budget.

    Args:
        points: The candidates to choose from; failed ones left out.
        max_drop: Largest tolerated loss of accuracy, as a fraction: 0.01 is one point.
        dense_accuracy: What the loss is counted from.
        fits: Whether a candidate meets the budget.
        budget_text: The budget in the user's words, for the rule and for errors.
        reward: What to pick by in place of the accuracy; not together with `max_drop`.
        reward_text: The reward in words, for the rule.

    Raises:
        ConfigError: No candidate qualifies (the message states the best there is), or the arguments contradict.
    """
    candidates = sorted(points, key=_cheapest_first)
    for point in candidates:
        _gains(point, OBJECTIVES)  # refuses what failed
    if reward is not None and max_drop is not None:
        raise ConfigError("a reward weighs accuracy against cost by itself; give `reward` or `max_drop`")
    if max_drop is None and fits is None and reward is None:
        return knee(candidates), "knee of the front"
    if not candidates:
        raise ConfigError("no candidate was measured, so there is none to pick; let the search evaluate at least one")
    fitting = candidates if fits is None else [point for point in candidates if fits(point)]
    if not fitting:
        raise ConfigError(_nothing_fits(candidates, budget_text))
    if reward is not None:
        return max(fitting, key=reward), f"highest {reward_text}" + ("" if fits is None else f" within {budget_text}")
    if max_drop is None:
        return min(fitting, key=_best_first), f"most accurate within {budget_text}"
    if not 0.0 <= max_drop < 1.0:
        raise ConfigError(f"`0 <= max_drop < 1` must hold, but got {max_drop:g}; a drop of one point is 0.01")
    if dense_accuracy is None:
        raise ConfigError("max_drop counts from the dense accuracy, but dense_accuracy is not given; pass both")
    accurate = [point for point in fitting if point.accuracy >= dense_accuracy - max_drop - _ROUNDING]
    if not accurate:
        where = "" if fits is None else f" that meet {budget_text}"
        raise ConfigError(_nothing_accurate(fitting, max_drop, dense_accuracy, where))
    limit = f"a drop of {max_drop:g}" if fits is None else f"{budget_text} and a drop of {max_drop:g}"
    return accurate[0], f"cheapest within {limit}"


def _gains(point: object, objectives: Mapping[str, Direction]) -> tuple[float, ...]:
    """Return the objectives as numbers to maximise."""
    gains = []
    for name, direction in objectives.items():
        value = float(getattr(point, name))
        if not math.isfinite(value):
            raise ConfigError(f"objectives must be finite, but {name} is {value:g}; leave failed candidates out")
        gains.append(value if direction == "max" else -value)
    return tuple(gains)


def _beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


def _layers(points: Iterable[P], objectives: Mapping[str, Direction]) -> Iterator[list[P]]:
    """Yield the front, then the front of the rest, and so on; each by MACs ascending."""
    equal: dict[tuple[float, ...], list[P]] = {}
    for point in points:
        equal.setdefault(_gains(point, objectives), []).append(point)
    falling = sorted(equal, reverse=True)  # so that none is dominated by one after it
    for layer in _swept(falling) if len(objectives) == 2 else _peeled(falling):
        yield sorted((point for gains in layer for point in equal[gains]), key=_cheapest_first)


def _swept(falling: Sequence[tuple[float, ...]]) -> list[list[tuple[float, ...]]]:
    """Return the layers of distinct pairs that fall: in each the second number rises, from layer to layer it falls.

    So a pair belongs to the first layer whose last one has less of it, which bisection finds (Jensen 2003, "Reducing
    the run-time complexity of multiobjective EAs", section III).
    """
    layers: list[list[tuple[float, ...]]] = []
    lowest: list[float] = []  # minus the last second number of each layer, which rises
    for pair in falling:
        place = bisect.bisect_right(lowest, -pair[1])
        if place == len(layers):
            layers.append([])
            lowest.append(0.0)
        layers[place].append(pair)
        lowest[place] = -pair[1]
    return layers


def _peeled(falling: Sequence[tuple[float, ...]]) -> Iterator[list[tuple[float, ...]]]:
    """Yield the layers of distinct vectors that fall: of those left the first is on the front, and what it beats isn't.

    O(n) in NumPy for each vector.
    """
    gains = np.array(falling, dtype=np.float64)
    rest, waits = np.arange(len(falling)), np.ones(len(falling), dtype=bool)
    while len(rest):
        left = rest
        layer: list[int] = []
        while len(left):
            layer.append(int(left[0]))
            left = left[(gains[left] > gains[left[0]]).any(axis=1)]
        yield [falling[number] for number in layer]
        waits[layer] = False
        rest = rest[waits[rest]]


def _gain(point: object, name: str, worst: float) -> float:
    """Return by how much one objective is better than the reference, as a fraction of [0, 1]."""
    value = _gains(point, {name: "max"})[0]
    return value - worst if name == "accuracy" else 1.0 - value / worst


def _area(boxes: Iterable[tuple[float, ...]]) -> float:
    """Return the area of the union of rectangles from the origin to `(x, y)`."""
    area, height = 0.0, 0.0
    for x, y in sorted(boxes, reverse=True):
        if y > height:
            area += x * (y - height)
            height = y
    return area


def _volume(boxes: Iterable[tuple[float, ...]]) -> float:
    """Return the volume of the union of boxes from the origin to `(x, y, z)`: areas, swept from the top down."""
    volume, added = 0.0, list[tuple[float, ...]]()
    by_height = sorted(boxes, key=lambda box: box[2], reverse=True)
    for box, floor in zip(by_height, [*(box[2] for box in by_height[1:]), 0.0], strict=False):
        added.append(box[:2])
        if box[2] > floor:
            volume += _area(added) * (box[2] - floor)
    return volume


def _cheapest_first(point: Measured) -> tuple[float, float, float, str]:
    return (point.macs, -point.accuracy, point.params, point.id)


def _best_first(point: Measured) -> tuple[float, float, float, str]:
    return (-point.accuracy, point.macs, point.params, point.id)


def _nothing_fits(candidates: Sequence[Measured], budget_text: str) -> str:
    cheapest = candidates[0]
    smallest = min(candidate.params for candidate in candidates)
    return (
        f"none of {len(candidates)} candidates meets {budget_text}: the cheapest has {cheapest.macs:g} MACs, the "
        f"smallest {smallest:g} parameters; allow that much, or search again with this budget"
    )


def _nothing_accurate(candidates: Sequence[Measured], max_drop: float, dense_accuracy: float, where: str) -> str:
    best = min(candidates, key=_best_first)
    drop = dense_accuracy - best.accuracy
    return (
        f"none of {len(candidates)} candidates{where} stays within max_drop={max_drop:g} of the dense accuracy "
        f"{dense_accuracy:.4f}: the best has {best.accuracy:.4f}, a drop of {drop:.4f}; allow "
        f"{math.ceil(drop * 1e4) / 1e4:g}, or search for longer or with a looser budget"
    )
