import copy
import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from autoprune.errors import StructureError
from autoprune.models import CifarResNet
from autoprune.structure import Cut, Structure, Weakest, add_gradients, analyse, carry_over, cut, plan, remove, surgery
from autoprune.testing import TinyNet, TinyResNet


class Bottleneck(nn.Module):
    """Expands, goes depth-wise, projects back onto its input, and flattens into a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.expand = nn.Conv2d(4, 8, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.act = nn.PReLU(8)
        self.project = nn.Conv2d(8, 4, 1)
        self.up = nn.ConvTranspose2d(4, 5, 2)
        self.fc1 = nn.Linear(5 * 25, 6)
        self.fc2 = nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.project(self.act(self.bn2(self.deep(F.relu6(self.bn1(self.expand(x)))))))
        return self.fc2(F.relu(self.fc1(F.relu(self.up(x)).flatten(1))))


class Branches(nn.Module):
    """Grouped convolutions of three sorts: many groups, normalised in as many, beside few; joined; depth-wise."""

    def __init__(self):
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.many = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.few = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(4, 12)
        self.joined = nn.Conv2d(18, 6, 1)
        self.gain = nn.Parameter(torch.rand(6, 1, 1))
        self.deep = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.fc = nn.Linear(12, 2)

    def forward(self, x):
        many, few = self.norm(self.many(F.relu(self.stem(x)))), F.relu(self.few(F.relu(self.other(x))))
        x = self.joined(torch.cat([many, few], 1)) * self.gain
        return self.fc(self.deep(F.relu(x)).mean((2, 3)))


def weight_normed():
    """A chain whose first layer computes its weight from a direction and a length."""
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 2))


CASES = {
    "chain": (TinyNet, (1, 8, 8)),
    "residual": (TinyResNet, (1, 8, 8)),
    "bottleneck": (Bottleneck, (3, 4, 4)),
    "branches": (Branches, (3, 6, 6)),
    "weight norm": (weight_normed, (3, 6, 6)),
    "option A": (lambda: CifarResNet(1, "pad", 3, 10), (3, 8, 8)),
    "option B": (lambda: CifarResNet(1, "projection", 3, 10), (3, 8, 8)),
}


def randomised(net, seed=0):
    """Give every parameter and statistic another random value, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + (0.5 if tensor.dim() == 1 else -0.5))
    return net.double().eval()


@pytest.fixture(scope="module", params=CASES)
def case(request):
    make, shape = CASES[request.param]
    net = randomised(make())
    return net, analyse(net, torch.zeros(2, *shape, dtype=torch.float64)), shape


@pytest.fixture(scope="module")
def structure():
    return analyse(TinyResNet(), torch.zeros(1, 1, 8, 8))


