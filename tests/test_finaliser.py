"""The picked network: full fine-tuning on a copy, the test set once, and saving with what was measured."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autoprune import export
from autoprune.cost import CostModel, count
from autoprune.errors import ConfigError, DivergedError, TestSetError
from autoprune.evaluation import Evaluator, Ledger, Pipeline, Recovery, Workbench, measure
from autoprune.finaliser import FULL_LR, PrunedNetwork
from autoprune.finetuning import Recipe, recalibrate, train
from autoprune.policy import Policy
from autoprune.scoring import Evidence, removal_orders
from autoprune.scoring.l1 import L1
from autoprune.structure import analyse
from autoprune.task import Task, cross_entropy, top1
from autoprune.testing import TinyResNet

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Faster for networks this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def samples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of four noisy patterns, `(n, 1, 8, 8)`, and which of them each is."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    targets = torch.arange(n) % 4
    return patterns[targets] + torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), targets


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = TinyResNet()
    task = Task(model, train=samples(200, 1), val=samples(101, 2), test=samples(60, 3))
    train(model, task.train_batches(40, 0), 60, recipe=Recipe(lr=0.2), loss=cross_entropy, seed=0)
    recalibrate(model, task.calibration_batches(200, 250, 0))
    structure = analyse(model, task.example_input)
    orders = removal_orders(L1().score(model, structure, Evidence([], task.loss, 0)))
    recovery = Recovery(200, 2, Recipe(lr=0.05, batch_size=50))
    costs = CostModel(model, task.example_input, structure)
    bench = Workbench(task, structure, orders, 200, 0, "recalibrated")
    return Evaluator(Pipeline(bench, recovery, 0), costs, Ledger())


@pytest.fixture
def network(evaluator: Evaluator) -> PrunedNetwork:
    candidate = evaluator.evaluate(Policy({"stem": 0.5, "conv1": 0.5}), arm="search", agent="tpe")
    model, measurements = evaluator.pipeline.recovered(candidate.policy)
    return PrunedNetwork(evaluator, candidate, model, measurements[-1], "the only one")


def test_it_is_what_was_measured(evaluator: Evaluator, network: PrunedNetwork) -> None:
    assert (network.accuracy, network.fidelity) == (network.candidate.accuracy, "short")
    val = evaluator.bench.task.val_batches(17)
    assert measure(network.model, val, top1, cross_entropy).summary("short").accuracy == network.accuracy
    assert count(network.model, evaluator.bench.task.example_input).cost == network.candidate.cost


def test_full_fine_tuning_has_a_rate_of_its_own(
    evaluator: Evaluator, network: PrunedNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[Recipe] = []
    monkeypatch.setattr(evaluator.pipeline, "train", lambda model, steps, recipe, *_: recipes.append(recipe))
    network.finetune(epochs=1)
    network.finetune(epochs=1, recipe=Recipe(lr=0.5))
    assert recipes == [Recipe(lr=FULL_LR, batch_size=50), Recipe(lr=0.5)]
    with pytest.raises(ConfigError, match=r"`lr > 0` must hold, but got lr=0"):
        network.finetune(epochs=1, recipe=Recipe(lr=0.0))


def test_full_fine_tuning_works_on_a_copy_and_is_measured(evaluator: Evaluator, network: PrunedNetwork) -> None:
    before = copy.deepcopy(network.model.state_dict())
    steps: list[int] = []
    tuned = network.finetune(epochs=3, progress=lambda step, _: steps.append(step))
    assert steps == list(range(1, 13))  # 200 samples in batches of 50, three times
    assert all(torch.equal(before[name], tensor) for name, tensor in network.model.state_dict().items())
    assert (network.fidelity, tuned.fidelity, tuned.rule) == ("short", "full", "the only one")
    assert tuned.measured.loss < network.measured.loss
    val = measure(tuned.model, evaluator.bench.task.val_batches(500), top1, cross_entropy)
    assert val.summary("full").accuracy == tuned.accuracy


def test_it_is_the_same_every_time_and_follows_the_recipe(network: PrunedNetwork) -> None:
    first, second = network.finetune(epochs=1), network.finetune(epochs=1)
    assert first.measured == second.measured
    steps: list[int] = []
    other = network.finetune(
        epochs=2, recipe=Recipe(lr=0.01, batch_size=150), progress=lambda step, _: steps.append(step)
    )
    assert steps == [1, 2]
    assert other.measured != first.measured


def test_no_epoch_and_divergence_are_errors(network: PrunedNetwork) -> None:
    with pytest.raises(ConfigError, match="`epochs >= 1` must hold, but got epochs=0"):
        network.finetune(epochs=0)
    with pytest.raises(DivergedError, match="the loss is nan"):
        network.finetune(epochs=2, recipe=Recipe(lr=1e30, batch_size=50))


def test_it_saves_with_what_was_measured(evaluator: Evaluator, network: PrunedNetwork, tmp_path: Path) -> None:
    folder = network.finetune(epochs=1).save(tmp_path / "pruned")
    measured = export.recipe_of(folder)["measured"]
    assert measured["id"] == network.candidate.id
    assert measured["policy"] == {"stem": 0.5, "conv1": 0.5}
    assert measured["widths"] == {"stem": "8 -> 4", "conv1": "8 -> 4"}
    assert (measured["fidelity"], measured["rule"]) == ("full", "the only one")
    cost = network.candidate.cost.to_dict()
    assert {key: measured[key] for key in cost} == cost
    loaded = export.load(folder, build=TinyResNet)
    val = evaluator.bench.task.val_batches(500)
    assert measure(loaded, val, top1, cross_entropy).summary("full").accuracy == measured["accuracy"]


def test_the_test_set_is_read_once(evaluator: Evaluator, network: PrunedNetwork) -> None:
    """The last one here: it opens the task's only test set."""
    pruned, dense = network.test()
    images, targets = samples(60, 3)
    with torch.no_grad():
        for measured, model in ((pruned, network.model), (dense, evaluator.bench.task.fresh_model().eval())):
            assert measured.accuracy == pytest.approx(float(top1(model(images), targets).double().mean()))
    assert (pruned.fidelity, dense.fidelity) == ("short", "dense")
    with pytest.raises(TestSetError, match="read already"):
        network.test()
    with pytest.raises(TestSetError, match="read already"):
        network.finetune(epochs=1).test()
