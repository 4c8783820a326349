"""AMC's rewards by their equations, and what tolerates a loss."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.cost import Cost
from autoprune.evaluation import Candidate, Measurement
from autoprune.policy import Policy
from autoprune.rewards import PROTOCOLS, accuracy, error_log_macs, error_log_params, within_drop


def candidate(measured: float, macs: int = 1000, params: int = 100) -> Candidate:
    return Candidate(
        number=0,
        id="0" * 12,
        arm="search",
        agent="amc",
        policy=Policy({"conv": 0.5}),
        removed={"conv": 1},
        cost=Cost(macs, params, 4 * params, 10, params, macs),
        measurements=(Measurement("short", measured, 0.01, 1.0, 0.01),),
        seconds=0.0,
    )


def test_each_is_its_equation() -> None:
    assert accuracy(candidate(0.875)) == 0.875
    assert error_log_macs(candidate(0.875)) == pytest.approx(-0.125 * math.log(1000))
    assert error_log_params(candidate(0.875)) == pytest.approx(-0.125 * math.log(100))


def test_no_error_is_worth_most_and_size_decides_between_equals() -> None:
    for reward in (error_log_macs, error_log_params):
        assert reward(candidate(1.0)) == 0
        assert reward(candidate(0.9, 500, 50)) > reward(candidate(0.9, 1000, 100))
        assert reward(candidate(0.95, 1000, 100)) > reward(candidate(0.9, 500, 50))


def test_a_network_of_nothing_has_a_reward() -> None:
    assert math.isfinite(error_log_macs(candidate(0.1, 0, 0)))


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 999))
def test_who_is_within_the_drop_is_worth_more_than_who_is_not(a: float, b: float, macs: int) -> None:
    reward = within_drop(0.8, 1000)
    inside, outside = max(a, 0.8), min(b, 0.79)
    assert reward(candidate(inside, macs)) > 0 > reward(candidate(outside, 1))
    assert reward(candidate(inside, macs)) == 1 - macs / 1000
    assert reward(candidate(outside)) == pytest.approx(outside - 0.8)


@pytest.mark.parametrize(
    ("protocol", "expected"), [("resource", 0.9), ("accuracy", -0.1 * math.log(1000)), ("accuracy-params", -0.46052)]
)
def test_protocols_by_name(protocol: str, expected: float) -> None:
    found: Any = PROTOCOLS[protocol](candidate(0.9))
    assert found == pytest.approx(expected, abs=1e-5)
