"""What a network can be called with, and how inputs are changed as a whole."""

import pytest
import torch
from torch import nn

from autoprune.inputs import call, each_tensor, evaluating, first_sample


class Echo(nn.Module):
    """Returns what it is called with."""

    def forward(self, *args, **kwargs):
        return args, kwargs


ONE, TWO = torch.arange(6).reshape(3, 2), torch.ones(3)


class TestCall:
    @pytest.mark.parametrize(
        ("inputs", "args", "kwargs"),
        [
            (ONE, (ONE,), {}),
            ((ONE, TWO), (ONE, TWO), {}),
            ({"x": ONE, "y": TWO}, (), {"x": ONE, "y": TWO}),
            ([ONE, TWO], ([ONE, TWO],), {}),
            ((ONE, None), (ONE, None), {}),
            (({"x": ONE},), ({"x": ONE},), {}),
            ((), (), {}),
        ],
        ids=["tensor", "tuple", "mapping", "list", "with None", "mapping as one argument", "nothing"],
    )
    def test_tuples_are_positional_and_mappings_are_keywords(self, inputs, args, kwargs):
        assert call(Echo(), inputs) == (args, kwargs)

    def test_hooks_run(self):
        net, seen = Echo(), []
        net.register_forward_hook(lambda module, args, output: seen.append(len(args)))
        call(net, (ONE, TWO))
        assert seen == [2]


class TestEachTensor:
    def test_structure_stays(self):
        inputs = {"a": ONE, "b": [TWO, "text", None], "c": (1, TWO)}
        changed = each_tensor(inputs, lambda tensor: tensor.shape)
        assert changed == {"a": (3, 2), "b": [(3,), "text", None], "c": (1, (3,))}

    def test_a_tensor_alone(self):
        assert torch.equal(each_tensor(TWO, lambda tensor: tensor + 1), TWO + 1)


class TestFirstSample:
    def test_every_tensor_has_one(self):
        first = first_sample({"a": ONE, "b": (TWO, None)})
        assert torch.equal(first["a"], ONE[:1])
        assert torch.equal(first["b"][0], TWO[:1])
        assert first["b"][1] is None

    def test_what_is_not_as_long_as_the_batch_is_for_all_samples(self):
        mask, mean = torch.ones(2, 2), torch.tensor(0.5)
        first = first_sample((mean, ONE, mask, TWO))
        assert [tuple(tensor.shape) for tensor in first] == [(), (1, 2), (2, 2), (1,)]

    def test_numbers_have_no_samples(self):
        assert first_sample((torch.tensor(5.0), 3)) == (torch.tensor(5.0), 3)

    def test_the_input_is_not_copied(self):
        assert first_sample(ONE).data_ptr() == ONE.data_ptr()


class TestEvaluating:
    def test_modes_come_back_also_after_an_error(self):
        net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
        net[1].eval()
        seen = []

        def run():
            with evaluating(net):
                seen.extend(module.training for module in net.modules())
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run()
        assert not any(seen)
        assert [module.training for module in net.modules()] == [True, True, False, False]
