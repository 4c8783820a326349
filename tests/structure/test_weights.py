"""Groups of single weights: which tensors are offered, under which names, and why others are not."""

import pytest
import torch
from torch import nn

from autoprune.errors import ConfigError
from autoprune.policy import Policy
from autoprune.structure.groups import Pattern, Structure
from autoprune.structure.masks import units
from autoprune.structure.weights import WeightKind, find_weights
from autoprune.testing import TinyResNet


def offered(model: nn.Module, kind: str, **options: bool) -> dict[str, int]:
    return {group.name: group.size for group in find_weights(model, kind, **options)[0]}


def reasons(model: nn.Module, kind: str, **options: bool) -> dict[str, str]:
    return {locked.name: locked.reason for locked in find_weights(model, kind, **options)[1]}


class Attention(nn.Module):
    """An attention layer beside what an attention block has: a position embedding, a token and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 7, 8))
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.mixed = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.scale = nn.Parameter(torch.zeros(8, 1, 1))


class Tied(nn.Module):
    """A language model's embedding and output layer, which share a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.embed.weight


class TestKind:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("weights", WeightKind("weights")),
            ("2:4", WeightKind("2:4", run=4, stay=2)),
            ("1:16", WeightKind("1:16", run=16, stay=1)),
            ("16x8", WeightKind("16x8", tile=(16, 8))),
            ("1x4", WeightKind("1x4", tile=(1, 4))),
        ],
    )
    def test_it_is_read(self, name: str, expected: WeightKind) -> None:
        assert WeightKind.read(name) == expected

    @pytest.mark.parametrize(
        "name", ["", "weight", "2:4:8", "2 : 4", "-2:4", "2:", "a:b", "4", "16X16", "2:4\n", "²:4"]
    )
    def test_a_name_that_is_none_is_refused(self, name: str) -> None:
        with pytest.raises(ConfigError, match="is no kind of weights; write 'weights'"):
            WeightKind.read(name)

    @pytest.mark.parametrize("name", ["4:2", "4:4", "0:4", "0:0"])
    def test_fewer_stay_than_there_are_and_one_at_least(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"^`0 < N < M` must hold .* but got '{name}'$"):
            WeightKind.read(name)

    @pytest.mark.parametrize("name", ["1x1", "0x4", "4x0"])
    def test_a_block_is_more_than_a_weight(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"^a block has two weights or more, but got '{name}'"):
            find_weights(nn.Linear(4, 4), name)


