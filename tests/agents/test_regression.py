import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.agents.regression import GaussianProcess, Kernel

PLAIN = Kernel(alone=1.0, together=1.0, share=1.0, variance=1.0, noise=0.2)


def _sample(seed: int, n: int, groups: int = 3) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    points = np.random.default_rng(seed).random((n, groups))
    return points, np.log((points**2).sum(1))


def test_exact_numbers_of_two_points() -> None:
    """One coordinate a distance 1 apart, values and trend -1 and 1 once standardised."""
    process = GaussianProcess(np.array([[0.0], [1.0]]), np.array([2.0, 4.0]), np.array([10.0, 14.0]), PLAIN)
    alike = np.exp(-0.5)
    covariance = np.array([[1 + 4 + 4 + 0.2, alike + 4 - 4], [alike + 4 - 4, 1 + 4 + 4 + 0.2]])
    weights = np.linalg.solve(covariance, [-1.0, 1.0])
    halfway = np.array([np.exp(-0.125) + 4, np.exp(-0.125) + 4])
    expected, deviation = process.predict(np.array([[0.5], [0.0]]), np.array([3.0, 2.0]))
    assert expected[0] == pytest.approx(12.0)
    assert deviation[0] == pytest.approx(2 * np.sqrt(1 + 4 - halfway @ np.linalg.solve(covariance, halfway)))
    assert expected[1] == pytest.approx(12 + 2 * np.array([9.0, alike]) @ weights)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.floats(-100, 100), st.floats(0.01, 100))
def test_units_of_the_values_do_not_matter(seed: int, shift: float, factor: float) -> None:
    points, trend = _sample(seed, 12)
    values = points @ [1.0, -2.0, 0.5]
    there = _sample(seed + 1, 5)
    expected, deviation = GaussianProcess(points, trend, values).predict(*there)
    moved, scaled = GaussianProcess(points, trend, shift + factor * values).predict(*there)
    assert moved == pytest.approx(shift + factor * expected, rel=1e-6, abs=1e-6 * factor)
    assert scaled == pytest.approx(factor * deviation, rel=1e-5)


@pytest.mark.parametrize("groups", [3, 12])
def test_it_ranks_what_it_has_not_seen(groups: int) -> None:
    def value(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return -(points**2).sum(1) - points[:, 0] * points[:, 1]

    told, there = _sample(0, 60, groups), _sample(1, 200, groups)
    expected, deviation = GaussianProcess(*told, value(told[0])).predict(*there)
    assert np.corrcoef(expected, value(there[0]))[0, 1] > 0.9
    assert (deviation > 0).all()


def test_what_is_known_is_surer_than_what_is_far() -> None:
    points, trend = _sample(0, 20)
    process = GaussianProcess(points, trend, points.sum(1))
    _, near = process.predict(points, trend)
    _, far = process.predict(points + 5, trend)
    assert near.max() < far.min()


def test_groups_that_add_up_are_told_from_those_that_do_not() -> None:
    points, trend = _sample(0, 60, 6)
    adds_up = GaussianProcess(points, trend, np.sin(6 * points).sum(1))
    assert adds_up.kernel.share >= 0.9
    together = GaussianProcess(points, trend, np.sin(4 * points.sum(1)) * 2)
    assert together.kernel.share <= 0.5


def test_low_values_are_lifted() -> None:
    points, trend = _sample(0, 30)
    values = points.sum(1)
    failed = values.copy()
    failed[3] = -1e6
    lifted = values.copy()
    middle = np.median(failed)
    lifted[3] = middle - 3 * (np.quantile(failed, 0.9) - middle)
    there = _sample(1, 5)
    assert np.array_equal(
        GaussianProcess(points, trend, failed).predict(*there), GaussianProcess(points, trend, lifted).predict(*there)
    )


def test_equal_values_are_no_obstacle() -> None:
    points, trend = _sample(0, 8)
    expected, _ = GaussianProcess(points, np.ones(8), np.full(8, 0.5)).predict(points, np.ones(8))
    assert expected == pytest.approx(0.5)
    assert np.isfinite(GaussianProcess(points, trend, np.zeros(8)).predict(points, trend)).all()


def test_what_is_believed_changes_no_expectation_but_how_sure_it_is() -> None:
    points, trend = _sample(0, 20)
    process = GaussianProcess(points, trend, points.sum(1))
    there = _sample(1, 1)
    before, doubt = process.predict(*there)
    process.believe(*there)
    after, less = process.predict(*there)
    assert after == pytest.approx(before, abs=1e-9)
    assert less < doubt
