"""L1 and L2, by hand on weights 0, 1, 2, ... with every other sign."""

import pytest
import torch
from torch import nn

from autoprune.scoring import Evidence
from autoprune.scoring.l1 import L1
from autoprune.scoring.l2 import L2
from autoprune.structure import analyse

NOTHING = Evidence([], torch.nn.CrossEntropyLoss(reduction="none"), 0)


def numbered(net):
    """Fill each weight with 0, -1, 2, -3, ..."""
    with torch.no_grad():
        for parameter in net.parameters():
            values = torch.arange(float(parameter.numel()))
            parameter.copy_((values * (-1) ** values).view(parameter.shape))
    return net


class Residual(nn.Module):
    """Two layers, `a` and `c`, write the stream of two channels that `b` and `fc` read."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Linear(1, 2), nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 1)

    def forward(self, x):
        x = self.a(x).relu()
        return self.fc(x + self.c(self.b(x).relu()))


class TestChain:
    """Filters [[0, -1], [2, -3], [4, -5]], read by columns of [[0, -1, 2], [-3, 4, -5]]."""

    @pytest.fixture
    def net(self):
        return numbered(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))

    def test_l1(self, net):
        scores = L1().score(net, analyse(net, torch.zeros(1, 2)), NOTHING)
        assert scores["0"].tolist() == [(0 + 1) + (0 + 3), (2 + 3) + (1 + 4), (4 + 5) + (2 + 5)]

    def test_l2(self, net):
        scores = L2().score(net, analyse(net, torch.zeros(1, 2)), NOTHING)
        squares = [(0 + 1) + (0 + 9), (4 + 9) + (1 + 16), (16 + 25) + (4 + 25)]
        assert scores["0"].tolist() == pytest.approx([square**0.5 for square in squares])


class TestFlatten:
    def test_a_channel_is_read_by_the_columns_of_all_its_pixels(self):
        net = numbered(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2 * 4, 1)))
        scores = L1().score(net, analyse(net, torch.zeros(1, 1, 2, 2)), NOTHING)
        assert scores["0"].tolist() == [0 + (0 + 1 + 2 + 3), 1 + (4 + 5 + 6 + 7)]


class TestCoupledGroup:
    """Weights: a [[0], [-1]], b [[0, -1], [2, -3], [4, -5]], c [[0, -1, 2], [-3, 4, -5]], fc [[0, -1]]."""

    @pytest.fixture
    def net(self):
        return numbered(Residual())

    def test_l1_sums_over_all_layers(self, net):
        scores = L1().score(net, analyse(net, torch.zeros(1, 1)), NOTHING)
        stream = [0 + (0 + 2 + 4) + (0 + 1 + 2) + 0, 1 + (1 + 3 + 5) + (3 + 4 + 5) + 1]
        inner = [(0 + 1) + (0 + 3), (2 + 3) + (1 + 4), (4 + 5) + (2 + 5)]
        assert {name: score.tolist() for name, score in scores.items()} == {"a": stream, "b": inner}

    def test_l2_is_one_norm_over_all_layers(self, net):
        scores = L2().score(net, analyse(net, torch.zeros(1, 1)), NOTHING)
        squares = [0 + (0 + 4 + 16) + (0 + 1 + 4) + 0, 1 + (1 + 9 + 25) + (9 + 16 + 25) + 1]
        assert scores["a"].tolist() == pytest.approx([square**0.5 for square in squares])
