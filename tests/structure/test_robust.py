"""Networks that are strange, shared, wrapped or broken: pruned right, in eval and in training mode, or refused.

Right means: half of every group goes, and the smaller network computes what the dense one does with zeros in the
weights that read what went. Refused means: one line that says what to do, or a locked group with its reason.
"""

import copy
import subprocess
import sys
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from autoprune.cost import CostModel, count
from autoprune.errors import StructureError
from autoprune.structure import analyse, cut, plan
from autoprune.structure.tracer import tensors

IMAGES = torch.zeros(1, 2, 4, 4)
TOKENS = torch.zeros(1, 3, 4)
IDS = torch.tensor([[1, 2, 5]])
OUTPUT = "its elements are the network's output"


class Net(nn.Module):
    """Modules or parameters, and how the input goes through them."""

    def __init__(self, run, **members):
        super().__init__()
        self.run = run
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 1)


def between(run, **members):
    """A network `a` → what is given → `b`."""
    return Net(lambda net, x: net.b(run(net, net.a(x))), a=conv(2, 6), b=conv(6, 2), **members)


def chain():
    return nn.Sequential(conv(2, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 2))


def called(net, example):
    return (
        net(**example) if isinstance(example, dict) else net(*example) if isinstance(example, tuple) else net(example)
    )


def randomly(example, generator):
    """The input with three samples of random numbers for each of zeros."""
    if isinstance(example, torch.Tensor):
        if not example.is_floating_point():
            return example[:1].expand(3, *example.shape[1:])
        return torch.randn(3, *example.shape[1:], generator=generator).to(example.dtype)
    if isinstance(example, dict):
        return {name: randomly(value, generator) for name, value in example.items()}
    return type(example)(randomly(value, generator) for value in example)


def halved(structure):
    return {group.name: list(range(0, group.size - 1, 2)) for group in structure}


