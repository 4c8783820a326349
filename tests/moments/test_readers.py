import math

import pytest
import torch
from torch import nn

from autoprune.finetuning import reconstruct
from autoprune.moments import Moments, Watch, readers_of, solve
from autoprune.moments.readers import Readers, norm_scale
from autoprune.structure import analyse, cut, plan
from autoprune.structure.trace import plain_attention
from autoprune.testing import TinyResNet

FLOAT = torch.float64
ALL = 10**6  # rows of a sample, so that all are looked at


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def no_ridge(monkeypatch):
    """Make the ridge vanish, so that the losses are those of the outputs alone."""
    monkeypatch.setattr(solve, "shrinkage", lambda second, *_: torch.full(second.shape[:-2], 1e-11, dtype=FLOAT))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
        self.c = nn.Conv2d(7, 3, (1, 2))

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], 1).relu())


class TwiceOver(nn.Module):
    """Every element of the group is two inputs of the reader, which lie apart."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        out = self.a(x)
        return self.c(torch.cat([out.relu(), out.tanh()], 1))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 4, batch_first=True), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 5), nn.Linear(5, 8)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(self.up(self.norm(x)).relu())


class Parameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        return (x @ self.up).relu() @ self.down


def plain():
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
    )


def unbiased():
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 2, bias=False))


def grouped():
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6))


def depthwise():
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 1)
    )


def flattened():
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5 * 4, 3))


IMAGES, TOKENS = (2, 6, 6), (5, 8)
CASES = [
    (plain, IMAGES, "0", 1),
    (unbiased, IMAGES, "0", 1),
    (grouped, IMAGES, "0", 2),
    (depthwise, IMAGES, "0", 1),
    (flattened, IMAGES, "0", 1),
    (Concatenated, IMAGES, "a", 1),
    (Concatenated, IMAGES, "b", 1),
    (TwiceOver, IMAGES, "a", 1),
    (TinyResNet, (1, 8, 8), "stem", 2),
    (TinyResNet, (1, 8, 8), "conv1", 1),
    (Transformer, TOKENS, "attention", 1),
    (Transformer, TOKENS, "up", 1),
    (Parameters, (7, 4), "up", 1),
]
EACH_CASE = pytest.mark.parametrize(("make", "shape", "name", "readers"), CASES)


class Known:
    """A network in double precision whose batch-norms have statistics, its groups, data and moments."""

    def __init__(self, make, shape, samples=12, **settings):
        self.net = make().double().eval()
        for norm in self.net.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.2, 3)
                nn.init.normal_(norm.weight)
        self.inputs = torch.randn(samples, *shape, dtype=FLOAT)
        self.structure = analyse(self.net, self.inputs[:1], kinds=("channels", "heads"))
        data = [(self.inputs, torch.zeros(samples))]
        self.moments = Moments.collect(self.net, data, readers_of(self.structure), each=ALL, **settings)
        self.readers = Readers(self.net, self.moments)

    def uses(self):
        """Return for every weight that runs `(groups, rows, d)` of what it reads, and its outputs."""
        found = {}

        def note(use, result):
            picks = use.picks(len(self.inputs), ALL, torch.Generator())
            found[use.weight] = use.rows(picks), use.outputs(result, picks), use

        with torch.no_grad(), plain_attention(), Watch(self.net, after=note):
            self.net(self.inputs)
        return found

    def loss(self, name, gone, slices=False):
        """Return the sum over readers of the error of their outputs, relative to their power, without these elements.

        Measured: the smaller network's layers, solved or merely sliced, read what is left of the dense inputs.
        """
        change = plan(self.net, self.structure, {name: gone})
        smaller = cut(self.net, change)
        if not slices:
            reconstruct(self.net, smaller, change, self.moments)
        parameters, total = dict(smaller.named_parameters()), 0.0
        for part in self.structure[name].slices:
            if part.role == "read":
                rows, outputs, use = self.uses()[part.tensor]
                kernel = math.prod(use.kernel)
                kept = change.kept[part.tensor][part.dim] if gone else torch.arange(rows.shape[2] // kernel)
                columns = (kept[:, None] * kernel + torch.arange(kernel)).flatten()
                weight = parameters[part.tensor].detach()
                weight = weight.T if use.input_dim == 0 else weight.flatten(1)
                given = [one[:, columns] @ w.T for one, w in zip(rows, weight.chunk(use.groups), strict=True)]
                bias = 0.0 if use.bias is None else parameters[use.bias].detach()
                layer = self.moments[part.tensor]
                total += relative(torch.cat(given, 1) + bias, outputs, layer, self.net)
        return total


def relative(given, wanted, layer, net):
    scale = 1.0 if layer.norm is None else norm_scale(net, layer.norm)
    error, power = given - wanted, wanted
    if layer.centred:
        error, power = error - error.mean(0), power - power.mean(0)
    return float((error * scale).square().sum() / (power * scale).square().sum())


class TestLosses:
    @EACH_CASE
    @pytest.mark.usefixtures("no_ridge")
    def test_they_are_the_errors_of_the_outputs_after_reconstruction(self, make, shape, name, readers):
        known = Known(make, shape)
        group = known.structure[name]
        assert len(known.readers.of(group)) == readers
        order = torch.randperm(group.size)
        losses = known.readers.losses(group, order)
        assert losses.shape == (group.size + 1,)
        expected = [known.loss(name, order[:gone].tolist()) for gone in range(group.size)]
        assert losses[:-1].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-8)
        assert (losses.diff() >= 0).all()

    @EACH_CASE
    def test_all_that_a_layer_reads_is_worth_one(self, make, shape, name, readers):
        known = Known(make, shape)
        group = known.structure[name]
        whole = float(known.readers.losses(group, torch.arange(group.size))[-1])
        layers = len({part.tensor for part in group.slices if part.role == "read"})
        if make is Concatenated:
            assert 0 < whole < 1
        else:
            assert whole == pytest.approx(layers)

    def test_what_is_removed_last_depends_on_the_order_and_the_whole_does_not(self):
        known = Known(plain, IMAGES)
        group = known.structure["0"]
        curves = [known.readers.losses(group, order) for order in (torch.arange(5), torch.arange(5).flip(0))]
        assert float(curves[0][-1]) == pytest.approx(float(curves[1][-1]))
        assert not torch.allclose(curves[0][1:-1], curves[1][1:-1])

    def test_nothing_is_known_of_a_group_whose_readers_are_not_seen(self):
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3)).eval()
        group = analyse(net, torch.zeros(1, 2, 6, 6))["0"]
        readers = Readers(net, Moments.collect(net, [(torch.randn(3, 2, 6, 6), torch.zeros(3))], ["2.weight"]))
        assert readers.losses(group, torch.arange(4)) is None
        assert readers.order(group) is None
        assert readers.of(group) == []

    def test_dead_inputs_cost_least(self):
        net = plain().eval()
        with torch.no_grad():
            net[1].bias[2] = -100.0
        structure = analyse(net, torch.zeros(1, 2, 6, 6))
        readers = Readers(net, Moments.collect(net, [(torch.randn(6, 2, 6, 6), torch.zeros(6))], readers_of(structure)))
        order = readers.order(structure["0"])
        assert int(order[0]) == 2
        losses = readers.losses(structure["0"], order)
        assert torch.isfinite(losses).all()
        assert float(losses[1]) < float(losses.diff()[1:].min())

    @pytest.mark.parametrize("memory", [2**30, 200])
    def test_a_layer_that_reads_nothing_but_zeros(self, memory):
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
        with torch.no_grad():
            net[0].bias.fill_(-100.0)
        structure = analyse(net, torch.zeros(1, 3))
        data = [(torch.randn(6, 3), torch.zeros(6))]
        readers = Readers(net, Moments.collect(net, data, readers_of(structure), memory=memory))
        losses = readers.losses(structure["0"], readers.order(structure["0"]))
        assert torch.isfinite(losses).all()
        assert (losses >= 0).all()


class TestOrder:
    @pytest.mark.parametrize(("make", "shape", "name", "readers"), [CASES[place] for place in (0, 2, 4, 6, 7, 10, 12)])
    @pytest.mark.usefixtures("no_ridge")
    def test_at_every_step_the_element_goes_that_trying_all_gives(self, make, shape, name, readers):
        known = Known(make, shape, samples=60)
        size = known.structure[name].size
        order = known.readers.order(known.structure[name]).tolist()
        for gone in range(size - 1):
            tried = {element: known.loss(name, [*order[:gone], element]) for element in order[gone:]}
            assert order[gone] == min(tried, key=tried.get)
        assert sorted(order) == list(range(size))

    def test_the_norm_behind_says_what_an_output_is_worth(self):
        """Output 0 reads input 0 alone and output 1 input 1; a norm that mutes one of them decides which goes."""
        for muted in (0, 1):
            net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)).eval()
            with torch.no_grad():
                net[0].weight.copy_(torch.eye(2))
                net[2].weight.copy_(torch.eye(2))
                net[3].weight[muted] = 1e-3
            structure = analyse(net, torch.zeros(1, 2))
            readers = Readers(net, Moments.collect(net, [(torch.randn(200, 2), torch.zeros(200))], ["2.weight"]))
            assert readers.order(structure["0"]).tolist() == [muted, 1 - muted]

    def test_groups_of_a_layer_that_is_used_by_several_can_be_asked_in_any_order(self):
        known = Known(Concatenated, IMAGES)
        first = {name: known.readers.order(known.structure[name]).tolist() for name in ("a", "b")}
        again = {name: known.readers.order(known.structure[name]).tolist() for name in ("b", "a")}
        assert first == again


class TestWide:
    """Layers that keep rows in place of moments."""

    WIDE = (
        (plain, IMAGES, "0", 3000),
        (grouped, IMAGES, "0", 3000),
        (flattened, IMAGES, "0", 2000),
        (Concatenated, IMAGES, "a", 1200),
        (Parameters, (7, 4), "up", 250),
    )

    @pytest.mark.parametrize(("make", "shape", "name", "memory"), WIDE)
    def test_every_element_costs_what_it_costs_alone(self, make, shape, name, memory):
        known = Known(make, shape, memory=memory)
        group = known.structure[name]
        [part] = [part for part in group.slices if part.role == "read"]
        layer = known.moments[part.tensor]
        assert layer.samples is not None
        rows = layer.samples
        weight = layer.matrix(dict(known.net.named_parameters())[part.tensor])
        kernel = weight.shape[2] // dict(known.net.named_parameters())[part.tensor].shape[part.dim]
        wanted = torch.cat([one @ w.T for one, w in zip(rows, weight, strict=True)], 1)
        alone = []
        for positions in part.positions:
            columns = (positions[:, None] * kernel + torch.arange(kernel)).flatten()
            without = weight.clone()
            without[:, :, columns] = 0.0
            given = torch.cat([one @ w.T for one, w in zip(rows, without, strict=True)], 1)
            alone.append(relative(given, wanted, layer, known.net))
        order = torch.randperm(group.size)
        expected = [0.0, *torch.tensor(alone, dtype=FLOAT)[order].cumsum(0).tolist()]
        assert known.readers.losses(group, order).tolist() == pytest.approx(expected, rel=1e-9)
        assert known.readers.order(group).tolist() == torch.tensor(alone).argsort(stable=True).tolist()

    def test_it_can_stand_beside_a_narrow_one(self):
        known = Known(TinyResNet, (1, 8, 8), memory=8 * (10 * 9 + 72 * 2 + 8 * 9 + 72 * 10))
        assert [known.moments[name].samples is None for name in ("conv1.weight", "fc.weight")] == [False, True]
        losses = known.readers.losses(known.structure["stem"], known.readers.order(known.structure["stem"]))
        assert torch.isfinite(losses).all()
        assert (losses.diff() >= 0).all()


class TestSaliency:
    @pytest.mark.parametrize(
        ("make", "shape", "weight"),
        [(plain, IMAGES, "3.weight"), (grouped, IMAGES, "2.weight"), (Parameters, (7, 4), "down")],
    )
    def test_it_is_the_loss_of_every_weight_alone(self, make, shape, weight):
        known = Known(make, shape)
        parameter = dict(known.net.named_parameters())[weight]
        found = known.readers.saliency(weight)
        assert found.shape == parameter.shape
        layer = known.moments[weight]
        matrix = layer.matrix(parameter)
        scale = torch.ones(matrix.shape[:2], dtype=FLOAT)
        if layer.norm is not None:
            scale = norm_scale(known.net, layer.norm).reshape(scale.shape)
        scaled = matrix * scale[:, :, None]
        power = sum(float(((w @ layer.moments(group)) * w).sum()) for group, w in enumerate(scaled))
        expected = torch.empty_like(matrix)
        for group, output, column in torch.cartesian_prod(*(torch.arange(n) for n in matrix.shape)).tolist():
            row, second = scaled[group, output], layer.moments(group)
            kept = torch.tensor([place for place in range(len(row)) if place != column])
            change = -row.clone()
            change[kept] += solve.kept_weights(row[None], second, kept)[0]
            expected[group, output, column] = change @ second @ change / power
        expected = expected.flatten(0, 1)
        expected = (expected.T if layer.input_dim == 0 else expected).reshape(parameter.shape)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)

    def test_it_is_by_optimal_brain_surgeon(self):
        known = Known(unbiased, IMAGES)
        layer = known.moments["2.weight"]
        weight = known.net[2].weight.detach()
        expected = weight.square() / torch.linalg.inv(layer.moments(0)).diagonal().reshape(weight.shape[1:])
        ratio = known.readers.saliency("2.weight") / expected
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-9, atol=0)
        torch.testing.assert_close(known.readers.saliency("2.weight", relative=False), expected, rtol=1e-9, atol=0)

    def test_of_what_is_not_known_there_is_none(self):
        known = Known(plain, IMAGES, memory=3000)
        assert known.moments["3.weight"].samples is not None
        assert known.readers.saliency("3.weight") is None
        assert known.readers.saliency("0.weight") is None


class TestNormScale:
    def test_it_is_what_the_norm_multiplies_by(self):
        norm = nn.BatchNorm2d(3).double().eval()
        norm.running_var.uniform_(0.1, 4)
        nn.init.normal_(norm.weight)
        step = norm(torch.ones(1, 3, 1, 1, dtype=FLOAT)) - norm(torch.zeros(1, 3, 1, 1, dtype=FLOAT))
        torch.testing.assert_close(norm_scale(nn.Sequential(norm), "0"), step.detach().flatten())
        plain_norm = nn.BatchNorm1d(2, affine=False)
        plain_norm.running_var.fill_(3.99999)
        assert norm_scale(nn.Sequential(plain_norm), "0").tolist() == pytest.approx([0.5, 0.5], rel=1e-6)

    @pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)])
    def test_other_layers_have_none(self, layer):
        with pytest.raises(TypeError, match="0 is no batch-norm with statistics"):
            norm_scale(nn.Sequential(layer), "0")