class TestOffered:
    def test_one_group_a_tensor_in_the_order_of_registration(self) -> None:
        net = TinyResNet()
        groups, locked = find_weights(net, "weights")
        assert locked == []
        assert {group.name: group.size for group in groups} == {
            "stem:weights": 8 * 9,
            "conv1:weights": 8 * 8 * 9,
            "conv2:weights": 8 * 8 * 9,
            "fc:weights": 80,
        }
        parameters = dict(net.named_parameters())
        for group in groups:
            assert group.pattern == Pattern(f"{group.layers[0]}.weight")
            assert group.size == parameters[group.pattern.tensor].numel()
            assert (group.kind, group.slices, group.readers, group.least) == ("weights", (), (), 1)
            assert (group.block, group.attributes, group.normalised) == (None, (), False)

    def test_all_kinds_go_into_one_structure(self) -> None:
        groups = [group for kind in ("weights", "2:4", "8x8") for group in find_weights(TinyResNet(), kind)[0]]
        assert len(Structure(tuple(groups))) == 4 + 3 + 2

    @pytest.mark.parametrize(
        ("kind", "allowed"),
        [("2:4", {0, 2}), ("1:4", {0, 1, 2, 3}), ("4:8", {0, 4}), ("2:8", {0, 2, 4, 6}), ("3:4", {0, 1})],
    )
    def test_of_a_run_a_multiple_of_n_stays(self, kind: str, allowed: set[int]) -> None:
        (group,) = find_weights(nn.Linear(8, 3), kind)[0]
        assert group.size == int(kind[-1])
        assert {group.nearest(removed / 10) for removed in range(10 * group.size)} == allowed

    def test_a_policy_reads_as_the_pattern(self) -> None:
        structure = Structure(tuple(find_weights(nn.Sequential(nn.Linear(8, 3)), "2:4")[0]))
        assert structure.removed(Policy({"0:2:4": 0.5})) == {"0:2:4": 2}
        assert structure.removed(Policy({"0:2:4": 0.1})) == {"0:2:4": 0}

    def test_tiles(self) -> None:
        groups, _ = find_weights(nn.Sequential(nn.Linear(40, 35), nn.Conv2d(3, 16, 3)), "16x16")
        assert [(group.size, group.pattern) for group in groups] == [(2 * 2, Pattern("0.weight", tile=(16, 16)))]
        (group,) = find_weights(nn.Sequential(nn.Conv2d(4, 16, 3)), "16x16")[0]  # 36 columns
        assert group.size == 2

    def test_every_layer_that_multiplies(self) -> None:
        net = nn.ModuleDict(
            {
                "conv1d": nn.Conv1d(4, 6, 3, groups=2),
                "conv3d": nn.Conv3d(2, 3, 2),
                "up": nn.ConvTranspose2d(4, 5, 2),
                "linear": nn.Linear(4, 3),
                "bilinear": nn.Bilinear(2, 3, 4),
                "embedding": nn.Embedding(7, 4),
                "bag": nn.EmbeddingBag(7, 3),
                "lstm": nn.LSTM(4, 3, bidirectional=True, proj_size=2),
                "cell": nn.GRUCell(4, 3),
                "norm": nn.BatchNorm2d(4),
            }
        )
        sizes = {
            "conv1d": 6 * 2 * 3,
            "conv3d": 3 * 2 * 8,
            "up": 4 * 5 * 4,
            "linear": 12,
            "bilinear": 24,
            "embedding": 28,
            "bag": 21,
            "lstm.weight_ih_l0": 12 * 4,
            "lstm.weight_hh_l0": 12 * 2,
            "lstm.weight_hr_l0": 2 * 3,
            "lstm.weight_ih_l0_reverse": 12 * 4,
            "lstm.weight_hh_l0_reverse": 12 * 2,
            "lstm.weight_hr_l0_reverse": 2 * 3,
            "cell.weight_ih": 9 * 4,
            "cell.weight_hh": 9 * 3,
        }
        assert offered(net, "weights") == {f"{name}:weights": size for name, size in sizes.items()}
        assert reasons(net, "weights") == {}

    def test_attention_and_what_is_beside_it(self) -> None:
        names = ["attention.in_proj_weight", "attention.out_proj"]
        names += [f"mixed.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")]
        assert list(offered(Attention(), "2:4")) == [f"{name}:2:4" for name in names]
        (locked,) = find_weights(Attention(), "2:4")[1]
        assert (locked.name, locked.size, locked.layers) == ("position:2:4", 56, ("",))
        assert locked.reason.startswith("it belongs to Attention; offered are the weights of linear")

    def test_a_network_of_one_layer(self) -> None:
        (group,) = find_weights(nn.Linear(4, 3), "weights")[0]
        assert (group.name, group.layers, group.pattern) == ("weight:weights", ("",), Pattern("weight"))

    def test_transposed_convolutions_have_their_inputs_first(self) -> None:
        net = nn.Sequential(nn.ConvTranspose2d(8, 3, 2), nn.Conv2d(3, 8, 2))
        assert [group.pattern and group.pattern.transposed for group in find_weights(net, "weights")[0]] == [
            True,
            False,
        ]
        assert offered(net, "2:4") == {"0:2:4": 4}
        (group,) = find_weights(nn.Sequential(nn.ConvTranspose2d(8, 3, 2)), "3x8")[0]
        assert group.size == units(group.pattern, (8, 3, 2, 2)) == 4

    def test_half_precision_and_unnamed_devices(self) -> None:
        assert offered(nn.Sequential(nn.Linear(4, 4)).half(), "2:4") == {"0:2:4": 4}
        assert offered(nn.Sequential(nn.Linear(4, 4, device="meta")), "2:4") == {"0:2:4": 4}

    def test_only_shapes_are_read(self) -> None:
        net = Tied()
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        find_weights(net, "2:4")
        assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


