import pytest
import torch
from torch import nn

from autoprune import registry
from autoprune.scoring import Evidence, ascending, removal_orders, removals
from autoprune.scoring.base import per_element, sum_of_weights
from autoprune.structure import Slice, Structure, analyse
from autoprune.testing import TinyNet, TinyResNet

EXAMPLE = torch.zeros(1, 1, 8, 8)


class Blocks(nn.Module):
    """Two blocks that the identity can take the place of: `(batch, 1, 8, 8)` to `(batch, 10)`."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm, self.down = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            return x + self.down(self.norm(self.up(x)).relu())

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), self.Block(), self.Block()
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.second(self.first(self.stem(x))).mean((2, 3)))


def evidence(seed=0):
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(6, 1, 8, 8, generator=generator), torch.arange(6)
    loss = torch.nn.CrossEntropyLoss(reduction="none")
    return Evidence([(inputs[:4], targets[:4]), (inputs[4:], targets[4:])], loss, seed)


class TestPerElement:
    def test_one_position_each(self):
        values = torch.arange(6.0).view(2, 3)
        assert per_element(values, Slice("w", 0, torch.tensor([[0], [1]]), "written")).tolist() == [3, 12]
        assert per_element(values, Slice("w", 1, torch.tensor([[2], [0]]), "read")).tolist() == [7, 3]

    def test_several_positions_each(self):
        part = Slice("w", 1, torch.tensor([[0, 1], [2, 3]]), "read")
        assert per_element(torch.arange(8.0).view(2, 4), part).tolist() == [0 + 4 + 1 + 5, 2 + 6 + 3 + 7]

    def test_vectors_and_convolutions(self):
        assert per_element(torch.tensor([5.0, 6.0]), Slice("b", 0, torch.tensor([[1], [0]]), "written")).tolist() == [
            6,
            5,
        ]
        part = Slice("w", 0, torch.tensor([[0], [1]]), "written")
        assert per_element(torch.ones(2, 3, 3, 3), part).tolist() == [27, 27]


class TestRemovals:
    def test_the_least_important_first(self):
        structure = analyse(TinyNet(), EXAMPLE, kinds=("channels", "weights"))
        scores = torch.arange(576.0).view(8, 8, 3, 3)
        orders = {"conv1": [3, 1, 2, 0, 4, 5, 6, 7], "conv2:weights": scores}
        found = removals(structure, orders, {"conv1": 2, "conv2:weights": 5})
        assert found["conv1"] == [3, 1]
        assert found["conv2:weights"].count == 5
        assert torch.equal(found["conv2:weights"].saliency, scores)
        assert removals(structure, orders, {"conv1": 0}) == {"conv1": []}


class TestSumOfWeights:
    def test_biases_and_norms_are_left_out(self):
        net = TinyNet()
        structure = analyse(net, EXAMPLE)
        before = sum_of_weights(net, structure["conv1"], torch.abs)
        with torch.no_grad():
            net.conv1.bias.fill_(100)
            net.bn1.weight.fill_(100)
        assert torch.equal(sum_of_weights(net, structure["conv1"], torch.abs), before)
        assert not before.requires_grad

    def test_every_writer_and_reader_counts(self):
        net = TinyResNet()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(1)
        structure = analyse(net, EXAMPLE)
        conv, stem, fc = 8 * 9, 9, 10
        assert sum_of_weights(net, structure["stem"], torch.abs).tolist() == [stem + conv + conv + fc] * 8
        assert sum_of_weights(net, structure["conv1"], torch.abs).tolist() == [conv + conv] * 8

    def test_of_a_single_weight_it_is_the_weight(self):
        net = TinyNet()
        structure = analyse(net, EXAMPLE, kinds=("weights",))
        assert torch.equal(sum_of_weights(net, structure["conv2:weights"], torch.abs), net.conv2.weight.abs())

    def test_a_block_is_all_the_weights_in_it(self):
        net = Blocks()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(-1)
        structure = analyse(net, EXAMPLE, kinds=("blocks",))
        assert sum_of_weights(net, structure["first"], torch.abs).tolist() == [4 * 6 * 9 + 6 * 4]


class TestRemovalOrders:
    def test_the_least_goes_first(self):
        assert removal_orders({"a": torch.tensor([3.0, 1.0, 2.0])}) == {"a": [1, 2, 0]}

    def test_ties_go_by_number(self):
        scores = torch.tensor([1.0, 0.0] * 40)
        assert removal_orders({"a": scores})["a"] == [*range(1, 80, 2), *range(0, 80, 2)]

    def test_weights_keep_their_scores(self):
        scores = torch.rand(3, 4)
        assert removal_orders({"a:weights": scores})["a:weights"] is scores


class TestEveryCriterion:
    @pytest.fixture(params=registry.names("criterion"))
    def criterion(self, request):
        return registry.resolve("criterion", request.param)()

    @pytest.mark.parametrize("make", [TinyNet, TinyResNet])
    def test_it_scores_every_element_of_every_group(self, criterion, make):
        net = make()
        structure = analyse(net, EXAMPLE)
        scores = criterion.score(net, structure, evidence())
        assert list(scores) == list(structure.names)
        for name, score in scores.items():
            assert score.shape == (structure[name].size,)
            assert torch.isfinite(score).all()
            assert not score.requires_grad

    @pytest.mark.parametrize("kinds", [("channels", "blocks"), ("weights",), ("blocks", "2:4"), ("channels", "2x2")])
    def test_it_scores_every_kind(self, criterion, kinds):
        """Blocks as a whole, weights one by one, whatever pattern they go in."""
        net = Blocks()
        structure = analyse(net, EXAMPLE, kinds=kinds)
        assert {group.kind for group in structure} == set(kinds)
        scores = criterion.score(net, structure, evidence())
        assert list(scores) == list(structure.names)
        for name, score in scores.items():
            pattern = structure[name].pattern
            weight = None if pattern is None else net.get_parameter(pattern.tensor)
            assert score.shape == ((structure[name].size,) if weight is None else weight.shape)
            assert torch.isfinite(score).all()
            assert (score >= 0).all()
            assert not score.requires_grad

    def test_a_residual_group_is_not_worth_nothing(self, criterion):
        net = TinyResNet()
        structure = analyse(net, EXAMPLE)
        assert (criterion.score(net, structure, evidence())["stem"] > 0).all()

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_the_network_is_not_changed(self, criterion):
        with torch.random.fork_rng():
            net = TinyNet().train()
        net.fc.weight.requires_grad_(False)
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        criterion.score(net, analyse(net, EXAMPLE), evidence())
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
        assert net.training
        assert [name for name, parameter in net.named_parameters() if not parameter.requires_grad] == ["fc.weight"]
        assert all(parameter.grad is None for parameter in net.parameters())

    def test_it_repeats(self, criterion):
        net = TinyNet()
        structure = analyse(net, EXAMPLE)
        one, other = (criterion.score(net, structure, evidence(seed=5)) for _ in range(2))
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_no_groups_have_no_scores(self, criterion):
        assert criterion.score(TinyNet(), Structure(()), evidence()) == {}


class TestAscending:
    def test_channels_come_in_the_order_in_which_they_go(self):
        group = analyse(TinyNet(), EXAMPLE)["conv1"]
        score = torch.tensor([3.0, 1.0, 2.0, 8.0, 7.0, 6.0, 5.0, 4.0])
        order = removal_orders({"conv1": score})["conv1"]
        assert ascending(group, score).tolist() == score[torch.as_tensor(order)].tolist() == list(range(1, 9))

    def test_of_weights_there_is_one_for_each_that_can_go(self):
        for kind, expected in (("weights", 8 * 8 * 9), ("2:4", 4), ("4x4", 2 * 18)):
            group = next(g for g in analyse(TinyNet(), EXAMPLE, kinds=(kind,)) if "conv2" in g.layers)
            ordered = ascending(group, torch.arange(8 * 8 * 9.0).reshape(8, 8, 3, 3))
            assert len(ordered) == expected, kind
            assert (ordered[1:] >= ordered[:-1]).all()

    def test_an_element_of_a_run_is_the_mean_over_the_runs(self):
        group = next(g for g in analyse(nn.Sequential(nn.Linear(8, 2)), torch.zeros(1, 8), kinds=("2:4",)))
        score = torch.tensor([[4.0, 3, 2, 1, 1, 1, 1, 1], [0, 0, 0, 8, 5, 6, 7, 8]])
        assert ascending(group, score).tolist() == [(1 + 1 + 0 + 5) / 4, 9 / 4, 11 / 4, (4 + 1 + 8 + 8) / 4]
