import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoprune.cost import Cost, count
from autoprune.cost.count import unknown_operators
from autoprune.testing import TinyNet, TinyResNet


class Net(nn.Module):
    """Modules or parameters, and how the input goes through them."""

    def __init__(self, run, **members):
        super().__init__()
        self.run = run
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def macs(module, *shape):
    counted = count(module, torch.zeros(1, *shape))
    assert not counted.unknown
    return counted.cost.macs


class TestMacs:
    """Each number is written as: outputs (or inputs) x weights that meet each of them."""

    @pytest.mark.parametrize(
        ("module", "shape", "expected"),
        [
            (nn.Conv2d(3, 4, 3, padding=1), (3, 8, 8), (8 * 8) * 4 * 3 * 9),
            (nn.Conv2d(3, 4, 3), (3, 8, 8), (6 * 6) * 4 * 3 * 9),
            (nn.Conv2d(3, 4, 3, padding=1, stride=2), (3, 8, 8), (4 * 4) * 4 * 3 * 9),
            (nn.Conv2d(3, 4, 3, dilation=2), (3, 8, 8), (4 * 4) * 4 * 3 * 9),
            (nn.Conv2d(3, 4, (1, 5), bias=False), (3, 8, 8), (8 * 4) * 4 * 3 * 5),
            (nn.Conv2d(4, 6, 3, groups=2), (4, 8, 8), (6 * 6) * 6 * 2 * 9),
            (nn.Conv2d(4, 4, 3, groups=4), (4, 8, 8), (6 * 6) * 4 * 9),
            (nn.Conv2d(4, 8, 3, groups=4, stride=2), (4, 8, 8), (3 * 3) * 8 * 9),
            (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 8, 8), (8 * 8) * 4 * 3 * 9),
            (nn.Conv1d(3, 4, 5), (3, 8), 4 * 4 * 3 * 5),
            (nn.Conv3d(2, 3, 2), (2, 4, 4, 4), (3 * 3 * 3) * 3 * 2 * 8),
            (nn.ConvTranspose2d(3, 4, 3), (3, 8, 8), (8 * 8) * 3 * 4 * 9),
            (nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 8, 8), (8 * 8) * 3 * 4 * 4),
            (nn.ConvTranspose2d(4, 4, 3, groups=4), (4, 8, 8), (8 * 8) * 4 * 9),
            (nn.ConvTranspose1d(3, 4, 3), (3, 8), 8 * 3 * 4 * 3),
            (nn.Linear(6, 5), (6,), 6 * 5),
            (nn.Linear(6, 5, bias=False), (6,), 6 * 5),
            (nn.Linear(6, 5), (7, 6), 7 * 6 * 5),
            (nn.Linear(6, 5, bias=False), (7, 6), 7 * 6 * 5),
            (nn.Linear(6, 5), (2, 7, 6), 2 * 7 * 6 * 5),
            (nn.Linear(6, 1), (6,), 6),
            (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()), (3, 8, 8), 0),
            (nn.Embedding(3, 4), (), 0),
        ],
        ids=str,
    )
    def test_one_operator(self, module, shape, expected):
        example = torch.zeros(1, 5, dtype=torch.int64) if isinstance(module, nn.Embedding) else torch.zeros(1, *shape)
        counted = count(module, example)
        assert counted.cost.macs == expected
        assert counted.macs_of == ({"weight": expected} if expected else {})
        assert (counted.unattributed, counted.unknown) == ({}, {})

    def test_the_batch_does_not_count(self):
        assert count(nn.Linear(6, 5), torch.zeros(9, 6)).cost.macs == 30

    def test_a_layer_that_runs_twice_counts_twice(self):
        net = Net(lambda net, x: net.a(net.a(x)), a=nn.Linear(6, 6, bias=False))
        counted = count(net, torch.zeros(1, 6))
        assert (counted.cost.macs, counted.cost.params) == (72, 36)

    def test_layers_of_a_network(self):
        counted = count(TinyNet(), torch.zeros(1, 1, 8, 8))
        assert counted.macs_of == {"conv1.weight": 64 * 8 * 9, "conv2.weight": 64 * 8 * 8 * 9, "fc.weight": 80}
        assert counted.cost.macs == sum(counted.macs_of.values())

    def test_a_matrix_times_a_vector(self):
        net = Net(lambda net, x: x @ net.v, v=nn.Parameter(torch.zeros(6)))
        assert count(net, torch.zeros(1, 5, 6)).macs_of == {"v": 30}

    def test_a_vector_times_a_vector(self):
        net = Net(lambda net, x: x[0] @ net.v, v=nn.Parameter(torch.zeros(6)))
        assert count(net, torch.zeros(1, 6)).macs_of == {"v": 6}

    def test_several_inputs(self):
        net = Net(lambda net, x, y: net.a(x) + net.b(y), a=nn.Linear(3, 4), b=nn.Linear(5, 4))
        expected = {"a.weight": 12, "b.weight": 20}
        assert count(net, (torch.zeros(7, 3), torch.zeros(7, 5))).macs_of == expected
        assert count(net, {"y": torch.zeros(7, 5), "x": torch.zeros(7, 3)}).macs_of == expected

    @pytest.mark.parametrize("names", [("w", "b"), ("weight", "bias"), ("kernel", "in_proj_bias")])
    def test_the_weight_is_told_from_the_bias(self, names):
        weight, bias = names
        members = {weight: nn.Parameter(torch.zeros(5, 6)), bias: nn.Parameter(torch.zeros(5))}
        net = Net(lambda net, x: F.linear(x, getattr(net, weight), getattr(net, bias)), **members)
        assert count(net, torch.zeros(1, 6)).macs_of == {weight: 30}


