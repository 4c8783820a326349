import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoprune.finetuning import Refit, reconstruct
from autoprune.moments import Moments, Watch, readers_of, solve
from autoprune.structure import Weakest, analyse, cut, plan
from autoprune.structure.trace import plain_attention
from autoprune.testing import TinyNet, TinyResNet

FLOAT = torch.float64
ALL = 10**6  # rows of a sample, so that all are looked at
IMAGES, TOKENS = (2, 6, 6), (5, 8)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def no_ridge(monkeypatch):
    monkeypatch.setattr(solve, "shrinkage", lambda second, *_: torch.full(second.shape[:-2], 1e-11, dtype=FLOAT))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 4, batch_first=True), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(self.up(self.norm(x)).relu())


class Parameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        return (x @ self.up).relu() @ self.down


class Blocks(nn.Module):
    """Two residual blocks: `(batch, 2, 6, 6)` to `(batch, 3)`."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm, self.down = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            return x + self.down(self.norm(self.up(x)).relu())

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), self.Block(), self.Block()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.second(self.first(self.stem(x))).mean((2, 3)))


def normed():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)
    )


def normed_with_bias():
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))


def with_bias():
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, padding=1))


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.ReLU(), nn.Linear(6, 3))


def flattened():
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 3, bias=False))


def grouped():
    return nn.Sequential(
        nn.Conv2d(2, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, groups=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 3, 1),
    )


def depthwise():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1)
    )


CASES = [
    (normed, IMAGES, {"0": [1, 4]}),
    (normed_with_bias, IMAGES, {"0": [0, 1, 2]}),
    (with_bias, IMAGES, {"0": [5, 3]}),
    (linear, IMAGES, {"1": [2, 0]}),
    (flattened, IMAGES, {"0": [1, 2]}),
    (grouped, IMAGES, {"0": [1, 4], "2": [0]}),
    (depthwise, IMAGES, {"0": [3]}),
    (TinyResNet, (1, 8, 8), {"stem": [0, 6], "conv1": [1, 2, 3]}),
    (Transformer, TOKENS, {"attention": [2], "up": [0, 5]}),
    (Parameters, (7, 4), {"up": [1, 3]}),
]
EACH_CASE = pytest.mark.parametrize(("make", "shape", "removed"), CASES)


def norms_of(net):
    return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def measured(net, inputs):
    """Give batch-norms the statistics of all that reaches them, the variance that of the population."""

    def measure(norm, args):
        dims = [0, *range(2, args[0].dim())]
        norm.running_mean.copy_(args[0].mean(dims))
        norm.running_var.copy_(args[0].var(dims, correction=0))

    handles = [norm.register_forward_pre_hook(measure) for norm in norms_of(net)]
    with torch.no_grad():
        net(inputs)
    for handle in handles:
        handle.remove()


class Known:
    """A network in double precision with statistics of its data, its groups and moments."""

    def __init__(self, make, shape, samples=24, **settings):
        self.net = make().double().eval()
        for norm in norms_of(self.net):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)
        self.inputs = torch.randn(samples, *shape, dtype=FLOAT)
        measured(self.net, self.inputs)
        self.structure = analyse(self.net, self.inputs[:1], kinds=("channels", "heads", "blocks"))
        data = [(self.inputs, torch.zeros(samples))]
        self.moments = Moments.collect(self.net, data, readers_of(self.structure), each=ALL, **settings)

    def smaller(self, removed):
        change = plan(self.net, self.structure, removed)
        return cut(self.net, change), change

    def reconstructed(self, removed):
        smaller, change = self.smaller(removed)
        reconstruct(self.net, smaller, change, self.moments)
        return smaller, change

    def uses(self):
        """Return for every weight that runs `(groups, rows, d)` of what it reads, and the rows' outputs."""
        found = {}

        def note(use, result):
            picks = use.picks(len(self.inputs), ALL, torch.Generator())
            found[use.weight] = use.rows(picks), use.outputs(result, picks), use

        with torch.no_grad(), plain_attention(), Watch(self.net, after=note):
            self.net(self.inputs)
        return found


