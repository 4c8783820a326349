"""Blocks: found where a module returns its input plus something, proven to leave the identity, and cut out whole."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoprune.cost import CostModel, count
from autoprune.models import build
from autoprune.structure import Group, analyse, plan, remove
from autoprune.structure.blocks import Skipped, find_blocks
from autoprune.structure.proof import Proof
from autoprune.structure.trace import trace

IMAGES = torch.zeros(1, 3, 8, 8)


class Block(nn.Module):
    """A convolution, and how it is joined with the input."""

    def __init__(self, join, size=4):
        super().__init__()
        self.conv = nn.Conv2d(size, size, 3, padding=1)
        self.join = join

    def forward(self, x, *rest, **named):
        return self.join(x, self.conv(x), *rest, **named)


def stem_added(x, y):
    return x + y


class Net(nn.Module):
    """`stem` → relu → blocks → `fc`."""

    def __init__(self, *blocks, run=None):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(blocks)
        self.run = run

    def forward(self, x):
        x = F.relu(self.stem(x))
        if self.run is not None:
            x = self.run(self.blocks, x)
        else:
            for block in self.blocks:
                x = block(x)
        return self.fc(x.mean((2, 3)))


def added_in_place(x, y):
    y += x
    return y


def added_onto_the_input(x, y):
    x += y
    return x


def blocks_of(net, example=IMAGES):
    return analyse(net, example, kinds=("blocks",))


def reasons(structure):
    return {locked.name: locked.reason for locked in structure.locked}


def assert_identity(net, structure, removed, example):
    """What is left computes what the network computes with the identity in the blocks' places."""
    smaller = remove(net.eval(), structure, {name: [0] for name in removed})
    expected = build_with_identities(net, [structure[name].block for name in removed])
    with torch.no_grad():
        torch.testing.assert_close(smaller(example), expected(example), rtol=0, atol=0)
    return smaller


def build_with_identities(net, blocks):
    """Return the network with forwards that hand their input on, by a way of its own."""
    other = copy.deepcopy(net)
    for name in blocks:
        other.get_submodule(name).forward = lambda x: x
    return other


class TestFound:
    @pytest.mark.parametrize(
        "join",
        [
            stem_added,
            lambda x, y: y + x,
            lambda x, y: F.relu(x + y),
            lambda x, y: torch.add(x, y, alpha=0.5),
            lambda x, y: x + 0.1 * torch.tanh(y),
            lambda x, y: F.dropout(x + y, 0.5, False),
            lambda x, y: (x + y) + y.mean((2, 3), keepdim=True).expand_as(y),
            added_in_place,
            added_onto_the_input,
        ],
        ids=["x + y", "y + x", "relu", "alpha", "scaled", "dropout", "two branches", "in place", "onto the input"],
    )
    def test_what_adds_to_its_input(self, join):
        net = Net(Block(join), Block(join))
        structure = blocks_of(net)
        assert structure.names == ("blocks.0", "blocks.1")
        assert_identity(net, structure, ["blocks.0"], torch.randn(2, 3, 8, 8))
        assert_identity(net, structure, ["blocks.0", "blocks.1"], torch.randn(2, 3, 8, 8))

    def test_the_record(self):
        (group,) = blocks_of(Net(Block(stem_added)))
        assert (group.kind, group.size, group.least, group.block) == ("blocks", 1, 0, "blocks.0")
        assert (group.slices, group.layers, group.readers) == ((), ("blocks.0",), ())

    def test_those_of_a_residual_network_whose_shape_stays(self):
        structure = blocks_of(build("resnet20"))
        first = {"layer2.0", "layer3.0"}
        every = {f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)}
        assert set(structure.names) == every - first
        assert list(structure.names) == sorted(structure.names)

    def test_of_two_that_are_nested_the_inner_one(self):
        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Block(stem_added)

            def forward(self, x):
                return x + self.inner(x)

        assert blocks_of(Net(Outer())).names == ("blocks.0.inner",)

    @pytest.mark.parametrize(
        "join",
        [
            lambda x, y: y,
            lambda x, y: 2 * x + y,
            lambda x, y: x * y,
            lambda x, y: torch.cat([x, y], 1)[:, :4],
            lambda x, y: (x + y)[:, :, :4],
        ],
        ids=["nothing added", "a multiple", "a product", "concatenated", "another shape"],
    )
    def test_what_does_not_is_no_block(self, join):
        structure = blocks_of(Net(Block(join)))
        assert (structure.names, structure.locked) == ((), ())

    def test_a_network_as_a_whole_is_none(self):
        class Whole(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 3, padding=1)

            def forward(self, x):
                return x + self.conv(x)

        assert blocks_of(Whole()).names == ()

    def test_it_needs_no_labels(self):
        """Blocks of frozen width are found too, whatever can be known of channels."""
        net = Net(Block(lambda x, y: x + torch.fft.fft(y, dim=1).real))
        assert analyse(net, IMAGES, kinds=("channels", "blocks")).names[-1] == "blocks.0"


