import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from autoprune.cost import METRICS, Cost, CostModel, count
from autoprune.errors import BudgetError
from autoprune.models import CifarResNet, build
from autoprune.structure import Structure, Weakest, analyse, cut, plan, remove
from autoprune.structure.blocks import find_blocks
from autoprune.structure.channels import find_channels
from autoprune.structure.trace import trace
from autoprune.testing import TinyNet, TinyResNet


class Bottleneck(nn.Module):
    """Inverted residual: expands, goes depth-wise, projects; the squeeze beside it scales channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.expand = nn.Conv2d(4, 12, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.squeeze, self.excite = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.project = nn.Conv2d(12, 4, 1)
        self.up = nn.ConvTranspose2d(4, 5, 2)
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.deep(F.relu6(self.bn1(self.expand(x))))
        y = y * self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return self.fc(self.up(x + self.project(y)).mean((2, 3)))


class Flattened(nn.Module):
    """Convolution, flatten, linear: a channel is as many features as it has pixels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc1 = nn.Linear(6 * 9, 7)
        self.fc2 = nn.Linear(7, 2)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))))


class PixelMixing(nn.Module):
    """A constant product and a shared weight over pixels: here channels are positions that a weight is applied at."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1), nn.Linear(4, 2)
        self.register_buffer("mixing", torch.ones(8, 8))

    def forward(self, x):
        return self.fc((self.b(self.a(x) @ self.mixing) @ self.mixing).mean((2, 3)))


class Branches(nn.Module):
    """Convolutions in many groups and in few, a norm in groups, a concatenation, and a block that may go."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(10, 6, 3, padding=1)

        def forward(self, x):
            return x + self.down(self.up(x).relu_())

    def __init__(self):
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.many, self.few = nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(8, 6, 3, groups=2)
        self.norm = nn.GroupNorm(4, 12)
        self.joined = nn.Conv2d(18, 6, 1)
        self.block, self.again = self.Block(), self.Block()
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        many, few = self.norm(self.many(F.relu(self.stem(x)))), F.relu(self.few(self.other(x)))
        x = F.relu(self.joined(torch.cat([many, few], 1)))
        return self.fc(self.again(self.block(x)).mean((2, 3)))


class Attention(nn.Module):
    """Two layers of a small transformer, that may go, with heads and hidden units."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
            self.attend = nn.MultiheadAttention(12, 3, batch_first=True)
            self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

        def forward(self, x):
            y = self.norm1(x)
            x = x + self.attend(y, y, y, need_weights=False)[0]
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second, self.fc = nn.Linear(3, 12), self.Layer(), self.Layer(), nn.Linear(12, 2)

    def forward(self, x):
        return self.fc(self.second(self.first(self.embed(x.flatten(2).mT))).mean(1))


def weight_normed():
    """A chain whose first layer computes its weight from a direction and a length."""
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 2))


CASES = {
    "chain": (TinyNet, (1, 8, 8)),
    "option A": (lambda: CifarResNet(1, "pad", 3, 10), (3, 8, 8)),
    "option B": (lambda: CifarResNet(1, "projection", 3, 10), (3, 8, 8)),
    "bottleneck": (Bottleneck, (3, 8, 8)),
    "flattened": (Flattened, (3, 8, 8)),
    "pixel mixing": (PixelMixing, (3, 8, 8)),
    "branches": (Branches, (3, 8, 8)),
    "attention": (Attention, (3, 3, 3)),
    "weight norm": (weight_normed, (3, 6, 6)),
    "resnet20": (lambda: build("resnet20"), (3, 8, 8)),
}
LARGE = {
    name: (lambda name=name: build(f"torchvision:{name}"), (3, 64, 64))
    for name in ("resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "convnext_tiny", "regnet_y_400mf")
}


@functools.cache
def prepared(name):
    """Return a network, an input, its groups and its costs; large networks' groups are not proven, which takes long."""
    make, shape = (CASES | LARGE)[name]
    net, example = make().eval(), torch.zeros(2, *shape)
    if name in CASES:
        structure = analyse(net, example, kinds=("channels", "heads", "blocks"))
    else:
        traced = trace(net, example[:1])
        structure = Structure((*find_channels(net, traced).groups, *find_blocks(traced)))
    return net, example, structure, CostModel(net, example, structure)


