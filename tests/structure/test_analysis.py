"""From a network to its structure: what is asked for, given up and refused; and the network stays whole."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from autoprune.errors import ConfigError, StructureError
from autoprune.models import build
from autoprune.structure import analyse
from autoprune.testing import TinyNet, TinyResNet

IMAGES = torch.zeros(1, 1, 8, 8)


class Net(nn.Module):
    """Modules or parameters, and how the input goes through them."""

    def __init__(self, run, **members):
        super().__init__()
        self.run = run
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def between(run):
    """A network `a` → what is given → `b` → `fc`."""
    members = {"a": nn.Conv2d(1, 8, 3, padding=1), "b": nn.Conv2d(8, 4, 3, padding=1), "fc": nn.Linear(4, 2)}
    return Net(lambda net, x: net.fc(F.relu(net.b(run(net.a(x)))).mean((2, 3))), **members)


def sizes(structure):
    return {group.name: group.size for group in structure}


def reasons(structure):
    return {locked.name: locked.reason for locked in structure.locked}


class Residual(nn.Module):
    """A block, two heads and a hidden layer."""

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out, self.heads = nn.Linear(8, 24), nn.Linear(8, 8), 2

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v)
            return x + self.out(mixed.transpose(1, 2).flatten(2))

    def __init__(self):
        super().__init__()
        self.embed, self.attend, self.fc = nn.Linear(3, 8), self.Attend(), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.attend(self.embed(x)).mean(1))


TOKENS = torch.zeros(1, 5, 3)


class TestKinds:
    @pytest.mark.parametrize(
        ("kinds", "found"),
        [
            ((), {}),
            (("channels",), {"embed": "channels"}),
            (("heads",), {"attend.qkv": "heads"}),
            (("blocks",), {"attend": "blocks"}),
            (("blocks", "heads"), {"attend.qkv": "heads", "attend": "blocks"}),
            (("16x4",), {"attend.qkv:16x4": "16x4"}),
        ],
    )
    def test_each_gives_its_own(self, kinds, found):
        structure = analyse(Residual(), TOKENS, kinds=kinds)
        assert {group.name: group.kind for group in structure} == found
        assert {locked.kind for locked in structure.locked} <= set(kinds)

    def test_channels_and_heads_are_looked_for_unless_said_otherwise(self):
        assert {group.kind for group in analyse(Residual(), TOKENS)} == {"channels", "heads"}

    def test_weights_stand_behind_what_is_removed_in_earnest(self):
        structure = analyse(TinyNet(), IMAGES, kinds=("weights", "channels"))
        assert structure.names == ("conv1", "conv2", "conv1:weights", "conv2:weights", "fc:weights")

    def test_weights_are_zeroed_in_one_way(self):
        with pytest.raises(ConfigError, match="weights are zeroed in one way at a time, but got weights and 2:4; name"):
            analyse(TinyNet(), IMAGES, kinds=("weights", "channels", "2:4"))

    def test_weights_need_no_run_of_the_network(self):
        def fails(net, x):
            raise RuntimeError("not now")

        assert analyse(Net(fails, fc=nn.Linear(4, 2)), IMAGES, kinds=("weights",)).names == ("fc:weights",)

    def test_a_block_that_is_named_like_a_group_of_channels(self):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 6))
                self.act = nn.ReLU()

            def forward(self, x):
                return x + F.linear(self.act(F.linear(x, self.up)), self.down)

        net = Net(lambda net, x: net.fc(net.b(net.a(x))), a=nn.Linear(3, 4), b=Own(), fc=nn.Linear(4, 2))
        structure = analyse(net, torch.zeros(1, 3), kinds=("channels", "blocks"))
        assert {group.name: (group.kind, group.size) for group in structure} == {
            "a": ("channels", 4),
            "b": ("channels", 6),
            "b:blocks": ("blocks", 1),
        }

    @pytest.mark.parametrize("kind", ["heds", "4:2", "0x4", ""])
    def test_what_is_no_kind_is_refused_before_anything_runs(self, kind):
        def never(net, x):
            raise AssertionError

        with pytest.raises(ConfigError) as caught:
            analyse(Net(never, fc=nn.Linear(4, 2)), IMAGES, kinds=("channels", kind))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("multiple", [0, -8])
    def test_a_multiple_is_positive(self, multiple):
        with pytest.raises(ConfigError, match=f"`multiple >= 1` must hold, but got {multiple}"):
            analyse(TinyNet(), IMAGES, multiple=multiple)


class TestGivenUp:
    def test_an_operator_that_is_not_followed_is_named(self):
        structure = analyse(between(lambda x: torch.fft.fft(x, dim=1).real), IMAGES)
        (given_up,) = structure.given_up
        assert given_up == "operator `_fft_r2c`, which ran once, is not followed; what flows into it is locked"
        assert sizes(structure) == {"b": 4}
        assert reasons(structure)["a"].endswith("runs `_fft_r2c` on it, whose effect on channels is not known")

    def test_how_often_it_ran(self):
        def run(x):
            return x + torch.fft.fft(x, dim=1).real + torch.fft.fft(x, dim=1).imag

        assert "`_fft_r2c`, which ran 2 times," in analyse(between(run), IMAGES).given_up[0]

    def test_what_it_runs_on_before_any_weight_does_not_matter(self):
        net = TinyNet()
        whole = Net(lambda self, x: self.net(torch.fft.fft(x).real), net=net)
        structure = analyse(whole, IMAGES)
        assert structure.given_up == ()
        assert sizes(structure) == {"net.conv1": 8, "net.conv2": 8}

    def test_nothing_where_all_is_followed(self):
        assert analyse(TinyResNet(), IMAGES).given_up == ()


class Auxiliary(nn.Module):
    """A second classifier, in training only."""

    def __init__(self, drop=0.0):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3)
        self.fc, self.aux = nn.Linear(4, 2), nn.Linear(6, 2)
        self.drop = drop

    def forward(self, x):
        features = F.relu(self.a(x))
        scores = self.fc(self.b(F.dropout(features, self.drop, self.training)).mean((2, 3)))
        return (scores, self.aux(features.mean((2, 3)))) if self.training else scores


class TestTraining:
    def test_what_reads_in_training_only_is_found(self):
        structure = analyse(Auxiliary().eval(), IMAGES)
        assert structure["a"].readers == ("b", "aux")
        assert reasons(structure)["aux"] == "its elements are the network's output"

    def test_what_reads_it_in_a_training_that_is_random_is_locked(self):
        structure = analyse(Auxiliary(drop=0.5), IMAGES)
        assert structure.names == ("b",)
        assert reasons(structure)["a"] == (
            "in training mode, which computes something else each time so that nothing can be proven, `aux` reads it"
        )
        assert reasons(structure)["aux"] == "the network does not use it when it runs on the example input"

    def test_what_a_random_training_does_nothing_with_is_offered(self):
        stem = nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 1, 1))
        assert analyse(nn.Sequential(stem, Auxiliary(drop=0.5)), IMAGES).names == ("0.0", "1.b")

    def test_what_a_random_training_fixes_is_locked(self):
        class Fixed(Auxiliary):
            def forward(self, x):
                features = F.relu(self.a(x))
                scores = self.fc(self.b(F.dropout(features, 0.5, self.training)).mean((2, 3)))
                return (scores, self.aux(features.mean((2, 3)).sort(1).values)) if self.training else scores

        structure = analyse(Fixed(), IMAGES)
        assert structure.names == ("b",)
        assert "in training mode, which computes something else" in reasons(structure)["a"]

    def test_a_training_that_fails_is_said(self):
        class Fails(Auxiliary):
            def forward(self, x):
                if self.training:
                    raise RuntimeError("no labels")
                return super().forward(x)

        structure = analyse(Fails(), IMAGES)
        assert structure.names == ("a", "b")
        (given_up,) = structure.given_up
        assert given_up.startswith("`aux`, which may run in training mode: there Fails does not run")
        assert "no labels" in given_up


class TestInputs:
    TWO = staticmethod(lambda: Net(lambda net, x, y: net.fc(F.relu(net.a(x) + net.b(y))), **two()))

    def test_several_arguments(self):
        structure = analyse(self.TWO(), (torch.zeros(1, 3), torch.zeros(1, 5)))
        assert structure["a"].layers == ("a", "b")

    def test_keyword_arguments(self):
        structure = analyse(self.TWO(), {"y": torch.zeros(1, 5), "x": torch.zeros(1, 3)})
        assert structure["a"].layers == ("a", "b")

    def test_a_batch_shows_what_one_sample_shows(self):
        assert sizes(analyse(TinyNet(), torch.zeros(7, 1, 8, 8))) == sizes(analyse(TinyNet(), IMAGES))

    def test_outputs_in_a_dictionary(self):
        net = Net(lambda net, x: {"scores": [net.net(x)], "note": "text"}, net=TinyNet())
        assert sizes(analyse(net, IMAGES)) == {"net.conv1": 8, "net.conv2": 8}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precisions(self, dtype):
        assert sizes(analyse(TinyResNet().to(dtype), IMAGES.to(dtype))) == {"stem": 8, "conv1": 8}


def two():
    return {"a": nn.Linear(3, 6), "b": nn.Linear(5, 6), "fc": nn.Linear(6, 2)}


class TestErrors:
    def refused(self, net, match):
        with pytest.raises(StructureError, match=match) as caught:
            analyse(net, IMAGES)
        assert "\n" not in str(caught.value)

    def test_a_network_that_fails_on_the_input(self):
        self.refused(
            between(lambda x: x[:, :5]), "Net does not run on the example input: RuntimeError: Given groups=1, weight"
        )

    def test_a_network_whose_tensors_are_computed(self):
        net = between(lambda x: x)
        prune.l1_unstructured(net.a, "weight", 0.5)
        self.refused(net, r"`a\.weight` is computed from other tensors, .* make it a plain parameter first")

    def test_a_compiled_network(self):
        self.refused(torch.compile(TinyNet()), "the model is a OptimizedModule, .* that you passed to torch.compile")

    def test_a_network_that_compiles_itself(self):
        net = TinyNet()
        net.compile()
        self.refused(net, "the model is a TinyNet, .* call `compile` on the pruned network")

    def test_a_part_that_is_compiled(self):
        net = TinyNet()
        net.conv2.compile()
        self.refused(net, "`conv2` is a Conv2d, .* call `compile` on the pruned network")

    def test_a_network_for_several_devices(self):
        self.refused(nn.DataParallel(TinyNet()), r"the model is a DataParallel, .* give its `\.module`")

    def test_a_failure_leaves_the_network_as_it_was(self):
        net = between(lambda x: x[:, :5]).train()
        net.b.eval()
        with pytest.raises(StructureError):
            analyse(net, IMAGES)
        assert [name for name, module in net.named_modules() if not module.training] == ["b"]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class TestInputUntouched:
    def snapshot(self, net):
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()]
        tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        return {
            "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
            "objects": {name: id(tensor) for name, tensor in tensors.items()},
            "grad": {name: None if t.grad is None else t.grad.clone() for name, t in net.named_parameters()},
            "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
            "training": [module.training for module in net.modules()],
            "hooks": hooks,
        }

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_nothing_of_it_changes(self):
        net = build("resnet20").train()
        net.bn1.eval()
        net.conv1.weight.requires_grad_(False)
        net.linear.weight.grad = torch.ones(10, 64)
        net.linear.register_forward_hook(lambda *_: None)
        before = self.snapshot(net)
        analyse(net, torch.zeros(1, 3, 8, 8), kinds=("channels", "heads", "blocks", "weights"))
        after = self.snapshot(net)
        for key in ("values", "grad"):
            for name, value in before[key].items():
                assert value is after[key][name] is None or torch.equal(value, after[key][name]), name
        assert {k: v for k, v in before.items() if k not in ("values", "grad")} == {
            k: v for k, v in after.items() if k not in ("values", "grad")
        }

    def test_the_example_input_does_not_change(self):
        images = torch.rand(2, 1, 8, 8)
        before = images.clone()
        analyse(TinyNet(), images)
        assert torch.equal(images, before)
        assert not images.requires_grad

    def test_frozen_and_no_grad_networks_are_found_alike(self):
        net = TinyResNet()
        expected = sizes(analyse(net, IMAGES))
        frozen = copy.deepcopy(net).requires_grad_(False)
        with torch.no_grad():
            assert sizes(analyse(frozen, IMAGES)) == expected


def test_embeddings_are_left_out_on_request() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    assert analyse(net, tokens, kinds=("weights",)).names == ("0:weights", "1:weights")
    structure = analyse(net, tokens, kinds=("weights",), embeddings=False)
    assert structure.names == ("1:weights",)
    assert [(locked.name, locked.reason) for locked in structure.locked] == [("0:weights", "embeddings are left out")]


def test_weights_are_zeroed_in_one_way_at_a_time() -> None:
    with pytest.raises(
        ConfigError, match=r"^weights are zeroed in one way at a time, but got weights and 2:4; name one$"
    ):
        analyse(nn.Sequential(nn.Linear(4, 3)), torch.zeros(1, 4), kinds=("weights", "2:4"))