class TestEquivalence:
    @settings(max_examples=20, deadline=None)
    @given(data=st.data())
    def test_slicing_equals_zeroing_where_elements_are_read(self, case, data):
        net, structure, shape = case
        removed = {g.name: data.draw(st.sets(st.integers(0, g.size - 1), max_size=g.size - 1)) for g in structure}
        inputs = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        zeroed = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        for group in structure:
            for part in group.slices:
                if part.role == "read":
                    for element in removed[group.name]:
                        zeroed[part.tensor].index_fill_(part.dim, part.positions[element], 0.0)
        smaller = remove(net, structure, {name: sorted(elements) for name, elements in removed.items()})
        with torch.no_grad():
            expected = torch.func.functional_call(net, zeroed, (inputs,))
            torch.testing.assert_close(smaller(inputs), expected, rtol=1e-9, atol=1e-9)

    @settings(max_examples=10, deadline=None)
    @given(data=st.data())
    def test_slicing_equals_activations_that_are_zeroed(self, data):
        """As above, but with no use of the positions that the structure gives."""
        net = randomised(TinyResNet())
        structure = analyse(net, torch.zeros(2, 1, 8, 8, dtype=torch.float64))
        removed = {name: sorted(data.draw(st.sets(st.integers(0, 7), max_size=7))) for name in ("stem", "conv1")}
        inputs = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        smaller = remove(net, structure, removed)

        def masking(elements):
            def mask(_, args):
                return (args[0].index_fill(1, torch.tensor(elements, dtype=torch.int64), 0.0),)

            return mask

        readers = {"conv1": "stem", "fc": "stem", "conv2": "conv1"}
        handles = [
            net.get_submodule(reader).register_forward_pre_hook(masking(removed[group]))
            for reader, group in readers.items()
        ]
        with torch.no_grad():
            expected = net(inputs)
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            torch.testing.assert_close(smaller(inputs), expected, rtol=1e-9, atol=1e-9)

    def test_sizes_stand_in_the_modules(self):
        net = Bottleneck()
        structure = analyse(net, torch.zeros(2, 3, 4, 4))
        removed = {"stem": [0], "expand": [1, 2, 3], "up": [4, 0], "fc1": [5]}
        smaller = remove(net, structure, removed)
        assert (smaller.stem.in_channels, smaller.stem.out_channels) == (3, 3)
        assert (smaller.expand.in_channels, smaller.expand.out_channels) == (3, 5)
        assert (smaller.deep.in_channels, smaller.deep.out_channels, smaller.deep.groups) == (5, 5, 5)
        assert (smaller.bn1.num_features, smaller.bn2.num_features, smaller.act.num_parameters) == (5, 5, 5)
        assert (smaller.project.in_channels, smaller.project.out_channels) == (5, 3)
        assert (smaller.up.in_channels, smaller.up.out_channels) == (3, 3)
        assert (smaller.fc1.in_features, smaller.fc1.out_features, smaller.fc2.in_features) == (75, 5, 5)

    def test_the_kept_values_are_the_dense_ones(self):
        net = TinyNet()
        smaller = remove(net, analyse(net, torch.zeros(1, 1, 8, 8)), {"conv1": [0, 3], "conv2": [7]})
        assert torch.equal(smaller.conv1.weight, net.conv1.weight[[1, 2, 4, 5, 6, 7]])
        assert torch.equal(smaller.conv2.weight, net.conv2.weight[:7][:, [1, 2, 4, 5, 6, 7]])
        assert torch.equal(smaller.fc.weight, net.fc.weight[:, :7])
        assert torch.equal(smaller.fc.bias, net.fc.bias)

    def test_padding_shrinks_with_its_channels(self):
        net = CifarResNet(1, "pad", 3, 10)
        structure = analyse(net, torch.zeros(1, 3, 8, 8))
        smaller = remove(net, structure, {"conv1": [0], "layer2.0.conv2": [0, 1], "layer3.0.conv2#2": [3]})
        assert smaller.layer2[0].shortcut.left.numel() == 6
        assert smaller.layer2[0].shortcut.right.numel() == 8
        assert smaller.layer3[0].shortcut.right.numel() == 15
        assert smaller.linear.in_features == 64 - 4

    def test_numbers_that_the_code_reads_shrink(self):
        net = Branches()
        structure = analyse(net, torch.zeros(2, 3, 6, 6))
        assert {group.name: group.size for group in structure} == {"stem": 4, "other": 4, "few": 3, "joined": 6}
        smaller = remove(net, structure, {"stem": [1], "few": [0, 2], "joined": [5, 1]})
        assert (smaller.many.groups, smaller.many.in_channels, smaller.many.out_channels) == (3, 6, 9)
        assert (smaller.norm.num_groups, smaller.norm.num_channels) == (3, 9)
        assert (smaller.few.groups, smaller.few.in_channels, smaller.few.out_channels) == (2, 8, 2)
        assert (smaller.deep.groups, smaller.deep.in_channels, smaller.deep.out_channels) == (4, 4, 8)
        assert smaller.gain.shape == (4, 1, 1)
        assert (net.norm.num_groups, net.deep.groups) == (4, 6)

    def test_a_weight_that_is_computed(self):
        net = weight_normed()
        smaller = remove(net, analyse(net, torch.zeros(1, 3, 6, 6)), {"0": [0, 5]})
        assert (smaller[0].out_channels, smaller[2].in_channels) == (4, 4)
        torch.testing.assert_close(smaller[0].weight, net[0].weight[1:5])
        smaller(torch.rand(1, 3, 6, 6)).sum().backward()

    def test_whole_groups_of_a_convolution_leave(self):
        net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1))
        smaller = remove(net, analyse(net, torch.zeros(1, 3, 6, 6)), {"0": [1]})
        assert (smaller[1].groups, smaller[1].in_channels, smaller[1].out_channels) == (3, 6, 9)
        assert torch.equal(smaller[1].weight, net[1].weight[[0, 1, 2, 6, 7, 8, 9, 10, 11]])