def right(net, example, names, kinds=("channels", "heads"), tolerance=1e-5):
    """Check that these groups are offered, and that they can go in both modes; return the smaller network."""
    net.eval()
    structure = analyse(net, example, kinds=kinds)
    assert list(structure.names) == names
    removed = halved(structure)
    smaller = cut(net, plan(net, structure, removed))
    masked = copy.deepcopy(net)
    for group in structure:
        for part in group.slices:
            if part.role == "read":
                weight = dict(masked.named_parameters())[part.tensor]
                weight.data.index_fill_(part.dim, part.positions[removed[group.name]].flatten(), 0.0)
    inputs = randomly(example, torch.Generator().manual_seed(0))
    for training in (False, True):
        with torch.no_grad():
            outputs, expected = (tensors(called(each.train(training), inputs)) for each in (smaller, masked))
        assert len(outputs) == len(expected) > 0
        for one, other in zip(outputs, expected, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() <= tolerance * other.abs().max()
    loss = sum(t.float().square().sum() for t in tensors(called(smaller, inputs)))
    loss.backward()
    costs = CostModel(net.eval(), example, structure)
    assert costs.cost({name: len(rows) for name, rows in removed.items()}) == count(smaller.eval(), example).cost
    return smaller


def locked(net, example):
    return {group.name: group.reason for group in analyse(net, example).locked}


def refused(net, example, match):
    with pytest.raises(StructureError, match=match) as caught:
        analyse(net, example)
    assert "\n" not in str(caught.value)


class TestSharing:
    def test_a_module_that_runs_twice(self):
        net = between(lambda net, x: net.again(F.relu(net.again(x))), again=conv(6, 6))
        smaller = right(net, IMAGES, ["a"])
        assert smaller.again.weight.shape == (3, 3, 1, 1)

    def test_a_module_under_two_names(self):
        net = between(lambda net, x: net.two(F.relu(net.one(x))), one=conv(6, 6))
        net.two = net.one
        smaller = right(net, IMAGES, ["a"])
        assert smaller.one is smaller.two

    def test_a_weight_in_two_modules(self):
        net = between(lambda net, x: net.two(F.relu(net.one(x))), one=conv(6, 6), two=conv(6, 6))
        net.two.weight = net.one.weight
        smaller = right(net, IMAGES, ["a"])
        assert smaller.one.weight is smaller.two.weight
        assert smaller.one.bias is not smaller.two.bias

    def test_an_embedding_that_is_also_the_last_layer(self):
        net = nn.Sequential(
            nn.Embedding(7, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 7, bias=False)
        )
        net[4].weight = net[0].weight
        smaller = right(net, IDS, ["0", "1"])
        assert smaller[4].weight is smaller[0].weight
        assert smaller[4].weight.shape == (7, 3)
        assert locked(net, IDS) == {"0#2": "`0` looks its rows up"}

    def test_weights_that_are_used_both_ways_round(self):
        net = Net(lambda net, x: F.linear(net.down(x), net.down.weight.T), down=nn.Linear(4, 6))
        assert right(net, TOKENS, ["down"]).down.weight.shape == (3, 4)


class TestParameters:
    def test_frozen_ones_stay_frozen(self):
        net = chain()
        net[0].weight.requires_grad_(False)
        net[1].requires_grad_(False)
        smaller = right(net, IMAGES, ["0"])
        assert [p.requires_grad for p in smaller.parameters()] == [p.requires_grad for p in net.parameters()]
        assert smaller[0].weight.grad is None
        assert smaller[0].bias.grad is not None

    def test_all_frozen(self):
        net = chain().requires_grad_(False)
        assert analyse(net, IMAGES).names == ("0",)

    def test_those_of_the_network_itself(self):
        net = Net(lambda net, x: (x @ net.up + net.shift).relu() @ net.down)
        net.up, net.down = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 3))
        net.shift = nn.Parameter(torch.randn(6))
        smaller = right(net, TOKENS, ["up"])
        assert (smaller.up.shape, smaller.shift.shape, smaller.down.shape) == ((4, 3), (3,), (3, 3))

    def test_those_in_a_list(self):
        net = Net(lambda net, x: (x @ net.both[0]).relu() @ net.both[1])
        net.both = nn.ParameterList([torch.randn(4, 6), torch.randn(6, 3)])
        assert right(net, TOKENS, ["both"]).both[0].shape == (4, 3)

    def test_buffers_of_activations(self):
        net = between(lambda net, x: x + net.place)
        net.register_buffer("place", torch.randn(6, 1, 1), persistent=False)
        smaller = right(net, IMAGES, ["a"])
        assert smaller.place.shape == (3, 1, 1)
        assert "place" not in smaller.state_dict()

    def test_buffers_that_read(self):
        net = Net(lambda net, x: net.b(net.a(x) @ net.basis), a=nn.Linear(4, 6), b=nn.Linear(5, 2))
        net.register_buffer("basis", torch.randn(6, 5))
        structure = analyse(net, TOKENS)
        assert structure.names == ("a",)
        smaller = cut(net, plan(net, structure, {"a": [0, 3]}))
        net.basis[[0, 3]] = 0
        tokens = torch.randn(2, 3, 4)
        torch.testing.assert_close(smaller(tokens), net(tokens))

    @pytest.mark.parametrize("make", [nn.LazyConv2d, nn.LazyConvTranspose2d])
    def test_lazy_ones_are_refused_till_they_are_there(self, make):
        net = nn.Sequential(make(6, 1), nn.ReLU(), make(2, 1))
        refused(net, IMAGES, r"`0\.weight` has no numbers yet: run a lazy network once")
        net(IMAGES)
        right(net, IMAGES, ["0"])

    def test_those_on_the_meta_device_are_refused(self):
        refused(chain().to("meta"), IMAGES.to("meta"), r"`0\.weight` has no numbers yet: .* load the weights")


