"""Kendall's tau between what is known early and what was measured last: by hand, and on candidates of every kind."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.cost import Cost
from autoprune.evaluation import Candidate, Measurement
from autoprune.fidelity import FEWEST, Agreement, Tau, agreements, kendall
from autoprune.policy import Policy

COST = Cost(macs=1, params=1, bytes=4, activations=1, nonzero_params=1, nonzero_macs=1)


def candidate(number: int, *accuracies: float, last: str = "short", steps: int = 0, seconds: float = 1.0) -> Candidate:
    rungs = ("reconstructed", last) if len(accuracies) > 1 else (last,)
    found = [Measurement(rung, value, 0.01, 1 - value, 0.01) for rung, value in zip(rungs, accuracies, strict=True)]
    found[-1] = dataclasses.replace(found[-1], steps=steps)
    policy = Policy({"a": 0.5})
    return Candidate(number, f"{number:x}", "search", "tpe", policy, {"a": 1}, COST, tuple(found), seconds)


class TestKendall:
    def test_by_hand(self):
        assert kendall([1, 2, 3, 4], [1, 2, 3, 4]).value == 1
        assert kendall([1, 2, 3, 4], [4, 3, 2, 1]).value == -1
        assert kendall([1, 2, 3, 4], [1, 2, 4, 3]).value == pytest.approx(4 / 6)  # five pairs agree, one does not
        assert kendall([1, 1, 2, 3], [1, 2, 3, 4]).value == pytest.approx(5 / math.sqrt(5 * 6))  # one tie

    def test_a_constant_ranks_nothing(self):
        assert all(math.isnan(value) for value in kendall([1, 1, 1], [1, 2, 3], 10))

    @given(st.lists(st.floats(-1, 1), min_size=8, max_size=8, unique=True))
    def test_the_interval_holds_the_value_where_order_is_kept(self, values):
        found = kendall(values, np.argsort(np.argsort(values)).tolist(), 20)
        assert found == pytest.approx((1, 1, 1))

    def test_more_policies_narrow_the_interval(self):
        rng = np.random.default_rng(1)
        spans = []
        for number in (10, 160):
            a = rng.standard_normal(number)
            found = kendall(a.tolist(), (a + rng.standard_normal(number)).tolist(), 200)
            assert found.low < found.value < found.high
            spans.append(found.high - found.low)
        assert spans[1] < 0.5 * spans[0]


class TestAgreements:
    def test_each_rung_and_what_else_is_known(self):
        last = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
        first = [0.1, 0.2, 0.3, 0.4, 0.8, 0.7, 0.6, 0.5]  # right in the worse half, reversed in the better one
        candidates = [candidate(number, a, b) for number, (a, b) in enumerate(zip(first, last, strict=True))]
        guess, rung = agreements([candidates], {"predicted": last})
        assert (guess.known, guess.last, guess.candidates) == ("predicted", "short", 8)
        assert (guess.all.value, guess.better.value) == pytest.approx((1, 1))
        assert rung.known == "reconstructed"
        assert rung.all.value == pytest.approx((28 - 2 * 6) / 28)
        assert rung.better.value == pytest.approx(-1)

    def test_candidates_that_stopped_earlier_are_left_out(self):
        full = [candidate(number, 0.1 * number, 0.1 * number) for number in range(FEWEST)]
        early = candidate(99, 0.9, last="reconstructed")
        found = agreements([[early, *full]], {"predicted": [0.0, *range(FEWEST)]})
        assert [(one.known, one.candidates) for one in found] == [("predicted", FEWEST), ("reconstructed", FEWEST)]
        assert [one.all.value for one in found] == pytest.approx([1, 1])

    def test_a_few_say_nothing(self):
        few = [candidate(n, 0.1 * n, 0.1 * n) for n in range(FEWEST - 1)]
        assert agreements([few, few, few], {}) == ()
        assert agreements([[]], {}) == agreements([], {}) == ()

    def test_each_rung_ranks_those_above_it(self):
        """Rung 1 keeps the order of the ground but for its best two; rung 2 reverses it."""
        ground = [candidate(n, n / 20, last="reconstructed", seconds=n) for n in range(12)]
        first = [candidate(n, n / 20, n / 20, steps=50, seconds=10 + n) for n in range(2, 12)]
        first[-2:] = [candidate(10, 0.5, 0.9, steps=50, seconds=20), candidate(11, 0.55, 0.8, steps=50, seconds=21)]
        second = [candidate(n, n / 20, 1 - n / 20, steps=200, seconds=100) for n in range(4, 12)]
        found = agreements([ground, first, second[::-1]], {})
        said = [(a.known, a.steps, a.seconds, a.last, a.last_steps, a.last_seconds, a.candidates) for a in found]
        assert said == [
            ("reconstructed", 0, 6.5, "short", 50, 16.5, 10),
            ("reconstructed", 0, 7.5, "short", 200, 100, 8),
            ("short", 50, 17.5, "short", 200, 100, 8),
        ]
        assert [a.all.value for a in found] == pytest.approx([43 / 45, -1, -26 / 28])
        assert found[0].better.value == pytest.approx(8 / 10)

    def test_what_a_candidate_took_to_a_rung_is_known_where_it_stopped_there(self):
        ranks = agreements(
            [[candidate(n, n / 20, n / 20, steps=50, seconds=n) for n in range(9)]], {"sensitivity": range(9)}
        )
        said = [(a.known, a.steps, a.seconds, a.last_steps, a.last_seconds) for a in ranks]
        assert said == [("sensitivity", 0, None, 50, 4), ("reconstructed", 0, None, 50, 4)]

    @pytest.mark.parametrize(
        ("low", "better", "expected"),
        [(0.5, 0.3, 0.3), (0.2, 0.3, 0.2), (0.2, math.nan, 0.2), (math.nan, 0.3, 0.3), (math.nan, math.nan, 0)],
    )
    def test_relied_on_is_the_lower_bound_or_the_better_half_where_it_is_lower(self, low, better, expected):
        taus = Tau(0.7, low, 0.9), Tau(better, math.nan, math.nan)
        assert Agreement("reconstructed", 0, 1.0, "short", 50, 2.0, 12, *taus).relied_on == expected

    def test_as_json(self):
        found = Agreement(
            *("predicted", 0, None, "short", 50, 1.5, 9),
            *(kendall([1, 2, 3], [1, 2, 3], 10), kendall([1, 1], [1, 2], 10)),
        )
        assert found.to_dict() == {
            **{"known": "predicted", "steps": 0, "seconds": None},
            **{"last": "short", "last_steps": 50, "last_seconds": 1.5, "candidates": 9},
            **{"all": [1.0, 1.0, 1.0], "better": [None, None, None]},
        }
