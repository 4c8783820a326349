import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from autoprune.errors import StructureError
from autoprune.models import CifarResNet, build
from autoprune.structure import analyse
from autoprune.structure.channels import find_channels
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


class TestLocked:
    def test_the_classifier(self):
        structure = analyse(TinyNet(), torch.zeros(1, 1, 8, 8))
        (locked,) = structure.locked
        assert (locked.name, locked.kind, locked.size, locked.layers) == ("fc", "channels", 10, ("fc",))
        assert locked.reason == "its elements are the network's output"

    @pytest.mark.parametrize(
        ("norm", "reason"),
        [
            (nn.GroupNorm(2, 8), "removing its elements is not the same as zeroing them"),
            (nn.GroupNorm(8, 8), "the network fails without some of its elements: Expected number of channels"),
            (nn.LayerNorm([8, 8, 8]), "removing its elements is not the same as zeroing them"),
        ],
    )
    def test_a_norm_over_channels(self, norm, reason):
        structure = analyse(between(lambda net, x: net.norm(x), norm=norm), IMAGES)
        assert reasons(structure)["a"].startswith(reason)
        assert sizes(structure) == {"b": 4}

    @pytest.mark.parametrize("affine", [True, False])
    def test_a_layer_norm_over_features(self, affine):
        norm = nn.LayerNorm(6, elementwise_affine=affine)
        net = Net(lambda net, x: net.fc(net.norm(net.a(x))), a=nn.Linear(4, 6), norm=norm, fc=nn.Linear(6, 2))
        assert set(reasons(analyse(net, torch.zeros(2, 4)))) == {"a", "fc"}

    def test_an_instance_norm_is_none_of_these(self):
        norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        assert sizes(analyse(between(lambda net, x: net.norm(x), norm=norm), IMAGES)) == {"a": 8, "b": 4}

    @pytest.mark.parametrize("options", [{"groups": 2}, {"groups": 4}])
    def test_a_grouped_convolution(self, options):
        structure = analyse(between(lambda net, x: net.grouped(x), grouped=conv(8, 8, **options)), IMAGES)
        reason = "`grouped` is a grouped convolution, whose channels can't leave one by one"
        assert reasons(structure)["a"] == reason
        assert sizes(structure) == {"b": 4}
        assert {layer for locked in structure.locked for layer in locked.layers} == {"a", "grouped", "fc"}

    def test_a_depthwise_convolution_with_a_multiplier(self):
        net = between(lambda net, x: net.deep(x), deep=conv(8, 16, groups=8), b=conv(16, 4))
        assert "grouped convolution" in reasons(analyse(net, IMAGES))["a"]

    def test_a_module_that_can_not_be_sliced(self):
        run = lambda net, x: net.fc(net.attention(*[net.a(x)] * 3)[0])  # noqa: E731
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        structure = analyse(Net(run, a=nn.Linear(4, 8), attention=attention, fc=nn.Linear(8, 2)), torch.zeros(2, 5, 4))
        assert reasons(structure)["a"] == "`attention` is a MultiheadAttention, which can't be sliced"

    def test_a_padding_whose_widths_stand_in_the_code(self):
        def run(net, x):
            return net.fc(pooled(net.a(x) + F.pad(net.b(x), (0, 0, 0, 0, 1, 1))))

        structure = analyse(Net(run, a=conv(3, 6), b=conv(3, 4), fc=nn.Linear(6, 2)), IMAGES)
        assert reasons(structure)["a"] == "their number is fixed by a call of `pad` in the network's code"
        assert [locked.size for locked in structure.locked if locked.name == "a"] == [2]
        (rest,) = structure.groups
        assert (rest.name, rest.size) == ("a#2", 4)
        assert positions(rest)["a.weight", 0] == positions(rest)["fc.weight", 1] == [1, 2, 3, 4]
        assert positions(rest)["b.weight", 0] == [0, 1, 2, 3]

    def test_one_element(self):
        structure = analyse(between(lambda net, x: x, a=conv(3, 1), b=conv(1, 4)), IMAGES)
        assert reasons(structure)["a"] == "it has one element only, and a layer is never emptied"

    def test_channels_that_are_mixed_on_the_way(self):
        structure = analyse(between(lambda net, x: F.pixel_shuffle(x, 2), b=conv(2, 4)), IMAGES)
        assert reasons(structure)["a"] == "its elements do not line up with the weights that read them"
        structure = analyse(between(lambda net, x: F.channel_shuffle(x, 2)), IMAGES)
        assert "not the same as zeroing them" in reasons(structure)["a"]

    def test_weights_that_are_shared_with_another_layer(self):
        first, second = nn.Linear(6, 6), nn.Linear(6, 6)
        second.weight = first.weight
        run = lambda net, x: net.fc(net.c(net.b(net.a(x))))  # noqa: E731
        net = Net(run, a=nn.Linear(4, 6), b=first, c=second, fc=nn.Linear(6, 2))
        structure = analyse(net, torch.zeros(2, 4))
        assert set(reasons(structure)) == {"a", "b", "c", "fc"}

    def test_weights_that_are_computed(self):
        net = between(lambda net, x: net.c(x), c=nn.utils.parametrizations.weight_norm(conv(8, 8)))
        structure = analyse(net, IMAGES)
        (locked,) = (locked for locked in structure.locked if "c" in locked.layers)
        assert locked.reason == "the weight of `c` is computed from other tensors"
        assert sizes(structure) == {"b": 4}

    def test_a_layer_that_is_not_called_is_listed(self):
        net = between(lambda net, x: F.conv2d(x, net.c.weight - net.c.weight.mean(), padding=1), c=conv(8, 8))
        reason = "the network does not call it as a module when it runs on the example input"
        assert reasons(analyse(net, IMAGES))["c"] == reason

    def test_every_layer_is_offered_or_listed(self):
        for net in (TinyNet(), TinyResNet()):
            structure = analyse(net, torch.zeros(1, 1, 8, 8))
            listed = [*structure.groups, *structure.locked]
            layers = {name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
            assert {layer for group in listed for layer in group.layers} == layers


class TestErrors:
    def test_a_network_that_fails_on_the_input(self):
        with pytest.raises(StructureError, match="of TinyNet can't be traced: RuntimeError: Given groups=1"):
            analyse(TinyNet(), torch.zeros(1, 3, 8, 8))

    def test_a_network_that_can_not_be_copied(self):
        net = between(lambda net, x: x)
        prune.l1_unstructured(net.a, "weight", 0.5)
        with pytest.raises(StructureError, match=r"Net can't be copied \(Only Tensors .* make them plain parameters"):
            analyse(net, IMAGES)

    def test_messages_are_one_line(self):
        with pytest.raises(StructureError) as caught:
            analyse(Net(lambda net, x: net.a(x).view(7), a=conv(3, 4)), IMAGES)
        assert "\n" not in str(caught.value)


class TestInputUntouched:
    def snapshot(self, net):
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()]
        tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        return {
            "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
            "objects": {name: id(tensor) for name, tensor in tensors.items()},
            "grad": {name: None if t.grad is None else t.grad.clone() for name, t in net.named_parameters()},
            "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
            "training": [module.training for module in net.modules()],
            "hooks": hooks,
        }

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_nothing_of_it_changes(self):
        net = build("resnet20").train()
        net.bn1.eval()
        net.conv1.weight.requires_grad_(False)
        net.linear.weight.grad = torch.ones(10, 64)
        net.linear.register_forward_hook(lambda *_: None)
        before = self.snapshot(net)
        analyse(net, torch.zeros(1, 3, 8, 8))
        after = self.snapshot(net)
        for key in ("values", "grad"):
            for name, value in before[key].items():
                assert value is after[key][name] is None or torch.equal(value, after[key][name]), name
        assert {k: v for k, v in before.items() if k not in ("values", "grad")} == {
            k: v for k, v in after.items() if k not in ("values", "grad")
        }

    def test_the_example_input_does_not_change(self):
        images = torch.rand(2, 1, 8, 8)
        before = images.clone()
        analyse(TinyNet(), images)
        assert torch.equal(images, before)
        assert not images.requires_grad

    def test_frozen_and_no_grad_networks_are_found_alike(self):
        net = TinyResNet()
        expected = sizes(analyse(net, torch.zeros(1, 1, 8, 8)))
        frozen = copy.deepcopy(net).requires_grad_(False)
        with torch.no_grad():
            assert sizes(analyse(frozen, torch.zeros(1, 1, 8, 8))) == expected

    def test_the_same_network_gives_the_same_groups(self):
        first, second = (find_channels(TinyResNet(), torch.zeros(1, 1, 8, 8))[0] for _ in range(2))
        assert [(g.name, positions(g)) for g in first] == [(g.name, positions(g)) for g in second]