class TestReparametrisations:
    def test_weight_norm(self):
        net = nn.Sequential(parametrizations.weight_norm(conv(2, 6)), nn.ReLU(), conv(6, 2))
        smaller = right(net, IMAGES, ["0"])
        assert smaller[0].parametrizations.weight.original1.shape == (3, 2, 1, 1)

    def test_a_reader_with_weight_norm_is_locked(self):
        net = nn.Sequential(conv(2, 6), nn.ReLU(), parametrizations.weight_norm(conv(6, 2)))
        assert "normalises across it" in locked(net, IMAGES)["0"]
        assert analyse(net, IMAGES, normalised=True).names == ()

    def test_weight_norm_of_the_older_kind(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            net = nn.Sequential(nn.utils.weight_norm(conv(2, 6)), nn.ReLU(), conv(6, 2))
        refused(net, IMAGES, r"`0\.weight` is computed from other tensors, as by weight norm .*; make it a plain")
        nn.utils.remove_weight_norm(net[0])
        right(net, IMAGES, ["0"])

    def test_spectral_norm_is_locked(self):
        net = nn.Sequential(parametrizations.spectral_norm(conv(2, 6)), nn.ReLU(), conv(6, 2))
        assert "whose effect on channels is not known" in locked(net, IMAGES)["0"]

    def test_spectral_norm_of_the_older_kind(self):
        net = nn.Sequential(nn.utils.spectral_norm(conv(2, 6)), nn.ReLU(), conv(6, 2)).eval()
        with torch.no_grad():
            net(IMAGES)
        assert "runs `dot` on it, whose effect on channels is not known" in locked(net, IMAGES)["0"]
        net(IMAGES)
        refused(net, IMAGES, r"`0\.weight` is computed from other tensors")

    def test_masks_of_torch_are_refused_till_they_are_made_permanent(self):
        net = chain()
        prune.l1_unstructured(net[0], "weight", 0.5)
        refused(net, IMAGES, r"`0\.weight` is computed from other tensors, as by .* pruning masks")
        prune.remove(net[0], "weight")
        right(net, IMAGES, ["0"])

    def test_any_other_parametrisation(self):
        class Positive(nn.Module):
            def forward(self, weight):
                return weight.exp()

        net = chain()
        nn.utils.parametrize.register_parametrization(net[0], "weight", Positive())
        assert right(net, IMAGES, ["0"])[0].weight.shape == (3, 2, 1, 1)


@dataclass
class Scores:
    """What a network may return."""

    logits: torch.Tensor
    hidden: tuple


class Output(OrderedDict):
    """A mapping that nobody has registered anywhere."""


class TestInputsAndOutputs:
    @pytest.mark.parametrize("make", [lambda one, two: (one, two), lambda one, two: {"x": one, "y": two}])
    def test_several_inputs(self, make):
        net = Net(lambda net, x, y: net.c(net.a(x) + net.b(y)), a=conv(2, 6), b=conv(3, 6), c=conv(6, 2))
        right(net, make(IMAGES, torch.zeros(1, 3, 4, 4)), ["a"])

    def test_a_list_is_one_input(self):
        net = Net(lambda net, xs: net.b(torch.cat([net.a(x) for x in xs], 1)), a=conv(2, 6), b=conv(12, 2))
        right(net, [IMAGES, IMAGES], ["a"])

    def test_token_ids_alone(self):
        net = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        right(net, IDS, ["0", "1"])

    def test_token_ids_with_a_mask(self):
        net = Net(lambda net, ids, mask: net.b(net.a(ids) * mask[..., None]), a=nn.Embedding(7, 6), b=nn.Linear(6, 2))
        right(net, {"ids": IDS, "mask": torch.ones(1, 3)}, ["a"])
        right(net, {"ids": IDS.expand(4, 3), "mask": torch.ones(4, 3)}, ["a"])

    @pytest.mark.parametrize("batch", [1, 4])
    def test_an_input_that_has_no_batch(self, batch):
        net = Net(lambda net, x, mix: net.b(mix @ net.a(x)), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
        example = (TOKENS.expand(batch, 3, 4), torch.ones(3, 3))
        structure = analyse(net, example)
        assert structure.names == ("a",)
        assert CostModel(net, example, structure).dense.macs == 3 * (4 * 6 + 3 * 6 + 6 * 2)

    def test_an_input_without_a_batch_is_refused(self):
        refused(chain(), IMAGES[0], "does not run on the example input: .*one sample, the first along the first dim")

    def test_a_network_for_one_sample_at_a_time(self):
        net = Net(lambda net, x: net.b(net.a(x).reshape(1, -1, 16).mean(2)), a=conv(2, 6), b=nn.Linear(6, 2))
        assert analyse(net, IMAGES).names == ("a",)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda y, z: (y, z),
            lambda y, z: {"logits": y, "hidden": [z]},
            lambda y, z: Scores(y, (z,)),
            lambda y, z: Output(logits=y, hidden=z),
            lambda y, z: SimpleNamespace(logits=y, hidden=z),
        ],
        ids=["tuple", "dict", "dataclass", "mapping", "object"],
    )
    def test_several_outputs(self, wrap):
        net = Net(
            lambda net, x: wrap(net.b(F.relu(net.a(x))), net.c(F.relu(net.a(x)))),
            a=conv(2, 6),
            b=conv(6, 4),
            c=conv(6, 4),
        )
        right(net, IMAGES, ["a"])
        assert {"b", "c"} == {layer for group in analyse(net, IMAGES).locked for layer in group.layers}

    def test_an_intermediate_result_that_is_returned_too(self):
        net = Net(lambda net, x: (net.b(y := net.a(x)), y), a=conv(2, 6), b=conv(6, 2))
        assert locked(net, IMAGES) == {"a": OUTPUT, "b": OUTPUT}

    def test_no_tensor_at_all_is_refused(self):
        net = between(lambda net, x: x)
        net.register_forward_hook(lambda module, args, output: float(output.sum()))
        refused(net, IMAGES, "there is no tensor in what the network returns, a float: wrap it in a module")


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_it_stays(self, dtype):
        smaller = right(chain().to(dtype), IMAGES.to(dtype), ["0"], tolerance=0.05)
        assert {p.dtype for p in smaller.parameters()} == {dtype}

    def test_casts_within_the_network(self):
        net = Net(lambda net, x: net.b(net.a(x).to(net.b.weight.dtype)), a=conv(2, 6), b=conv(6, 2).double())
        smaller = right(net, IMAGES, ["a"])
        assert (smaller.a.weight.dtype, smaller.b.weight.dtype) == (torch.float32, torch.float64)

    def test_autocast_within_the_network(self):
        net = between(lambda net, x: x)
        net.forward = torch.autocast("cpu", torch.bfloat16)(net.forward)
        assert analyse(net, IMAGES).names == ("a",)

    def test_code_that_insists_on_half_is_refused(self):
        net = Net(lambda net, x: net.inner(x.half()), inner=chain().half())
        refused(net, IMAGES, "not on a random one of the same shapes in float32, so that nothing can be proven")