def most(group):
    return group.size if group.kind == "blocks" else group.size - 1


def built(name, removed):
    net, _, structure, _ = prepared(name)
    elements = {group.name: range(group.size)[:number] for group, number in zip(structure, removed, strict=True)}
    return remove(net, structure, elements)


def assert_exact(name, removed):
    _, example, _, costs = prepared(name)
    assert costs.cost(np.array(removed)) == count(built(name, removed), example).cost


class TestExact:
    """Every number: multiply-adds, parameters, bytes and activations; channels, heads and blocks removed."""

    @pytest.mark.parametrize("name", CASES)
    @settings(max_examples=15, deadline=None)
    @given(data=st.data())
    def test_a_policy_costs_what_the_built_network_counts(self, name, data):
        structure = prepared(name)[2]
        assert_exact(name, [data.draw(st.integers(0, most(group))) for group in structure])

    @pytest.mark.parametrize("name", CASES)
    def test_one_number_is_that_of_all(self, name):
        rng = np.random.default_rng(0)
        _, _, structure, costs = prepared(name)
        for _ in range(5):
            removed = np.array([rng.integers(0, most(group) + 1) for group in structure])
            cost = costs.cost(removed)
            for metric in METRICS[:-1]:
                assert costs.used(metric, removed) == getattr(cost, metric)
            with pytest.raises(BudgetError):  # no latency was measured
                costs.used("latency", removed)

    @pytest.mark.parametrize("name", LARGE)
    def test_large_networks(self, name):
        rng = np.random.default_rng(0)
        structure = prepared(name)[2]
        for _ in range(2):
            assert_exact(name, [int(rng.integers(0, most(group) + 1)) for group in structure])

    @pytest.mark.parametrize("name", CASES)
    def test_the_ends(self, name):
        net, example, structure, costs = prepared(name)
        assert costs.cost({}) == costs.dense == count(net, example).cost
        assert_exact(name, [most(group) for group in structure])

    @pytest.mark.parametrize(
        ("name", "kinds"), [("branches", {"channels", "blocks"}), ("attention", {"channels", "heads", "blocks"})]
    )
    def test_the_cases_have_what_they_are_for(self, name, kinds):
        assert {group.kind for group in prepared(name)[2]} == kinds

    def test_blocks_one_by_one(self):
        structure = prepared("resnet20")[2]
        for column, group in enumerate(structure):
            if group.kind == "blocks":
                removed = [0] * len(structure)
                removed[column] = 1
                assert_exact("resnet20", removed)

    def test_which_elements_go_does_not_matter(self):
        net, example, structure, costs = prepared("option A")
        for elements in ([0, 1, 2], [3, 9, 15]):
            smaller = remove(net, structure, {"conv1": elements})
            assert costs.cost({"conv1": 3}) == count(smaller, example).cost

    def test_numbers_by_hand(self):
        """Most is held when the second norm runs: the image, its input, that before the convolution, and its output."""
        costs = prepared("chain")[3]
        assert costs.cost({"conv1": 3, "conv2": 2}) == Cost(
            macs=64 * 9 * (1 * 5 + 5 * 6) + 6 * 10,
            params=9 * (1 * 5 + 5 * 6) + (5 + 6) + 2 * (5 + 6) + 6 * 10 + 10,
            bytes=4 * (9 * 35 + 11 + 22 + 70) + 4 * 2 * (5 + 6) + 2 * 8,
            activations=4 * 64 * (1 + 5 + 6 + 6),
        )

    def test_pixels_that_are_mixed(self):
        costs = prepared("pixel mixing")[3]
        constant = {k: 64 * 8 * k for k in (4, 6)}
        assert costs.dense.macs == 64 * 9 * (3 * 6 + 6 * 4) + constant[6] + constant[4] + 8
        assert costs.cost({"a": 2}).macs == 64 * 9 * (3 * 4 + 4 * 4) + constant[4] + constant[4] + 8

    def test_heads_by_hand(self):
        """Of three heads of four features one goes, in one of two layers, on nine tokens."""
        costs = prepared("attention")[3]
        head = 9 * 12 * 4 * 4 + 2 * 9 * 9 * 4  # queries, keys, values and output; scores and what they weigh
        assert costs.dense.macs - costs.cost({"first.attend": 1}).macs == head

    def test_the_batch_of_the_example_does_not_matter(self):
        net, structure = TinyResNet(), analyse(TinyResNet(), torch.zeros(1, 1, 8, 8))
        found = [CostModel(net, torch.zeros(batch, 1, 8, 8), structure).dense for batch in (1, 7)]
        assert found[0] == found[1] == count(net, torch.zeros(3, 1, 8, 8)).cost


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("name", ["chain", "branches"])
    def test_bytes_are_those_of_a_network_in_that_precision(self, name, dtype):
        net, example, structure, costs = prepared(name)
        removed = dict.fromkeys(structure.names, 1)
        other = CostModel(net, example, structure, precision=dtype).cost(removed)
        smaller = built(name, [1] * len(structure)).to(dtype)
        assert other.bytes == count(smaller, example.to(dtype)).cost.bytes
        assert (other.macs, other.params, other.activations) == (
            *(costs.cost(removed).macs, costs.cost(removed).params),
            costs.cost(removed).activations,
        )

    def test_numbers_by_hand(self):
        net, example, structure, _ = prepared("chain")
        params, statistics = 9 * (8 + 64) + 16 + 32 + 90, 2 * 16
        costs = CostModel(net, example, structure, precision=torch.bfloat16)
        assert costs.dense.bytes == 2 * (params + statistics) + 2 * 8  # batches are counted in int64


