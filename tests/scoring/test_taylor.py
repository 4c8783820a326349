import pytest
import torch
from torch import nn

from autoprune.scoring import Evidence
from autoprune.scoring.taylor import Taylor
from autoprune.structure import analyse
from autoprune.testing import TinyResNet


def squares(outputs, targets):
    return (outputs - targets).square().sum(1)


def linear_net(seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
    return net


def batch(size, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(size, 5, generator=generator, dtype=torch.float64)
    return numbers[:, :3], numbers[:, 3:]


def slope(net, reads, inputs, targets, loss, step=1e-6):
    """Return the change of the mean loss as the weights in `reads` start to shrink, for shrinking them all the way."""

    def loss_with(factor):
        weights = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        for name, dim, index in reads:
            weights[name].select(dim, index).mul_(factor)
        with torch.no_grad():
            return loss(torch.func.functional_call(net, weights, (inputs,)), targets).mean()

    return float((loss_with(1 - step) - loss_with(1 + step)) / (2 * step))


class TestByHand:
    def test_one_weight_each(self):
        """With x = 1, hidden (2, 3), output 2*1 + 3*(-1) = -1, target 0: dL/dy = -2, so |-2 * w * h| = 4 and 6."""
        net = nn.Sequential(nn.Linear(1, 2), nn.Identity(), nn.Linear(2, 1))
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor([[2.0], [3.0]]))
            net[2].weight.copy_(torch.tensor([[1.0, -1.0]]))
            net[0].bias.zero_()
            net[2].bias.zero_()
        evidence = Evidence([(torch.ones(1, 1), torch.zeros(1, 1))], squares, 0)
        scores = Taylor().score(net, analyse(net, torch.zeros(1, 1)), evidence)
        assert scores["0"].tolist() == [4.0, 6.0]

    def test_batches_are_weighed_by_their_size(self):
        net, structure = linear_net(), analyse(linear_net(), torch.zeros(1, 3, dtype=torch.float64))
        small, large = batch(2, 1), batch(6, 2)
        alone = [Taylor().score(net, structure, Evidence([b], squares, 0))["0"] for b in (small, large)]
        both = Taylor().score(net, structure, Evidence([small, large], squares, 0))["0"]
        torch.testing.assert_close(both, (2 * alone[0] + 6 * alone[1]) / 8)


class TestFirstOrder:
    def test_it_is_the_slope_of_the_loss(self):
        net, (inputs, targets) = linear_net(), batch(5, 0)
        structure = analyse(net, inputs)
        scores = Taylor().score(net, structure, Evidence([(inputs, targets)], squares, 0))
        expected = [abs(slope(net, [("2.weight", 1, index)], inputs, targets, squares)) for index in range(4)]
        assert scores["0"].tolist() == pytest.approx(expected, rel=1e-5)

    def test_it_is_the_change_of_the_loss_for_small_weights(self):
        """Where the weights that are removed are small, the first order is all there is."""
        net, (inputs, targets) = linear_net(), batch(5, 0)
        with torch.no_grad():
            net[2].weight.mul_(1e-4)
        scores = Taylor().score(net, analyse(net, inputs), Evidence([(inputs, targets)], squares, 0))["0"]
        with torch.no_grad():
            dense = squares(net(inputs), targets).mean()
            for index in range(4):
                weights = {"2.weight": net[2].weight.index_fill(1, torch.tensor([index]), 0.0)}
                removed = squares(torch.func.functional_call(net, weights, (inputs,)), targets).mean()
                assert abs(float(removed - dense)) == pytest.approx(float(scores[index]), rel=1e-3)

    def test_a_coupled_group_sums_over_all_its_readers(self):
        net = TinyResNet().double().eval()
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
        targets = torch.tensor([1, 4, 9])
        loss = nn.CrossEntropyLoss(reduction="none")
        scores = Taylor().score(net, analyse(net, inputs), Evidence([(inputs, targets)], loss, 0))
        for index in range(8):
            reads = [("conv1.weight", 1, index), ("fc.weight", 1, index)]
            expected = abs(slope(net, reads, inputs, targets, loss, step=1e-7))
            assert float(scores["stem"][index]) == pytest.approx(expected, rel=1e-4, abs=1e-8)


class TestOtherKinds:
    """A weight that goes shrinks to nothing; a block that goes takes what it adds with it."""

    class Deep(nn.Module):
        class Block(nn.Module):
            def __init__(self, scale):
                super().__init__()
                self.fc, self.scale = nn.Linear(3, 3), nn.Parameter(torch.full((3,), scale))

            def forward(self, x):
                return x + self.scale * torch.tanh(self.fc(x))

        def __init__(self):
            super().__init__()
            self.first, self.second, self.fc = self.Block(0.5), self.Block(2.0), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(self.second(self.first(x.relu())))

    @staticmethod
    def slope_of(net, name, inputs, targets):
        """Return how the loss starts to change as a whole tensor shrinks, for shrinking it all the way."""

        def loss_with(factor):
            changed = {name: net.get_parameter(name).detach() * factor}
            with torch.no_grad():
                return squares(torch.func.functional_call(net, changed, (inputs,)), targets).mean()

        return float((loss_with(1 - 1e-6) - loss_with(1 + 1e-6)) / 2e-6)

    @pytest.mark.parametrize("frozen", [False, True])
    def test_a_block_is_the_slope_of_what_it_adds(self, frozen):
        net, (inputs, targets) = self.Deep().double(), batch(5, 0)
        structure = analyse(net, inputs, kinds=("blocks",))
        assert structure.names == ("first", "second")
        net.requires_grad_(not frozen)
        scores = Taylor().score(net, structure, Evidence([(inputs, targets)], squares, 0))
        for name in structure.names:
            expected = abs(self.slope_of(net, f"{name}.scale", inputs, targets))
            assert scores[name].tolist() == pytest.approx([expected], rel=1e-5), name

    def test_a_weight_is_its_own_slope(self):
        net, (inputs, targets) = linear_net(), batch(5, 0)
        scores = Taylor().score(
            net, analyse(net, inputs, kinds=("weights",)), Evidence([(inputs, targets)], squares, 0)
        )
        net.zero_grad()
        squares(net(inputs), targets).mean().backward()
        for name in ("0", "2"):
            weight = net.get_parameter(f"{name}.weight")
            torch.testing.assert_close(scores[f"{name}:weights"].double(), (weight * weight.grad).abs().detach())

    def test_kinds_beside_each_other_do_not_change_each_other(self):
        net, (inputs, targets) = self.Deep().double(), batch(5, 0)
        evidence = Evidence([(inputs, targets)], squares, 0)
        alone = {}
        for kind in ("blocks", "weights", "channels"):
            alone |= Taylor().score(net, analyse(net, inputs, kinds=(kind,)), evidence)
        both = Taylor().score(net, analyse(net, inputs, kinds=("channels", "blocks", "weights")), evidence)
        assert set(both) == set(alone)
        for name, score in both.items():
            torch.testing.assert_close(score, alone[name], msg=name)


class TestSettings:
    def test_frozen_networks_have_scores_too(self):
        net, (inputs, targets) = linear_net(), batch(5, 0)
        structure, evidence = analyse(net, inputs), Evidence([(inputs, targets)], squares, 0)
        expected = Taylor().score(net, structure, evidence)
        assert torch.equal(Taylor().score(net.requires_grad_(False), structure, evidence)["0"], expected["0"])

    def test_batch_norm_and_dropout_stay_out_of_it(self):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).double()
        structure, evidence = analyse(net, batch(5, 0)[0]), Evidence([batch(5, 0)], squares, 0)
        in_training = Taylor().score(net.train(), structure, evidence)
        assert torch.equal(in_training["0"], Taylor().score(net.eval(), structure, evidence)["0"])