class TestWrappers:
    @pytest.mark.parametrize(
        ("wrap", "way_out"),
        [
            (torch.compile, "OptimizedModule, .*: give the module that you passed to torch.compile"),
            (lambda net: net.compile() or net, "Sequential, .*: call `compile` on the pruned network"),
            (nn.DataParallel, "DataParallel, .*: give its `.module`"),
            (
                lambda net: scripted(torch.jit.script, net),
                "RecursiveScriptModule, .*: give the module that it was made",
            ),
            (lambda net: scripted(torch.jit.trace, net, IMAGES), "TopLevelTracedModule, .*: give the module that it"),
        ],
        ids=["torch.compile", "compile", "DataParallel", "script", "trace"],
    )
    def test_they_are_refused_whole_or_in_part(self, wrap, way_out):
        refused(wrap(chain()), IMAGES, f"the model is a {way_out}")
        refused(nn.Sequential(wrap(chain()), conv(2, 2)), IMAGES, f"`0` is a {way_out}")

    def test_the_pruned_network_can_be_wrapped(self):
        net = chain()
        smaller = right(net, IMAGES, ["0"])
        torch.testing.assert_close(nn.DataParallel(smaller)(IMAGES), smaller(IMAGES))

    def test_checkpoints_and_inference_mode_and_vmap(self):
        inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        for run in (
            lambda net, x: torch.utils.checkpoint.checkpoint(net.inner, x, use_reentrant=False),
            torch.inference_mode()(lambda net, x: net.inner(x)),
            lambda net, x: torch.vmap(net.inner)(x),
        ):
            assert analyse(Net(run, inner=copy.deepcopy(inner)), TOKENS).names == ("inner.0",)


def scripted(make, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args)


