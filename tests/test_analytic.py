import numpy as np
import pytest
import torch
from torch import nn

from autoprune.analytic import POWER, Analytic
from autoprune.cost import Budget, CostModel, FeasibleSet
from autoprune.finetuning import reconstruct
from autoprune.moments import Moments, readers_of
from autoprune.scoring import Evidence, removal_orders
from autoprune.scoring.obs import OBS
from autoprune.structure import analyse, cut, plan
from autoprune.task import cross_entropy
from autoprune.testing import TinyNet, TinyResNet

EXAMPLE = torch.zeros(1, 1, 8, 8)


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().eval()


def inputs(n=64):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def prepared(net, kinds=("channels", "heads")):
    structure = analyse(net, EXAMPLE, kinds=kinds)
    moments = Moments.collect(net, [(inputs(), torch.zeros(64))], readers_of(structure))
    evidence = Evidence([], cross_entropy, 0, lambda: moments)
    orders = removal_orders(OBS().score(net, structure, evidence))
    return structure, orders, moments, Analytic.of(net, structure, orders, moments)


class Residual(nn.Module):
    """A stem, two blocks and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 2)
        self.one, self.two = Branch(), Branch()

    def forward(self, x):
        return self.fc(self.two(self.one(self.stem(x).relu())).mean((2, 3)))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class TestCurves:
    @pytest.mark.parametrize("make", [TinyNet, TinyResNet])
    def test_they_start_at_nothing_and_never_fall(self, make):
        structure, _, _, analytic = prepared(seeded(make))
        assert analytic.missing == ()
        for name in structure.names:
            assert analytic.counts[name].tolist() == list(range(structure[name].size + 1))
            assert analytic.losses[name][0] == 0
            assert np.all(np.diff(analytic.losses[name]) >= 0)

    def test_the_loss_is_what_reconstruction_leaves(self):
        net = seeded(TinyNet).double()
        structure = analyse(net, EXAMPLE.double())
        x = inputs().double()
        moments = Moments.collect(net, [(x, torch.zeros(64))], readers_of(structure), each=1000)
        orders = removal_orders(OBS().score(net, structure, Evidence([], cross_entropy, 0, lambda: moments)))
        analytic = Analytic.of(net, structure, orders, moments)
        last = structure.names[-1]  # read by the classifier
        for count in (2, 4):
            change = plan(net, structure, {last: orders[last][:count]})
            smaller = cut(net, change)
            reconstruct(net, smaller, change, moments)
            with torch.no_grad():
                dense, outputs = net(x), smaller(x)
            missing = (outputs - dense).square().sum() / (dense - dense.mean(0)).square().sum()
            assert float(missing) <= analytic.losses[last][count] <= 2 * float(missing)  # the ridge costs the rest

    def test_weights_have_points_of_a_curve(self):
        structure, _, _, analytic = prepared(seeded(TinyNet), kinds=("weights",))
        for name in structure.names:
            assert analytic.counts[name][[0, -1]].tolist() == [0, structure[name].size]
            assert np.all(np.diff(analytic.losses[name]) >= 0)

    def test_blocks_are_not_known(self):
        structure, _, _, analytic = prepared(seeded(Residual), kinds=("channels", "blocks"))
        assert analytic.missing == tuple(group.name for group in structure if group.block is not None)
        assert analytic.missing
        assert analytic.loss_of(analytic.missing[0])(1) == 0
        assert analytic.points(analytic.missing[0]) == ()

    def test_points_of_a_report(self):
        _, _, _, analytic = prepared(seeded(TinyNet))
        points = analytic.points("conv1")
        assert [count for count, _ in points] == list(range(9))
        assert [loss for _, loss in points] == analytic.losses["conv1"].tolist()


class TestPredict:
    def test_it_adds_powers_and_takes_many_policies_at_once(self):
        structure, _, _, analytic = prepared(seeded(TinyNet))
        removed = np.array([[0, 0], [2, 5], [8, 8]])
        by_hand = [
            sum(analytic.losses[name][count] ** POWER for name, count in zip(structure.names, row, strict=True))
            for row in removed.tolist()
        ]
        assert analytic.predict(removed) == pytest.approx(by_hand)
        assert analytic.predict(removed[1]) == pytest.approx(by_hand[1])
        assert analytic.predict(removed, power=1.0)[2] == pytest.approx(
            sum(analytic.losses[name][-1] for name in structure.names)
        )


class TestAllocate:
    def test_it_beats_uniform_in_what_it_predicts_and_meets_the_budget(self):
        net = seeded(TinyResNet)
        structure, _, _, analytic = prepared(net)
        costs = CostModel(net, EXAMPLE, structure)
        feasible = FeasibleSet.build(structure, costs, Budget.parse("macs<=50%"))
        policy = analytic.allocate(feasible)
        removed = np.array([structure.removed(policy)[name] for name in structure.names])
        assert feasible.utilisation(removed) <= 1
        assert analytic.predict(removed) <= analytic.predict(feasible.uniform())

    def test_what_is_not_known_stays(self):
        net = seeded(Residual)
        structure, _, _, analytic = prepared(net, kinds=("channels", "blocks"))
        costs = CostModel(net, EXAMPLE, structure)
        feasible = FeasibleSet.build(structure, costs, Budget.parse("macs<=60%"))
        assert all(analytic.allocate(feasible)[name] == 0 for name in analytic.missing)

    def test_without_readers_nothing_is_known(self):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
        structure = analyse(net, EXAMPLE)
        analytic = Analytic.of(net, structure, {"0": [0, 1, 2, 3]}, Moments({}))
        assert analytic.missing == ("0",)
        assert analytic.predict(np.array([3])) == 0
