import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from autoprune.cost import Cost, CostModel, count
from autoprune.models import CifarResNet, build
from autoprune.structure import Structure, remove
from autoprune.structure.channels import find_channels
from autoprune.testing import TinyNet


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


CASES = {
    "chain": (TinyNet, (1, 8, 8)),
    "option A": (lambda: CifarResNet(1, "pad", 3, 10), (3, 8, 8)),
    "option B": (lambda: CifarResNet(1, "projection", 3, 10), (3, 8, 8)),
    "bottleneck": (Bottleneck, (3, 8, 8)),
    "flattened": (Flattened, (3, 8, 8)),
    "pixel mixing": (PixelMixing, (3, 8, 8)),
    "resnet20": (lambda: build("resnet20"), (3, 8, 8)),
}
LARGE = {name: (lambda name=name: build(f"torchvision:{name}"), (3, 32, 32)) for name in ("resnet18", "mobilenet_v2")}


@functools.cache
def prepared(name):
    """Return a network, an input, its groups without the output (not proven here, which takes long) and its costs."""
    make, shape = (CASES | LARGE)[name]
    net, example = make().eval(), torch.zeros(2, *shape)
    groups = find_channels(net, example)[0]
    output = list(dict(net.named_modules()))[-1]
    structure = Structure(tuple(group for group in groups if output not in group.layers))
    assert len(structure) == len(groups) - 1
    return net, example, structure, CostModel(net, example, structure)


def assert_exact(name, removed):
    net, example, structure, costs = prepared(name)
    elements = {group.name: range(group.size)[:number] for group, number in zip(structure, removed, strict=True)}
    smaller = remove(net, structure, elements)
    assert costs.cost(np.array(removed)) == count(smaller, example).cost


class TestExact:
    @pytest.mark.parametrize("name", CASES)
    @settings(max_examples=15, deadline=None)
    @given(data=st.data())
    def test_a_policy_costs_what_the_built_network_counts(self, name, data):
        structure = prepared(name)[2]
        assert_exact(name, [data.draw(st.integers(0, group.size - 1)) for group in structure])

    @pytest.mark.parametrize("name", LARGE)
    def test_large_networks(self, name):
        rng = np.random.default_rng(0)
        structure = prepared(name)[2]
        for _ in range(2):
            assert_exact(name, [int(rng.integers(0, group.size)) for group in structure])

    @pytest.mark.parametrize("name", CASES)
    def test_the_ends(self, name):
        net, example, structure, costs = prepared(name)
        assert costs.cost({}) == costs.dense == count(net, example).cost
        assert_exact(name, [group.size - 1 for group in structure])

    def test_which_elements_go_does_not_matter(self):
        net, example, structure, costs = prepared("option A")
        for elements in ([0, 1, 2], [3, 9, 15]):
            smaller = remove(net, structure, {"conv1": elements})
            assert costs.cost({"conv1": 3}) == count(smaller, example).cost

    def test_numbers_by_hand(self):
        costs = prepared("chain")[3]
        assert costs.cost({"conv1": 3, "conv2": 2}) == Cost(
            macs=64 * 9 * (1 * 5 + 5 * 6) + 6 * 10,
            params=9 * (1 * 5 + 5 * 6) + (5 + 6) + 2 * (5 + 6) + 6 * 10 + 10,
            bytes=4 * (9 * 35 + 11 + 22 + 70) + 4 * 2 * (5 + 6) + 2 * 8,
        )

    def test_pixels_that_are_mixed(self):
        costs = prepared("pixel mixing")[3]
        constant = {k: 64 * 8 * k for k in (4, 6)}
        assert costs.dense.macs == 64 * 9 * (3 * 6 + 6 * 4) + constant[6] + constant[4] + 8
        assert costs.cost({"a": 2}).macs == 64 * 9 * (3 * 4 + 4 * 4) + constant[4] + constant[4] + 8


class TestCostModel:
    def test_removing_more_never_costs_more(self):
        structure, costs = prepared("option A")[2:]
        for column in range(len(structure)):
            counts = np.zeros(len(structure), dtype=np.int64)
            paid = []
            for number in range(structure.groups[column].size):
                counts[column] = number
                paid.append(costs.cost(counts))
            assert all(a.macs > b.macs and a.params > b.params for a, b in itertools.pairwise(paid))

    def test_an_array_and_a_map_are_alike(self):
        structure, costs = prepared("bottleneck")[2:]
        counts = np.arange(len(structure)) % 3
        assert costs.cost(counts) == costs.cost(dict(zip(structure.names, counts.tolist(), strict=True)))

    def test_the_share_of_a_group_is_of_what_it_touches(self):
        costs = prepared("chain")[3]
        conv1, conv2, fc = 64 * 8 * 9, 64 * 64 * 9, 80
        assert costs.macs_share("conv1") == (conv1 + conv2) / (conv1 + conv2 + fc)
        assert costs.macs_share("conv2") == (conv2 + fc) / (conv1 + conv2 + fc)

    def test_unknown_operators_are_passed_on(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 2)

            def forward(self, x):
                return self.fc(x.cumprod(1))

        assert CostModel(Odd(), torch.zeros(1, 4), Structure(())).unknown == {"aten::cumprod": 1}

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_the_network_is_not_changed(self):
        net, example, structure, _ = prepared("option A")
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        CostModel(net, example, structure)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
