"""Who is promoted, and how far: rungs cost about the same, and the best come first."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune import fidelity
from autoprune.cost import Cost
from autoprune.evaluation import Candidate, Measurement
from autoprune.evaluation.ladder import FEWEST, Rung, best, promotion, rungs, sample
from autoprune.pareto import OBJECTIVES, Direction
from autoprune.policy import Policy

TRADED: dict[str, Direction] = {"accuracy": "max", "macs": "min"}


def candidate(number: int, accuracy: float, macs: int = 100, params: int = 10) -> Candidate:
    return Candidate(
        number=number,
        id=f"{number:012x}",
        arm="search",
        agent="tpe",
        policy=Policy({"conv": number / 1000}),
        removed={"conv": number},
        cost=Cost(macs, params, 10, 10, params, macs),
        measurements=(Measurement("reconstructed", accuracy, 0.01, 1 - accuracy, 0.01),),
        seconds=0.0,
    )


@pytest.mark.parametrize(
    ("candidates", "steps", "promote", "expected"),
    [
        (60, 50, 0.25, [(1, 50, 15)]),
        (100, 50, 0.25, [(1, 50, 25), (2, 200, 6)]),
        (64, 10, 0.5, [(1, 10, 32), (2, 20, 16), (3, 40, 8), (4, 80, 4)]),
        (60, 50, 1.0, []),
        (60, 0, 0.5, []),
        (8, 50, 0.5, [(1, 50, 4)]),
        (7, 50, 0.5, []),
    ],
)
def test_rungs(candidates: int, steps: int, promote: float, expected: list[tuple[int, int, int]]) -> None:
    assert rungs(candidates, steps, promote) == tuple(Rung(*line) for line in expected)


@given(st.integers(1, 5000), st.integers(10, 500), st.floats(0.05, 0.5))
def test_each_rung_takes_about_as_long_as_the_first(candidates: int, steps: int, promote: float) -> None:
    found = rungs(candidates, steps, promote)
    assert [rung.level for rung in found] == list(range(1, len(found) + 1))
    for rung in found:
        assert rung.candidates >= FEWEST
        work, first = rung.candidates * rung.steps, found[0].candidates * found[0].steps
        assert work == pytest.approx(first, rel=0.5)  # candidates are whole


def test_the_best_come_first() -> None:
    three = [candidate(number, accuracy) for number, accuracy in enumerate((0.5, 0.9, 0.7))]
    assert best(three, 2, lambda c: c.accuracy) == [three[1], three[2]]
    assert best(three, 9, lambda c: c.accuracy) == [three[1], three[2], three[0]]
    assert best(three, 1, lambda c: -c.accuracy) == [three[0]]


def test_of_equal_ones_the_cheaper_and_then_the_first_by_id() -> None:
    equal = [candidate(2, 0.5, 90), candidate(1, 0.5, 90), candidate(3, 0.5, 80)]
    assert [c.number for c in best(equal, 3, lambda c: c.accuracy)] == [3, 1, 2]


def test_where_accuracy_is_traded_for_cost_the_front_comes_first() -> None:
    front = [candidate(0, 0.5, 10), candidate(1, 0.8, 50), candidate(2, 0.9, 90)]
    behind = [candidate(3, 0.45, 11), candidate(4, 0.79, 51)]
    assert {c.number for c in best([*behind, *front], 3, TRADED)} == {0, 1, 2}
    assert [c.number for c in best([*behind, *front], 5, TRADED)][3:] == [4, 3]
    assert best([*behind, *front], 1, TRADED) == [front[2]]  # an end of the front


def test_what_is_traded_for_each_other_are_the_objectives_given() -> None:
    small, cheap = candidate(0, 0.8, macs=90, params=1), candidate(1, 0.8, macs=50, params=10)
    behind = candidate(2, 0.7, macs=95, params=10)
    assert best([behind, small, cheap], 1, TRADED) == [cheap]
    assert best([behind, small, cheap], 1, {"accuracy": "max", "params": "min"}) == [small]
    assert best([behind, small, cheap], 2, OBJECTIVES) == [small, cheap]


def test_a_sample_goes_from_the_best_to_the_worst() -> None:
    ranked = [candidate(number, 1 - number / 100) for number in range(60)]
    assert [c.number for c in sample(ranked)] == [0, 5, 11, 16, 21, 27, 32, 38, 43, 48, 54, 59]
    assert [c.number for c in sample(ranked[:16])] == [0, 2, 4, 6, 9, 11, 13, 15]


@pytest.mark.parametrize(
    ("tau", "candidates", "low", "high"),
    [(1.0, 60, 0.1, 0.1), (1.0, 10, 0.4, 0.4), (0.0, 60, 0.5, 0.5), (-1.0, 60, 0.5, 0.5), (0.7, 60, 0.1, 0.2)],
)
def test_the_better_the_agreement_the_fewer_climb(tau: float, candidates: int, low: float, high: float) -> None:
    assert low <= promotion(tau, candidates).share <= high


def test_the_best_is_among_those_that_climb_nine_times_in_ten() -> None:
    """Drawn otherwise than in the code: pairs of a known tau, counted by hand."""
    rng, n, tau, hits = np.random.default_rng(1), 40, 0.6, 0
    climbing = int(promotion(tau, n).share * n + 1e-9)
    rho = np.sin(np.pi * tau / 2)
    for _ in range(1000):
        early, late = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=n).T
        hits += int(late.argmax()) in np.argsort(-early)[:climbing]
    assert 0.87 <= hits / 1000 <= 0.93


@pytest.mark.parametrize("tau", [0.2, 0.4, 0.6])
def test_it_says_how_often_they_hold_the_best(tau: float) -> None:
    """Counted over other draws: half at most climb, which at a tau of 0.2 is too few."""
    rng, n = np.random.default_rng(2), 10
    share, holds = promotion(tau, n)
    early, other = rng.standard_normal((2, 4000, n))
    rho = np.sin(np.pi * tau / 2)
    late = rho * early + np.sqrt(1 - rho**2) * other
    places = (-early).argsort(1).argsort(1)[np.arange(4000), late.argmax(1)]
    assert (places < int(share * n + 1e-9)).mean() == pytest.approx(holds, abs=0.03)
    assert (holds < 0.8) == (tau == 0.2)


def test_where_the_better_half_ranks_worse_more_of_them_climb(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order holds below the median only: what is relied on finds most of the best, tau over all few of them."""
    monkeypatch.setattr(fidelity, "kendall", functools.partial(fidelity.kendall, draws=40))  # faster
    rng, n, worlds = np.random.default_rng(3), 40, 20
    held = {"relied on": 0, "over all": 0}
    for _ in range(worlds):
        early = rng.standard_normal(n)
        late = 3 * np.minimum(early, 0) + 0.3 * rng.standard_normal(n)
        ranked = np.argsort(-early)
        ground = [candidate(int(place), float(early[place])) for place in ranked]
        tried = sample(ground)
        found = fidelity.agreement(
            [(c, c) for c in tried], [early[c.number] for c in tried], [late[c.number] for c in tried]
        )
        for name, tau in (("relied on", found.relied_on), ("over all", found.all.value)):
            climbing = int(promotion(tau, n).share * n + 1e-9)
            held[name] += int(late.argmax()) in ranked[:climbing]
    assert held["relied on"] >= 0.75 * worlds
    assert held["over all"] <= 0.4 * worlds


@settings(deadline=None)
@given(st.floats(-1, 1), st.integers(8, 300))
def test_some_climb_and_half_at_most(tau: float, candidates: int) -> None:
    found = promotion(tau, candidates).share
    assert 0.1 <= found <= 0.5
    assert rungs(candidates, 10, found)
