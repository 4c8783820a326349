"""Kendall's tau between what is known early and what was measured last: by hand, and on candidates of every kind."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.cost import Cost
from autoprune.evaluation import Candidate, Measurement
from autoprune.fidelity import FEWEST, Agreement, agreements, kendall
from autoprune.policy import Policy

COST = Cost(macs=1, params=1, bytes=4, activations=1, nonzero_params=1, nonzero_macs=1)


def candidate(number: int, *accuracies: float, last: str = "short") -> Candidate:
    rungs = ("reconstructed", last) if len(accuracies) > 1 else (last,)
    found = tuple(
        Measurement(rung, value, 0.01, 1 - value, 0.01) for rung, value in zip(rungs, accuracies, strict=True)
    )
    return Candidate(number, f"{number:x}", "search", "tpe", Policy({"a": 0.5}), {"a": 1}, COST, found, 1.0)


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
        guess, rung = agreements(candidates, {"predicted": last})
        assert (guess.known, guess.last, guess.candidates) == ("predicted", "short", 8)
        assert (guess.all.value, guess.better.value) == pytest.approx((1, 1))
        assert rung.known == "reconstructed"
        assert rung.all.value == pytest.approx((28 - 2 * 6) / 28)
        assert rung.better.value == pytest.approx(-1)

    def test_candidates_that_stopped_earlier_are_left_out(self):
        full = [candidate(number, 0.1 * number, 0.1 * number) for number in range(FEWEST)]
        early = candidate(99, 0.9, last="reconstructed")
        found = agreements([early, *full], {"predicted": [0.0, *range(FEWEST)]})
        assert [(one.known, one.candidates) for one in found] == [("predicted", FEWEST), ("reconstructed", FEWEST)]
        assert [one.all.value for one in found] == pytest.approx([1, 1])

    def test_a_few_say_nothing(self):
        assert agreements([candidate(n, 0.1 * n, 0.1 * n) for n in range(FEWEST - 1)], {}) == ()
        assert agreements([], {}) == ()

    def test_as_json(self):
        found = Agreement("predicted", "short", 9, kendall([1, 2, 3], [1, 2, 3], 10), kendall([1, 1], [1, 2], 10))
        assert found.to_dict() == {
            **{"known": "predicted", "last": "short", "candidates": 9},
            **{"all": [1.0, 1.0, 1.0], "better": [None, None, None]},
        }
