import pytest
import torch
from torch import nn

from autoprune.moments import influences


def images(*shape, samples=2000, seed=0):
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(seed))


def of(net, inputs, *weights, seed=0):
    batches = [(part, None) for part in torch.split(inputs, 100)]
    return influences(net, batches, weights, seed)


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().eval()


class TestExact:
    @pytest.fixture(autouse=True)
    def all_images(self, monkeypatch):
        monkeypatch.setattr("autoprune.moments.influence.IMAGES", 2000)

    def test_of_a_linear_layer_it_is_the_power_of_what_reads_it(self):
        net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
        inputs = images(3)
        with torch.no_grad():
            power = float(net(inputs).var(0, correction=0).sum())
            expected = net[1].weight.square().sum(0).double() / power
        found = of(net, inputs, "0.weight", "1.weight")
        torch.testing.assert_close(found["0.weight"], expected, rtol=0.1, atol=0)
        torch.testing.assert_close(found["1.weight"], torch.ones(2).double() / power, rtol=0.1, atol=0)

    @pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(2)])
    def test_an_error_is_the_same_at_all_positions(self, pool):
        net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 3, 1), pool, nn.Flatten(), nn.LazyLinear(2)))
        inputs = images(1, 4, 4)
        with torch.no_grad():
            level = net(inputs)
            power = float(level.var(0, correction=0).sum())
            expected = []
            for channel in range(3):
                net[0].bias[channel] += 1.0
                expected.append(float((net(inputs) - level).square().sum(1).mean()) / power)
                net[0].bias[channel] -= 1.0
        found = of(net, inputs, "0.weight")["0.weight"]
        torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0.1, atol=0)

    def test_tokens_are_positions_too(self):
        net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(20, 2)))
        inputs = images(5, 3)
        with torch.no_grad():
            power = float(net(inputs).var(0, correction=0).sum())
            together = net[2].weight.reshape(2, 5, 4).sum(1)
        torch.testing.assert_close(
            of(net, inputs, "0.weight")["0.weight"], together.square().sum(0).double() / power, rtol=0.1, atol=0
        )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return {"scores": self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1)), "note": "text"}


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(7, 4), nn.Linear(4, 2)
        self.own = nn.Parameter(torch.ones(2, 3))

    def forward(self, x):
        return self.fc(self.table(x).mean(1)) @ self.own


class Rounded(nn.Sequential):
    def forward(self, x):
        return super().forward(x.float())


class TestNetworks:
    def test_attention_and_outputs_in_a_dictionary(self):
        found = of(seeded(Attention), images(3, 4, samples=50), "attention.out_proj.weight", "attention.in_proj_weight")
        assert list(found) == ["attention.out_proj.weight"]
        assert found["attention.out_proj.weight"].shape == (4,)
        assert (found["attention.out_proj.weight"] > 0).all()

    def test_inputs_that_are_whole_numbers(self):
        inputs = torch.arange(60).reshape(12, 5) % 7
        found = of(seeded(Words), inputs, "fc.weight", "own")
        assert list(found) == ["fc.weight"]
        assert (found["fc.weight"] > 0).all()

    def test_code_without_gradients(self):
        class Frozen(nn.Sequential):
            @torch.no_grad()
            def forward(self, x):
                return super().forward(x)

        assert of(Frozen(nn.Linear(3, 2)).eval(), images(3, samples=20), "0.weight") == {}
        whole = torch.arange(60).reshape(20, 3)
        whole_numbers = seeded(lambda: Rounded(nn.Linear(3, 2)))
        assert of(whole_numbers, whole, "0.weight") == {}

    def test_activations_in_place(self):
        net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(108, 2)))
        plain = seeded(lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2)))
        inputs = images(1, 8, 8, samples=30)
        one, other = (of(each, inputs, "0.weight")["0.weight"] for each in (net, plain))
        torch.testing.assert_close(one, other)

    def test_the_network_stays_as_it_is(self):
        net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))).train()
        net[0].weight.requires_grad_(False)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        of(net, images(3, samples=20), "0.weight", "2.weight")
        assert net.training
        assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True, True]
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert all(not module._forward_hooks for module in net.modules())

    def test_it_repeats_and_the_seed_matters(self):
        net, inputs = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))), images(3, samples=40)
        one, again, other = (of(net, inputs, "0.weight", seed=seed)["0.weight"] for seed in (0, 0, 1))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)

    def test_without_batches_nothing_is_known(self):
        assert influences(nn.Sequential(nn.Linear(3, 2)), [], ["0.weight"], 0) == {}