class TestZeros:
    """Weights that masks keep at zero cost nothing in theory; what runs is as dense as ever."""

    KINDS = ("channels", "weights")

    @pytest.fixture(scope="class", params=[KINDS, ("channels", "2:4"), ("channels", "2x3"), ("blocks", "weights")])
    @classmethod
    def masked(cls, request):
        net, example = Branches().eval(), torch.zeros(1, 3, 8, 8)
        structure = analyse(net, example, kinds=request.param)
        return net, example, structure, CostModel(net, example, structure)

    @settings(max_examples=10, deadline=None)
    @given(data=st.data())
    def test_a_policy_costs_what_the_masked_network_counts(self, masked, data):
        net, example, structure, costs = masked
        counts, removed = {}, {}
        saliency = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
        for group in structure:
            top = group.size - group.least
            counts[group.name] = group.nearest(data.draw(st.integers(0, top)))
            removed[group.name] = range(counts[group.name])
            if group.pattern is not None:
                shape = net.get_parameter(group.pattern.tensor).shape
                removed[group.name] = Weakest(counts[group.name], torch.rand(shape, generator=saliency))
        change = plan(net, structure, removed)
        smaller = cut(net, change)
        assert costs.cost(counts) == count(smaller, example, zeroed=change.zeroed).cost

    def test_numbers_by_hand(self):
        net, example = TinyNet(), torch.zeros(1, 1, 8, 8)
        structure = analyse(net, example, kinds=("weights",))
        cost = CostModel(net, example, structure).cost({"conv2:weights": 144, "fc:weights": 8})
        dense = count(net, example).cost
        assert (cost.macs, cost.params, cost.bytes) == (dense.macs, dense.params, dense.bytes)
        assert cost.nonzero_params == dense.params - 152
        assert cost.nonzero_macs == dense.macs - 64 * 144 - 8


