import pytest
import torch
from torch import nn

from autoprune import registry
from autoprune.moments import Moments, readers_of
from autoprune.moments.readers import Readers
from autoprune.scoring import Evidence, removal_orders
from autoprune.scoring.l1 import L1
from autoprune.scoring.obs import OBS
from autoprune.structure import analyse
from autoprune.testing import TinyNet, TinyResNet

EXAMPLE = torch.zeros(1, 1, 8, 8)


def evidence(*shape, samples=40, known=None):
    inputs = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(1))
    halves = [(half, torch.zeros(len(half))) for half in inputs.split(samples // 2)]
    return Evidence(halves, lambda outputs, targets: outputs.sum(1), 3, known)


def hidden(weights_in, weights_out):
    """Return a network of one hidden layer without a non-linearity to speak of, and its groups."""
    net = nn.Sequential(nn.Linear(len(weights_in[0]), len(weights_in)), nn.Identity(), nn.Linear(len(weights_in), 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(weights_in))
        net[2].weight.copy_(torch.tensor([weights_out]))
    return net, analyse(net, torch.zeros(1, len(weights_in[0])))


class Residual(nn.Module):
    """A block that the identity can take the place of, and a reader that can't be looked into: a transposed one."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.mid = nn.Conv2d(1, 4, 3, padding=1), self.Block(), nn.Conv2d(4, 5, 3)
        self.last = nn.ConvTranspose2d(5, 2, 3)

    def forward(self, x):
        return self.last(self.mid(self.block(self.stem(x))).relu())


class TestScores:
    def test_the_registry_knows_it(self):
        assert "obs" in registry.names("criterion")
        assert registry.resolve("criterion", "obs") is OBS

    @pytest.mark.parametrize("make", [TinyNet, TinyResNet])
    def test_they_are_places_in_the_order_of_removal(self, make):
        net = make().eval()
        structure, given = analyse(net, EXAMPLE), evidence(1, 8, 8)
        scores = OBS().score(net, structure, given)
        readers = Readers(net, given.moments(net, structure))
        orders = removal_orders(scores)
        for group in structure:
            assert sorted(scores[group.name].tolist()) == list(range(1, group.size + 1))
            assert orders[group.name] == readers.order(group).tolist()

    def test_of_two_that_say_the_same_one_goes_first_and_the_other_stays_longest(self):
        net, structure = hidden(
            [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [4.0, 4.0, 2.0, 1.0]
        )
        places = OBS().score(net, structure, evidence(3, samples=400))["0"].tolist()
        assert {places[0], places[1]} == {1.0, 4.0}
        assert places[2:] == [3.0, 2.0]
        by_weights = L1().score(net, structure, evidence(3))["0"]
        assert by_weights.argsort(stable=True).tolist() == [3, 2, 0, 1]

    def test_what_hardly_moves_goes_first_whatever_its_weight(self):
        net, structure = hidden([[0.01, 0.0], [0.0, 1.0]], [5.0, 1.0])
        assert OBS().score(net, structure, evidence(2, samples=400))["0"].tolist() == [1.0, 2.0]

    def test_it_repeats(self):
        net = TinyResNet().eval()
        structure = analyse(net, EXAMPLE)
        one, other = (OBS().score(net, structure, evidence(1, 8, 8)) for _ in range(2))
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_a_layer_too_wide_for_moments_has_an_order_too(self):
        net = TinyNet().eval()
        structure, given = analyse(net, EXAMPLE), evidence(1, 8, 8)
        moments = Moments.collect(net, given.batches, readers_of(structure), memory=4 * 3000)
        assert moments["conv2.weight"].samples is not None
        known = Evidence(given.batches, given.loss, given.seed, lambda: moments)
        scores = OBS().score(net, structure, known)
        assert all(sorted(scores[group.name].tolist()) == list(range(1, 9)) for group in structure)
        alone = Readers(net, moments).of(structure["conv1"])[0].alone
        assert removal_orders(scores)["conv1"] == alone.argsort(stable=True).tolist()


class TestOtherKinds:
    def test_weights_are_scored_by_what_their_removal_costs(self):
        net = TinyNet().eval()
        structure, given = analyse(net, EXAMPLE, kinds=("weights",)), evidence(1, 8, 8)
        scores = OBS().score(net, structure, given)
        moments = given.moments(net, structure)
        for group in structure:
            weight = net.get_parameter(group.pattern.tensor).detach().double()
            inverse = torch.linalg.inv(moments[group.pattern.tensor].moments(0)).diagonal()
            expected = weight.square() / inverse.reshape(weight.shape[1:])
            ratio = scores[group.name].double() / expected
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)
            assert scores[group.name].dtype == torch.float32

    @pytest.mark.parametrize("kinds", [("blocks",), ("blocks", "channels")])
    def test_a_block_is_the_sum_of_its_weights(self, kinds):
        net = Residual().eval()
        structure, given = analyse(net, EXAMPLE, kinds=kinds), evidence(1, 8, 8)
        assert torch.equal(OBS().score(net, structure, given)["block"], L1().score(net, structure, given)["block"])

    def test_where_readers_are_not_seen_it_is_the_sum_of_weights(self):
        net = Residual().eval()
        structure, given = analyse(net, EXAMPLE), evidence(1, 8, 8)
        assert structure["mid"].readers == ("last",)
        scores, sums = OBS().score(net, structure, given), L1().score(net, structure, given)
        assert torch.equal(scores["mid"], sums["mid"])
        assert sorted(scores["block.up"].tolist()) == list(range(1, 7))

    def test_weights_that_are_not_seen_have_their_size(self):
        net = Residual().eval()
        structure, given = analyse(net, EXAMPLE, kinds=("weights",)), evidence(1, 8, 8)
        assert torch.equal(OBS().score(net, structure, given)["last:weights"], net.last.weight.abs())


class TestEvidence:
    def test_moments_that_are_known_are_not_collected_again(self):
        net = TinyNet().eval()
        structure, asked = analyse(net, EXAMPLE), []
        given = evidence(1, 8, 8)
        moments = given.moments(net, structure)
        assert set(moments) == readers_of(structure)

        def known():
            asked.append(True)
            return moments

        assert Evidence([], given.loss, 0, known).moments(net, structure) is moments
        assert asked == [True]
        one, other = OBS().score(net, structure, given), OBS().score(net, structure, Evidence([], given.loss, 0, known))
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_the_seed_says_which_rows_count(self):
        net = TinyNet().eval()
        structure, given = analyse(net, EXAMPLE), evidence(1, 8, 8)
        others = [Evidence(given.batches, given.loss, seed).moments(net, structure) for seed in (3, 4)]
        mine = given.moments(net, structure)
        assert torch.equal(mine["conv2.weight"].mean, others[0]["conv2.weight"].mean)
        assert not torch.equal(mine["conv2.weight"].mean, others[1]["conv2.weight"].mean)

    def test_every_criterion_still_takes_three(self):
        scores = L1().score(TinyNet(), analyse(TinyNet(), EXAMPLE), Evidence([], lambda *_: torch.zeros(1), 0))
        assert set(scores) == {"conv1", "conv2"}
