import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoprune.models import CifarResNet, build
from autoprune.structure import Attribute, analyse
from autoprune.structure.channels import find_channels, unseen_layers
from autoprune.structure.trace import trace
from autoprune.testing import TinyNet, TinyResNet

IMAGES = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    """Modules or parameters, and how the input goes through them."""

    def __init__(self, run, **members):
        super().__init__()
        self.run = run
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x):
        return self.run(self, x)


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def pooled(x):
    return x.mean((2, 3))


def between(run, **members):
    """A network `a` → what is given → `b` → `fc`; `a` writes 8 channels, and `b` reads them."""
    members = {"a": conv(3, 8), "b": conv(8, 4), "fc": nn.Linear(4, 2)} | members
    return Net(lambda net, x: net.fc(pooled(F.relu(net.b(run(net, net.a(x)))))), **members)


def sizes(structure):
    return {group.name: group.size for group in structure}


def reasons(structure):
    return {locked.name: locked.reason for locked in structure.locked}


def positions(group):
    """Return where a group lies: (tensor, dim) → its positions, as plain lists of rows, or of numbers where k is 1."""
    rows = {(part.tensor, part.dim): part.positions.tolist() for part in group.slices}
    return {key: [row[0] for row in value] if len(value[0]) == 1 else value for key, value in rows.items()}


class TestChains:
    def test_a_convolution_with_its_norm_and_reader(self):
        structure = analyse(TinyNet(), torch.zeros(1, 1, 8, 8))
        assert sizes(structure) == {"conv1": 8, "conv2": 8}
        group = structure["conv1"]
        assert (group.kind, group.layers, group.readers) == ("channels", ("conv1",), ("conv2",))
        norm = ["bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"]
        written = [("conv1.weight", 0), ("conv1.bias", 0), *((name, 0) for name in norm)]
        assert positions(group) == {key: list(range(8)) for key in [*written, ("conv2.weight", 1)]}
        assert {part.tensor for part in group.slices if part.role == "read"} == {"conv2.weight"}

    def test_a_flatten_gives_a_channel_as_many_features_as_pixels(self):
        net = Net(lambda net, x: net.fc(F.relu(net.a(x)).flatten(1)), a=nn.Conv2d(3, 4, 3), fc=nn.Linear(4 * 36, 2))
        structure = analyse(net, IMAGES)
        expected = [list(range(36 * channel, 36 * channel + 36)) for channel in range(4)]
        assert positions(structure["a"])["fc.weight", 1] == expected

    def test_a_concatenation_moves_the_second_behind_the_first(self):
        def run(net, x):
            return net.fc(pooled(torch.cat([net.a(x), net.b(x)], 1)))

        structure = analyse(Net(run, a=conv(3, 4), b=conv(3, 6), fc=nn.Linear(10, 2)), IMAGES)
        assert positions(structure["a"])["fc.weight", 1] == [0, 1, 2, 3]
        assert positions(structure["b"])["fc.weight", 1] == [4, 5, 6, 7, 8, 9]

    def test_a_channel_read_twice_by_one_layer(self):
        def run(net, x):
            return net.fc(pooled(torch.cat([net.a(x), -net.a(x)], 1)))

        structure = analyse(Net(run, a=conv(3, 4), fc=nn.Linear(8, 2)), IMAGES)
        assert positions(structure["a"])["fc.weight", 1] == [[0, 4], [1, 5], [2, 6], [3, 7]]

    def test_transposed_and_depthwise_convolutions(self):
        def run(net, x):
            return net.fc(pooled(net.up(net.deep(net.a(x)))))

        deep, up = conv(4, 4, groups=4), nn.ConvTranspose2d(4, 5, 3)
        structure = analyse(Net(run, a=conv(3, 4), deep=deep, up=up, fc=nn.Linear(5, 2)), IMAGES)
        assert sizes(structure) == {"a": 4, "up": 5}
        assert set(positions(structure["a"])) >= {("deep.weight", 0), ("deep.bias", 0), ("up.weight", 0)}
        assert set(positions(structure["up"])) == {("up.weight", 1), ("up.bias", 0), ("fc.weight", 1)}

    def test_a_parameter_outside_of_modules_goes_with_its_channels(self):
        net = between(lambda net, x: x * net.scale, scale=nn.Parameter(torch.rand(8, 1, 1)))
        structure = analyse(net, IMAGES)
        assert positions(structure["a"])["scale", 0] == list(range(8))

    def test_one_slope_for_all_channels_is_not_sliced(self):
        structure = analyse(between(lambda net, x: net.many(net.one(x)), one=nn.PReLU(), many=nn.PReLU(8)), IMAGES)
        assert sizes(structure) == {"a": 8, "b": 4}
        assert ("many.weight", 0) in positions(structure["a"])
        assert ("one.weight", 0) not in positions(structure["a"])

    def test_a_module_that_runs_twice_is_one_group(self):
        net = between(lambda net, x: net.again(F.relu(net.again(x))), again=conv(8, 8))
        assert analyse(net, IMAGES)["a"].layers == ("a", "again")

    def test_a_layer_whose_weights_the_code_takes_is_like_any_other(self):
        structure = analyse(
            between(lambda net, x: F.conv2d(x, net.c.weight, padding=1), c=conv(8, 6), b=conv(6, 4)), IMAGES
        )
        assert {name: structure[name].readers for name in structure.names} == {"a": ("c",), "c": ("b",), "b": ("fc",)}

    def test_a_gradient_that_is_cut_hides_no_reader(self):
        run = lambda net, x: net.fc(pooled(net.a(x))) + net.other(pooled(net.a(x).detach()))  # noqa: E731
        net = Net(run, a=conv(3, 6), fc=nn.Linear(6, 2), other=nn.Linear(6, 2))
        assert analyse(net, IMAGES)["a"].readers == ("fc", "other")

    def test_a_pixel_shuffle_takes_four_channels_for_one(self):
        structure = analyse(between(lambda net, x: F.pixel_shuffle(x, 2), b=conv(2, 4)), IMAGES)
        assert positions(structure["a"])["a.weight", 0] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert positions(structure["a"])["b.weight", 1] == [0, 1]

    def test_embeddings(self):
        def run(net, x):
            return net.fc(F.relu(net.a(net.words(x) + net.places)).mean(1))

        members = {"words": nn.Embedding(10, 6), "places": nn.Parameter(torch.rand(1, 5, 6))}
        net = Net(run, **members, a=nn.Linear(6, 8), fc=nn.Linear(8, 2))
        assert sizes(analyse(net, torch.tensor([[1, 2, 3, 4, 5]])))["a"] == 8


