"""Who is promoted, and how far: rungs cost about the same, and the best come first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.cost import Cost
from autoprune.evaluation import Candidate, Measurement
from autoprune.evaluation.ladder import FEWEST, Rung, best, rungs
from autoprune.policy import Policy


def candidate(number: int, accuracy: float, macs: int = 100) -> Candidate:
    return Candidate(
        number=number,
        id=f"{number:012x}",
        arm="search",
        agent="tpe",
        policy=Policy({"conv": number / 1000}),
        removed={"conv": number},
        cost=Cost(macs, 10, 10, 10, 10, macs),
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
    assert {c.number for c in best([*behind, *front], 3)} == {0, 1, 2}
    assert [c.number for c in best([*behind, *front], 5)][3:] == [4, 3]
    assert best([*behind, *front], 1) == [front[2]]  # an end of the front