def matrices(weight, groups, input_dim):
    weight = weight.detach()
    return (weight.T if input_dim == 0 else weight.flatten(1)).chunk(groups)


def pairs(known, smaller, change):
    """Yield of each layer that lost inputs its moments, dense rows, weights now, and outputs now and before."""
    parameters = dict(smaller.named_parameters())
    for name, (rows, outputs, use) in known.uses().items():
        kept = change.kept.get(name, {})
        if use.input_dim not in kept:
            continue
        kernel = math.prod(use.kernel)
        columns = (kept[use.input_dim][:, None] * kernel + torch.arange(kernel)).flatten()
        there = rows[:, :, columns]
        weights = matrices(parameters[name], use.groups, use.input_dim)
        given = torch.cat([one @ w.T for one, w in zip(there, weights, strict=True)], 1)
        given = given if use.bias is None else given + parameters[use.bias].detach()
        wanted = outputs[:, kept[1 - use.input_dim]] if 1 - use.input_dim in kept else outputs
        yield known.moments[name], there, weights, given, wanted


def twin(net, first, second, factor=2.0):
    """Make one output of the layers named here a multiple of another, through a ReLU."""
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                for tensor in (layer.weight, layer.bias):
                    if tensor is not None:
                        tensor[second] = factor * tensor[first]
                break
    return net