class TestNormalised:
    """By hand: a norm over the elements that stay."""

    KEPT = torch.tensor([0, 2, 3, 5])

    def removed(self, net, example):
        return remove(net, analyse(net, example, normalised=True), {"0": [1, 4]})

    def test_a_layer_norm(self):
        net = randomised(nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)))
        smaller = self.removed(net, torch.zeros(1, 3, dtype=torch.float64))
        assert smaller[1].normalized_shape == (4,)
        x = torch.randn(5, 3, dtype=torch.float64)
        with torch.no_grad():
            inner = net[0](x)[:, self.KEPT]
            inner = F.layer_norm(inner, [4], net[1].weight[self.KEPT], net[1].bias[self.KEPT])
            torch.testing.assert_close(smaller(x), F.linear(inner, net[2].weight[:, self.KEPT], net[2].bias))

    def test_a_group_norm(self):
        net = randomised(nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(1, 6), nn.Conv2d(6, 2, 1)))
        smaller = self.removed(net, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
        assert (smaller[1].num_groups, smaller[1].num_channels) == (1, 4)
        x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
        with torch.no_grad():
            inner = net[0](x)[:, self.KEPT]
            inner = F.group_norm(inner, 1, net[1].weight[self.KEPT], net[1].bias[self.KEPT])
            torch.testing.assert_close(smaller(x), F.conv2d(inner, net[2].weight[:, self.KEPT], net[2].bias))


class TestPlan:
    def test_only_what_shrinks_is_named(self, structure):
        kept = plan(TinyResNet(), structure, {"conv1": [0, 2], "stem": []}).kept
        norm = [f"bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
        assert set(kept) == {"conv1.weight", *norm, "conv2.weight"}
        assert {dim: indices.tolist() for dim, indices in kept["conv2.weight"].items()} == {1: [1, 3, 4, 5, 6, 7]}

    def test_groups_meet_in_one_tensor(self, structure):
        kept = plan(TinyResNet(), structure, {"conv1": [0], "stem": [1]}).kept
        assert {dim: indices.tolist() for dim, indices in kept["conv1.weight"].items()} == {
            0: [1, 2, 3, 4, 5, 6, 7],
            1: [0, 2, 3, 4, 5, 6, 7],
        }

    def test_order_and_repetition_do_not_matter(self, structure):
        net = TinyResNet()
        choices = ([5, 0], [0, 5, 0], torch.tensor([5, 0]))
        one, *others = (plan(net, structure, {"conv1": elements}).kept for elements in choices)
        for other in others:
            assert list(one) == list(other)
            assert all(torch.equal(one[name][dim], other[name][dim]) for name in one for dim in one[name])

    def test_nothing_removed_is_nothing_named(self, structure):
        change = plan(TinyResNet(), structure, {})
        assert (change.kept, change.attributes, change.blocks, change.zeroed) == ({}, {}, (), {})

    def test_attributes_get_their_new_value(self):
        net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1))
        structure = analyse(net, torch.zeros(1, 3, 6, 6))
        assert plan(net, structure, {"0": [1, 4, 7]}).attributes == {"1": {"groups": 5}}

    def test_groups_share_an_attribute(self):
        """As many as all of them leave, whatever their order."""
        net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1))
        (group,) = analyse(net, torch.zeros(1, 3, 6, 6)).groups
        halves = [half_of(group, name, rows) for name, rows in (("low", range(4)), ("high", range(4, 8)))]
        change = plan(net, Structure(tuple(halves)), {"low": [1], "high": [0, 2]})
        assert change.attributes == {"1": {"groups": 5}}
        assert change.kept["2.weight"][1].tolist() == [0, 2, 3, 5, 7]

    def test_weights_that_become_zero(self):
        net = TinyNet()
        structure = analyse(net, torch.zeros(1, 1, 8, 8), kinds=("channels", "weights"))
        saliency = torch.arange(80.0).view(10, 8)
        change = plan(net, structure, {"fc:weights": Weakest(7, saliency), "conv1:weights": Weakest(0, saliency)})
        assert set(change.zeroed) == {"fc.weight"}
        assert change.zeroed["fc.weight"].flatten().nonzero().flatten().tolist() == list(range(7))

    def test_channels_go_first_and_then_weights_of_what_is_left(self):
        """Half of the 80 weights go: half of the 60 that are left, and the weakest of those."""
        net = TinyNet()
        structure = analyse(net, torch.zeros(1, 1, 8, 8), kinds=("channels", "weights"))
        saliency = torch.arange(80.0).view(10, 8)
        removed = {"fc:weights": Weakest(40, saliency), "conv2": [0, 3]}
        change = plan(net, structure, removed)
        assert change.zeroed["fc.weight"].shape == (10, 6)
        assert change.zeroed["fc.weight"].flatten().nonzero().flatten().tolist() == list(range(30))
        smaller = cut(net, change)
        left = net.fc.weight[:, [1, 2, 4, 5, 6, 7]].detach().clone()
        left.view(-1)[:30] = 0
        assert torch.equal(smaller.fc.weight, left)

    def test_two_patterns_of_one_tensor(self):
        net = TinyNet()
        kinds = [analyse(net, torch.zeros(1, 1, 8, 8), kinds=(kind,)) for kind in ("weights", "2:4")]
        structure = Structure(tuple(group for found in kinds for group in found))
        saliency = torch.arange(80.0).view(10, 8)
        removed = {"fc:weights": Weakest(8, saliency), "fc:2:4": Weakest(2, saliency)}
        gone = plan(net, structure, removed).zeroed["fc.weight"]
        assert gone[0].all()
        assert gone[1:].tolist() == [[True, True, False, False] * 2] * 9