class TestArguments:
    def test_a_block_may_be_called_with_more_than_its_input(self):
        block = Block(lambda x, y, scale, shift=None: x + y * scale + shift * y)
        net = Net(block, run=lambda blocks, x: blocks[0](x, 2.0, shift=torch.ones(1)))
        structure = blocks_of(net)
        smaller = remove(net.eval(), structure, {"blocks.0": [0]})
        images = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            assert torch.equal(smaller(images), net.fc(F.relu(net.stem(images)).mean((2, 3))))

    def test_or_by_keyword_alone(self):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(4, 4, 3, padding=1)

            def forward(self, hidden, scale):
                return hidden + scale * self.conv(hidden)

        net = Net(Named(), run=lambda blocks, x: blocks[0](hidden=x, scale=2.0))
        assert blocks_of(net).names == ("blocks.0",)

    def test_transformer_layers(self):
        """`nn.TransformerEncoder` gives its layers masks by keyword."""
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        structure = blocks_of(net, torch.zeros(1, 5, 8))
        assert structure.names == ("layers.1", "layers.2")
        assert "no attribute 'self_attn'" in reasons(structure)["layers.0"]  # torch's encoder reads its first layer


class TestRefused:
    """What looks like a block, but does not leave the identity."""

    def test_an_activation_of_the_sum_that_changes_the_input(self):
        block = Block(lambda x, y: F.relu(x + y))
        net = Net(block, run=lambda blocks, x: blocks[0](x - 1))
        assert blocks_of(net).names == ()
        assert "is not the same as zeroing" in reasons(blocks_of(net))["blocks.0"]

    def test_an_input_that_is_weighted(self):
        net = Net(Block(lambda x, y: torch.add(y, x, alpha=2)))
        assert "is not the same as zeroing" in reasons(blocks_of(net))["blocks.0"]

    def test_a_block_that_leaves_something_behind(self):
        class Noted(Block):
            def forward(self, x):
                self.seen = self.conv(x)
                return x + self.seen

        net = Net(Noted(None), run=lambda blocks, x: blocks[0](x) + blocks[0].seen)
        structure = blocks_of(net)
        assert structure.names == ()
        assert reasons(structure)["blocks.0"].startswith("the network fails without some of its elements: ")

    def test_one_that_is_made_up(self):
        """A convolution is no block, whatever a record says."""
        net = Net(Block(stem_added))
        judge = Proof(net, IMAGES, torch.Generator().manual_seed(0))
        (group,) = find_blocks(trace(net, IMAGES))
        assert judge.fault(group) is None
        for module in ("stem", "blocks.0.conv"):
            assert judge.fault(dataclasses.replace(group, block=module)) is not None

    def test_a_broken_one_beside_good_ones(self):
        good = [Block(stem_added) for _ in range(5)]
        net = Net(
            *good[:3], Block(lambda x, y: F.relu(x + y - 1)), *good[3:], Block(lambda x, y: torch.add(y, x, alpha=2))
        )
        structure = blocks_of(net)
        assert structure.names == ("blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.5")
        assert set(reasons(structure)) == {"blocks.6"}