class TestReconstruct:
    @EACH_CASE
    def test_weights_are_the_least_squares_solution(self, make, shape, removed):
        known = Known(make, shape)
        smaller, change = known.reconstructed(removed)
        dense = dict(known.net.named_parameters())
        seen = 0
        for layer, there, weights, _, wanted in pairs(known, smaller, change):
            kept = change.kept[layer.weight]
            bias = 0.0
            if layer.bias is not None:
                bias = dense[layer.bias].detach()
                bias = bias[kept[1 - layer.input_dim]] if 1 - layer.input_dim in kept else bias
            targets = (wanted - bias).chunk(len(weights), 1)
            rows_kept = kept.get(1 - layer.input_dim, torch.arange(layer.matrix(dense[layer.weight]).shape[:2].numel()))
            sliced = dense[layer.weight].detach().index_select(layer.input_dim, kept[layer.input_dim])
            sliced = matrices(sliced.index_select(1 - layer.input_dim, rows_kept), len(weights), layer.input_dim)
            for group, weight in enumerate(weights):
                rows, target = there[group], targets[group]
                if layer.centred:
                    rows, target = rows - rows.mean(0), target - target.mean(0)
                ridge = float((layer.moments(group) - layer.bare_moments(group))[0, 0])
                system = torch.cat([rows / len(rows) ** 0.5, ridge**0.5 * torch.eye(rows.shape[1], dtype=FLOAT)])
                goal = torch.cat([target / len(rows) ** 0.5, ridge**0.5 * sliced[group].T])
                expected = torch.linalg.lstsq(system, goal).solution.T
                torch.testing.assert_close(weight, expected, rtol=0, atol=1e-8)
                assert not torch.allclose(weight, sliced[group], atol=1e-4)
                seen += 1
        assert seen >= len(removed)

    @EACH_CASE
    def test_the_mean_of_the_outputs_stays(self, make, shape, removed):
        """By the bias where there is one, by the batch-norm's mean where there is none."""
        known = Known(make, shape)
        smaller, change = known.reconstructed(removed)
        for layer, _, _, given, wanted in pairs(known, smaller, change):
            if layer.bias is not None:
                torch.testing.assert_close(given.mean(0), wanted.mean(0), rtol=0, atol=1e-10)
            if layer.norm is not None:
                norm = smaller.get_submodule(layer.norm)
                torch.testing.assert_close(norm.running_mean, given.mean(0), rtol=0, atol=1e-10)
                torch.testing.assert_close(norm.running_var, given.var(0, correction=0), rtol=1e-8, atol=1e-10)

    @EACH_CASE
    def test_it_loses_less_than_slicing(self, make, shape, removed):
        known = Known(make, shape)
        errors = []
        for smaller, change in (known.reconstructed(removed), known.smaller(removed)):
            layers = pairs(known, smaller, change)
            errors.append(
                [float((g - w - (g - w).mean(0) * layer.centred).square().mean()) for layer, _, _, g, w in layers]
            )
        assert all(solved < sliced for solved, sliced in zip(*errors, strict=True))

    @EACH_CASE
    def test_layers_that_lost_no_inputs_are_only_sliced(self, make, shape, removed):
        known = Known(make, shape)
        smaller, change = known.reconstructed(removed)
        sliced, _ = known.smaller(removed)
        solved = {name for name in known.moments if known.moments[name].input_dim in change.kept.get(name, {})}
        assert solved
        changed = solved | {known.moments[name].bias for name in solved}
        norms = {known.moments[name].norm for name in solved}
        for name, value in sliced.state_dict().items():
            if name not in changed and name.rpartition(".")[0] not in norms:
                assert torch.equal(value, smaller.state_dict()[name]), name
        names = {
            name for name, value in sliced.named_parameters() if not torch.equal(value, smaller.get_parameter(name))
        }
        assert solved <= names <= changed

    @pytest.mark.parametrize("make", [normed, normed_with_bias, with_bias, flattened])
    @pytest.mark.usefixtures("no_ridge")
    def test_what_a_twin_says_is_not_lost(self, make):
        net = twin(make(), 1, 4)
        if isinstance(net[1], nn.BatchNorm2d):  # twins through a norm: the same for both, whatever the scale
            twin(net[1:], 1, 4, 1.0)
        known = Known(lambda: net, IMAGES)
        if isinstance(net[1], nn.BatchNorm2d):
            with torch.no_grad():
                net[1].weight[4], net[1].bias[4] = net[1].weight[1], net[1].bias[1]
                net[1].eps = 0.0
            measured(net, known.inputs)
            known.moments = Moments.collect(
                net, [(known.inputs, torch.zeros(24))], readers_of(known.structure), each=ALL
            )
        smaller, _ = known.reconstructed({"0": [4]})
        torch.testing.assert_close(smaller(known.inputs), net(known.inputs), rtol=0, atol=1e-6)

    def test_zeros_stay_and_what_is_beside_them_makes_up(self):
        net = with_bias().double().eval()
        inputs = torch.randn(8, *IMAGES, dtype=FLOAT)
        structure = analyse(net, inputs[:1], kinds=("channels", "weights"))
        moments = Moments.collect(net, [(inputs, torch.zeros(8))], readers_of(structure))
        weakest = Weakest(20, net[2].weight.detach().abs())
        for removed in ({"0": [1], "2:weights": weakest}, {"2:weights": weakest}):
            change = plan(net, structure, removed)
            smaller, before = cut(net, change), cut(net, change)
            reconstruct(net, smaller, change, moments)
            assert torch.all(smaller[2].weight[change.zeroed["2.weight"]] == 0)
            errors = [(one(inputs) - net(inputs)).square().mean() for one in (smaller, before)]
            assert errors[0] < 0.9 * errors[1]
            assert torch.equal(smaller[0].weight, before[0].weight)

    @pytest.mark.parametrize("removed", [{}, {"0": []}])
    def test_nothing_removed_changes_nothing(self, removed):
        net = with_bias().double().eval()
        inputs = torch.randn(8, *IMAGES, dtype=FLOAT)
        structure = analyse(net, inputs[:1])
        moments = Moments.collect(net, [(inputs, torch.zeros(8))], readers_of(structure))
        change = plan(net, structure, removed)
        smaller = cut(net, change)
        reconstruct(net, smaller, change, moments)
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in smaller.state_dict().items())

    def test_blocks_can_be_removed_beside(self):
        known = Known(Blocks, IMAGES)
        removed = {"first": [0], "second.up": [1, 2]}
        smaller, change = known.reconstructed(removed)
        alone, _ = known.reconstructed({"second.up": [1, 2]})
        assert isinstance(smaller.first, nn.Identity)
        assert change.blocks == ("first",)
        assert torch.equal(smaller.second.down.weight, alone.second.down.weight)
        assert torch.isfinite(smaller(known.inputs)).all()

    def test_layers_whose_moments_are_not_known_stay_as_they_are_sliced(self):
        known = Known(TinyResNet, (1, 8, 8))
        known.moments = Moments({"fc.weight": known.moments["fc.weight"]})
        smaller, _ = known.reconstructed({"stem": [1]})
        sliced, _ = known.smaller({"stem": [1]})
        assert torch.equal(smaller.conv1.weight, sliced.conv1.weight)
        assert not torch.equal(smaller.fc.weight, sliced.fc.weight)

    @pytest.mark.parametrize("make", [normed, normed_with_bias, grouped])
    def test_rows_in_place_of_moments_solve_the_same(self, make):
        """With as many rows as there are samples, a layer is solved as from the moments of those rows."""
        known = Known(make, IMAGES, memory=8 * 2000)
        wide = [name for name, layer in known.moments.items() if layer.samples is not None]
        assert wide
        layers = dict(known.moments)
        for name in wide:
            layer = layers[name]
            rows = torch.stack([layer.centred_samples(group) for group in range(len(layer.mean))])
            count = rows.shape[1]
            second = rows.transpose(1, 2) @ rows / count
            layers[name] = type(layer)(name, layer.bias, layer.norm, layer.input_dim, count, layer.mean, second, None)
        smaller, change = known.reconstructed({"0": [1, 2]})
        other = cut(known.net, change)
        reconstruct(known.net, other, change, Moments(layers))
        for name, value in smaller.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-8, atol=1e-9)

    def test_variances_stay_above_zero(self):
        """Statistics that are not those of the data can say that more is lost than there was."""
        known = Known(normed, IMAGES)
        known.net[4].running_var.fill_(1e-6)
        smaller, _ = known.reconstructed({"0": [0, 1, 2, 3, 4]})
        assert (smaller[4].running_var >= 0.99e-8).all()

    def test_inputs_of_zeros(self):
        net = with_bias().eval()
        with torch.no_grad():
            net[0].bias.fill_(-100.0)
        inputs = torch.randn(4, *IMAGES)
        structure = analyse(net, inputs[:1])
        moments = Moments.collect(net, [(inputs, torch.zeros(4))], readers_of(structure))
        change = plan(net, structure, {"0": [0, 1]})
        smaller = cut(net, change)
        reconstruct(net, smaller, change, moments)
        assert torch.equal(smaller[2].weight, net[2].weight[:, 2:])
        torch.testing.assert_close(smaller(inputs), net(inputs))


