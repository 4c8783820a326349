"""Training one set of weights for many networks: against a loop by hand, what it is good for, and its file."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import DivergedError, RunError
from autoprune.finetuning import Recipe, SharedWeights, recalibrate, train, train_shared
from autoprune.finetuning.train import one_cycle
from autoprune.scoring import Evidence, removal_orders
from autoprune.scoring.l1 import L1
from autoprune.structure import Cut, Structure, Weakest, analyse, cut, plan
from autoprune.task import Task, cross_entropy
from autoprune.testing import TinyResNet

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

Batch = tuple[Tensor, Tensor]
UNITS = ("channels", "weights")
RECIPE = Recipe(lr=0.05, momentum=0.8, weight_decay=0.01, warmup=0.25)


def batches(seed: int = 3) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        inputs = torch.randn(12, 1, 8, 8, generator=generator, dtype=torch.float64)
        yield inputs, torch.randint(0, 10, (12,), generator=generator)


def network(dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        model = TinyResNet().double()
    model.fc = nn.Sequential(nn.Dropout(dropout), model.fc)  # type: ignore[assignment]
    return model


def structure_of(model: nn.Module) -> Structure:
    return analyse(model, torch.zeros(1, 1, 8, 8, dtype=torch.float64), kinds=UNITS)


def policies(model: nn.Module) -> Iterator[Sequence[Cut]]:
    """Two of three cuts at each step: one of the stream, one inside the block, one of single weights."""
    structure = structure_of(model)
    saliency = torch.rand(8, 8, 3, 3, generator=torch.Generator().manual_seed(5))
    removals = itertools.cycle(
        [{"stem": [0, 3, 4]}, {"conv1": [1]}, {"stem": [7], "conv2:weights": Weakest(300, saliency)}]
    )
    while True:
        yield [plan(model, structure, next(removals)) for _ in range(2)]


def masks(model: nn.Module, change: Cut) -> dict[str, Tensor]:
    """Return what a cut leaves of every parameter, where channels are read; what writes them is whole."""
    found = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    readers = {"stem.weight": (), "conv1.weight": (1,), "conv2.weight": (1,), "fc.1.weight": (1,)}
    for name, dims in readers.items():
        for dim in dims:
            if dim in change.kept.get(name, {}):
                gone = sorted(set(range(found[name].shape[dim])) - set(change.kept[name][dim].tolist()))
                found[name].index_fill_(dim, torch.tensor(gone), 0.0)
    for name, zeroed in change.zeroed.items():
        kept = [change.kept.get(name, {}).get(dim, torch.arange(n)) for dim, n in enumerate(found[name].shape)]
        found[name][torch.meshgrid(*kept, indexing="ij")] *= (~zeroed).double()
    return found


def test_it_is_a_loop_by_hand() -> None:
    """The dense network's gradients and those of masked copies of it, added up, under Nesterov momentum."""
    trained, by_hand, changes = network(), network().train(), policies(network())
    said: list[tuple[int, float]] = []
    train_shared(
        trained,
        batches(),
        policies(network()),
        4,
        recipe=RECIPE,
        loss=cross_entropy,
        seed=0,
        progress=lambda *step: said.append(step),
    )
    momenta = {name: torch.zeros_like(parameter) for name, parameter in by_hand.named_parameters()}
    values = []
    for number, (inputs, targets) in zip(range(4), batches(), strict=False):
        parameters = dict(by_hand.named_parameters())
        loss = cross_entropy(by_hand(inputs), targets).mean()
        values.append(loss.item())
        for change in next(changes):
            masked = {name: parameter * masks(by_hand, change)[name] for name, parameter in parameters.items()}
            buffers = {name: buffer.clone() for name, buffer in by_hand.named_buffers()}
            outputs = torch.func.functional_call(by_hand, masked | buffers, (inputs,))
            loss = loss + cross_entropy(outputs, targets).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        rate = 0.05 * one_cycle((number + 1) / 4, 0.25)
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                decayed = gradient + 0.01 * parameter
                momenta[name].mul_(0.8).add_(decayed)
                parameter -= rate * (decayed + 0.8 * momenta[name])
    for (name, ours), theirs in zip(trained.state_dict().items(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=name)  # running statistics among them
    assert [step for step, _ in said] == [1, 2, 3, 4]
    assert [value for _, value in said] == pytest.approx(values, rel=1e-9)
    assert not any(module.training for module in trained.modules())


def test_without_small_networks_it_is_training() -> None:
    shared, plain = network(0.5), network(0.5)
    nothing: Iterator[Sequence[Cut]] = itertools.repeat(())
    train_shared(shared, batches(), nothing, 3, recipe=RECIPE, loss=cross_entropy, seed=4)
    train(plain, batches(), 3, recipe=RECIPE, loss=cross_entropy, seed=4)
    for ours, theirs in zip(shared.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_dropout_is_drawn_from_the_seed_alone() -> None:
    def trained(seed: int) -> Tensor:
        model = network(dropout=0.5)
        train_shared(model, batches(), policies(model), 2, recipe=RECIPE, loss=cross_entropy, seed=seed)
        return model.get_parameter("stem.weight").detach()

    assert torch.equal(trained(5), trained(5))
    assert not torch.equal(trained(5), trained(6))


def test_no_steps_and_frozen_weights_change_nothing() -> None:
    for steps, frozen in ((0, False), (2, True)):
        model = network().train().requires_grad_(not frozen)
        before = copy.deepcopy(model.state_dict())
        train_shared(model, batches(), policies(model), steps, recipe=RECIPE, loss=cross_entropy, seed=0)
        assert not model.training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_frozen_layer_stays() -> None:
    model = network()
    model.get_parameter("conv1.weight").requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    train_shared(model, batches(), policies(model), 2, recipe=RECIPE, loss=cross_entropy, seed=0)
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {"conv1.weight"}


@pytest.mark.parametrize("spoiled", [0, 2])
def test_a_loss_that_is_not_finite_ends_it(spoiled: int) -> None:
    """Of the dense network, or of a small one alone."""
    calls = itertools.count()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) * (math.inf if next(calls) == 3 + spoiled else 1.0)

    model = network()
    with pytest.raises(
        DivergedError, match=r"^a loss is not finite at step 2 of 5 of training shared weights; a lower"
    ):
        train_shared(model, batches(), policies(model), 5, recipe=RECIPE, loss=loss, seed=0)


# ----------------------------------------------------------------------------------------------------- what it is for


def test_a_heavily_pruned_network_needs_recalibration_only() -> None:
    """On digits: ten of sixteen gone in every layer, a policy that training never saw."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layers = [nn.Conv2d(1, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16)]
        model = nn.Sequential(*layers, nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    task = Task.named("", "digits", model=model)
    train(model, task.train_batches(128, 0), 80, recipe=Recipe(lr=0.2), loss=task.loss, seed=0)
    structure = analyse(model, task.example_input)
    orders = removal_orders(L1().score(model, structure, Evidence([], task.loss, 0)))
    shared, most = copy.deepcopy(model), {name: order[:10] for name, order in orders.items()}
    pairs = [{"0": 6, "4": 12}, {"0": 12, "4": 6}]
    changes = [plan(model, structure, {name: orders[name][:n] for name, n in pair.items()}) for pair in pairs]
    stream = task.train_batches(128, 1)
    recipe = Recipe(lr=0.1)
    train_shared(shared, stream, itertools.repeat(changes), 60, recipe=recipe, loss=task.loss, seed=0)
    accuracies = []
    for dense, gone in ((model, {}), (model, most), (shared, most)):
        smaller = cut(dense, plan(dense, structure, gone))
        recalibrate(smaller, task.calibration_batches(500, 250, 2))
        scores = [task.metric(smaller.eval()(inputs), targets) for inputs, targets in task.val_batches(500)]
        accuracies.append(float(torch.cat(scores).mean()))
    assert accuracies[0] > accuracies[2] > accuracies[1] + 0.2, accuracies


# --------------------------------------------------------------------------------------------------------------- file


class Odd(nn.Module):
    """A weight that two layers share, a number that is not in the state dict, and a statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.register_buffer("own", torch.zeros(2), persistent=False)


def odd(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = Odd()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return model


class TestSharedWeights:
    DIGEST = {"network": "abc", "seed": "3"}  # noqa: RUF012 - never changed

    def test_there_and_back(self, tmp_path: Path) -> None:
        model, other = odd(1), odd(2)
        weights = SharedWeights.of(model)
        weights.save(tmp_path / "shared", self.DIGEST)
        assert [file.name for file in tmp_path.iterdir()] == ["shared"]
        read = SharedWeights.load(tmp_path / "shared", self.DIGEST)
        assert read.digest == weights.digest
        own = other.get_buffer("own").clone()
        read.put_into(other)
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value)
        assert other.get_parameter("b.weight") is other.get_parameter("a.weight")
        assert torch.equal(other.get_buffer("own"), own)  # nobody could save it

    def test_they_are_copies(self) -> None:
        model = odd(1)
        weights, before = SharedWeights.of(model), copy.deepcopy(model.state_dict())
        with torch.no_grad():
            model.get_parameter("a.weight").fill_(0.0)
        weights.put_into(model)
        assert torch.equal(model.get_parameter("a.weight"), before["a.weight"])
        with torch.no_grad():
            model.get_parameter("a.weight").fill_(0.0)
        assert weights.tensors["a.weight"].count_nonzero() > 0

    def test_the_layout_of_a_network_stays(self) -> None:
        with torch.random.fork_rng(devices=[]):
            model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
        weights = SharedWeights.of(model)
        assert weights.tensors["0.weight"].is_contiguous()
        weights.put_into(model)
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(model[0].weight, weights.tensors["0.weight"])

    def test_the_digest_is_of_every_number(self) -> None:
        model = odd(1)
        found = {SharedWeights.of(model).digest}
        for name in ("a.weight", "b.bias", "norm.running_mean"):
            with torch.no_grad():
                model.state_dict()[name].view(-1)[0] += 1e-3
            found.add(SharedWeights.of(model).digest)
        assert len(found) == 4
        assert dataclasses.replace(SharedWeights.of(model)).digest in found

    @pytest.mark.parametrize("other", [{"network": "abc", "seed": "4"}, {"network": "abc"}])
    def test_those_of_something_else_are_refused(self, other: dict[str, str], tmp_path: Path) -> None:
        SharedWeights.of(odd(1)).save(tmp_path / "shared", self.DIGEST)
        with pytest.raises(RunError, match=r"with another seed \(3, not (4|None)\); move it away to train them anew"):
            SharedWeights.load(tmp_path / "shared", other)

    def test_a_file_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "shared").write_bytes(b"torn")
        with pytest.raises(RunError, match="holds no shared weights"):
            SharedWeights.load(tmp_path / "shared", self.DIGEST)