class TestFunctionalNetworks:
    def test_a_functional_relu_is_no_obstacle(self):
        structure = analyse(TinyResNet(), torch.zeros(1, 1, 8, 8))
        assert sizes(structure) == {"stem": 8, "conv1": 8}

    def test_what_both_sides_of_an_addition_write_is_one_group(self):
        group = analyse(TinyResNet(), torch.zeros(1, 1, 8, 8))["stem"]
        assert group.layers == ("stem", "conv2")
        assert group.readers == ("conv1", "fc")

    def test_networks_may_return_a_dict_or_a_tuple(self):
        net = Net(lambda net, x: {"scores": net.fc(pooled(net.a(x)))}, a=conv(3, 4), fc=nn.Linear(4, 2))
        assert sizes(analyse(net, IMAGES)) == {"a": 4}
        net = Net(lambda net, x: (net.fc(pooled(net.a(x))), x.sum()), a=conv(3, 4), fc=nn.Linear(4, 2))
        assert sizes(analyse(net, IMAGES)) == {"a": 4}


@pytest.fixture(scope="module")
def resnet20():
    return analyse(build("resnet20"), torch.zeros(1, 3, 8, 8))


class TestOptionA:
    """He et al.'s option A adds 8 + 8 channels to the stream of 16, and then 16 + 16 to those 32."""

    @pytest.fixture
    def structure(self, resnet20):
        return resnet20

    def test_the_groups(self, structure):
        inner = {f"layer{stage}.{block}.conv1": 16 * 2 ** (stage - 1) for stage in (1, 2, 3) for block in (0, 1, 2)}
        stream = {"conv1": 16, "layer2.0.conv2": 8, "layer2.0.conv2#2": 8, "layer3.0.conv2": 16, "layer3.0.conv2#2": 16}
        assert sizes(structure) == inner | stream
        assert set(reasons(structure)) == {"linear"}

    def test_one_group_runs_through_three_stages(self, structure):
        blocks = [f"layer{stage}.{block}.conv2" for stage in (1, 2, 3) for block in (0, 1, 2)]
        assert structure["conv1"].layers == ("conv1", *blocks)
        readers = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1, 2)]
        assert structure["conv1"].readers == (*readers, "linear")

    def test_its_channels_move_by_what_is_added_on_the_left(self, structure):
        where = positions(structure["conv1"])
        first, second, third = list(range(16)), list(range(8, 24)), list(range(24, 40))
        assert where["conv1.weight", 0] == where["layer1.2.bn2.bias", 0] == where["layer2.0.conv1.weight", 1] == first
        assert where["layer2.0.conv2.weight", 0] == where["layer3.0.conv1.weight", 1] == second
        assert where["layer2.2.bn2.running_var", 0] == second
        assert where["layer3.2.bn2.weight", 0] == where["linear.weight", 1] == third
        assert not any("shortcut" in tensor for tensor, _ in where)

    @pytest.mark.parametrize(
        ("name", "side", "second", "third"),
        [("layer2.0.conv2", "left", 0, 16), ("layer2.0.conv2#2", "right", 24, 40)],
    )
    def test_channels_that_the_second_stage_adds(self, structure, name, side, second, third):
        where = positions(structure[name])
        assert where[f"layer2.0.shortcut.{side}", 0] == list(range(8))
        assert where["layer2.0.conv2.weight", 0] == where["layer3.0.conv1.weight", 1] == list(range(second, second + 8))
        assert where["layer3.0.conv2.weight", 0] == where["linear.weight", 1] == list(range(third, third + 8))
        assert not any(tensor.startswith(("conv1", "layer1")) for tensor, _ in where)

    @pytest.mark.parametrize(
        ("name", "side", "third"), [("layer3.0.conv2", "left", 0), ("layer3.0.conv2#2", "right", 48)]
    )
    def test_channels_that_the_third_stage_adds(self, structure, name, side, third):
        where = positions(structure[name])
        assert where[f"layer3.0.shortcut.{side}", 0] == list(range(16))
        assert where["layer3.1.conv2.weight", 0] == where["linear.weight", 1] == list(range(third, third + 16))
        assert structure[name].layers == tuple(f"layer3.{block}.conv2" for block in (0, 1, 2))

    def test_option_b_and_none(self):
        option_b = analyse(CifarResNet(1, "projection", 3, 10), torch.zeros(1, 3, 8, 8))
        assert option_b["layer2.0.conv2"].layers == ("layer2.0.conv2", "layer2.0.shortcut.0")
        assert sizes(option_b)["layer2.0.conv2"] == 32
        plain = analyse(CifarResNet(1, "none", 3, 10), torch.zeros(1, 3, 8, 8))
        assert all(len(group.layers) == 1 for group in plain)