def fitted(known, removed, **settings):
    smaller, change = known.smaller(removed)
    Refit(known.net, known.inputs, **settings)(smaller, change)
    return smaller


def error(net, known):
    with torch.no_grad():
        return float((net(known.inputs) - known.net(known.inputs)).square().mean())


class TestRefit:
    @pytest.mark.parametrize("make", [with_bias, linear, flattened])
    @pytest.mark.usefixtures("no_ridge")
    def test_what_a_twin_says_is_not_lost(self, make):
        first = "1" if make is linear else "0"
        net = make()
        twin(net, 1, 4)
        known = Known(lambda: net, IMAGES)
        smaller = fitted(known, {first: [4]}, each=ALL)
        torch.testing.assert_close(smaller(known.inputs), net(known.inputs), rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        ("make", "shape", "removed"), [case for case in CASES if case[0] not in (normed, normed_with_bias)]
    )
    def test_one_layer_after_another_loses_less_than_each_for_itself(self, make, shape, removed):
        known = Known(make, shape, samples=40)
        alone, _ = known.reconstructed(removed)
        sliced, _ = known.smaller(removed)
        assert error(fitted(known, removed, each=ALL), known) < error(alone, known) * 1.02
        assert error(alone, known) < error(sliced, known)

    def test_later_layers_make_up_for_earlier_ones(self):
        """In a chain of three, the last layer lost nothing itself, but is fitted to what reaches it now."""

        def make():
            sizes = (6, 12, 12, 12, 3)
            layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
            for layer in layers:
                nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5)
            return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]

        known = Known(make, (6,), samples=600)
        removed = {"0": [0, 1, 2, 3], "2": [0, 1, 2]}
        alone, _ = known.reconstructed(removed)
        both = fitted(known, removed)
        assert not torch.equal(both[6].weight, known.net[6].weight)
        assert torch.equal(alone[6].weight, known.net[6].weight)
        assert error(both, known) < 0.95 * error(alone, known)

    @pytest.mark.usefixtures("no_ridge")
    def test_the_first_layer_that_lost_inputs_has_the_least_squares_solution(self):
        known = Known(with_bias, IMAGES)
        smaller = fitted(known, {"0": [5, 3]}, each=ALL)
        solved, _ = known.reconstructed({"0": [5, 3]})
        torch.testing.assert_close(smaller[2].weight, solved[2].weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(smaller[2].bias, solved[2].bias, rtol=0, atol=1e-6)
        assert torch.equal(smaller[0].weight, known.net[0].weight[[0, 1, 2, 4]])  # it lost outputs alone

    @pytest.mark.parametrize(("make", "shape", "removed"), [CASES[0], CASES[1], CASES[5], CASES[7]])
    def test_norms_have_the_statistics_of_the_batch(self, make, shape, removed):
        known = Known(make, shape)
        smaller = fitted(known, removed)
        found = copy.deepcopy(smaller.state_dict())
        for norm in norms_of(smaller):
            norm.train()
            norm.momentum = 1.0
        with torch.no_grad():
            smaller(known.inputs)
        for name, value in smaller.state_dict().items():
            if name.endswith(("running_mean", "running_var")):
                torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize(("make", "shape"), [(normed, IMAGES), (TinyResNet, (1, 8, 8)), (Transformer, TOKENS)])
    def test_nothing_cut_changes_nothing(self, make, shape):
        known = Known(make, shape)
        same, dense = fitted(known, {}), known.net.state_dict()
        assert all(torch.equal(value, dense[name]) for name, value in same.state_dict().items())

    def test_tokens_that_are_alike_everywhere_do_not_hide_the_others(self):
        class Marked(nn.Module):
            """A token that is always the same stands before the others: `(n, 1, 4, 4)` to `(n, 3)`."""

            def __init__(self):
                super().__init__()
                self.stem, self.token = nn.Conv2d(1, 8, 1), nn.Parameter(torch.randn(1, 1, 6))
                self.patches, self.up, self.down, self.fc = (nn.Linear(*s) for s in ((8, 6), (6, 8), (8, 6), (6, 3)))

            def forward(self, x):
                x = self.patches(F.relu(self.stem(x)).flatten(2).transpose(1, 2))
                x = torch.cat([self.token.expand(len(x), -1, -1), x[:, 1:]], 1)
                return self.fc(self.down(F.relu(self.up(x))).mean(1))

        known = Known(Marked, (1, 4, 4), samples=80)
        smaller, dense = fitted(known, {"stem": [0, 3, 5]}), known.net.state_dict()
        changed = {name.split(".")[0] for name, value in smaller.state_dict().items() if not value.equal(dense[name])}
        assert {"up", "down", "fc"} <= changed

    def test_rounding_of_half_precision_hides_no_change(self):
        known = Known(Blocks, IMAGES)
        net, inputs = copy.deepcopy(known.net).bfloat16(), known.inputs.bfloat16()
        structure = analyse(net, inputs[:1])
        change = plan(net, structure, {"first.up": [0, 3]})
        smaller, dense = cut(net, change), net.state_dict()
        Refit(net, inputs)(smaller, change)
        changed = {name for name, value in smaller.state_dict().items() if not value.equal(dense[name])}
        assert {"first.down.weight", "second.up.weight", "second.norm.running_var"} <= changed

    def test_what_lies_before_all_that_was_cut_stays(self):
        known = Known(Blocks, IMAGES)
        smaller, dense = fitted(known, {"second.up": [0, 3]}), known.net.state_dict()
        changed = {name for name, value in smaller.state_dict().items() if not torch.equal(value, dense[name])}
        assert {name.split(".")[0] for name in changed} == {"second", "fc"}
        assert {"second.norm.running_var", "second.down.weight"} <= changed

    @pytest.mark.parametrize("make", [normed, normed_with_bias])
    def test_norms_are_still_seen_while_their_inputs_are_looked_at(self, make):
        """Before batch-norm, which takes the mean away, layers are fitted without it."""
        known = Known(make, IMAGES)
        assert Refit(known.net, known.inputs)._norms == {"0.weight": "1", "3.weight": "4"}

    def test_modes_momenta_and_gradients_are_restored(self):
        known = Known(TinyResNet, (1, 8, 8))
        smaller, change = known.smaller({"stem": [1]})
        smaller.train()
        smaller.bn1.eval()
        smaller.bn0.momentum, smaller.bn1.momentum = 0.3, None
        smaller.conv1.weight.requires_grad_(False)
        Refit(known.net, known.inputs)(smaller, change)
        assert [smaller.training, smaller.bn0.training, smaller.bn1.training] == [True, True, False]
        assert [smaller.bn0.momentum, smaller.bn1.momentum, smaller.bn2.momentum] == [0.3, None, 0.1]
        assert [name for name, one in smaller.named_parameters() if not one.requires_grad] == ["conv1.weight"]
        assert all(one.grad is None for one in smaller.parameters())

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_the_dense_network_is_not_changed_and_its_mode_neither(self):
        with torch.random.fork_rng(devices=[]):
            known = Known(TinyNet, (1, 8, 8))
        known.net.train()
        known.net.bn2.eval()
        before = copy.deepcopy(known.net.state_dict())
        fitted(known, {"conv1": [1, 2]})
        assert all(torch.equal(value, before[name]) for name, value in known.net.state_dict().items())
        assert [known.net.training, known.net.bn1.training, known.net.bn2.training] == [True, True, False]

    def test_it_repeats_and_the_seed_says_which_rows_count(self):
        known = Known(TinyResNet, (1, 8, 8))
        removed = {"stem": [0, 6], "conv1": [1]}
        refit = Refit(known.net, known.inputs, each=3, seed=1)
        results = []
        for one in (refit, refit, Refit(known.net, known.inputs, each=3, seed=1)):
            smaller, change = known.smaller(removed)
            one(smaller, change)
            results.append(smaller.state_dict())
        assert all(torch.equal(value, other[name]) for other in results[1:] for name, value in results[0].items())
        other = fitted(known, removed, each=3, seed=2)
        assert not torch.equal(other.conv2.weight, results[0]["conv2.weight"])

    def test_a_weight_that_runs_twice_is_left_alone(self):
        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.shared, self.down = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

            def forward(self, x):
                return self.down(self.shared(self.shared(self.up(x).relu()).relu()).relu())

        net, inputs = Shared().double().eval(), torch.randn(30, 3, dtype=FLOAT)
        structure = analyse(net, inputs[:1])
        change = plan(net, structure, {structure.names[0]: [1]})
        smaller, before = cut(net, change), cut(net, change)
        Refit(net, inputs)(smaller, change)
        assert torch.equal(smaller.shared.weight, before.shared.weight)
        assert not torch.equal(smaller.down.weight, before.down.weight)

    def test_zeros_stay_and_what_is_beside_them_is_fitted(self):
        net, inputs = with_bias().double().eval(), torch.randn(8, *IMAGES, dtype=FLOAT)
        structure = analyse(net, inputs[:1], kinds=("channels", "weights"))
        change = plan(net, structure, {"0:weights": Weakest(40, net[0].weight.detach().abs()), "0": [1]})
        smaller, before = cut(net, change), cut(net, change)
        Refit(net, inputs)(smaller, change)
        assert torch.equal(smaller[0].weight == 0, before[0].weight == 0)
        assert int((smaller[0].weight == 0).sum()) > 20
        errors = [(one(inputs) - net(inputs)).square().mean() for one in (smaller, before)]
        assert errors[0] < 0.7 * errors[1]

    def test_layers_that_are_called_otherwise_are_left_alone(self):
        """A network that looks at half of the picture only: nothing can be said row by row."""
        net, inputs = with_bias().double().eval(), torch.randn(8, *IMAGES, dtype=FLOAT)
        structure = analyse(net, inputs[:1])
        change = plan(net, structure, {"0": [1]})
        smaller, before = cut(net, change), cut(net, change)
        forward = smaller.forward
        smaller.forward = lambda x: forward(x[..., :4])
        Refit(net, inputs)(smaller, change)
        assert torch.equal(smaller[0].weight, before[0].weight)
        assert torch.equal(smaller[2].weight, before[2].weight)

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("removed", [{"0.attention": [1]}, {"0.up": [1, 2]}])
    def test_attention_that_lost_heads_beside_attention_that_did_not(self, batch_first, removed):
        """Their rows come in the same order, that of the dense network."""

        def make():
            net = nn.Sequential(Transformer(), Transformer())
            for layer in net:
                layer.attention = nn.MultiheadAttention(8, 4, batch_first=batch_first)
            return net

        known = Known(make, TOKENS, samples=40)
        assert error(fitted(known, removed, each=ALL), known) < error(known.reconstructed(removed)[0], known) * 1.05
        same, change = known.smaller({})
        Refit(known.net, known.inputs)(same, change)
        for name, value in same.named_parameters():
            torch.testing.assert_close(value, known.net.get_parameter(name), rtol=0, atol=1e-12)
        assert all(type(layer.attention) is nn.MultiheadAttention for layer in (*known.net, *same))

    def test_half_precision(self):
        known = Known(TinyResNet, (1, 8, 8))
        known.net, known.inputs = known.net.bfloat16(), known.inputs.bfloat16()
        smaller = fitted(known, {"stem": [0, 6]})
        sliced, _ = known.smaller({"stem": [0, 6]})
        assert smaller.fc.weight.dtype == torch.bfloat16
        assert not torch.equal(smaller.fc.weight, sliced.fc.weight)
        assert all(torch.isfinite(value).all() for value in smaller.state_dict().values())

    def test_blocks(self):
        known = Known(Blocks, IMAGES)
        smaller = fitted(known, {"first": [0]})
        sliced, _ = known.smaller({"first": [0]})
        assert isinstance(smaller.first, nn.Identity)
        assert error(smaller, known) < error(sliced, known)
        assert smaller.second.down.weight.shape == known.net.second.down.weight.shape

    def test_inputs_of_zeros(self):
        known = Known(with_bias, IMAGES)
        with torch.no_grad():
            known.net[0].bias.fill_(-100.0)
        smaller = fitted(known, {"0": [0, 1]})
        torch.testing.assert_close(smaller(known.inputs), known.net(known.inputs))
        known = Known(normed, IMAGES)
        known.inputs = torch.zeros_like(known.inputs)
        smaller = fitted(known, {"0": [0, 1]})
        assert all(torch.isfinite(value).all() for value in smaller.state_dict().values())

    @pytest.mark.parametrize(("make", "shape", "removed"), CASES)
    def test_one_sample(self, make, shape, removed):
        known = Known(make, shape)
        known.inputs = known.inputs[:1]
        smaller = fitted(known, removed)
        assert all(torch.isfinite(value).all() for value in smaller.state_dict().values())

    def test_one_sample_has_no_statistics(self):
        def make():
            return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))

        known = Known(make, (3,))
        known.inputs = known.inputs[:1]
        smaller = fitted(known, {"0": [1]})
        assert torch.equal(smaller[1].running_mean, known.net[1].running_mean[[0, 2, 3]])