def calls_of(net, example):
    """Run a network; return the calls of modules that call no other, with the shapes they are given."""
    found, running = [], []

    def enter(name, module, args, kwargs):
        for above in running:
            above["calls others"] = True
        shapes = [tuple(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        running.append({"name": name, "shapes": shapes, "calls others": False})

    def leave(module, args, output):
        call = running.pop()
        if not call["calls others"]:
            found.append((call["name"], *call["shapes"]))

    for name, module in net.named_modules():
        module.register_forward_pre_hook(functools.partial(enter, name), with_kwargs=True)
        module.register_forward_hook(leave)
    with torch.no_grad():
        net(example)
    return found


class TestCalls:
    @pytest.mark.parametrize("name", ["chain", "branches", "attention", "resnet20"])
    @pytest.mark.parametrize("number", [0, 1])
    def test_they_are_those_of_the_built_network(self, name, number):
        """Sizes that every leaf module is given, in order; none of those in blocks that went."""
        _, example, structure, costs = prepared(name)
        removed = np.full(len(structure), number)
        skipped = {group.block for group in structure if group.block is not None and number}
        seen = calls_of(built(name, removed.tolist()), example[:1])
        calls = [(call.module, *call.inputs) for call in costs.calls(removed)]
        assert calls == [call for call in seen if call[0] not in skipped]

    @pytest.mark.parametrize("name", ["chain", "branches", "attention"])
    def test_shapes_are_those_of_the_built_network(self, name):
        _, _, structure, costs = prepared(name)
        smaller = built(name, [1 if group.kind != "blocks" else 0 for group in structure])
        removed = {group.name: 1 for group in structure if group.kind != "blocks"}
        tensors = {**dict(smaller.named_parameters()), **dict(smaller.named_buffers())}
        assert {key: costs.shape(key, removed) for key in tensors} == {k: tuple(t.shape) for k, t in tensors.items()}


class TestCostModel:
    @pytest.mark.parametrize("name", ["option A", "branches", "attention"])
    def test_removing_more_never_costs_more(self, name):
        structure, costs = prepared(name)[2:]
        for column, group in enumerate(structure):
            counts = np.zeros(len(structure), dtype=np.int64)
            paid = []
            for number in range(most(group) + 1):
                counts[column] = number
                paid.append(costs.cost(counts))
            assert all(
                a.macs > b.macs and a.params > b.params and a.bytes > b.bytes for a, b in itertools.pairwise(paid)
            )
            assert all(a.activations >= b.activations for a, b in itertools.pairwise(paid))

    def test_an_array_and_a_map_are_alike(self):
        structure, costs = prepared("bottleneck")[2:]
        counts = np.arange(len(structure)) % 3
        assert costs.cost(counts) == costs.cost(dict(zip(structure.names, counts.tolist(), strict=True)))

    def test_the_share_of_a_group_is_of_what_it_touches(self):
        costs = prepared("chain")[3]
        conv1, conv2, fc = 64 * 8 * 9, 64 * 64 * 9, 80
        assert costs.macs_share("conv1") == (conv1 + conv2) / (conv1 + conv2 + fc)
        assert costs.macs_share("conv2") == (conv2 + fc) / (conv1 + conv2 + fc)

    def test_the_share_of_a_block_is_of_what_it_holds(self):
        costs = prepared("branches")[3]
        inside = 36 * 9 * (6 * 10 + 10 * 6)
        assert costs.macs_share("block") == inside / costs.dense.macs
        assert costs.cost({"block": 1}).macs == costs.dense.macs - inside

    def test_the_share_of_weights_is_of_their_layer(self):
        net, example = TinyNet(), torch.zeros(1, 1, 8, 8)
        costs = CostModel(net, example, analyse(net, example, kinds=("weights",)))
        assert costs.macs_share("conv2:weights") == 64 * 64 * 9 / costs.dense.macs

    def test_a_block_that_is_named_otherwise(self):
        """Its name is taken by a group of channels."""

        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 6))
                self.act = nn.ReLU()

            def forward(self, x):
                return x + F.linear(self.act(F.linear(x, self.up)), self.down)

        net = nn.Sequential(nn.Linear(3, 4), Own(), nn.Linear(4, 2))
        structure = analyse(net, torch.zeros(1, 3), kinds=("channels", "blocks"))
        cost = CostModel(net, torch.zeros(1, 3), structure).cost({"1:blocks": 1, "0": 2})
        smaller = remove(net, structure, {"1:blocks": [0], "0": [1, 2]})
        assert cost == count(smaller, torch.zeros(1, 3)).cost

    def test_unknown_operators_are_passed_on(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 2)

            def forward(self, x):
                return self.fc(x.cumprod(1))

        net = Odd()
        assert CostModel(net, torch.zeros(1, 4), Structure(())).unknown == {"aten::cumprod": 1}
        assert CostModel(net, torch.zeros(1, 4), Structure(())).unknown == count(net, torch.zeros(1, 4)).unknown
        assert prepared("branches")[3].unknown == {}

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_the_network_is_not_changed(self):
        net, example, structure, _ = prepared("option A")
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        CostModel(net, example, structure)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
