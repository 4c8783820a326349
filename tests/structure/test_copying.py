"""Copying: what `copy.deepcopy` makes of a network, for networks of every make."""

import copy

import pytest
import torch
from torch import nn

from autoprune.models import build
from autoprune.structure.copying import copied
from autoprune.testing import TinyResNet


def hooked():
    net = TinyResNet()
    net.fc.register_forward_hook(print)
    net.stem.register_forward_pre_hook(print)
    net.register_buffer("extra", torch.arange(3), persistent=False)
    return net


def shared():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    net.add_module("again", net[2])
    return net


def strange_attributes():
    net = TinyResNet()
    net.note = {"of": ["the user", torch.ones(2)], "layer": net.conv1}
    net.pair = (1, net.conv2, "text")
    net.itself = [net]
    net.cache = {net.fc: net.fc.weight}
    return net


class OwnCopy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.copies = 0

    def forward(self, x):
        return self.fc(x)

    def __deepcopy__(self, memo):
        new = OwnCopy()
        new.copies = self.copies + 1
        return new


def own_state():
    class State(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.copies = nn.Linear(2, 2), 0

        def __getstate__(self):
            return {**self.__dict__, "copies": self.copies + 1}

    return nn.Sequential(State(), nn.Linear(2, 2))


def parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))


def parts():
    parts = {"list": nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])}
    parts |= {"dict": nn.ModuleDict({"a": nn.Linear(2, 2)}), "tensors": nn.ParameterList([torch.ones(2)])}
    parts |= {"gru": nn.GRU(2, 3), "attention": nn.MultiheadAttention(4, 2)}
    net = nn.Module()
    for name, part in parts.items():
        net.add_module(name, part)
    return net


NETWORKS = {
    "resnet20": lambda: build("resnet20"),
    "hooks": hooked,
    "shared": shared,
    "strange attributes": strange_attributes,
    "own state": own_state,
    "parametrized": parametrized,
    "lists": parts,
}


def described(net):
    """Return what can be told of a network without running it."""
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    numbers: dict[int, int] = {}
    for _, tensor in tensors:
        numbers.setdefault(id(tensor), len(numbers))
    return {
        "text": repr(net),
        "types": [(name, type(module)) for name, module in net.named_modules(remove_duplicate=False)],
        "modes": [module.training for module in net.modules()],
        "keys": [sorted(module.__dict__) for module in net.modules()],
        "hooks": [(list(m._forward_hooks.values()), list(m._forward_pre_hooks.values())) for m in net.modules()],
        "tensors": [(name, type(t), t.requires_grad, numbers[id(t)]) for name, t in tensors],
        "numbers": [getattr(module, "copies", None) for module in net.modules()],
    }


class TestAsDeepcopy:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_it_is_the_same(self, name):
        net = NETWORKS[name]().train()
        new, expected = copied(net, {}), copy.deepcopy(net)
        assert described(new) == described(expected)
        for (key, tensor), other in zip(new.state_dict().items(), expected.state_dict().values(), strict=True):
            assert torch.equal(tensor, other), key

    @pytest.mark.parametrize("name", NETWORKS)
    def test_nothing_is_shared_with_the_original(self, name):
        net = NETWORKS[name]()
        new = copied(net, {})
        assert {id(module) for module in net.modules()}.isdisjoint(id(module) for module in new.modules())
        memory = {tensor.data_ptr() for tensor in net.state_dict().values()}
        assert memory.isdisjoint(tensor.data_ptr() for tensor in new.state_dict().values())
        for old, other in zip(net.modules(), new.modules(), strict=True):
            for key in ("_modules", "_parameters", "_buffers", "_forward_hooks"):
                assert getattr(old, key) is not getattr(other, key)

    def test_a_class_may_have_its_own_way(self):
        new = copied(nn.Sequential(OwnCopy(), nn.Linear(2, 2)), {})
        assert new[0].copies == 1

    def test_tensors_that_are_plain_attributes(self):
        net = nn.ReLU()
        net.levels, net.empty = torch.arange(3.0), torch.zeros(0)
        new = copied(net, {})
        assert torch.equal(new.levels, net.levels)
        assert new.levels is not net.levels
        assert new.empty.shape == (0,)

    def test_references_within_lead_to_the_copy(self):
        new = copied(strange_attributes(), {})
        assert new.note["layer"] is new.conv1
        assert new.pair[1] is new.conv2
        assert new.itself[0] is new
        assert list(new.cache) == [new.fc]
        assert new.cache[new.fc] is new.fc.weight

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_it_draws_nothing(self):
        with torch.random.fork_rng(devices=[]):
            net = TinyResNet()
        copied(net, {})


class TestMemo:
    def test_what_stands_for_a_tensor_or_a_module(self):
        net = TinyResNet()
        weight, module = nn.Parameter(torch.ones(3)), nn.Identity()
        new = copied(net, {id(net.fc.weight): weight, id(net.bn1): module})
        assert new.fc.weight is weight
        assert new.bn1 is module
        assert torch.equal(new.conv1.weight, net.conv1.weight)

    def test_what_only_a_replaced_module_holds_is_not_copied(self):
        class NotCopied(nn.Module):
            def __deepcopy__(self, memo):
                raise AssertionError("copied")

        inner = NotCopied()
        net = nn.Sequential(nn.Sequential(inner, nn.Linear(2, 2)), nn.ReLU())
        new = copied(net, {id(net[0]): nn.Identity()})
        assert isinstance(new[0], nn.Identity)
        net.add_module("late", inner)
        with pytest.raises(AssertionError, match="copied"):
            copied(net, {id(net[0]): nn.Identity()})
