"""Dominance, fronts, hypervolumes and picking: exact numbers, a brute-force oracle, and laws."""

import itertools
import math
import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.errors import ConfigError
from autoprune.pareto import Direction, dominates, front, hypervolume, knee, pick, sorted_by_layers


@dataclass(frozen=True)
class Point:
    id: str
    accuracy: float
    macs: float
    params: float


DENSE = {"accuracy": 0.0, "macs": 100, "params": 100}
TWO = {"accuracy": 0.0, "macs": 100}


def made(*triples: tuple[float, float, float]) -> list[Point]:
    return [Point(f"p{index}", *triple) for index, triple in enumerate(triples)]


def cheapest_first(point: Point) -> tuple[float, float, float, str]:
    return point.macs, -point.accuracy, point.params, point.id


def ids(points: list[Point]) -> list[str]:
    return [point.id for point in points]


# A coarse grid, so that ties and equal points are common.
levels = st.integers(0, 5)
sets_of_points = st.lists(
    st.builds(lambda a, m, p: (a / 5, 20 * m + 10, 20 * p + 10), levels, levels, levels), max_size=12
).map(lambda triples: made(*triples))


def boxes(points: list[Point], reference: dict[str, float]) -> list[tuple[float, ...]]:
    return [
        tuple(
            max(0.0, point.accuracy - worst if name == "accuracy" else 1 - getattr(point, name) / worst)
            for name, worst in reference.items()
        )
        for point in points
    ]


def by_inclusion_exclusion(points: list[Point], reference: dict[str, float]) -> float:
    every = boxes(points, reference)
    return sum(
        (-1) ** (size + 1) * math.prod(map(min, zip(*some, strict=True)))
        for size in range(1, len(every) + 1)
        for some in itertools.combinations(every, size)
    )


class TestDominance:
    def test_better_in_one_and_equal_in_the_rest_dominates(self):
        a, b = made((0.9, 50, 50), (0.9, 50, 51))
        assert dominates(a, b)
        assert not dominates(b, a)

    def test_equal_points_and_trade_offs_do_not(self):
        a, same, cheaper = made((0.9, 50, 50), (0.9, 50, 50), (0.8, 40, 50))
        assert not dominates(a, same)
        assert not dominates(a, cheaper)
        assert not dominates(cheaper, a)

    def test_only_the_objectives_named_count(self):
        a, b = made((0.9, 50, 99), (0.8, 50, 10))
        assert not dominates(a, b)
        assert dominates(a, b, {"accuracy": "max", "macs": "min"})

    def test_directions_are_obeyed(self):
        a, b = made((0.9, 50, 50), (0.8, 50, 50))
        assert dominates(b, a, {"accuracy": "min"})


class TestFront:
    def test_exact(self):
        points = made((0.9, 80, 50), (0.8, 40, 50), (0.7, 40, 50), (0.85, 90, 40), (0.5, 95, 60))
        assert ids(front(points)) == ["p1", "p0", "p3"]

    def test_equal_points_all_stay(self):
        assert ids(front(made((0.9, 50, 50), (0.9, 50, 50)))) == ["p0", "p1"]

    def test_empty(self):
        assert front([]) == []

    def test_a_failed_measurement_is_refused(self):
        with pytest.raises(ConfigError, match="accuracy is nan; leave failed candidates out"):
            front(made((math.nan, 50, 50)))

    @given(sets_of_points)
    def test_members_are_not_dominated_and_the_others_are(self, points):
        members = front(points)
        for point in points:
            beaten_by_a_member = any(dominates(member, point) for member in members)
            assert beaten_by_a_member == (point not in members)

    @given(sets_of_points, st.randoms(use_true_random=False))
    def test_order_does_not_matter(self, points, random):
        shuffled = random.sample(points, len(points))
        assert front(shuffled) == front(points)


OBJECTIVES: list[dict[str, Direction]] = [
    {"accuracy": "max"},
    {"accuracy": "max", "macs": "min"},
    {"params": "min", "accuracy": "min"},
    {"accuracy": "max", "macs": "min", "params": "min"},
]


