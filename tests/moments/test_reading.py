import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.inputs import evaluating
from autoprune.moments import Picks, Watch
from autoprune.structure.trace import plain_attention


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Product(nn.Module):
    """A module of one function of a parameter, which says how the parameter is used."""

    def __init__(self, shape, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x):
        return self.function(x, self.weight)


def watched(model, *inputs):
    """Return the uses of a model's weights, and what came of each."""
    uses = []
    with torch.no_grad(), plain_attention(), Watch(model, after=lambda use, result: uses.append((use, result))):
        model(*inputs)
    return uses


def seen(model, *inputs):
    return [use.weight for use, _ in watched(model, *inputs)]


def assert_rows_give_outputs(model, use, result, picks):
    """Check that rows times the weight, plus the bias, are the outputs at the same picks."""
    parameters = dict(model.named_parameters())
    weight = parameters[use.weight].detach()
    weight = weight.T if use.input_dim == 0 else weight.flatten(1)
    rows = use.rows(picks)
    assert rows.shape == (use.groups, len(picks.sample), use.width)
    given = torch.cat([part @ w.T for part, w in zip(rows, weight.chunk(use.groups), strict=True)], 1)
    given = given if use.bias is None else given + parameters[use.bias].detach()
    torch.testing.assert_close(given, use.outputs(result, picks), rtol=1e-10, atol=1e-10)


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    (nn.Conv1d(4, 6, 4, stride=3, padding=2, dilation=2, groups=2, bias=False), (2, 4, 12)),
    (nn.Conv2d(4, 6, 1), (2, 4, 3, 5)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(0, 3), dilation=(2, 1)), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, (2, 3), padding="same"), (2, 4, 5, 6)),
    (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 5, 6)),
    (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 5, 6)),
    (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 5, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", stride=2), (2, 4, 5, 6)),
    (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 6)),
    (nn.Conv2d(4, 8, 3, groups=4, padding=1, bias=False), (2, 4, 5, 6)),
    (nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 2, 3, 4, 5)),
    (nn.Conv2d(4, 6, 3), (4, 5, 6)),
]

PRODUCTS = [
    (nn.Linear(4, 3), (5, 4)),
    (nn.Linear(4, 3, bias=False), (5, 4)),
    (nn.Linear(4, 3), (4,)),
    (nn.Linear(4, 3), (2, 5, 4)),
    (nn.Linear(4, 3, bias=False), (2, 5, 4)),
    (nn.Linear(4, 3), (2, 3, 5, 4)),
    (nn.Linear(4, 3, bias=False), (2, 3, 5, 4)),
    (nn.Linear(4, 4), (5, 4)),
    (Product((4, 3), lambda x, w: x @ w), (5, 4)),
    (Product((4, 4), lambda x, w: x @ w), (2, 5, 4)),
    (Product((4, 4), lambda x, w: x @ w.T), (2, 5, 4)),
    (Product((4, 3), lambda x, w: torch.addmm(torch.zeros(3, dtype=x.dtype), x, w) - 1), (5, 4)),
]


