import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.errors import PolicyError
from autoprune.policy import Policy
from autoprune.structure import Group, LockedGroup, Structure


def group(name, size):
    return Group(name, "channels", size, (), (name,), ())


STRUCTURE = Structure(
    (group("a", 8), group("b", 3), group("c", 2)), (LockedGroup("fc", "channels", 10, ("fc",), "the reason"),)
)


class TestCount:
    @pytest.mark.parametrize(
        ("size", "sparsity", "expected"),
        [(8, 0.0, 0), (8, 0.5, 4), (8, 0.06, 0), (8, 0.07, 1), (8, 0.99, 7), (3, 0.34, 1), (2, 0.99, 1), (1, 0.99, 0)],
    )
    def test_it_is_the_nearest_that_leaves_one(self, size, sparsity, expected):
        assert group("a", size).count(sparsity) == expected

    @given(st.integers(1, 300), st.floats(0, 1, exclude_max=True))
    def test_it_is_never_further_than_half_an_element_but_at_the_end(self, size, sparsity):
        count = group("a", size).count(sparsity)
        assert 0 <= count <= size - 1
        assert abs(count - sparsity * size) <= 0.5 or count == size - 1

    @given(st.integers(1, 300), st.data())
    def test_a_sparsity_made_of_a_count_gives_it_back(self, size, data):
        count = data.draw(st.integers(0, size - 1))
        assert group("a", size).count(count / size) == count


class TestStructure:
    def test_it_is_read_in_order_and_by_name(self):
        assert (STRUCTURE.names, len(STRUCTURE)) == (("a", "b", "c"), 3)
        assert [g.name for g in STRUCTURE] == ["a", "b", "c"]
        assert STRUCTURE["b"].size == 3
        with pytest.raises(KeyError):
            STRUCTURE["fc"]

    def test_a_name_is_used_once(self):
        with pytest.raises(ValueError, match="group names must be unique"):
            Structure((group("a", 8), group("a", 3)))

    def test_removed_counts_every_group(self):
        assert STRUCTURE.removed(Policy({"c": 0.9, "a": 0.5})) == {"a": 4, "b": 0, "c": 1}

    def test_a_locked_group_is_refused_with_its_reason(self):
        with pytest.raises(PolicyError, match="group 'fc' is locked: the reason"):
            STRUCTURE.removed(Policy({"fc": 0.5}))

    def test_an_unknown_group_is_refused_with_the_list(self):
        with pytest.raises(PolicyError, match="the network has no group 'd'; its groups are a, b, c"):
            STRUCTURE.removed(Policy({"a": 0.5, "d": 0.5}))

    @given(st.tuples(*(st.floats(0, 1, exclude_max=True) for _ in range(3))))
    def test_rounding_keeps_what_is_removed_and_is_done_once(self, sparsities):
        policy = Policy(dict(zip("abc", sparsities, strict=True)))
        rounded = STRUCTURE.rounded(policy)
        assert STRUCTURE.removed(rounded) == STRUCTURE.removed(policy)
        assert STRUCTURE.rounded(rounded) == rounded

    def test_policies_that_slice_alike_become_equal(self):
        policies = [Policy({"a": 0.5}), Policy({"a": 0.52, "b": 0.1}), Policy({"c": 0.0, "a": 0.45})]
        assert len({STRUCTURE.rounded(policy).id for policy in policies}) == 1
