"""Batch-norm recalibration: exact statistics, and nothing else touched."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from autoprune.finetuning import recalibrate

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

Batch = tuple[Tensor, Tensor]


def split(values: Tensor, sizes: Sequence[int]) -> list[Batch]:
    return [(part, torch.zeros(len(part))) for part in values.split(list(sizes))]


def images(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 + 2 * torch.randn(n, 2, 3, 3, generator=generator) * torch.tensor([1.0, 4.0]).view(1, 2, 1, 1)


def test_one_batch_gives_exactly_its_mean_and_variance() -> None:
    norm, values = nn.BatchNorm2d(2), images(50)
    norm.running_mean = torch.tensor([100.0, -7.0])
    recalibrate(norm, split(values, [50]))
    torch.testing.assert_close(norm.running_mean, values.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, values.var((0, 2, 3), correction=1))


@pytest.mark.parametrize("sizes", [[25, 25], [40, 10], [2, 47, 1], [10, 20, 20]])
def test_every_sample_weighs_the_same_whatever_its_batch(sizes: list[int]) -> None:
    """A short last batch must not count as much as a full one; a batch of one is left out."""
    norm, values = nn.BatchNorm2d(2), images(50)
    recalibrate(norm, split(values, sizes))
    parts = [part for part in values.split(sizes) if len(part) > 1]
    total = sum(len(part) for part in parts)
    torch.testing.assert_close(norm.running_mean, torch.cat(parts).mean((0, 2, 3)))
    within = [part.var((0, 2, 3), correction=1) * len(part) / total for part in parts]
    torch.testing.assert_close(norm.running_var, torch.stack(within).sum(0))


def test_layers_behind_see_what_the_recalibrated_network_in_training_mode_gives() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2))
    values = images(60)
    recalibrate(model, split(values, [60]))
    hidden = (values - values.mean((0, 2, 3), keepdim=True)) / values.var((0, 2, 3), correction=0, keepdim=True).sqrt()
    assert isinstance(model[2].running_mean, Tensor)
    torch.testing.assert_close(model[2].running_mean, hidden.relu().mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_modes_momenta_and_weights_stay() -> None:
    model = nn.Sequential(
        nn.PReLU(), nn.BatchNorm2d(2, momentum=0.3), nn.Dropout(0.5), nn.BatchNorm2d(2, momentum=None)
    )
    model[1].eval()  # a mixture of modes
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model)
    recalibrate(model, split(images(20), [10, 10]))
    assert [module.training for module in model.modules()] == modes
    assert model[1].momentum == 0.3
    assert model[3].momentum is None
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(model[1].running_mean, before[1].running_mean)


def test_dropout_draws_nothing() -> None:
    """The statistics behind a dropout are those of the network as it will run."""
    model, plain = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(2)).train(), nn.BatchNorm2d(2)
    recalibrate(model, split(images(20), [20]))
    recalibrate(plain, split(images(20), [20]))
    assert torch.equal(model[1].running_var, plain.running_var)


@pytest.mark.parametrize(
    "model", [nn.PReLU(), nn.BatchNorm1d(2, track_running_stats=False), nn.GroupNorm(1, 2)], ids=repr
)
def test_a_network_without_running_statistics_does_not_run_at_all(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recalibrate(model, iter([("not a batch", "at all")]))  # type: ignore[list-item]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_it_works_in_one_dimension_and_without_affine_parameters() -> None:
    norm = nn.BatchNorm1d(3, affine=False)
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    recalibrate(norm, split(values, [20, 20]))
    torch.testing.assert_close(norm.running_mean, values.mean(0))


@pytest.mark.parametrize(("sizes", "threads"), [([20, 20, 20], 2), ([10, 20, 5, 24, 1], 3), ([60], 4), ([59, 1], 2)])
def test_side_by_side_gives_the_statistics_of_one_after_another(sizes: list[int], threads: int) -> None:
    made = [nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2)) for _ in range(2)]
    for model, number in zip(made, (1, threads), strict=True):
        recalibrate(model, split(images(60), sizes), threads=number)
    expected, found = (model.state_dict() for model in made)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])
    assert all(m.momentum == 0.1 and m.training for m in made[1] if isinstance(m, nn.BatchNorm2d))
