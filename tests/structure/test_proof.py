import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from autoprune.models import build
from autoprune.structure import Attribute, Group, analyse
from autoprune.structure.channels import find_channels
from autoprune.structure.proof import Proof, _removals
from autoprune.structure.trace import trace
from autoprune.testing import TinyNet, TinyResNet

IMAGES = torch.zeros(1, 1, 8, 8)


def proof(net, example=IMAGES, seed=0):
    return Proof(net, example, torch.Generator().manual_seed(seed))


def every(net, example=IMAGES, **options):
    """Return the groups that a trace shows, not proven."""
    return {group.name: group for group in find_channels(net, trace(net, example), **options).groups}


def found(net, name, example=IMAGES, **options):
    return every(net, example, **options)[name]


def with_slices(group, change):
    """Return the group with every slice replaced by what `change` makes of it; None leaves it out."""
    slices = tuple(part for part in map(change, group.slices) if part is not None)
    return dataclasses.replace(group, slices=slices)


def only(condition, change):
    return lambda part: change(part) if condition(part) else part


def is_read(part):
    return part.role == "read"


def moved(positions):
    return lambda part: dataclasses.replace(part, positions=positions(part.positions))


def nowhere(_):
    return None


class TestGoodGroups:
    @pytest.mark.parametrize("net", [TinyNet(), TinyResNet()], ids=["chain", "residual"])
    def test_they_pass(self, net):
        groups = every(net).values()
        assert len(groups) == 2
        assert proof(net).faults(list(groups)) == {}
        assert [proof(net).fault(group) for group in groups] == [None, None]

    def test_in_half_precision_too(self):
        assert len(analyse(TinyNet().half(), IMAGES.half())) == 2

    def test_a_network_that_insists_on_single_precision(self):
        class Insists(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = TinyNet()

            def forward(self, x):
                return self.net(x.float())

        assert len(analyse(Insists(), IMAGES)) == 2

    def test_outputs_may_be_of_any_kind(self):
        class Several(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = TinyNet()

            def forward(self, x):
                scores = self.net(x)
                return {"scores": scores, "best": scores.argmax(1), "sure": scores > 0, "none": scores[:0], "note": "x"}

        assert len(analyse(Several(), IMAGES)) == 2

    def test_code_that_checks_its_precision(self):
        class Checks(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = TinyNet()

            def forward(self, x):
                assert x.dtype == torch.float32
                return self.net(x)

        assert len(analyse(Checks(), IMAGES)) == 2

    def test_with_several_arguments_and_integers_among_them(self):
        class Words(nn.Module):
            def __init__(self):
                super().__init__()
                self.words, self.a, self.fc = nn.Embedding(7, 6), nn.Linear(6, 8), nn.Linear(8, 2)

            def forward(self, tokens, *, scale):
                return self.fc(F.relu(self.a(self.words(tokens) * scale)).mean(1))

        example = {"tokens": torch.tensor([[1, 6, 3]]), "scale": torch.ones(1, 3, 1)}
        net = Words()
        assert proof(net, example).faults(list(every(net, example).values())) == {}

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_the_network_is_not_changed(self):
        net = tiny_residual()
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        proof(net).fault(found(net, "stem"))
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
        assert net.training
        assert next(net.parameters()).dtype == torch.float32


def tiny_residual(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyResNet()


class TestBrokenGroups:
    """Each break is of the kind that a wrong dependency graph would make."""

    @pytest.fixture(params=["stem", "conv1"])
    def group(self, request):
        return found(tiny_residual(), request.param)

    def fault(self, group, change):
        net = tiny_residual()
        assert proof(net).fault(group) is None
        return proof(net).fault(with_slices(group, change))

    def test_wrong_positions_of_the_reader(self, group):
        assert "not the same as zeroing" in self.fault(group, only(is_read, moved(lambda p: p.roll(1, 0))))

    def test_wrong_positions_of_one_writer(self):
        group = found(tiny_residual(), "stem")
        wrong = only(lambda part: part.tensor == "conv2.weight", moved(lambda p: p.flip(0)))
        assert "not the same as zeroing" in self.fault(group, wrong)

    def test_wrong_positions_of_a_norm(self, group):
        norm = "bn0" if group.name == "stem" else "bn1"
        wrong = only(lambda part: part.tensor == f"{norm}.weight", moved(lambda p: p.roll(1, 0)))
        assert "not the same as zeroing" in self.fault(group, wrong)

    @pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
    def test_wrong_positions_of_a_statistic(self, statistic):
        group = found(tiny_residual(), "conv1")
        wrong = only(lambda part: part.tensor == f"bn1.{statistic}", moved(lambda p: p.roll(1, 0)))
        assert "not the same as zeroing" in self.fault(group, wrong)

    def test_any_two_elements_exchanged(self):
        net, group = tiny_residual(), found(tiny_residual(), "conv1")
        judge = proof(net)
        for one, other in itertools.combinations(range(8), 2):
            order = list(range(8))
            order[one], order[other] = other, one
            broken = with_slices(group, only(is_read, moved(lambda p, order=order: p[order])))
            assert judge.fault(broken) is not None, (one, other)

    def test_off_by_one_beyond_the_end(self, group):
        assert self.fault(group, only(is_read, moved(lambda p: p + 1))) is not None

    def test_positions_beyond_the_end(self, group):
        fault = self.fault(group, only(is_read, moved(lambda p: p + 8)))
        assert fault == "its elements do not line up with the weights that read them"

    def test_off_by_one_before_the_start(self):
        def run_off(p):
            return (p - 1).clamp_min(0)

        group = found(tiny_residual(), "conv1")
        assert self.fault(group, only(is_read, moved(run_off))) is not None

    def test_a_missing_reader(self, group):
        assert self.fault(group, only(is_read, nowhere)).startswith("the network fails without some of its elements: ")

    def test_a_missing_reader_among_several(self):
        group = found(tiny_residual(), "stem")
        fault = self.fault(group, only(lambda part: part.tensor == "fc.weight", nowhere))
        assert fault.startswith("the network fails without some of its elements: ")

    def test_a_missing_norm(self, group):
        norms = only(lambda part: part.tensor.startswith("bn"), nowhere)
        assert self.fault(group, norms).startswith("the network fails without some of its elements: ")

    def test_a_missing_writer(self):
        group = found(tiny_residual(), "stem")
        writer = only(lambda part: part.tensor == "conv2.weight" and part.dim == 0, nowhere)
        assert self.fault(group, writer).startswith("the network fails without some of its elements: ")

    def test_the_wrong_dimension(self):
        group = found(tiny_residual(), "conv1")
        turned = only(is_read, lambda part: dataclasses.replace(part, dim=0))
        assert self.fault(group, turned) is not None

    def test_a_reader_among_several_that_is_called_a_writer(self):
        def renamed(part):
            return dataclasses.replace(part, role="written")

        group = found(tiny_residual(), "stem")
        wrong = only(lambda part: part.tensor == "fc.weight", renamed)
        assert "not the same as zeroing" in self.fault(group, wrong)

    def test_two_groups_taken_for_one(self):
        net = TinyNet()
        first, second = found(net, "conv1"), found(net, "conv2")
        both = dataclasses.replace(first, slices=first.slices + second.slices)
        assert proof(net).fault(both) is None  # coupling more than need be is exact, only wasteful

    def test_nothing_hides_behind_a_scale_of_zero(self):
        net = tiny_residual()
        nn.init.zeros_(net.bn2.weight)
        group = found(net, "conv1")
        assert proof(net).fault(group) is None
        broken = with_slices(group, only(is_read, moved(lambda p: p.roll(1, 0))))
        assert "not the same as zeroing" in proof(net).fault(broken)


@pytest.fixture(scope="module")
def resnet20():
    net = build("resnet20")
    return net, every(net, torch.zeros(1, 3, 8, 8))


class TestJoint:
    """All groups are removed at once, and only what is broken is found."""

    BREAKS = staticmethod(
        lambda: {
            "wrong position": only(is_read, moved(lambda p: p.roll(1, 0))),
            "missing reader": only(lambda part: part.tensor.endswith("conv2.weight") and is_read(part), nowhere),
            "swapped rows": only(
                lambda part: part.tensor.endswith("bn1.bias"), moved(lambda p: p[[1, 0, *range(2, len(p))]])
            ),
        }
    )

    def test_many_good_ones(self, resnet20):
        net, groups = resnet20
        assert proof(net, torch.zeros(1, 3, 8, 8)).faults(list(groups.values())) == {}

    @pytest.mark.parametrize(
        "broken",
        [
            {"layer1.0.conv1": "missing reader"},
            {"layer3.2.conv1": "swapped rows"},
            {"conv1": "wrong position", "layer3.2.conv1": "wrong position"},
            {
                "layer1.1.conv1": "swapped rows",
                "layer1.2.conv1": "missing reader",
                "layer3.0.conv2#2": "wrong position",
            },
        ],
        ids=lambda broken: ", ".join(broken),
    )
    def test_exactly_the_broken_ones_are_found(self, resnet20, broken):
        net, groups = resnet20
        breaks = self.BREAKS()
        given = [with_slices(g, breaks[broken[g.name]]) if g.name in broken else g for g in groups.values()]
        faults = proof(net, torch.zeros(1, 3, 8, 8)).faults(given)
        assert set(faults) == set(broken)
        for name, how in broken.items():
            fails = "the network fails without some" if how == "missing reader" else "is not the same as zeroing them"
            assert fails in faults[name]

    def test_all_broken(self, resnet20):
        net, groups = resnet20
        given = [with_slices(group, only(is_read, moved(lambda p: p.roll(1, 0)))) for group in groups.values()]
        assert set(proof(net, torch.zeros(1, 3, 8, 8)).faults(given)) == set(groups)

    def test_of_two_that_are_exact_alone_but_not_together_the_second_is_refused(self):
        class Either(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = TinyNet()

            def forward(self, x):
                if self.net.conv1.out_channels < 8 and self.net.conv2.out_channels < 8:
                    raise ValueError("one or the other")
                return self.net(x)

        net = Either()
        judge, groups = proof(net), every(net)
        assert [judge.fault(group) for group in groups.values()] == [None, None]
        faults = judge.faults(list(groups.values()))
        assert faults == {"net.conv2": "the network fails without some of its elements: one or the other"}

    def test_nothing_to_prove(self):
        assert proof(TinyNet()).faults([]) == {}


class TestAttributes:
    """A number that the code reads shrinks with its group, or the group is no group."""

    @staticmethod
    def grouped():
        run = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 2, 3))
        return run, found(run, "0")

    def test_the_right_one(self):
        net, group = self.grouped()
        assert group.attributes == (Attribute("1", "groups", 1),)
        assert proof(net).fault(group) is None

    @pytest.mark.parametrize("attributes", [(), (Attribute("1", "groups", 2),), (Attribute("0", "groups", 1),)])
    def test_a_wrong_one(self, attributes):
        net, group = self.grouped()
        assert proof(net).fault(dataclasses.replace(group, attributes=attributes)) is not None


class Normed(nn.Module):
    """`a` writes 6 channels; a norm runs across them; `fc` reads them."""

    def __init__(self, norm):
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)
        self.norm = norm

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.a(x))).mean((2, 3)))