class TestControlFlow:
    def test_what_the_data_decide_locks_the_data(self):
        def run(net, x):
            return net.b(x) if x.sum() > 0 else net.c(x)

        net = Net(lambda net, x: run(net, net.a(x)), a=conv(2, 6), b=conv(6, 2), c=conv(6, 2))
        reasons = locked(net, IMAGES)
        assert "normalises across it" in reasons["a"]
        assert "the network does not use it when it runs on the example input" in reasons.values()

    @pytest.mark.parametrize("take", [lambda x: x.max().item(), lambda x: x[0, 0, 0, 0].item(), lambda x: x.tolist()])
    def test_numbers_taken_out_of_tensors(self, take):
        net = between(lambda net, x: x * torch.tensor(take(x)).to(x.dtype))
        assert "a" in locked(net, IMAGES)

    def test_a_detour_by_numpy_is_found_by_the_proof(self):
        net = between(lambda net, x: torch.from_numpy(x.detach().numpy() * 2))
        assert "a" in locked(net, IMAGES)

    def test_code_that_insists_on_an_even_number(self):
        def run(net, x):
            if x.shape[1] % 2:
                raise ValueError("odd")
            return x

        net = Net(lambda net, x: net.b(run(net, net.a(x))), a=conv(2, 12), b=conv(12, 2))
        assert locked(net, IMAGES)["a"] == "the network fails without some of its elements: odd"

    def test_what_depends_on_the_shape_alone(self):
        net = between(lambda net, x: x.mean(3, keepdim=True) if x.shape[2] > 2 else x)
        right(net, IMAGES, ["a"])

    def test_a_forward_that_fails(self):
        refused(
            between(lambda net, x: 1 / 0), IMAGES, "Net does not run on the example input: ZeroDivisionError: division"
        )
        refused(chain(), torch.zeros(1, 5, 4, 4), "expected input.* to have 2 channels, but got 5 channels instead")

    def test_layers_that_never_run(self):
        net = between(lambda net, x: x, spare=conv(9, 5), lone=nn.Embedding(3, 4))
        reasons = locked(net, IMAGES)
        assert reasons["spare"] == reasons["lone"] == "the network does not use it when it runs on the example input"
        assert right(net, IMAGES, ["a"]).spare.weight.shape == (5, 9, 1, 1)

    def test_outputs_that_are_no_numbers_prove_nothing(self):
        reason = "the network's output on random input is not a number, which proves nothing"
        assert locked(between(lambda net, x: x.log()), IMAGES)["a"] == reason

    def test_infinities_are_numbers(self):
        net = Net(lambda net, x: F.pad(net.b(net.a(x)), (0, 1), value=-torch.inf), a=conv(2, 6), b=conv(6, 2))
        assert analyse(net, IMAGES).names == ("a",)

    def test_complex_outputs(self):
        net = Net(lambda net, x: torch.fft.rfft(net.b(net.a(x))), a=conv(2, 6), b=conv(6, 2))
        assert analyse(net, IMAGES).names == ("a",)


class TestRandomness:
    def test_dropout_that_heeds_the_mode(self):
        net = between(lambda net, x: F.dropout(x, 0.5, net.training))
        assert analyse(net, IMAGES).names == ("a",)
        assert net.training

    def test_dropout_that_does_not(self):
        before = torch.get_rng_state()
        net = between(lambda net, x: F.dropout(x))
        state = torch.get_rng_state()
        assert locked(net, IMAGES)["a"] == (
            "the network computes something else each time it runs, as with dropout that is always on"
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(before, state)  # which making a network changes

    def test_then_nothing_else_is_tried(self):
        calls = []

        def run(net, x):
            calls.append(1)
            return F.dropout(net.inner(x))

        layers = [layer for _ in range(16) for layer in (nn.Linear(4, 4), nn.ReLU())]
        reasons = locked(Net(run, inner=nn.Sequential(*layers, nn.Linear(4, 2))), TOKENS)
        assert len(reasons) == 17
        assert len(calls) < 10


class TestRecurrence:
    @pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
    @pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}, {"bias": False}])
    def test_it_is_locked_and_what_comes_after_is_not(self, make, options):
        width = 10 if "bidirectional" in options else 5
        net = Net(
            lambda net, x: net.c(F.relu(net.b(net.rnn(net.a(x))[0]))),
            a=nn.Linear(4, 3),
            rnn=make(3, 5, batch_first=True, **options),
            b=nn.Linear(width, 6),
            c=nn.Linear(6, 2),
        )
        structure = analyse(net, TOKENS)
        assert structure.names == ("b",)
        assert {"a", "rnn", "c"} <= {layer for group in structure.locked for layer in group.layers}
        tokens = torch.randn(2, 3, 4)
        smaller = cut(net, plan(net, structure, {"b": [1, 4]}))
        net.c.weight.data[:, [1, 4]] = 0
        torch.testing.assert_close(smaller(tokens), net(tokens))

    @pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
    def test_cells(self, make):
        def run(net, x):
            state = net.cell(net.a(x))
            return net.b(state[0] if isinstance(state, tuple) else state)

        net = Net(run, a=nn.Linear(4, 6), cell=make(6, 5), b=nn.Linear(5, 2))
        structure = analyse(net, torch.zeros(1, 4))
        assert set(structure.names) <= {"a"}
        assert "cell" in {layer for group in structure.locked for layer in group.layers}