class TestLayers:
    """Fronts and layers against the definition, point by point."""

    @pytest.mark.parametrize("objectives", OBJECTIVES, ids=len)
    @given(points=sets_of_points)
    def test_each_layer_is_what_nothing_left_dominates(self, objectives, points):
        rest, layers = list(points), []
        while rest:
            layers.append([p for p in rest if not any(dominates(other, p, objectives) for other in rest)])
            rest = [p for p in rest if p not in layers[-1]]
        assert ids(front(points, objectives)) == ids(sorted(layers[0] if layers else [], key=cheapest_first))
        found = sorted_by_layers(points, objectives)
        assert len(found) == len(points)
        for layer in layers:
            assert set(ids(found[: len(layer)])) == set(ids(layer))
            found = found[len(layer) :]

    def test_within_a_layer_the_ends_and_then_the_loneliest(self):
        front_and_behind = [(0.9, 90, 1), (0.5, 10, 1), (0.52, 12, 1), (0.6, 50, 1), (0.8, 80, 1), (0.4, 95, 1)]
        # as shares of 0.4 and 80: p2 0.25 + 0.5, p3 0.7 + 0.85, p4 0.75 + 0.5
        assert ids(sorted_by_layers(made(*front_and_behind), OBJECTIVES[1])) == ["p0", "p1", "p3", "p4", "p2", "p5"]

    @pytest.mark.parametrize("objectives", OBJECTIVES[1::2], ids=len)
    def test_many_points_take_no_time(self, objectives):
        """Layers of one each, which comparing all pairs layer by layer takes minutes for."""
        points = made(*((number / 3000, 3000 - number, 3000 - number) for number in range(3000)))
        started = time.process_time()
        assert ids(sorted_by_layers(points, objectives)) == ids(points[::-1])
        assert time.process_time() - started < 5

    def test_a_failed_measurement_is_refused(self):
        with pytest.raises(ConfigError, match="macs is inf; leave failed candidates out"):
            sorted_by_layers(made((0.5, math.inf, 50)))


class TestHypervolume:
    def test_one_point_is_one_box(self):
        assert hypervolume(made((0.9, 40, 25)), TWO) == pytest.approx(0.9 * 0.6)
        assert hypervolume(made((0.9, 40, 25)), DENSE) == pytest.approx(0.9 * 0.6 * 0.75)

    def test_two_overlapping_points_by_hand(self):
        points = made((0.9, 60, 50), (0.6, 20, 50))
        assert hypervolume(points, TWO) == pytest.approx(0.9 * 0.4 + 0.6 * 0.8 - 0.6 * 0.4)
        assert hypervolume(points, DENSE) == pytest.approx((0.9 * 0.4 + 0.6 * 0.8 - 0.6 * 0.4) * 0.5)

    def test_the_reference_accuracy_is_a_floor(self):
        assert hypervolume(made((0.9, 40, 25), (0.3, 1, 1)), {"accuracy": 0.5, "macs": 100}) == pytest.approx(0.4 * 0.6)

    def test_the_extremes_are_zero_and_one(self):
        assert hypervolume([], DENSE) == 0.0
        assert hypervolume(made((0.97, 100, 100)), DENSE) == 0.0
        assert hypervolume(made((1.0, 0, 0)), DENSE) == 1.0

    def test_worse_than_the_reference_adds_nothing(self):
        assert hypervolume(made((0.9, 120, 10), (0.9, 10, 120)), DENSE) == 0.0

    @given(sets_of_points.filter(lambda points: len(points) <= 8), st.sampled_from([TWO, DENSE]))
    def test_equals_inclusion_exclusion(self, points, reference):
        assert hypervolume(points, reference) == pytest.approx(by_inclusion_exclusion(points, reference), abs=1e-12)

    @given(sets_of_points.filter(bool), st.sampled_from([TWO, DENSE]))
    def test_never_falls_when_a_point_is_added(self, points, reference):
        *fewer, _ = points
        assert hypervolume(points, reference) >= hypervolume(fewer, reference) - 1e-12

    @given(sets_of_points, st.sampled_from([TWO, DENSE]), st.randoms(use_true_random=False))
    def test_is_that_of_the_front_in_any_order_and_within_one(self, points, reference, random):
        volume = hypervolume(points, reference)
        assert volume == pytest.approx(hypervolume(random.sample(points, len(points)), reference), abs=1e-12)
        assert volume == pytest.approx(hypervolume(front(points), reference), abs=1e-12)
        assert 0.0 <= volume <= 1.0

    @pytest.mark.parametrize(
        ("reference", "message"),
        [
            ({"accuracy": 0.0}, "two or three objectives"),
            ({"accuracy": 0.0, "latency": 3.0}, "two or three objectives of accuracy, macs, params"),
            ({"accuracy": 1.0, "macs": 100}, "0 <= accuracy < 1"),
            ({"accuracy": 0.0, "macs": 0}, "macs > 0"),
        ],
    )
    def test_a_reference_without_room_is_refused(self, reference, message):
        with pytest.raises(ConfigError, match=message):
            hypervolume(made((0.9, 1, 1)), reference)


class TestKnee:
    def test_the_bend_wins(self):
        assert knee(made((0.5, 10, 1), (0.9, 20, 1), (0.95, 100, 1))).id == "p1"

    def test_units_do_not_matter(self):
        assert knee(made((0.5, 10e6, 1), (0.9, 20e6, 1), (0.95, 100e6, 1))).id == "p1"

    def test_dominated_points_do_not_bend_it(self):
        assert knee(made((0.5, 10, 1), (0.2, 11, 1), (0.9, 20, 1), (0.95, 100, 1), (0.1, 1e9, 1))).id == "p2"

    def test_without_a_bend_the_most_accurate(self):
        assert knee(made((0.5, 10, 1), (0.6, 50, 1), (0.95, 100, 1))).id == "p2"
        assert knee(made((0.5, 10, 1), (0.9, 100, 1))).id == "p1"
        assert knee(made((0.5, 10, 1))).id == "p0"

    def test_nothing_to_choose_from(self):
        with pytest.raises(ConfigError, match="no candidate was measured"):
            knee([])