class TestSharing:
    def test_a_shared_tensor_is_one_group_of_all_its_layers(self) -> None:
        net = Tied()
        groups, _ = find_weights(net, "weights")
        assert [(g.name, g.layers, g.size) for g in groups] == [
            ("embed:weights", ("embed", "out"), 96),
            ("body:weights", ("body",), 64),
        ]
        assert {g.pattern.tensor for g in groups} <= set(dict(net.named_parameters()))

    def test_embeddings_can_be_left_out_with_what_they_share(self) -> None:
        assert offered(Tied(), "weights", embeddings=False) == {"body:weights": 64}
        assert reasons(Tied(), "weights", embeddings=False) == {"embed:weights": "embeddings are left out"}

    def test_the_tensor_has_its_first_name_even_if_another_layer_multiplies(self) -> None:
        net = nn.Module()
        net.table = nn.Parameter(torch.zeros(3, 4))
        net.fc = nn.Linear(4, 3)
        net.fc.weight = net.table
        ((group,), locked) = find_weights(net, "weights")
        assert (group.name, group.layers, group.pattern.tensor, locked) == ("fc:weights", ("fc",), "table", [])
        assert "table" in dict(net.named_parameters())

    def test_a_module_used_twice_is_one_layer(self) -> None:
        layer = nn.Linear(4, 4)
        assert offered(nn.Sequential(layer, nn.ReLU(), layer), "weights") == {"0:weights": 16}

    def test_wrappers_name_what_they_hold(self) -> None:
        net = nn.DataParallel(nn.Sequential(nn.Linear(4, 4)))
        assert offered(net, "weights") == {"module.0:weights": 16}


class TestLocked:
    def test_frozen_weights(self) -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        net[0].requires_grad_(False)
        assert reasons(net, "weights") == {"0:weights": "its weights are frozen"}
        assert list(offered(net, "weights")) == ["1:weights"]

    def test_weights_that_are_integers(self) -> None:
        net = nn.Sequential(nn.Linear(4, 4))
        net[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        assert reasons(net, "weights") == {"0:weights": "its weights are int8, not floating-point"}

    def test_weights_computed_from_others(self) -> None:
        net = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        (reason,) = reasons(net, "weights").values()
        assert reason.startswith("it belongs to ParametrizationList; offered are")

    def test_weights_without_a_shape(self) -> None:
        assert reasons(nn.Sequential(nn.LazyLinear(4)), "2:4") == {
            "0:2:4": "its weights have no shape before the network has run once"
        }

    @pytest.mark.parametrize(
        ("kind", "layer", "reason"),
        [
            ("weights", nn.Conv1d(1, 1, 1), "it has fewer than two weights, and a layer is never emptied"),
            ("2:4", nn.Conv2d(3, 8, 3), "each of its outputs has 3 inputs at a position, but a run is 4"),
            ("2:4", nn.Conv2d(8, 8, 3, groups=8), "each of its outputs has 1 inputs at a position, but a run is 4"),
            ("2:4", nn.ConvTranspose1d(2, 8, 1), "each of its outputs has 2 inputs at a position, but a run is 4"),
            ("4x4", nn.Linear(40, 3), "it has 0 whole blocks of 4x4, and a layer is never emptied"),
            ("4x4", nn.Linear(7, 7), "it has 1 whole blocks of 4x4, and a layer is never emptied"),
            (
                "2:4",
                nn.ConvTranspose1d(8, 8, 1, groups=2),
                "it is a transposed convolution in 2 groups, whose weights form no single matrix",
            ),
        ],
    )
    def test_what_a_pattern_does_not_fit(self, kind: str, layer: nn.Module, reason: str) -> None:
        assert reasons(nn.Sequential(layer), kind) == {f"0:{kind}": reason}
        assert offered(nn.Sequential(layer), kind) == {}

    def test_single_weights_of_grouped_transposed_convolutions_are_offered(self) -> None:
        assert offered(nn.Sequential(nn.ConvTranspose1d(8, 8, 1, groups=2)), "weights") == {"0:weights": 32}
