import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.search_spaces.uniform import Uniform
from autoprune.testing import MakeSpace, SearchSpaceContract, chain


class TestUniform(SearchSpaceContract):
    @pytest.fixture
    def make_space(self) -> MakeSpace:
        return Uniform


def test_a_fixed_spend_leaves_a_single_point() -> None:
    space = Uniform(chain((10, 20)), spend=(1.0, 1.0))
    assert space.dimensions == ()
    assert space.encode(space.decode([])) == []


def test_sparsity_is_the_lowest_that_fits() -> None:
    feasible = chain((10, 10, 10))
    removed = feasible.removed(Uniform(feasible, spend=(1.0, 1.0)).decode([]))
    lowest = next(k for k in range(10) if feasible.utilisation(np.array([k, k, k])) <= 1)
    assert set(removed.tolist()) <= {lowest - 1, lowest}
    assert feasible.utilisation(removed) <= 1
    for index in np.flatnonzero(removed == lowest):  # each of these is needed
        removed[index] -= 1
        assert feasible.utilisation(removed) > 1
        removed[index] += 1


@given(st.floats(0, 1))
def test_sparsities_are_equal_up_to_rounding_and_bounds(share: float) -> None:
    feasible = chain((6, 30, 11))
    policy = Uniform(feasible, spend=(0.0, 1.0)).decode([share])
    low = [policy[g.name] - 0.5 / g.size for g in feasible.structure]
    high = [policy[g.name] + 0.5 / g.size if policy[g.name] < 0.89 else 1.0 for g in feasible.structure]
    assert max(low) <= min(high) + 1e-9