def grouped(inputs, outputs, groups):
    """A network `a` → `many`, a convolution in groups → `b` → `fc`."""
    members = {"a": conv(3, inputs), "many": conv(inputs, outputs, groups=groups), "b": conv(outputs, 4)}
    return between(lambda net, x: net.many(x), **members)


class TestGroupedConvolutions:
    """Where groups are many, whole ones leave; where they are few, the same channel of each leaves in all of them."""

    def test_whole_groups_leave_where_they_are_many(self):
        structure = analyse(grouped(12, 8, 4), IMAGES)
        group = structure["a"]
        assert (group.size, group.layers, group.readers) == (4, ("a", "many"), ("b",))
        assert group.attributes == (Attribute("many", "groups", 1),)
        where = positions(group)
        assert where["a.weight", 0] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
        assert (
            where["many.weight", 0] == where["many.bias", 0] == where["b.weight", 1] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        )
        assert ("many.weight", 1) not in where

    def test_channels_leave_every_group_where_they_are_few(self):
        structure = analyse(grouped(8, 12, 2), IMAGES)
        assert sizes(structure) == {"a": 4, "many": 6, "b": 4}
        first, second = positions(structure["a"]), positions(structure["many"])
        assert first["a.weight", 0] == [[0, 4], [1, 5], [2, 6], [3, 7]]
        assert first["many.weight", 1] == [0, 1, 2, 3]
        assert second["many.weight", 0] == second["b.weight", 1] == [[n, n + 6] for n in range(6)]
        assert not structure["a"].attributes

    def test_a_depthwise_convolution_with_a_multiplier(self):
        structure = analyse(grouped(8, 16, 8), IMAGES)
        assert sizes(structure) == {"a": 8, "b": 4}
        assert structure["a"].attributes == (Attribute("many", "groups", 1),)
        assert positions(structure["a"])["b.weight", 1] == [[2 * n, 2 * n + 1] for n in range(8)]

    def test_what_two_of_them_share_leaves_in_whole_groups_of_both(self):
        def run(net, x):
            return net.fc(pooled(net.second(net.first(net.a(x)))))

        first, second = conv(8, 8, groups=8), conv(8, 8, groups=4)
        structure = analyse(Net(run, a=conv(3, 8), first=first, second=second, fc=nn.Linear(8, 2)), IMAGES)
        (group,) = structure.groups
        assert (group.size, group.layers) == (4, ("a", "first", "second"))
        assert set(group.attributes) == {Attribute("first", "groups", 2), Attribute("second", "groups", 1)}

    def test_a_group_norm_loses_whole_groups(self):
        structure = analyse(between(lambda net, x: net.norm(x), norm=nn.GroupNorm(4, 8)), IMAGES)
        assert (structure["a"].size, structure["a"].normalised) == (4, False)
        assert structure["a"].attributes == (Attribute("norm", "num_groups", 1),)

    def test_on_the_networks_input_all_groups_stay_and_lose_alike(self):
        net = Net(lambda net, x: net.fc(pooled(net.deep(x))), deep=conv(3, 6, groups=3), fc=nn.Linear(6, 2))
        (group,) = analyse(net, IMAGES).groups
        where = positions(group)
        assert where["deep.weight", 0] == where["fc.weight", 1] == [[0, 2, 4], [1, 3, 5]]
        assert group.attributes == ()