class LastNorm(nn.Module):
    """A layer norm over the channels of every pixel."""

    def __init__(self):
        super().__init__()
        self.inner = nn.LayerNorm(6)

    def forward(self, x):
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)


class Centred(nn.Module):
    """What is left of every pixel without its mean over the channels."""

    def forward(self, x):
        return x - x.mean(1, keepdim=True)


class Scaled(nn.Module):
    """A root-mean-square norm, as in Zhang and Sennrich 2019 (arXiv:1910.07467)."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(6, 1, 1))

    def forward(self, x):
        return x * self.gain / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()


NORMS = {
    "layer": LastNorm,
    "group": lambda: nn.GroupNorm(1, 6),
    "mean": Centred,
    "root mean square": Scaled,
}


class TestNormalised:
    """A norm that runs across a group is, in the reference, over what stays."""

    EXAMPLE = torch.zeros(1, 3, 6, 6)

    @pytest.mark.parametrize("norm", NORMS)
    def test_it_is_refused_unless_asked_for(self, norm):
        structure = analyse(Normed(NORMS[norm]()), self.EXAMPLE)
        assert structure.names == ()
        reasons = {locked.name: locked.reason for locked in structure.locked}
        assert "normalises across it, so that removing is not the same as zeroing" in reasons["a"]
        assert "offered on request, as a normalised group" in reasons["a"]

    @pytest.mark.parametrize("norm", NORMS)
    def test_it_is_proven_when_asked_for(self, norm):
        structure = analyse(Normed(NORMS[norm]()), self.EXAMPLE, normalised=True)
        assert [(group.name, group.size, group.normalised) for group in structure] == [("a", 6, True)]

    @pytest.mark.parametrize("norm", NORMS)
    def test_it_fails_against_plain_zeros(self, norm):
        net = Normed(NORMS[norm]())
        group = found(net, "a", self.EXAMPLE, normalised=True)
        plain = dataclasses.replace(group, normalised=False)
        assert "is not the same as zeroing them" in proof(net, self.EXAMPLE).fault(plain)

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("role", ["read", "written"])
    def test_wrong_positions_are_found(self, norm, role):
        net = Normed(NORMS[norm]())
        group = found(net, "a", self.EXAMPLE, normalised=True)
        parts = [part.tensor for part in group.slices if part.role == role and part.tensor != "a.bias"]
        wrong = only(lambda part: part.tensor == parts[-1], moved(lambda p: p.roll(1, 0)))
        assert proof(net, self.EXAMPLE).fault(group) is None
        assert "is not the same as zeroing them" in proof(net, self.EXAMPLE).fault(with_slices(group, wrong))

    def test_a_layer_norm_over_pixels_too_stops_nothing(self):
        net = Normed(nn.LayerNorm([6, 4, 4]))
        structure = analyse(net, self.EXAMPLE, normalised=True)
        assert {group.name for group in (*structure.groups, *structure.locked)} == {"a", "fc"}

    def test_beside_a_broken_group(self):
        net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        groups = every(net, torch.zeros(1, 3), normalised=True)
        broken = with_slices(groups["2"], only(is_read, moved(lambda p: p.roll(1, 0))))
        assert set(proof(net, torch.zeros(1, 3)).faults([groups["0"], broken])) == {"2"}


class TestHiddenReaders:
    """Networks with a reader that no trace shows, as its input goes through numpy."""

    class Hidden(nn.Module):
        def __init__(self, read):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(4, 2)
            self.other = nn.Linear(6, 2)
            self.read = read

        def forward(self, x):
            features = F.relu(self.a(x))
            return self.fc(self.b(features).mean((2, 3))) + self.read(self, torch.from_numpy(features.numpy()))

    def reasons(self, read):
        structure = analyse(self.Hidden(read), IMAGES)
        assert structure.names == ("b",)
        return {locked.name: locked.reason for locked in structure.locked}

    def test_a_layer_of_fixed_width(self):
        reasons = self.reasons(lambda net, features: net.other(features.mean((2, 3))))
        assert reasons["a"].startswith("the network fails without some of its elements: ")

    def test_an_operator_of_any_width(self):
        reasons = self.reasons(lambda net, features: features.mean((1, 2, 3))[:, None])
        assert reasons["a"].startswith("removing its elements is not the same as zeroing them (outputs differ by ")

    def test_code_that_insists_on_a_width(self):
        def read(net, features):
            if features.shape[1] != 6:
                raise KeyError("six channels, please")
            return 0

        assert "six channels, please" in self.reasons(read)["a"]

    def test_reasons_are_one_line(self):
        def read(net, features):
            if features.shape[1] != 6:
                raise ValueError("six channels\nplease")
            return 0

        assert self.reasons(read)["a"] == "the network fails without some of its elements: six channels"


class TestLimits:
    def test_outputs_that_are_not_numbers_prove_nothing(self):
        net = TinyNet()
        nn.init.constant_(net.fc.bias[:1], float("nan"))
        assert "is not a number, which proves nothing" in proof(net).fault(found(net, "conv1"))

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError()])
    def test_running_out_of_memory_is_no_fault_of_the_group(self, error):
        class Full(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = TinyNet()

            def forward(self, x):
                if self.net.conv1.out_channels < 8:
                    raise error
                return self.net(x)

        net = Full()
        with pytest.raises(type(error)):
            proof(net).fault(found(net, "net.conv1"))

    def test_a_network_that_computes_the_same_twice_is_steady(self):
        class Dice(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 2)

            def forward(self, x):
                return self.fc(F.dropout(x, 0.5))

        assert proof(TinyNet()).steady
        with torch.random.fork_rng(devices=[]):
            assert not proof(Dice(), torch.zeros(1, 4)).steady


def drawn(size, seed):
    """Return the runs in which channels go; the last one repeats the first, where blocks go too."""
    group = Group("a", "channels", size, (), ("a",), ())
    *runs, last = _removals(group, torch.Generator().manual_seed(seed))
    assert last == runs[0]
    return [run for run in runs if run]


class TestRemovals:
    @given(st.integers(2, 200), st.integers(0, 100))
    def test_each_run_removes_some_and_leaves_some(self, size, seed):
        runs = drawn(size, seed)
        assert 2 <= len(runs) <= 4
        assert all(0 < len(set(run)) == len(run) < size for run in runs)

    @given(st.integers(2, 200), st.integers(0, 100))
    def test_every_element_is_removed_and_kept(self, size, seed):
        runs = drawn(size, seed)
        times = [sum(element in run for run in runs) for element in range(size)]
        assert 0 < min(times) <= max(times) < len(runs)

    @given(st.integers(2, 14), st.integers(0, 100))
    def test_any_two_of_a_few_are_told_apart(self, size, seed):
        runs = drawn(size, seed)
        assert len({tuple(element in run for run in runs) for element in range(size)}) == size

    @given(st.integers(15, 200), st.integers(0, 100))
    def test_of_many_at_most_one_in_fourteen_go_alike(self, size, seed):
        runs = drawn(size, seed)
        codes = [tuple(element in run for run in runs) for element in range(size)]
        assert max(codes.count(code) for code in set(codes)) == -(-size // 14)

    def test_a_block_goes_last(self):
        group = Group("a", "blocks", 1, (), ("a",), (), least=0, block="a")
        assert _removals(group, torch.Generator()) == [[], [], [], [], [0]]
