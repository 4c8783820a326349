import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.errors import ConfigError
from autoprune.search_spaces.base import Spend, TiedRatios, checked_point
from autoprune.testing import chain


@pytest.mark.parametrize("spend", [(-0.1, 1.0), (0.6, 0.4), (0.0, 1.1), (float("nan"), 1.0)])
def test_a_spend_outside_the_budget_is_refused(spend: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="0 <= low <= high <= 1"):
        Spend(0.1, *spend)


def test_the_whole_budget_is_the_target_of_a_full_spend() -> None:
    assert Spend(0.3, 1.0, 1.0).target(0.0) == 1.0


def test_no_spend_is_the_smallest_network() -> None:
    assert Spend(0.3, 0.0, 1.0).target(0.0) == pytest.approx(0.3)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_share_comes_back(smallest: float, coordinate: float) -> None:
    spend = Spend(smallest, 0.25, 0.75)
    target = spend.target(coordinate)
    (back,) = spend.coordinates(target)
    assert spend.target(back) == pytest.approx(target, abs=1e-8)


def test_points_of_other_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 coordinates"):
        checked_point([0.5], ["a", "b"])


def test_tied_groups_of_other_bounds_find_the_way_back() -> None:
    space = TiedRatios(chain((8, 20, 12), "macs<=60%"), {"all": [0, 1, 2]}, spend=(0.0, 1.0))
    for step in range(51):
        policy = space.decode([0.3, step / 50])
        assert space.decode(space.encode(policy)) == policy
