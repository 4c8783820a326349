import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.errors import PolicyError
from autoprune.policy import Policy
from autoprune.structure import Group, LockedGroup, Structure, nearest


def group(name, size, **options):
    return Group(name, "channels", size, (), (name,), (), **options)


def block(name):
    return Group(name, "blocks", 1, (), (name,), (), least=0, block=name)


STRUCTURE = Structure(
    (group("a", 8), group("b", 3), group("c", 2)), (LockedGroup("fc", "channels", 10, ("fc",), "the reason"),)
)


def allowed(size, multiple, least):
    """Return the numbers of elements that may go, by trying each: none, or what leaves enough, and a multiple."""
    return [0] + [gone for gone in range(1, size + 1) if size - gone >= least and (size - gone) % multiple == 0]


class TestNearest:
    @given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 12), st.floats(0, 40))
    def test_it_is_what_trying_all_finds(self, size, multiple, least, removed):
        choices = allowed(size, multiple, least)
        found = int(nearest(removed, size, multiple, least))
        assert found in choices
        assert abs(found - removed) <= min(abs(choice - removed) for choice in choices) + 1e-9

    @given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 12), st.data())
    def test_what_is_allowed_stays(self, size, multiple, least, data):
        gone = data.draw(st.sampled_from(allowed(size, multiple, least)))
        assert int(nearest(gone, size, multiple, least)) == gone

    @given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 12), st.floats(0, 40), st.floats(0, 40))
    def test_more_is_never_less(self, size, multiple, least, one, other):
        low, high = (int(nearest(removed, size, multiple, least)) for removed in sorted((one, other)))
        assert low <= high

    @pytest.mark.parametrize(
        ("removed", "expected"), [(0.9, 0), (1, 2), (5, 2), (6, 2), (6.1, 10), (13.9, 10), (14, 18), (26, 18)]
    )
    def test_ties_by_hand(self, removed, expected):
        """Of 26 elements in multiples of 8 there stay 26, 24, 16 or 8; steps of an even number win."""
        assert int(nearest(removed, 26, 8, 1)) == expected

    def test_arrays_broadcast(self):
        found = nearest([[0.0, 3.0, 9.0], [4.0, 4.0, 4.0]], [8, 8, 10], [1, 4, 8], [1, 1, 0])
        assert found.dtype == np.int64
        assert found.tolist() == [[0, 4, 10], [4, 4, 2]]


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

    @given(st.integers(1, 60), st.integers(1, 9), st.floats(0, 1, exclude_max=True))
    def test_what_stays_is_a_multiple_or_all(self, size, multiple, sparsity):
        removed = group("a", size, multiple=multiple).count(sparsity)
        assert removed == 0 or 0 < size - removed == (size - removed) // multiple * multiple

    @pytest.mark.parametrize(("sparsity", "expected"), [(0.0, 0), (0.5, 0), (0.51, 1), (1.0, 1)])
    def test_a_block_stays_or_goes(self, sparsity, expected):
        assert block("layer1.0").count(sparsity) == expected

    def test_an_element_less_is_what_a_group_keeps_at_least(self):
        assert [group("a", 8, least=least).count(0.99) for least in (0, 1, 3, 8)] == [8, 7, 5, 0]


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

    def test_only_a_block_may_vanish(self):
        structure = Structure((group("a", 8), block("layer1.0")))
        assert structure.removed(Policy({"layer1.0": 1.0})) == {"a": 0, "layer1.0": 1}
        reason = r"only a block may vanish \(sparsity 1\), but 'a' is a group of channels; .* ask for 0\.99"
        with pytest.raises(PolicyError, match=reason) as caught:
            structure.removed(Policy({"layer1.0": 1.0, "a": 1.0}))
        assert "\n" not in str(caught.value)

    @given(st.integers(2, 50), st.integers(1, 9), st.floats(0, 1, exclude_max=True))
    def test_rounding_holds_for_multiples(self, size, multiple, sparsity):
        structure = Structure((group("a", size, multiple=multiple),))
        rounded = structure.rounded(Policy({"a": sparsity}))
        assert structure.removed(rounded) == structure.removed(Policy({"a": sparsity}))
        assert structure.rounded(rounded) == rounded

    @given(st.tuples(*(st.floats(0, 1, exclude_max=True) for _ in range(3))))
    def test_rounding_keeps_what_is_removed_and_is_done_once(self, sparsities):
        policy = Policy(dict(zip("abc", sparsities, strict=True)))
        rounded = STRUCTURE.rounded(policy)
        assert STRUCTURE.removed(rounded) == STRUCTURE.removed(policy)
        assert STRUCTURE.rounded(rounded) == rounded

    def test_policies_that_slice_alike_become_equal(self):
        policies = [Policy({"a": 0.5}), Policy({"a": 0.52, "b": 0.1}), Policy({"c": 0.0, "a": 0.45})]
        assert len({STRUCTURE.rounded(policy).id for policy in policies}) == 1
