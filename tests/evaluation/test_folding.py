"""Folded batch-norm: the same outputs, in the dense network and in what is cut from it, and only where it is proven."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune import models
from autoprune.evaluation.folding import Folding
from autoprune.policy import Policy
from autoprune.structure import analyse, cut, plan

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def lived_in(model: nn.Module) -> nn.Module:
    """Return a network whose batch-norms are far from the identity."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for key, value in module.state_dict().items():
                if key != "num_batches_tracked":
                    drawn = torch.randn(len(value), generator=generator)
                    value.copy_(0.5 + drawn.square() if key == "running_var" else drawn)
    return model.eval()


class Reads(nn.Module):
    """A network whose first convolution is read by another layer as well, and whose second is not."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.first, self.one = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.two = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        wide = self.first(x)
        out: Tensor = self.two(self.second(torch.relu(self.one(wide))))
        return out + self.gain * wide[..., 1:-1, 1:-1]


class Twice(Reads):
    """One convolution that runs twice, before two batch-norms."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.second(self.one(self.second(x[:, [0, 1, 2, 0]]))))
        return out


class Looks(Reads):
    """A network that reads a number of its batch-norm's."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.one(self.first(x)) * self.one.momentum
        return out


def made(kind: type[Reads], gain: float = 0.0) -> Any:
    with torch.random.fork_rng(devices=[]):
        return lived_in(kind(gain))


def norms_in(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@torch.no_grad()
def test_resnet_folds_all_and_gives_the_same() -> None:
    model = lived_in(models.build("resnet20"))
    folding = Folding(model, IMAGES)
    folded = folding(model)
    assert len(folding.pairs) == norms_in(model) == 19
    assert ("layer1.0.conv1", "layer1.0.bn1") in folding.pairs
    assert norms_in(folded) == 0
    torch.testing.assert_close(folded(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
    assert norms_in(model) == 19  # which is as it was


@torch.no_grad()
def test_a_sliced_network_is_folded_with_its_own_statistics() -> None:
    model = lived_in(models.build("mobilenetv2_half"))
    structure = analyse(model, IMAGES[:1])
    removed = structure.removed(Policy(dict.fromkeys(structure.names, 0.5)))
    small = cut(model, plan(model, structure, {name: list(range(count)) for name, count in removed.items()}))
    lived_in(small)
    folded = Folding(model, IMAGES)(small)
    assert norms_in(folded) == 0
    torch.testing.assert_close(folded(IMAGES), small(IMAGES), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_else_reads_a_convolution_is_seen() -> None:
    model = made(Reads, 1.0)
    folding = Folding(model, IMAGES)
    assert folding.pairs == (("second", "two"),)
    torch.testing.assert_close(folding(model)(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
    alone = made(Reads)
    assert Folding(alone, IMAGES).pairs == (("first", "one"), ("second", "two"))


@pytest.mark.parametrize("kind", [Twice, Looks])
@torch.no_grad()
def test_what_can_t_be_folded_is_left_alone(kind: type[Reads]) -> None:
    model = made(kind)
    folding = Folding(model, IMAGES)
    assert folding.pairs == ()
    assert torch.equal(folding(model)(IMAGES), model(IMAGES))


@torch.no_grad()
def test_a_module_that_somebody_watches_is_left_alone() -> None:
    model = made(Reads)
    seen: list[Any] = []
    model.two.register_forward_hook(lambda module, given, output: seen.append(output))
    assert Folding(model, IMAGES).pairs == (("first", "one"),)


@torch.no_grad()
def test_modules_that_will_not_run_are_not_folded() -> None:
    model = lived_in(models.build("resnet20"))
    folded = Folding(model, IMAGES)(model, without=("conv1", "layer1"))
    names = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert names == ["bn1", *(f"layer1.{block}.bn{number}" for block in range(3) for number in (1, 2))]


@torch.no_grad()
def test_a_block_that_was_taken_out_is_passed_over() -> None:
    model = lived_in(models.build("resnet20"))
    folding = Folding(model, IMAGES)
    model.get_submodule("layer1")[1] = nn.Identity()  # type: ignore[index,operator]
    assert norms_in(folding(model)) == 0
    torch.testing.assert_close(folding(model)(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
