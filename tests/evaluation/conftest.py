"""Tiny trained tasks for the tests of this folder, on one thread: that is faster for networks this small."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from autoprune.cost import CostModel
from autoprune.evaluation import Evaluator, Ledger, Pipeline, Recovery, Workbench
from autoprune.finetuning import Recipe, recalibrate, train
from autoprune.scoring import Evidence, removal_orders
from autoprune.scoring.l1 import L1
from autoprune.structure import analyse
from autoprune.task import Task, cross_entropy
from autoprune.testing import TinyNet, TinyResNet


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def samples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of four noisy patterns, `(n, 1, 8, 8)`, and which of them each is."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    targets = torch.arange(n) % 4
    return patterns[targets] + torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), targets


def trained(make: Callable[[], nn.Module]) -> Task:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make()
    task = Task(model, train=samples(200, 1), val=samples(101, 2))
    train(model, task.train_batches(40, 0), 60, recipe=Recipe(lr=0.2), loss=cross_entropy, seed=0)
    recalibrate(model, task.calibration_batches(200, 250, 0))
    return task


@pytest.fixture(scope="module")
def task() -> Task:
    return trained(TinyNet)


@pytest.fixture(scope="module")
def residual_task() -> Task:
    return trained(TinyResNet)


@pytest.fixture(scope="module")
def make_evaluator() -> Callable[..., Evaluator]:
    def make(task: Task, recovery: Recovery | None = None, ledger: Ledger | None = None, seed: int = 0) -> Evaluator:
        structure = analyse(task.model, task.example_input)
        scores = L1().score(task.model, structure, Evidence([], task.loss, 0))
        recovery = recovery or Recovery(calibration_images=200, finetune_steps=2)
        bench = Workbench(task, structure, removal_orders(scores), recovery.calibration_images, seed)
        costs = CostModel(task.model, task.example_input, structure)
        return Evaluator(Pipeline(bench, recovery, seed), costs, Ledger() if ledger is None else ledger)

    return make