class TestTransformers:
    @pytest.mark.parametrize("norm_first", [False, True])
    def test_torchs_own_encoder(self, norm_first):
        layer = nn.TransformerEncoderLayer(8, 4, 12, dropout=0.0, batch_first=True, norm_first=norm_first)
        net = Net(
            lambda net, x: net.b(net.encoder(net.a(x))),
            a=nn.Linear(4, 8),
            encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            b=nn.Linear(8, 2),
        )
        names = [f"encoder.layers.{n}.{part}" for n in range(2) for part in ("self_attn", "linear1")]
        smaller = right(net, TOKENS, names)
        assert smaller.encoder.layers[1].self_attn.num_heads == 2
        assert smaller.encoder.layers[1].linear1.out_features == 6

    def test_encoder_and_decoder(self):
        inner = nn.Transformer(8, 4, 1, 1, 12, dropout=0.0, batch_first=True)
        net = Net(
            lambda net, x: net.b(net.inner(net.a(x), net.a(x))), a=nn.Linear(4, 8), inner=inner, b=nn.Linear(8, 2)
        )
        decoder = [f"inner.decoder.layers.0.{part}" for part in ("self_attn", "multihead_attn", "linear1")]
        right(net, TOKENS, [f"inner.encoder.layers.0.{part}" for part in ("self_attn", "linear1")] + decoder)


class TestTrainingOnly:
    @staticmethod
    def with_auxiliary(run):
        return Net(run, a=conv(2, 6), b=conv(6, 2), extra=nn.Sequential(conv(6, 4), nn.ReLU(), conv(4, 2)))

    def test_auxiliary_heads_are_pruned_with_the_rest(self):
        def run(net, x):
            y = F.relu(net.a(x))
            return (net.b(y), net.extra(y)) if net.training else net.b(y)

        net = self.with_auxiliary(run)
        smaller = right(net, IMAGES, ["a", "extra.0"])
        assert smaller.extra[0].weight.shape == (2, 3, 1, 1)


_MEMORY = """
import resource, torch
from torch import nn
from autoprune.structure import analyse

analyse(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.zeros(1, 4))  # loads what is loaded late
net = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(6)])
size = sum(parameter.numel() for parameter in net.parameters()) * 4
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
assert len(analyse(net, torch.zeros(1, 2048))) == 5
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / size)
"""


class TestMany:
    def test_memory_is_a_small_multiple_of_the_network(self):
        """A copy in float64 with masked weights, or with the smaller network, is 4 times it, and the allocator's."""
        run = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, timeout=100, check=True)
        assert float(run.stdout) < 6

    def test_nothing_to_prune(self):
        assert len(analyse(nn.Sequential(nn.ReLU()), IMAGES)) == 0

    def test_a_network_that_is_deep(self):
        layers = [layer for _ in range(150) for layer in (conv(4, 4), nn.ReLU())]
        assert len(analyse(nn.Sequential(conv(2, 4), *layers), IMAGES)) == 150
