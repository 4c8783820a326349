"""The arithmetic of labels, on maps small enough to write out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from autoprune.structure.labels import Area, Nodes, compact, distinct, varying


def over(labels, shape, dim):
    """The map of a shape that varies along one dimension."""
    return torch.tensor(labels).reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


class TestVarying:
    def test_dimensions_of_stride_0_do_not(self):
        assert varying(over([1, 2, 3], (2, 3, 4), 1)) == (1,)
        assert varying(torch.zeros((), dtype=torch.int64).expand(2, 3)) == ()

    def test_dimensions_of_size_1_do_not(self):
        assert varying(torch.tensor([[1, 2]])) == (1,)

    def test_several(self):
        assert varying(torch.tensor([[1, 2], [3, 4]]).unsqueeze(1).expand(2, 5, 2)) == (0, 2)


class TestCompact:
    def test_it_finds_what_is_constant(self):
        label = over([1, 2, 3], (2, 3, 4), 1).contiguous()
        assert varying(label) == (0, 1, 2)
        assert varying(compact(label)) == (1,)
        assert torch.equal(compact(label), label)

    def test_what_is_compact_stays_the_same_object(self):
        label = torch.tensor([1, 2, 3])
        assert compact(label) is label

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(arrays.arrays(np.int64, arrays.array_shapes(min_dims=1, max_dims=4, max_side=4), elements=st.integers(0, 2)))
    def test_any_map(self, labels):
        label = torch.from_numpy(labels)
        small = compact(label)
        assert torch.equal(small, label)
        for dim in range(label.dim()):
            constant = bool((labels == labels.take([0], dim)).all())
            assert (dim in varying(small)) == (not constant)


class TestDistinct:
    def test_zero_is_none(self):
        assert distinct(torch.tensor([[3, 0], [3, 1]])).tolist() == [1, 3]
        assert distinct(np.array([0, 0])).tolist() == []

    def test_repetition_costs_nothing(self):
        enormous = torch.tensor([5, 0, 2]).reshape(3, 1).expand(3, 10**15)
        assert distinct(enormous).tolist() == [2, 5]


class TestArea:
    def test_without_maps_it_is_a_number(self):
        assert Area.of((2, 3, 4), []) == Area(24, ())
        assert Area.of((), []) == Area(1, ())

    def test_a_map_takes_its_dimension_out_of_the_number(self):
        area = Area.of((2, 3, 4), [over([7, 8, 9], (2, 3, 4), 1)])
        assert area.fixed == 8
        ((dims, labels),) = area.maps
        assert dims == (1,)
        assert labels.tolist() == [7, 8, 9]

    def test_two_maps(self):
        shape = (2, 3, 4)
        area = Area.of(shape, [over([1, 2], shape, 0), over([7, 8, 9], shape, 1)])
        assert area.fixed == 4
        assert [(dims, labels.tolist()) for dims, labels in area.maps] == [((0,), [1, 2]), ((1,), [7, 8, 9])]

    def test_a_map_along_two_dimensions(self):
        area = Area.of((2, 5, 2), [torch.tensor([[1, 2], [3, 4]]).unsqueeze(1).expand(2, 5, 2)])
        assert area.fixed == 5
        assert [(dims, labels.tolist()) for dims, labels in area.maps] == [((0, 2), [[1, 2], [3, 4]])]

    def test_a_constant_map_is_none(self):
        assert Area.of((2, 3), [torch.ones(1, dtype=torch.int64).expand(2, 3)]) == Area(6, ())

    def test_it_keeps_no_memory_of_the_map(self):
        label = torch.tensor([1, 2, 3])
        area = Area.of((3,), [label])
        label.zero_()
        assert area.maps[0][1].tolist() == [1, 2, 3]


class TestNodes:
    @pytest.fixture
    def nodes(self):
        nodes = Nodes()
        nodes.side("a.weight", 0, 3)  # 1 2 3
        nodes.side("b.weight", 1, 3)  # 4 5 6
        return nodes

    def test_they_are_numbered_from_1(self, nodes):
        assert nodes.side("c.weight", 0, 2).tolist() == [7, 8]
        assert nodes.sides == [("a.weight", 0), ("b.weight", 1), ("c.weight", 0)]
        assert nodes.starts == [1, 4, 7]
        assert len(nodes) == 9

    def test_what_is_united_is_one_element(self, nodes):
        nodes.unite(torch.tensor([1, 2, 3]), torch.tensor([6, 5, 4]), "")
        of = nodes.components()
        assert of[1] == of[6] != of[2] == of[5] != of[3] == of[4] != of[1]
        assert nodes.blocked == []

    def test_through_a_third(self, nodes):
        nodes.unite(torch.tensor([1, 2]), torch.tensor([2, 3]), "")
        assert len(set(nodes.components()[[1, 2, 3]])) == 1

    def test_maps_are_broadcast(self, nodes):
        nodes.unite(torch.tensor([[1], [2]]), torch.tensor([[4, 5]]), "")
        assert len(set(nodes.components()[[1, 2, 4, 5]])) == 1

    def test_what_meets_nothing_is_blocked(self, nodes):
        nodes.unite(torch.tensor([1, 0, 3]), torch.tensor([4, 5, 0]), "padding")
        ((blocked, reason),) = nodes.blocked
        assert (blocked.tolist(), reason) == ([3, 5], "padding")
        of = nodes.components()
        assert of[1] == of[4]
        assert len(set(of[[0, 1, 3, 5]])) == 4

    def test_nothing_meets_nothing(self, nodes):
        nodes.unite(torch.tensor([0]), torch.tensor([0]), "padding")
        assert nodes.blocked == []

    def test_repetition_costs_nothing(self, nodes):
        wide = (3, 10**15)
        nodes.unite(over([1, 2, 3], wide, 0), over([4, 5, 6], wide, 0), "")
        of = nodes.components()
        assert of[1] == of[4] != of[2]

    def test_marks_and_blocks_of_nothing_are_left_out(self, nodes):
        nodes.mark(nodes.norms, torch.zeros(3, dtype=torch.int64), "norm")
        nodes.block(torch.zeros(3, dtype=torch.int64), "why")
        assert nodes.norms == nodes.blocked == []
        nodes.mark(nodes.norms, torch.tensor([2, 2, 0]), "norm")
        assert [(labels.tolist(), text) for labels, text in nodes.norms] == [([2], "norm")]

    def test_no_nodes(self):
        assert Nodes().components().tolist() == [0]