class TestRows:
    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
    @pytest.mark.parametrize(("layer", "shape"), [*CONVOLUTIONS, *PRODUCTS])
    @pytest.mark.parametrize("each", [2, 1000])
    def test_they_are_what_the_weight_meets(self, layer, shape, each):
        layer = layer.double()
        inputs = torch.randn(shape, dtype=torch.float64)
        [(use, result)] = watched(layer, inputs)
        assert use.weight == "weight"
        if getattr(layer, "bias", None) is not None:
            assert use.bias == "bias"
        picks = use.picks(2, each, torch.Generator().manual_seed(3))
        assert_rows_give_outputs(layer, use, result, picks)

    def test_a_patch_by_hand(self):
        layer = nn.Conv2d(1, 1, 2, stride=2, padding=1)
        [(use, _)] = watched(layer, torch.arange(1.0, 17.0).reshape(1, 1, 4, 4))
        assert use.places == (3, 3)
        picks = Picks(torch.tensor([0, 0]), (torch.tensor([0, 1]), torch.tensor([1, 1])))
        assert use.rows(picks).tolist() == [[[0, 0, 2, 3], [6, 7, 10, 11]]]

    def test_inputs_of_a_parameter_that_multiplies_from_the_right_lie_along_its_first_dimension(self):
        model = nn.ModuleList([Product((4, 3), lambda x, w: x @ w), nn.Linear(4, 3), nn.Conv1d(4, 3, 1)])
        dims = [watched(layer, torch.randn(2, 4, 4))[0][0].input_dim for layer in model]
        assert dims == [0, 1, 1]

    def test_of_attention_the_last_projection_is_seen(self):
        class Attend(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x, y):
                return self.attention(x, y, y, need_weights=False)[0]

        model = Attend().double().eval()
        x, y = torch.randn(2, 3, 5, 8, dtype=torch.float64)
        uses = watched(model, x, y)
        assert [use.weight for use, _ in uses] == ["attention.out_proj.weight"]
        use, result = uses[0]
        assert use.bias == "attention.out_proj.bias"
        assert_rows_give_outputs(model, use, result, use.picks(3, 2, torch.Generator()))
        assert_rows_give_outputs(model, use, result, use.picks(3, 9, torch.Generator()))

    def test_half_precision(self):
        layer = nn.Linear(4, 3).bfloat16()
        [(use, _)] = watched(layer, torch.randn(5, 4).bfloat16())
        assert use.rows(use.picks(5, 1, torch.Generator())).dtype == torch.bfloat16

    def test_another_memory_layout(self):
        layer = nn.Conv2d(4, 6, 3, groups=2).double().to(memory_format=torch.channels_last)
        inputs = torch.randn(2, 4, 5, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        [(use, result)] = watched(layer, inputs)
        assert_rows_give_outputs(layer, use, result, use.picks(2, 4, torch.Generator()))

    def test_the_weight_can_change_before_it_is_used(self):
        layer = nn.Linear(4, 3)
        with torch.no_grad(), Watch(layer, before=lambda _: layer.weight.zero_()):
            result = layer(torch.randn(5, 4))
        assert torch.equal(result, layer.bias.expand(5, 3))


class TestPicks:
    @staticmethod
    def of(shape, samples, each, seed):
        [(use, _)] = watched(nn.Conv2d(1, 1, (2, 3)), torch.zeros(shape))
        return use.picks(samples, each, torch.Generator().manual_seed(seed))

    def test_they_are_within_range_and_depend_on_the_seed_alone(self):
        shape = (6, 1, 5, 9)  # 4 x 7 positions
        chosen = [self.of(shape, 6, 5, seed) for seed in (1, 1, 2)]
        for picks in chosen:
            assert len(picks.sample) == len(picks.places[0]) == len(picks.places[1]) == 30
            for index, size in zip((picks.sample, *picks.places), (6, 4, 7), strict=True):
                assert 0 <= int(index.min()) <= int(index.max()) < size
        flat = [torch.stack([picks.sample, *picks.places]) for picks in chosen]
        assert torch.equal(flat[0], flat[1])
        assert not torch.equal(flat[0], flat[2])

    def test_every_sample_has_its_share_and_none_is_looked_at_twice(self):
        picks = self.of((6, 1, 5, 9), 6, 5, 0)
        assert picks.sample.bincount().tolist() == [5] * 6
        assert len({tuple(row) for row in torch.stack([picks.sample, *picks.places], 1).tolist()}) == 30

    @pytest.mark.parametrize("each", [28, 29, 1000])
    def test_where_there_are_few_all_are_looked_at(self, each):
        picks = self.of((2, 1, 5, 9), 2, each, 0)
        expected = [(sample, row, column) for sample in range(2) for row in range(4) for column in range(7)]
        assert [tuple(row) for row in torch.stack([picks.sample, *picks.places], 1).tolist()] == expected

    def test_tokens_count_as_rows(self):
        [(use, _)] = watched(nn.Linear(4, 3), torch.zeros(2, 7, 4))
        assert len(use.picks(2, 3, torch.Generator()).sample) == 6
        assert use.picks(2, 7, torch.Generator()).sample.tolist() == list(range(14))

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_the_global_generator_is_left_alone(self):
        use = watched(self.frozen(), torch.zeros(9, 4))[0][0]
        use.picks(3, 1, torch.Generator())

    @staticmethod
    def frozen():
        with torch.random.fork_rng(devices=[]):
            return nn.Linear(4, 3)


class TestNotSeen:
    """What can't be looked at is left alone: no error, and nothing is said of it."""

    @pytest.mark.parametrize(
        ("layer", "shape"),
        [
            (nn.ConvTranspose2d(4, 3, 2), (2, 4, 3, 3)),
            (nn.ConvTranspose1d(4, 3, 2, stride=2), (2, 4, 3)),
            (nn.Bilinear(4, 4, 3), None),
            (nn.Embedding(5, 3), None),
            (nn.GRU(4, 3), (2, 5, 4)),
            (Product((8, 4), lambda x, w: F.linear(x, w[2:5])), (2, 4)),
            (Product((8, 4), lambda x, w: F.linear(x, w[:3])), (2, 4)),
            (Product((3, 4), lambda x, w: F.linear(x, w * 2)), (2, 4)),
            (Product((4, 3), lambda x, w: torch.addmm(torch.zeros(3), x, w, alpha=2.0)), (2, 4)),
            (Product((4,), lambda x, w: x @ w), (2, 4)),
            (Product((4, 2), lambda x, w: x @ w.reshape(2, 4).T), (2, 4)),
        ],
    )
    def test_nothing_is_seen(self, layer, shape):
        inputs = [torch.randn(shape)] if shape else [torch.tensor([1, 2])]
        if isinstance(layer, nn.Bilinear):
            inputs = [torch.randn(2, 4), torch.randn(2, 4)]
        assert [name for name in seen(layer, *inputs) if name == "weight"] == []

    def test_a_matrix_that_is_added_is_no_bias(self):
        class Added(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight, self.place = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5, 3))

            def forward(self, x):
                return torch.addmm(self.place, x, self.weight)

        [(use, _)] = watched(Added(), torch.randn(5, 4))
        assert (use.weight, use.bias, use.input_dim) == ("weight", None, 0)