class TestPick:
    points = made((0.95, 60, 60), (0.93, 50, 50), (0.93, 50, 40), (0.90, 30, 30), (0.90, 20, 60))

    def test_within_a_drop_the_cheapest(self):
        point, rule = pick(self.points, max_drop=0.05, dense_accuracy=0.95)
        assert (point.id, rule) == ("p4", "cheapest within a drop of 0.05")

    def test_the_limit_itself_is_within_despite_rounding(self):
        assert 0.1 + 0.2 > 0.3  # the kind of rounding meant
        point, _ = pick(made((0.3, 10, 10)), max_drop=0.1, dense_accuracy=0.1 + 0.2 + 0.1)
        assert point.id == "p0"

    def test_ties_in_macs_go_to_the_more_accurate(self):
        point, _ = pick(made((0.90, 20, 1), (0.93, 20, 1)), max_drop=0.1, dense_accuracy=0.95)
        assert point.id == "p1"

    def test_within_a_budget_the_most_accurate_and_of_those_the_cheaper(self):
        point, rule = pick(self.points, fits=lambda point: point.macs <= 50, budget_text="macs<=50%")
        assert (point.id, rule) == ("p2", "most accurate within macs<=50%")

    def test_both(self):
        point, rule = pick(
            self.points,
            max_drop=0.05,
            dense_accuracy=0.95,
            fits=lambda point: point.params <= 40,
            budget_text="params<=40%",
        )
        assert (point.id, rule) == ("p3", "cheapest within params<=40% and a drop of 0.05")

    def test_a_reward_is_picked_by_and_of_equal_ones_the_cheaper(self):
        point, rule = pick(self.points, reward=lambda point: -point.params, reward_text="-params")
        assert (point.id, rule) == ("p3", "highest -params")
        assert pick(self.points, reward=lambda point: round(point.accuracy, 1))[0].id == "p4"  # all are 0.9
        point, rule = pick(
            self.points, reward=lambda point: point.params, fits=lambda point: point.macs <= 50, budget_text="macs<=50%"
        )
        assert (point.id, rule) == ("p4", "highest reward within macs<=50%")

    def test_neither_is_the_knee(self):
        point, rule = pick(self.points)
        assert (point, rule) == (knee(self.points), "knee of the front")

    def test_too_small_a_drop_states_the_best_there_is(self):
        with pytest.raises(
            ConfigError, match=r"none of 5 .*max_drop=0.01 .*0\.9800: the best has 0\.9500.*allow 0\.03"
        ):
            pick(self.points, max_drop=0.01, dense_accuracy=0.98)

    def test_what_the_error_says_to_allow_is_enough(self):
        points = made((0.91234567, 10, 10))
        with pytest.raises(ConfigError) as caught:
            pick(points, max_drop=0.0, dense_accuracy=0.98)
        allowed = float(str(caught.value).split("allow ")[1].split(",")[0])
        assert pick(points, max_drop=allowed, dense_accuracy=0.98)[0].id == "p0"

    def test_a_budget_that_none_meets_states_the_cheapest(self):
        with pytest.raises(
            ConfigError, match="none of 5 candidates meets macs<=10%: the cheapest has 20 MACs, the smallest 30"
        ):
            pick(self.points, fits=lambda point: point.macs <= 10, budget_text="macs<=10%")

    def test_both_limits_blame_the_right_one(self):
        with pytest.raises(ConfigError, match=r"that meet macs<=30% stays within max_drop=0.01"):
            pick(
                self.points,
                max_drop=0.01,
                dense_accuracy=0.95,
                fits=lambda point: point.macs <= 30,
                budget_text="macs<=30%",
            )

    def test_contradicting_arguments(self):
        with pytest.raises(ConfigError, match=r"a drop of one point is 0\.01"):
            pick(self.points, max_drop=1.0, dense_accuracy=0.95)
        with pytest.raises(ConfigError, match="dense_accuracy is not given"):
            pick(self.points, max_drop=0.01)
        with pytest.raises(ConfigError, match="no candidate was measured"):
            pick([], fits=lambda point: True)
        with pytest.raises(ConfigError, match="give `reward` or `max_drop`"):
            pick(self.points, max_drop=0.01, dense_accuracy=0.95, reward=lambda point: point.accuracy)

    def test_a_failed_candidate_is_refused(self):
        with pytest.raises(ConfigError, match="leave failed candidates out"):
            pick([*self.points, *made((math.nan, 10, 10))], fits=lambda point: True)

    @given(sets_of_points.filter(bool), st.randoms(use_true_random=False))
    def test_order_does_not_matter(self, points, random):
        shuffled = random.sample(points, len(points))
        assert pick(shuffled) == pick(points)
        assert pick(shuffled, max_drop=0.9, dense_accuracy=0.9) == pick(points, max_drop=0.9, dense_accuracy=0.9)
        assert pick(shuffled, fits=lambda point: True) == pick(points, fits=lambda point: True)