class TestMultiple:
    def test_channels_stay_in_multiples(self):
        structure = analyse(between(lambda net, x: x), IMAGES, multiple=4)
        assert structure["a"].multiple == 4
        assert [structure["a"].count(sparsity) for sparsity in (0.2, 0.3, 0.99)] == [0, 4, 4]

    def test_a_multiple_is_of_channels_and_not_of_elements(self):
        """An element of four channels, and one of two, count as such."""
        structure = analyse(grouped(16, 16, 8), IMAGES, multiple=8)
        assert (structure["a"].size, structure["a"].multiple) == (8, 4)

    @pytest.mark.parametrize(("multiple", "channels"), [(4, 4), (8, 4), (5, 4)])
    def test_fewer_channels_than_that_stay_whole(self, multiple, channels):
        structure = analyse(between(lambda net, x: x), IMAGES, multiple=multiple)
        assert reasons(structure)["b"] == f"it has {channels} channels, and no smaller multiple of {multiple}"

    def test_sizes_that_are_no_multiple(self):
        structure = analyse(between(lambda net, x: x, a=conv(3, 11), b=conv(11, 4)), IMAGES, multiple=3)
        assert [structure["a"].nearest(number) for number in range(12)] == [0, 2, 2, 2, 5, 5, 5, 8, 8, 8, 8, 8]