def half_of(group, name, rows):
    slices = [dataclasses.replace(part, positions=part.positions[list(rows)]) for part in group.slices]
    return dataclasses.replace(group, name=name, size=len(rows), slices=tuple(slices))


class TestRecord:
    CHANGE = Cut(
        {"a.weight": {0: torch.tensor([0, 2]), 1: torch.tensor([1])}, "a.bias": {0: torch.tensor([0, 2])}},
        {"a": {"groups": 2, "heads": 3}},
        ("layer1.0",),
        {"b.weight": torch.tensor([[True, False]])},
    )

    def test_there_and_back_through_json(self):
        again = Cut.from_dict(json.loads(json.dumps(self.CHANGE.to_dict())))
        assert again.to_dict() == {**self.CHANGE.to_dict(), "zeroed": []}
        assert torch.equal(again.kept["a.weight"][1], torch.tensor([1]))
        assert again.kept["a.bias"][0].dtype == torch.int64
        assert (again.attributes, again.blocks) == (self.CHANGE.attributes, self.CHANGE.blocks)

    def test_of_zeros_only_the_names(self):
        assert self.CHANGE.to_dict()["zeroed"] == ["b.weight"]

    def test_it_builds_the_same_network(self, case):
        net, structure, _ = case
        change = plan(net, structure, {group.name: [0] for group in structure})
        again = cut(net, Cut.from_dict(json.loads(json.dumps(change.to_dict()))))
        expected = cut(net, change)
        assert repr(again) == repr(expected)
        for name, tensor in expected.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name


class Sizes(TorchDispatchMode):
    """Sees the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is not torch.ops.aten.detach.default and isinstance(output, torch.Tensor):
            self.largest = max(self.largest, output.numel())
        return output


class TestCopy:
    def test_the_network_is_not_changed(self, structure):
        net = TinyResNet()
        net.fc.weight.grad = torch.ones(10, 8)
        before = {name: (tensor, tensor.clone()) for name, tensor in net.state_dict(keep_vars=True).items()}
        remove(net, structure, {"stem": [0], "conv1": [1, 2]})
        after = net.state_dict(keep_vars=True)
        assert all(after[name] is tensor and torch.equal(tensor, values) for name, (tensor, values) in before.items())
        assert torch.equal(net.fc.weight.grad, torch.ones(10, 8))
        assert (net.conv1.out_channels, net.bn0.num_features) == (8, 8)

    @pytest.mark.parametrize("removed", [{}, {"stem": [0], "conv1": [1, 2]}])
    def test_it_shares_no_memory(self, structure, removed):
        def storages(model):
            return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

        net = TinyResNet()
        smaller = remove(net, structure, removed)
        assert storages(net) & storages(smaller) == set()
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in smaller.state_dict().values())

    def test_dense_tensors_are_never_copied(self):
        net = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 2))
        structure = analyse(net, torch.zeros(2, 8))
        change = plan(net, structure, {"0": list(range(90))})
        with Sizes() as sizes:
            cut(net, change)
        assert sizes.largest == 80

    def test_nothing_of_a_block_that_goes_is_copied(self):
        inner = nn.Sequential(nn.Linear(2, 100), nn.Linear(100, 2))
        net = nn.Sequential(nn.Linear(8, 2), nn.Sequential(inner, nn.ReLU()), nn.Linear(2, 2))
        with Sizes() as sizes:
            cut(net, Cut(blocks=("1",)))
        assert sizes.largest == 16

    def test_what_belongs_to_a_tensor_stays(self, structure):
        net = TinyResNet().half()
        net.bn0.double()
        net.conv1.weight.requires_grad_(False)
        net.register_buffer("extra", torch.arange(3), persistent=False)
        smaller = remove(net, structure, {"stem": [0], "conv1": [1, 2]})
        assert [name for name, _ in smaller.named_parameters()] == [name for name, _ in net.named_parameters()]
        assert list(smaller.state_dict()) == list(net.state_dict())
        assert torch.equal(smaller.extra, net.extra)
        for (name, small), dense in zip(smaller.named_parameters(), net.parameters(), strict=True):
            assert isinstance(small, nn.Parameter)
            assert (small.dtype, small.requires_grad) == (dense.dtype, dense.requires_grad), name
            assert small.is_leaf
            assert small.grad is None
        assert smaller.bn0.running_mean.dtype == torch.float64
        assert smaller.bn0.num_batches_tracked.dtype == torch.int64

    def test_what_belongs_to_a_module_stays(self, structure):
        net = TinyResNet().train()
        net.bn1.eval()
        net.note = {"of": "the user"}
        seen = []
        net.fc.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
        net.fc.register_forward_pre_hook(lambda module, args: seen.append(len(args)))
        net.conv1.register_full_backward_hook(lambda module, given, received: seen.append(received[0].shape[1]))
        smaller = remove(net, structure, {"stem": [0, 1, 2]})
        assert type(smaller) is TinyResNet
        assert [module.training for module in smaller.modules()] == [module.training for module in net.modules()]
        assert smaller.note == net.note
        assert smaller.note is not net.note
        smaller(torch.rand(2, 1, 8, 8)).sum().backward()
        assert seen == [1, 5, 8]

    def test_shared_parameters_stay_shared(self):
        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.fc = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 5)
                self.fc.weight = self.b.weight

            def forward(self, x):
                x = F.relu(self.a(x))
                return self.b(x) + self.fc(-x)

        net = Shared()
        structure = analyse(net, torch.zeros(2, 4))
        assert structure.names == ("a",)
        smaller = remove(net, structure, {"a": [0, 4]})
        assert smaller.fc.weight is smaller.b.weight
        assert smaller.b.weight is not net.b.weight
        assert (smaller.b.in_features, smaller.fc.in_features) == (4, 4)
        assert torch.equal(smaller.fc.weight, net.fc.weight[:, [1, 2, 3, 5]])

    def test_it_can_be_trained(self, structure):
        smaller = remove(TinyResNet(), structure, {"stem": [0, 1, 2], "conv1": [0]})
        smaller(torch.randn(2, 1, 8, 8)).sum().backward()
        assert all(parameter.grad is not None for parameter in smaller.parameters())

    def test_it_can_be_cut_again(self, structure):
        smaller = remove(TinyResNet(), structure, {"stem": [0, 1, 2]})
        again = analyse(smaller, torch.zeros(2, 1, 8, 8))
        assert again["stem"].size == 5
        assert remove(smaller, again, {"stem": [0]}).fc.in_features == 4

    def test_an_empty_structure_cuts_nothing(self):
        net = TinyNet()
        same = remove(net, Structure(()), {})
        assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in net.state_dict().items())

    def test_the_network_itself_can_not_go(self):
        with pytest.raises(StructureError, match="the network as a whole can't be replaced by the identity"):
            cut(TinyNet(), Cut(blocks=("",)))


class Deep(nn.Module):
    """A residual block that can go, between two layers that can shrink."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return x + self.inner(x)

    def __init__(self):
        super().__init__()
        self.a, self.block, self.b, self.fc = nn.Linear(4, 6), self.Block(), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(F.relu(self.b(self.block(F.relu(self.a(x))))))