class Then(nn.Module):
    """A convolution and two batch-norms, in a way that a function says."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.other = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
        self.norm, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.plain = nn.BatchNorm2d(3, track_running_stats=False)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def split(net, x):
    out = net.conv(x)
    return net.norm(out) + out


def twice(net, x):
    return net.norm(net.conv(x)) + net.norm(net.conv(x + 1))


class TestNorms:
    @pytest.mark.parametrize(
        ("function", "expected"),
        [
            (lambda net, x: net.norm(net.conv(x)), {"conv.weight": "norm"}),
            (
                lambda net, x: net.norm(net.conv(x)) + net.second(net.other(x)),
                {"conv.weight": "norm", "other.weight": "second"},
            ),
            (lambda net, x: net.conv(x).relu(), {}),
            (lambda net, x: net.conv(x), {}),
            (lambda net, x: net.norm(net.conv(x).relu()), {}),
            (lambda net, x: net.norm(net.conv(x).relu_()), {}),
            (lambda net, x: net.norm(net.conv(x) * 2), {}),
            (split, {}),
            (lambda net, x: net.norm(net.conv(x)) + net.second(net.conv(x)), {}),
            (twice, {"conv.weight": "norm"}),
            (lambda net, x: net.norm(net.conv(x)) + net.norm(net.other(x)), {}),
            (lambda net, x: net.norm(net.conv(x)) + net.norm(x[:, [0, 0, 0]]), {}),
            (lambda net, x: net.norm(torch.cat([net.conv(x), net.other(x)])), {}),
            (lambda net, x: net.plain(net.conv(x)), {}),
        ],
    )
    @pytest.mark.parametrize("training", [False, True])
    def test_only_what_goes_into_one_norm_alone_has_it(self, function, expected, training):
        model = Then(function).train(training)
        watch = Watch(model)
        with torch.no_grad(), watch:
            model(torch.randn(2, 2, 3, 3))
        assert watch.norms == expected

    def test_linear_layers_and_other_dimensions(self):
        net = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 5, 2), nn.BatchNorm1d(5)
        )
        watch = Watch(net.eval())
        with torch.no_grad(), watch:
            net(torch.randn(3, 4))
        assert watch.norms == {"0.weight": "1", "3.weight": "4"}


class TestEvalMode:
    def test_every_mode_is_restored_even_after_an_error(self):
        net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2)).train()
        net[2].eval()

        def run():
            with evaluating(net):
                assert not any(module.training for module in net.modules())
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            run()
        assert [module.training for module in net.modules()] == [True, True, True, False]
