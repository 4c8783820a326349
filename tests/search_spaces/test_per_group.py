import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.search_spaces.per_group import PerGroup
from autoprune.testing import MakeSpace, SearchSpaceContract, chain

FEASIBLE = chain((6, 8, 12, 5))
UNIT = st.floats(0, 1)


class TestPerGroup(SearchSpaceContract):
    @pytest.fixture
    def make_space(self) -> MakeSpace:
        return PerGroup


def test_a_coordinate_is_a_group() -> None:
    assert PerGroup(FEASIBLE, spend=(1.0, 1.0)).dimensions == ("conv1", "conv2", "conv3", "conv4")
    assert PerGroup(FEASIBLE, spend=(0.0, 1.0)).dimensions[-1] == "spend"


def test_a_coordinate_is_the_way_between_the_bounds() -> None:
    loose = chain((10, 10), "macs<=1000%")
    space = PerGroup(loose, spend=(0.0, 1.0))
    smallest = space.decode([1.0, 1.0, 0.0])
    assert dict(smallest) == {"conv1": 0.9, "conv2": 0.9}


def test_a_point_of_the_right_cost_is_taken_as_it_is() -> None:
    space = PerGroup(chain((10, 10), "macs<=100%", max_sparsity=0.5), spend=(1.0, 1.0))
    assert dict(space.decode([0.0, 0.0])) == {"conv1": 0.0, "conv2": 0.0}


@given(st.tuples(UNIT, UNIT, UNIT, UNIT, UNIT))
def test_decode_encode_decode_is_decode(point: tuple[float, ...]) -> None:
    space = PerGroup(FEASIBLE, spend=(0.0, 1.0))
    policy = space.decode(point)
    encoded = space.encode(policy)
    assert space.decode(encoded) == policy
    assert FEASIBLE.utilisation(FEASIBLE.removed(policy)) <= 1


@given(st.tuples(UNIT, UNIT, UNIT, UNIT), st.integers(0, 3))
def test_asking_more_of_a_group_never_takes_less_of_it_than_of_the_others(point: tuple[float, ...], index: int) -> None:
    space = PerGroup(FEASIBLE, spend=(1.0, 1.0))
    more = [*point]
    more[index] = 1.0
    name = space.dimensions[index]
    assert space.decode(more)[name] >= space.decode(point)[name] - 1 / FEASIBLE.sizes[index]


def test_a_warm_start_is_met_closely() -> None:
    # Neither rounding nor the projection moves a policy that fills the budget by more than one element a group.
    space = PerGroup(FEASIBLE, spend=(1.0, 1.0))
    removed = FEASIBLE.project(np.array([0.2, 0.7, 0.4, 0.3]))
    met = FEASIBLE.removed(space.decode(space.encode(FEASIBLE.policy(removed))))
    assert np.abs(met - removed).max() <= 1