class TestLocked:
    def test_the_classifier(self):
        structure = analyse(TinyNet(), torch.zeros(1, 1, 8, 8))
        (locked,) = structure.locked
        assert (locked.name, locked.kind, locked.size, locked.layers) == ("fc", "channels", 10, ("fc",))
        assert locked.reason == "its elements are the network's output"

    @pytest.mark.parametrize("norm", [nn.GroupNorm(1, 8), nn.LayerNorm([8, 8, 8])])
    def test_a_norm_over_channels(self, norm):
        structure = analyse(between(lambda net, x: net.norm(x), norm=norm), IMAGES)
        assert reasons(structure)["a"] == (
            "`norm` normalises across it, so that removing is not the same as zeroing "
            "(offered on request, as a normalised group)"
        )
        assert sizes(structure) == {"b": 4}

    @pytest.mark.parametrize("affine", [True, False])
    def test_a_layer_norm_over_features(self, affine):
        norm = nn.LayerNorm(6, elementwise_affine=affine)
        net = Net(lambda net, x: net.fc(net.norm(net.a(x))), a=nn.Linear(4, 6), norm=norm, fc=nn.Linear(6, 2))
        assert set(reasons(analyse(net, torch.zeros(2, 4)))) == {"a", "fc"}

    def test_an_instance_norm_is_none_of_these(self):
        norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        assert sizes(analyse(between(lambda net, x: net.norm(x), norm=norm), IMAGES)) == {"a": 8, "b": 4}

    def test_a_module_whose_code_insists_on_a_width(self):
        run = lambda net, x: net.fc(net.attention(*[net.a(x)] * 3)[0])  # noqa: E731
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        structure = analyse(Net(run, a=nn.Linear(4, 8), attention=attention, fc=nn.Linear(8, 2)), torch.zeros(2, 5, 4))
        reason = (
            "the network fails without some of its elements: passed-in embed_dim 8 didn't match last dim of query 4"
        )
        assert reasons(structure)["a"] == reason

    def test_a_padding_whose_widths_stand_in_the_code(self):
        def run(net, x):
            return net.fc(pooled(net.a(x) + F.pad(net.b(x), (0, 0, 0, 0, 1, 1))))

        structure = analyse(Net(run, a=conv(3, 6), b=conv(3, 4), fc=nn.Linear(6, 2)), IMAGES)
        assert reasons(structure)["a"].endswith(" joins it with padding of a fixed size")
        assert [locked.size for locked in structure.locked if locked.name == "a"] == [2]
        (rest,) = structure.groups
        assert (rest.name, rest.size) == ("a#2", 4)
        assert positions(rest)["a.weight", 0] == positions(rest)["fc.weight", 1] == [1, 2, 3, 4]
        assert positions(rest)["b.weight", 0] == [0, 1, 2, 3]

    def test_channels_that_are_mixed_on_the_way(self):
        structure = analyse(between(lambda net, x: F.channel_shuffle(x, 2)), IMAGES)
        assert sizes(structure) == {"b": 4}
        assert "shuffles the 8 of them" in reasons(structure)["a"]

    def test_what_a_softmax_runs_over(self):
        structure = analyse(between(lambda net, x: net.gate(x), gate=nn.Softmax(1)), IMAGES)
        assert reasons(structure)["a"] == "`gate` runs `softmax` across it"

    def test_weights_that_are_shared_with_another_layer(self):
        """Rows and columns of one matrix meet in one element."""
        first, second = nn.Linear(6, 6), nn.Linear(6, 6)
        second.weight = first.weight
        run = lambda net, x: net.fc(net.c(net.b(net.a(x))))  # noqa: E731
        net = Net(run, a=nn.Linear(4, 6), b=first, c=second, fc=nn.Linear(6, 2))
        (group,) = analyse(net, torch.zeros(2, 4)).groups
        written = [("a.weight", 0), ("a.bias", 0), ("b.weight", 0), ("b.bias", 0), ("c.bias", 0)]
        assert positions(group) == {key: list(range(6)) for key in [*written, ("b.weight", 1), ("fc.weight", 1)]}

    def test_a_layer_that_is_not_used_is_listed(self):
        structure = analyse(between(lambda net, x: x, unused=conv(8, 6)), IMAGES)
        (locked,) = (locked for locked in structure.locked if locked.name == "unused")
        assert (locked.size, locked.layers) == (6, ("unused",))
        assert locked.reason == "the network does not use it when it runs on the example input"

    def test_one_line_for_a_layer_and_reason(self):
        """Elements of a layer that are locked for one reason are one group, however they differ."""
        structure = analyse(build("resnet20"), torch.zeros(1, 3, 8, 8))
        assert [(locked.name, locked.size) for locked in structure.locked] == [("linear", 10)]

    def test_every_layer_is_offered_or_listed(self):
        for net in (TinyNet(), TinyResNet()):
            structure = analyse(net, torch.zeros(1, 1, 8, 8))
            listed = [*structure.groups, *structure.locked]
            layers = {name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
            assert {layer for group in listed for layer in group.layers} == layers


class TestFindChannels:
    def test_the_same_network_gives_the_same_groups(self):
        net = build("resnet20")
        first, second = (find_channels(net, trace(net, torch.zeros(1, 3, 8, 8))) for _ in range(2))
        assert [(g.name, positions(g)) for g in first.groups] == [(g.name, positions(g)) for g in second.groups]
        assert first.locked == second.locked

    def test_groups_stand_in_the_order_of_execution(self):
        def run(net, x):
            return net.z(pooled(net.m(F.relu(net.a(F.relu(net.b(x)))))))

        net = Net(run, z=nn.Linear(5, 2), a=conv(3, 4), m=conv(4, 5), b=conv(3, 3))
        assert [group.name for group in find_channels(net, trace(net, IMAGES)).groups] == ["b", "a", "m"]

    def test_unseen_layers(self):
        net = between(lambda net, x: x, unused=conv(8, 6), tied=conv(8, 4))
        net.tied.weight = net.b.weight
        assert unseen_layers(net, trace(net, IMAGES)) == ["unused"]

    def test_what_an_example_of_one_pixel_shows(self):
        """Dimensions of size 1 have nothing to lose, and don't get in the way."""
        structure = analyse(between(lambda net, x: x), torch.zeros(1, 3, 1, 1))
        assert sizes(structure) == {"a": 8, "b": 4}
