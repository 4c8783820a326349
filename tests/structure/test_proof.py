import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from autoprune.structure import Group, Slice, analyse
from autoprune.structure.channels import find_channels
from autoprune.structure.proof import Proof, _removals
from autoprune.testing import TinyNet, TinyResNet

IMAGES = torch.zeros(1, 1, 8, 8)


def proof(net, example=IMAGES, seed=0):
    return Proof(net, example, torch.Generator().manual_seed(seed))


def found(net, name, example=IMAGES):
    groups, _ = find_channels(net, example)
    return next(group for group in groups if group.name == name)


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
        groups, _ = find_channels(net, IMAGES)
        judge = proof(net)
        assert [group.name for group in groups if judge.fault(group) is not None] == ["fc"]

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

    def test_a_reader_that_is_called_a_writer(self, group):
        renamed = only(is_read, lambda part: dataclasses.replace(part, role="written"))
        assert "not the same as zeroing" in self.fault(group, renamed)

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


class TestHiddenReaders:
    """Networks with a reader that the dependency graph can't see, as no gradient flows to it."""

    class Hidden(nn.Module):
        def __init__(self, read):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(4, 2)
            self.other = nn.Linear(6, 2)
            self.read = read

        def forward(self, x):
            features = F.relu(self.a(x))
            return self.fc(self.b(features).mean((2, 3))) + self.read(self, features.detach())

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


class TestLimits:
    def test_one_element_is_never_removed(self):
        group = Group("a", "channels", 1, (Slice("a.weight", 0, torch.zeros(1, 1), "written"),), ("a",), ())
        assert proof(TinyNet()).fault(group) == "it has one element only, and a layer is never emptied"

    def test_outputs_that_are_not_numbers_prove_nothing(self):
        net = TinyNet()
        group = found(net, "conv1")
        net.bn2.running_var.fill_(float("nan"))
        assert "outputs differ by nan" in proof(net).fault(group)

    def test_running_out_of_memory_is_no_fault_of_the_group(self):
        net = TinyNet()
        group = found(net, "conv1")
        judge = proof(net)

        def fails(model, replaced=None):
            if replaced is None:
                raise torch.OutOfMemoryError("full")
            return []

        judge._outputs = fails
        with pytest.raises(torch.OutOfMemoryError):
            judge.fault(group)


class TestRemovals:
    @given(st.integers(2, 200), st.integers(0, 100))
    def test_each_run_removes_some_and_leaves_some(self, size, seed):
        runs = _removals(size, torch.Generator().manual_seed(seed))
        assert 2 <= len(runs) <= 5
        assert all(0 < len(set(run)) == len(run) < size for run in runs)

    @given(st.integers(2, 200), st.integers(0, 100))
    def test_every_element_is_removed_and_kept(self, size, seed):
        runs = _removals(size, torch.Generator().manual_seed(seed))
        times = [sum(element in run for run in runs) for element in range(size)]
        assert 0 < min(times) <= max(times) < len(runs)

    @given(st.integers(2, 30), st.integers(0, 100))
    def test_any_two_are_told_apart(self, size, seed):
        runs = _removals(size, torch.Generator().manual_seed(seed))
        assert len({tuple(element in run for run in runs) for element in range(size)}) == size