class TestNoWeights:
    def test_attention_is_listed_by_operator(self):
        counted = count(nn.Sequential(Attention()), torch.zeros(1, 5, 8))
        projections = {"0.inner.in_proj_weight": 5 * 8 * 24, "0.inner.out_proj.weight": 5 * 8 * 8}
        assert counted.macs_of == projections
        assert counted.unattributed == {"aten::bmm": 2 * (5 * 5) * 8}
        assert counted.unknown == {}
        assert counted.cost.macs == sum(projections.values()) + 400

    def test_a_whole_transformer_layer_is_seen_through(self):
        counted = count(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.zeros(1, 5, 8))
        assert counted.cost.macs == 5 * (4 * 8 * 8 + 2 * 8 * 16) + 400
        assert counted.unknown == {}

    def test_scaled_dot_products(self):
        net = Net(lambda net, x: F.scaled_dot_product_attention(x, x, x))
        counted = count(net, torch.zeros(1, 2, 5, 4))
        assert (counted.unattributed, counted.unknown) == ({"aten::bmm": 2 * 2 * (5 * 5) * 4}, {})

    def test_settings_of_torch_are_restored(self):
        before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
        count(Attention(), torch.zeros(1, 5, 8))
        with pytest.raises(RuntimeError):
            count(nn.Linear(3, 3), torch.zeros(1, 4))
        assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before

    def test_a_product_with_a_constant(self):
        net = Net(lambda net, x: x @ torch.ones(6, 2))
        assert count(net, torch.zeros(1, 6)).unattributed == {"aten::mm": 12}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x)[0]


