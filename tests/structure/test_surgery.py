import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from autoprune.models import CifarResNet
from autoprune.structure import Structure, analyse, kept_indices, remove, select
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


CASES = {
    "chain": (TinyNet, (1, 8, 8)),
    "residual": (TinyResNet, (1, 8, 8)),
    "bottleneck": (Bottleneck, (3, 4, 4)),
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


class TestKeptIndices:
    def test_only_what_shrinks_is_named(self, structure):
        kept = kept_indices(TinyResNet(), structure, {"conv1": [0, 2], "stem": []})
        norm = [f"bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
        assert set(kept) == {"conv1.weight", *norm, "conv2.weight"}
        assert {dim: indices.tolist() for dim, indices in kept["conv2.weight"].items()} == {1: [1, 3, 4, 5, 6, 7]}

    def test_groups_meet_in_one_tensor(self, structure):
        kept = kept_indices(TinyResNet(), structure, {"conv1": [0], "stem": [1]})
        assert {dim: indices.tolist() for dim, indices in kept["conv1.weight"].items()} == {
            0: [1, 2, 3, 4, 5, 6, 7],
            1: [0, 2, 3, 4, 5, 6, 7],
        }

    def test_order_and_repetition_do_not_matter(self, structure):
        net = TinyResNet()
        one, other = (kept_indices(net, structure, {"conv1": elements}) for elements in ([5, 0], [0, 5, 0]))
        assert list(one) == list(other)
        assert all(torch.equal(one[name][dim], other[name][dim]) for name in one for dim in one[name])

    def test_nothing_removed_is_nothing_named(self, structure):
        assert kept_indices(TinyResNet(), structure, {}) == {}


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
        class Sizes(TorchDispatchMode):
            def __init__(self):
                super().__init__()
                self.largest = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                output = function(*args, **(kwargs or {}))
                if function is not torch.ops.aten.detach.default and isinstance(output, torch.Tensor):
                    self.largest = max(self.largest, output.numel())
                return output

        net = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 2))
        structure = analyse(net, torch.zeros(2, 8))
        kept = kept_indices(net, structure, {"0": list(range(90))})
        with Sizes() as sizes:
            select(net, kept)
        assert sizes.largest == 80

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
        smaller = remove(net, structure, {"stem": [0, 1, 2]})
        assert type(smaller) is TinyResNet
        assert [module.training for module in smaller.modules()] == [module.training for module in net.modules()]
        assert smaller.note == net.note
        assert smaller.note is not net.note
        smaller(torch.zeros(2, 1, 8, 8))
        assert seen == [5]

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