class TestShared:
    def test_a_block_that_runs_twice_goes_everywhere(self):
        net = Net(Block(stem_added), run=lambda blocks, x: blocks[0](blocks[0](x)))
        structure = blocks_of(net)
        assert [(group.name, group.size) for group in structure] == [("blocks.0", 1)]
        smaller = assert_identity(net, structure, ["blocks.0"], torch.randn(2, 3, 8, 8))
        assert CostModel(net, IMAGES, structure).cost({"blocks.0": 1}) == count(smaller, IMAGES).cost

    def test_a_block_with_two_names(self):
        block = Block(stem_added)
        net = Net(block, Block(stem_added), block)
        structure = blocks_of(net)
        assert structure.names == ("blocks.0", "blocks.1")
        smaller = assert_identity(net, structure, ["blocks.0"], torch.randn(2, 3, 8, 8))
        assert [type(module) for module in smaller.blocks] == [Skipped, Block, Skipped]
        assert CostModel(net, IMAGES, structure).cost({"blocks.0": 1}) == count(smaller, IMAGES).cost

    def test_weights_that_a_block_shares_stay_for_the_other(self):
        net = Net(Block(stem_added), Block(stem_added))
        net.blocks[1].conv.weight = net.blocks[0].conv.weight
        structure = blocks_of(net)
        smaller = assert_identity(net, structure, ["blocks.0"], torch.randn(2, 3, 8, 8))
        assert torch.equal(smaller.blocks[1].conv.weight, net.blocks[0].conv.weight)
        assert smaller.blocks[1].conv.weight is not net.blocks[0].conv.weight
        costs = CostModel(net, IMAGES, structure)
        assert costs.cost({"blocks.0": 1}) == count(smaller, IMAGES).cost
        smaller = assert_identity(net, structure, ["blocks.0", "blocks.1"], torch.randn(2, 3, 8, 8))
        assert costs.cost({"blocks.0": 1, "blocks.1": 1}) == count(smaller, IMAGES).cost


class TestCut:
    def test_its_parameters_are_gone_and_no_others(self):
        net = Net(Block(stem_added), Block(stem_added))
        structure = blocks_of(net)
        smaller = remove(net, structure, {"blocks.1": [0]})
        assert set(dict(net.named_parameters())) - set(dict(smaller.named_parameters())) == {
            "blocks.1.conv.weight",
            "blocks.1.conv.bias",
        }
        assert isinstance(net.blocks[1], Block)

    @pytest.mark.parametrize("training", [True, False])
    def test_the_identity_has_the_blocks_mode(self, training):
        net = Net(Block(stem_added)).train(not training)
        net.blocks[0].train(training)
        assert remove(net, blocks_of(net), {"blocks.0": [0]}).blocks[0].training is training

    def test_channels_and_blocks_go_together(self):
        net = build("resnet20").eval()
        structure = analyse(net, IMAGES, kinds=("channels", "blocks"))
        removed = {"layer1.1": [0], "layer1.1.conv1": [0, 1], "conv1": [3, 4, 5], "layer3.2": [0]}
        change = plan(net, structure, removed)
        assert change.blocks == ("layer1.1", "layer3.2")
        smaller = remove(net, structure, removed)
        without = build_with_identities(net, ["layer1.1", "layer3.2"])
        zeroed = {name: parameter.detach().clone() for name, parameter in without.named_parameters()}
        for part in structure["conv1"].slices:
            if part.role == "read":
                zeroed[part.tensor].index_fill_(part.dim, part.positions[[3, 4, 5]].flatten(), 0.0)
        images = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            expected = torch.func.functional_call(without, zeroed, (images,))
            torch.testing.assert_close(smaller(images), expected, rtol=1e-4, atol=1e-5)

    def test_a_block_is_not_removed_by_an_empty_choice(self):
        net = Net(Block(stem_added))
        assert plan(net, blocks_of(net), {"blocks.0": []}).blocks == ()

    def test_two_blocks_in_any_order(self):
        net = Net(Block(stem_added), Block(stem_added))
        structure = blocks_of(net)
        changes = [
            plan(net, structure, {name: [0] for name in order}) for order in (structure.names, structure.names[::-1])
        ]
        assert [set(change.blocks) for change in changes] == [{"blocks.0", "blocks.1"}] * 2


def test_find_blocks_stands_in_the_order_of_execution():
    net = Net(Block(stem_added), Block(stem_added), run=lambda blocks, x: blocks[0](blocks[1](x)))
    assert [group.name for group in find_blocks(trace(net, IMAGES))] == ["blocks.1", "blocks.0"]
    assert all(isinstance(group, Group) for group in find_blocks(trace(net, IMAGES)))