class TestUnknown:
    def test_it_is_listed_with_how_often_it_ran(self):
        net = Net(lambda net, x: net.a(x.cumprod(1)).cumprod(1), a=nn.Linear(6, 5))
        counted = count(net, torch.zeros(1, 6))
        assert counted.unknown == {"aten::cumprod": 2}
        assert counted.cost.macs == 30

    def test_in_place_operators_are_known_by_their_names(self):
        counted = count(Net(lambda net, x: x.clone().relu_().add_(1).clamp_(0).mul_(2).sigmoid_()), torch.zeros(1, 6))
        assert counted.unknown == {}

    def test_a_list_of_operators_is_judged_alike(self):
        names = ["aten::relu_", "aten::cumprod", "aten::mm", "aten::cumprod", "own::operator"]
        assert unknown_operators(names) == {"aten::cumprod": 2, "own::operator": 1}

    def test_known_networks_have_none(self):
        from torchvision import models

        for name in ("mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "regnet_y_400mf"):
            with torch.random.fork_rng():
                assert count(models.get_model(name), torch.zeros(1, 3, 32, 32)).unknown == {}, name


class TestMemory:
    def test_parameters_and_bytes(self):
        net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
        params, buffers = 30 + 5 + 5 + 5, 5 + 5
        assert count(net, torch.zeros(1, 6)).cost == Cost(30, params, 4 * (params + buffers) + 8, 4 * (6 + 5 + 5))

    def test_half_precision_is_half(self):
        assert count(nn.Linear(6, 5).half(), torch.zeros(1, 6).half()).cost == Cost(30, 35, 70, 2 * (6 + 5))

    def test_what_is_shared_counts_once(self):
        shared = nn.Linear(6, 6)
        net = Net(lambda net, x: net.b(net.a(x)), a=shared, b=nn.Linear(6, 6))
        net.b.weight = shared.weight
        counted = count(net, torch.zeros(1, 6))
        assert counted.cost == Cost(72, 36 + 12, 4 * 48, 4 * (6 + 6 + 6))
        assert counted.macs_of == {"a.weight": 72}

    def test_the_numbers_by_name(self):
        exact = {"macs": 1, "params": 2, "bytes": 3, "activations": 4, "nonzero_params": 2, "nonzero_macs": 1}
        assert Cost(1, 2, 3, 4).to_dict() == exact
        assert Cost(1, 2, 3, 4, latency_ms=0.5).to_dict() == {**exact, "latency_ms": 0.5}


class TestActivations:
    """The most that is held at once; each number is one float of four bytes. The input is held all the time."""

    @pytest.mark.parametrize(
        ("run", "held"),
        [
            (lambda net, x: x, 10),
            (lambda net, x: x.relu(), 10 + 10),
            (lambda net, x: x.relu().relu().relu(), 10 + 2 * 10),
            (lambda net, x: x.relu().relu_().relu_(), 10 + 10),
            (lambda net, x: x.relu().view(5, 2).t()[1:], 10 + 10),
            (lambda net, x: x.relu()[:, :5].clone().clone(), 10 + 10 + 5),
            (lambda net, x: torch.cat([x.relu(), x.sigmoid()]), 10 + 2 * 10 + 20),
            (lambda net, x: x.sum(), 10 + 1),
            (lambda net, x: net.w + 1, 10 + 3),
            (lambda net, x: net.w.relu_().view(3, 1), 10),
            (lambda net, x: x.expand(100, 10), 10),
        ],
        ids=["nothing", "one", "two at a time", "in place", "views", "a view holds all", "cat", "sum", *"abc"],
    )
    def test_by_hand(self, run, held):
        assert count(Net(run, w=nn.Parameter(torch.zeros(3))), torch.zeros(1, 10)).cost.activations == 4 * held

    def test_what_is_needed_later_is_held_on_to(self):
        def run(net, x):
            early = x.relu()
            late = early.sigmoid().relu()
            return early + late

        assert count(Net(run), torch.zeros(1, 10)).cost.activations == 4 * (10 + 3 * 10)

    def test_bytes_are_those_of_the_precision(self):
        net = Net(lambda net, x: (x > 0).sum(1))
        assert count(net, torch.zeros(1, 10)).cost.activations == 4 * 10 + 10 + 8

    def test_it_is_of_one_sample_and_the_same_every_time(self):
        """The stream, what goes into the block's last convolution, what comes out, and that after its norm."""
        found = {count(TinyResNet(), torch.zeros(batch, 1, 8, 8)).cost.activations for batch in (1, 1, 5)}
        assert found == {4 * 64 * (1 + 4 * 8)}


class TestZeroed:
    """Weights that masks keep at zero."""

    def masked(self):
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2))
        with torch.no_grad():
            net[0].weight.view(-1)[:9] = 0
            net[3].weight[:, :32] = 0
            net[3].bias[:] = 0
        return net

    def test_those_that_are_named_do_not_count(self):
        counted = count(self.masked(), torch.zeros(1, 1, 4, 4), zeroed=["0.weight", "3.weight"])
        assert counted.cost.macs == 16 * 4 * 9 + 64 * 2
        assert counted.cost.nonzero_macs == 16 * 3 * 9 + 32 * 2
        assert counted.cost.params == (36 + 4) + (128 + 2)
        assert counted.cost.nonzero_params == (27 + 4) + (64 + 2)

    def test_zeros_of_others_are_numbers_like_any(self):
        cost = count(self.masked(), torch.zeros(1, 1, 4, 4), zeroed=["0.weight"]).cost
        assert cost.nonzero_params == cost.params - 9
        cost = count(self.masked(), torch.zeros(1, 1, 4, 4)).cost
        assert (cost.nonzero_params, cost.nonzero_macs) == (cost.params, cost.macs)


class TestInputUntouched:
    @pytest.mark.usefixtures("global_rng_untouched")
    def test_nothing_of_it_changes(self):
        with torch.random.fork_rng():
            net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout()).train()
        net[0].weight.requires_grad_(False)
        before = copy.deepcopy(net.state_dict())
        count(net, torch.ones(4, 6))
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
        assert net.training
        assert [parameter.requires_grad for parameter in net.parameters()] == [False, True, True, True]
