import pytest
import torch

from autoprune.search_spaces.per_stage import PerStage, stages
from autoprune.structure import Group, Structure
from autoprune.testing import MakeSpace, SearchSpaceContract, chain


class TestPerStage(SearchSpaceContract):
    @pytest.fixture
    def make_space(self) -> MakeSpace:
        return PerStage


def group(name: str, size: int) -> Group:
    return Group(name, "channels", size, (), (name,), ())


def test_a_stage_is_one_size_in_one_module() -> None:
    groups = [("stem", 16), ("layer1.0.conv1", 16), ("layer1.1.conv1", 16), ("layer2.0.conv1", 32), ("layer2.0.out", 8)]
    found = stages(Structure(tuple(group(name, size) for name, size in groups)))
    assert found == {"/16": [0], "layer1/16": [1, 2], "layer2/32": [3], "layer2/8": [4]}


def test_flat_names_are_staged_by_size() -> None:
    assert PerStage(chain((8, 8, 16)), spend=(1.0, 1.0)).dimensions == ("/8", "/16")


def test_groups_of_a_stage_are_pruned_alike() -> None:
    space = PerStage(chain((8, 8, 16, 8)), spend=(1.0, 1.0))
    for coordinate in torch.linspace(0, 1, 11).tolist():
        policy = space.decode([coordinate, 0.5])
        assert policy["conv1"] == policy["conv2"] == policy["conv4"]