OPTIMIZERS = {
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5, centered=True),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
}


def step(net, optimizer, seed=0):
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    net(inputs).square().sum().backward()
    optimizer.step()


class TestCarryOver:
    """The optimizer goes on with the state of what is left."""

    KEPT = torch.tensor([0, 2, 4, 5])
    REMOVED = {"b": [1, 3, 6, 7]}  # noqa: RUF012 - never changed

    def trained(self, make, net=None):
        net = net or Deep()
        optimizer = make(net.parameters())
        for seed in range(3):
            step(net, optimizer, seed)
        return net, optimizer

    def change(self, net, removed=None):
        structure = analyse(net, torch.zeros(1, 4), kinds=("channels", "blocks", "weights"))
        return plan(net, structure, removed or self.REMOVED)

    @pytest.mark.parametrize(
        ("name", "keys"),
        [
            ("SGD with momentum", ["momentum_buffer"]),
            ("Adam", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
            ("RMSprop", ["square_avg", "momentum_buffer", "grad_avg"]),
        ],
    )
    def test_sliced_by_hand(self, name, keys):
        net, optimizer = self.trained(OPTIMIZERS[name])
        change = self.change(net)
        smaller = cut(net, change)
        carried = carry_over(optimizer, net, smaller, change)
        order = [name for name, _ in smaller.named_parameters()]
        dense = {name: optimizer.state[parameter] for name, parameter in net.named_parameters()}
        small = {name: carried["state"][number] for number, name in enumerate(order)}
        for key in keys:
            assert torch.equal(small["b.weight"][key], dense["b.weight"][key][self.KEPT])
            assert torch.equal(small["b.bias"][key], dense["b.bias"][key][self.KEPT])
            assert torch.equal(small["fc.weight"][key], dense["fc.weight"][key][:, self.KEPT])
            assert torch.equal(small["a.weight"][key], dense["a.weight"][key])
            assert small["a.weight"][key].data_ptr() != dense["a.weight"][key].data_ptr()
        if name == "Adam":
            assert {float(state["step"]) for state in small.values()} == {3.0}

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_it_loads_and_training_goes_on(self, name):
        net, optimizer = self.trained(OPTIMIZERS[name])
        change = self.change(net)
        smaller = cut(net, change)
        fresh = OPTIMIZERS[name](smaller.parameters())
        fresh.load_state_dict(carry_over(optimizer, net, smaller, change))
        for number, parameter in enumerate(smaller.parameters()):
            state = fresh.state[parameter]
            assert all(v.dim() == 0 or v.dim() == parameter.dim() for v in state.values() if v is not None), number
        before = [parameter.detach().clone() for parameter in smaller.parameters()]
        step(smaller, fresh)
        assert all(not torch.equal(p, old) for p, old in zip(smaller.parameters(), before, strict=True))

    @pytest.mark.parametrize("name", ["SGD with momentum", "Adam", "AdamW", "RMSprop"])
    def test_a_step_is_the_dense_step_of_what_is_left(self, name):
        """Where what goes had no effect, the dense network's next step and the small network's are the same."""
        net = Deep()
        with torch.no_grad():
            for tensor, dim in ((net.b.weight, 0), (net.b.bias, 0), (net.fc.weight, 1)):
                tensor.index_fill_(dim, torch.tensor(self.REMOVED["b"]), 0.0)
        net, optimizer = self.trained(OPTIMIZERS[name], net)
        change = self.change(net)
        smaller = cut(net, change)
        fresh = OPTIMIZERS[name](smaller.parameters())
        fresh.load_state_dict(carry_over(optimizer, net, smaller, change))
        step(net, optimizer, 7)
        step(smaller, fresh, 7)
        expected = cut(net, change)
        for (key, small), dense in zip(smaller.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(small, dense, rtol=1e-5, atol=1e-6, msg=key)

    def test_a_blocks_parameters_are_left_out(self):
        net, optimizer = self.trained(OPTIMIZERS["Adam"])
        change = self.change(net, {"block": [0], **self.REMOVED})
        smaller = cut(net, change)
        carried = carry_over(optimizer, net, smaller, change)
        order = [name for name, _ in smaller.named_parameters()]
        assert order == ["a.weight", "a.bias", "b.weight", "b.bias", "fc.weight", "fc.bias"]
        assert carried["param_groups"][0]["params"] == list(carried["state"]) == list(range(6))
        dense = optimizer.state[net.fc.weight]["exp_avg"]
        assert torch.equal(carried["state"][4]["exp_avg"], dense[:, self.KEPT])
        fresh = OPTIMIZERS["Adam"](smaller.parameters())
        fresh.load_state_dict(carried)
        step(smaller, fresh)

    def test_what_a_block_shares_with_another_layer_stays(self):
        net = Deep()
        net.late = nn.Linear(6, 6)
        net.late.weight = net.block.inner.weight
        net.forward = lambda x: net.fc(F.relu(net.b(net.late(net.block(F.relu(net.a(x)))))))
        optimizer = OPTIMIZERS["SGD with momentum"](net.parameters())
        net.block.inner.weight.grad = torch.ones(6, 6)
        optimizer.step()
        change = Cut(blocks=("block",))
        smaller = cut(net, change)
        carried = carry_over(optimizer, net, smaller, change)
        places = [number for number, (name, _) in enumerate(smaller.named_parameters()) if name == "late.weight"]
        assert len(carried["param_groups"][0]["params"]) == len(list(smaller.parameters()))
        assert len(places) == 1
        assert [carried["state"][n]["momentum_buffer"].shape for n in carried["state"]] == [(6, 6)]

    def test_weights_that_are_zeroed_have_no_momentum(self):
        net, optimizer = self.trained(OPTIMIZERS["Adam"])
        change = self.change(net, {"fc:weights": Weakest(5, torch.arange(16.0).view(2, 8))})
        carried = carry_over(optimizer, net, cut(net, change), change)
        number = [name for name, _ in net.named_parameters()].index("fc.weight")
        momentum = carried["state"][number]["exp_avg"]
        expected = optimizer.state[net.fc.weight]["exp_avg"].clone()
        expected.view(-1)[:5] = 0
        assert torch.equal(momentum, expected)

    def test_groups_of_parameters_keep_their_settings(self):
        net = Deep()
        named = dict(net.named_parameters())
        biases = [(name, p) for name, p in named.items() if name.endswith("bias")]
        weights = [(name, p) for name, p in named.items() if not name.endswith("bias")]
        optimizer = torch.optim.SGD(
            [{"params": weights, "weight_decay": 0.5}, {"params": biases, "lr": 0.25}], lr=0.1, momentum=0.9
        )
        step(net, optimizer)
        change = self.change(net, {"block": [0]})
        groups = carry_over(optimizer, net, cut(net, change), change)["param_groups"]
        assert [group["params"] for group in groups] == [[0, 1, 2], [3, 4, 5]]
        assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.5, 0.1), (0, 0.25)]
        assert groups[0]["param_names"] == ["a.weight", "b.weight", "fc.weight"]

    def test_nothing_is_carried_before_the_first_step(self):
        net = Deep()
        optimizer = OPTIMIZERS["Adam"](net.parameters())
        change = self.change(net)
        assert carry_over(optimizer, net, cut(net, change), change)["state"] == {}

    def test_the_optimizer_is_not_changed(self):
        net, optimizer = self.trained(OPTIMIZERS["Adam"])
        before = copy.deepcopy(optimizer.state_dict())
        change = self.change(net)
        carry_over(optimizer, net, cut(net, change), change)["state"][0]["exp_avg"].fill_(7.0)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for number, state in before["state"].items():
            assert all(torch.equal(value, after["state"][number][key]) for key, value in state.items())

    def test_numbers_that_nobody_knows_are_refused(self):
        net = Deep()
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=2)

        def closure():
            optimizer.zero_grad()
            loss = net(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        change = self.change(net)
        with pytest.raises(
            StructureError, match=r"what of them belongs to what is not known; start .* afresh"
        ) as caught:
            carry_over(optimizer, net, cut(net, change), change)
        assert "\n" not in str(caught.value)

    def test_another_networks_optimizer_is_refused(self):
        net = Deep()
        change = self.change(net)
        with pytest.raises(StructureError, match="the optimizer holds a parameter that is not the network's"):
            carry_over(OPTIMIZERS["Adam"](Deep().parameters()), net, cut(net, change), change)


class TestAddGradients:
    """The gradients of a small network are those of the dense one with what went zeroed where it is read."""

    KEPT = torch.tensor([0, 2, 4, 5])
    REMOVED = {"b": [1, 3, 6, 7]}  # noqa: RUF012 - never changed

    @settings(max_examples=8, deadline=None)
    @given(data=st.data())
    def test_they_are_those_of_the_masked_network(self, case, data):
        net, structure, shape = case
        net = copy.deepcopy(net).train()
        removed = {g.name: data.draw(st.sets(st.integers(0, g.size - 1), max_size=g.size - 1)) for g in structure}
        inputs = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        masks = {name: torch.ones_like(parameter) for name, parameter in net.named_parameters()}
        for group in structure:
            for part in group.slices:
                if part.role == "read":
                    for element in removed[group.name]:
                        masks[part.tensor].index_fill_(part.dim, part.positions[element], 0.0)
        masked = {name: parameter * masks[name] for name, parameter in net.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
        target = torch.randn(3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        outputs = torch.func.functional_call(net, masked | buffers, (inputs,))
        wanted = torch.autograd.grad((outputs - target).square().sum(), list(net.parameters()), allow_unused=True)
        change = plan(net, structure, {name: sorted(elements) for name, elements in removed.items()})
        smaller = cut(net, change)
        (smaller(inputs) - target).square().sum().backward()
        add_gradients(net, smaller, change)
        for (name, parameter), gradient in zip(net.named_parameters(), wanted, strict=True):
            expected = torch.zeros_like(parameter) if gradient is None else gradient
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9, msg=name)

    def change(self, net, removed=None):
        structure = analyse(net, torch.zeros(1, 4), kinds=("channels", "blocks", "weights"))
        return plan(net, structure, removed or self.REMOVED)

    def scattered(self, net, removed=None):
        """Cut, give every parameter of the small network the gradient 1, 2, ..., and add these up."""
        change = self.change(net, removed)
        smaller = cut(net, change)
        for parameter in smaller.parameters():
            parameter.grad = torch.arange(1.0, 1 + parameter.numel()).view_as(parameter)
        add_gradients(net, smaller, change)
        return change

    def test_by_hand(self):
        net = Deep()
        net.fc.weight.grad = torch.full((2, 8), 10.0)
        self.scattered(net)
        assert net.b.bias.grad.tolist() == [1, 0, 2, 0, 3, 4, 0, 0]
        assert net.fc.weight.grad.tolist() == [[11, 10, 12, 10, 13, 14, 10, 10], [15, 10, 16, 10, 17, 18, 10, 10]]
        assert net.b.weight.grad[self.KEPT].tolist() == torch.arange(1.0, 25.0).view(4, 6).tolist()
        assert net.b.weight.grad.count_nonzero() == 24
        assert net.a.bias.grad.tolist() == [1, 2, 3, 4, 5, 6]

    def test_rows_and_columns_of_one_tensor_in_any_layout(self):
        net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 2), nn.Conv2d(4, 2, 1))
        net.to(memory_format=torch.channels_last)
        structure = analyse(net, torch.zeros(1, 2, 4, 4))
        change = plan(net, structure, {"0": [1], "1": [0, 3]})
        smaller = cut(net, change)
        gradient = torch.arange(1.0, 17.0).view(2, 2, 2, 2)
        smaller[1].weight.grad = gradient
        add_gradients(net, smaller, change)
        assert torch.equal(net[1].weight.grad[1:3][:, [0, 2]], gradient)
        assert net[1].weight.grad.count_nonzero() == 16
        assert net[0].weight.grad is None  # it had none in the small network

    def test_frozen_parameters_get_none(self):
        net = Deep()
        net.a.requires_grad_(False)
        change = self.change(net)
        smaller = cut(net, change)
        smaller(torch.ones(1, 4)).sum().backward()
        add_gradients(net, smaller, change)
        assert net.a.weight.grad is net.a.bias.grad is None
        assert net.b.weight.grad is not None

    def test_weights_that_are_zeroed_add_nothing(self):
        net = Deep()
        saliency = torch.arange(48.0).view(8, 6)
        change = self.scattered(net, {"b:weights": Weakest(20, saliency), **self.REMOVED})
        zeroed = change.zeroed["b.weight"]
        assert zeroed.sum() == 10  # of 24 that are left
        expected = torch.arange(1.0, 25.0).view(4, 6).masked_fill(zeroed, 0.0)
        assert torch.equal(net.b.weight.grad[self.KEPT], expected)
        assert net.b.weight.grad.count_nonzero() == 14

    def test_a_block_that_went_adds_nothing(self):
        net = Deep()
        self.scattered(net, {"block": [0], **self.REMOVED})
        assert net.block.inner.weight.grad is None
        assert net.b.bias.grad.tolist() == [1, 0, 2, 0, 3, 4, 0, 0]

    def test_what_a_block_shares_with_another_layer_is_added(self):
        net = Deep()
        net.late = nn.Linear(6, 6)
        net.late.weight = net.block.inner.weight
        change = Cut(blocks=("block",))
        smaller = cut(net, change)
        smaller.late.weight.grad = torch.arange(36.0).view(6, 6)
        add_gradients(net, smaller, change)
        assert torch.equal(net.block.inner.weight.grad, smaller.late.weight.grad)

    def test_a_parameter_that_is_used_twice_is_added_once(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
        net[2].weight = net[0].weight
        change = Cut()
        smaller = cut(net, change)
        inputs = torch.randn(5, 4)
        smaller(inputs).square().sum().backward()
        add_gradients(net, smaller, change)
        scattered = [parameter.grad.clone() for parameter in net.parameters()]
        net.zero_grad()
        net(inputs).square().sum().backward()
        assert all(torch.equal(p.grad, found) for p, found in zip(net.parameters(), scattered, strict=True))


class TestSelection:
    @pytest.mark.parametrize("on_the_way", [1, 200, 1 << 20])
    @pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
    def test_rows_and_columns_some_at_a_time_are_those_at_once(self, monkeypatch, on_the_way, dims):
        monkeypatch.setattr(surgery, "_ON_THE_WAY", on_the_way)
        tensor = torch.arange(10 * 6 * 3.0).reshape(10, 6, 3)
        kept = {0: torch.tensor([0, 3, 4, 9]), 1: torch.tensor([1, 5]), 2: torch.tensor([0, 2])}
        expected = tensor
        for dim in dims:
            expected = expected.index_select(dim, kept[dim])
        assert torch.equal(surgery._selected(tensor, {dim: kept[dim] for dim in dims}), expected)

    @pytest.mark.parametrize("on_the_way", [1, 1 << 20])
    @pytest.mark.parametrize("dims", [(0,), (1,), (0, 1), (0, 1, 3)])
    def test_the_memory_layout_stays(self, monkeypatch, on_the_way, dims):
        monkeypatch.setattr(surgery, "_ON_THE_WAY", on_the_way)
        tensor = torch.arange(6 * 4 * 3 * 2.0).reshape(6, 4, 3, 2)
        kept = {dim: torch.arange(0, tensor.shape[dim], 2) for dim in dims}
        last = surgery._selected(tensor.to(memory_format=torch.channels_last), kept)
        assert torch.equal(last, surgery._selected(tensor, kept))
        assert last.is_contiguous(memory_format=torch.channels_last)

    def test_a_network_that_lies_channels_last_is_cut_to_one(self):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)).to(memory_format=torch.channels_last)
        structure = analyse(net, torch.randn(1, 3, 8, 8))
        smaller = cut(net, plan(net, structure, {structure.groups[0].name: [1, 4]}))
        assert smaller[0].weight.shape == (6, 3, 3, 3)
        assert smaller[2].weight.shape == (6, 6, 3, 3)
        for layer in (smaller[0], smaller[2]):
            assert layer.weight.is_contiguous(memory_format=torch.channels_last)

    def test_building_takes_the_candidate_s_tensors_and_a_megabyte(self):
        net = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 4))
        structure = analyse(net, torch.randn(2, 64))
        change = plan(net, structure, {group.name: range(group.size // 2) for group in structure.groups})
        candidate = cut(net, change)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            cut(net, change)
        changes = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        tensors = sum(p.numel() * p.element_size() for p in candidate.parameters())
        assert tensors <= max(itertools.accumulate(changes)) <= tensors + (1 << 20)
