"""The workbench with shared weights: what is cut from them, what stays the user's own, and what travels."""

import pickle
from collections.abc import Callable

import pytest
import torch

from autoprune.evaluation import Evaluator, Pipeline, Recovery, Workbench
from autoprune.finetuning import SharedWeights
from autoprune.policy import Policy
from autoprune.task import Task

Make = Callable[..., Evaluator]


@pytest.fixture
def weights(task: Task) -> SharedWeights:
    """The network's, each a little off."""
    model = task.fresh_model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return SharedWeights.of(model)


@pytest.fixture
def bench(task: Task, weights: SharedWeights, make_evaluator: Make) -> Workbench:
    plain = make_evaluator(task).bench
    return Workbench(task, plain.structure, plain.orders, 200, 0, weights=weights)


def test_it_is_as_good_as_a_task_that_had_those_weights(task: Task, bench: Workbench, weights: SharedWeights) -> None:
    other = task.fresh_model()
    weights.put_into(other)
    same = Workbench(Task(other, train=task._train, val=task._val), bench.structure, bench.orders, 200, 0)
    for removed in ({"conv1": 3, "conv2": 4}, {"conv2": 6}):
        assert torch.equal(bench.measure(bench.recovered(removed)).losses, same.measure(same.recovered(removed)).losses)
        assert torch.equal(bench.probe(removed).losses, same.probe(removed).losses)
    assert torch.equal(bench.whole.losses, same.dense.losses)
    assert not torch.equal(bench.dense.losses, same.dense.losses)


def test_the_baseline_stays_the_users_own(task: Task, bench: Workbench, make_evaluator: Make) -> None:
    plain = make_evaluator(task).bench
    assert torch.equal(bench.dense.losses, plain.dense.losses)
    assert bench.recalibrating() == plain.recalibrating()
    assert all(torch.equal(a, b) for a, b in zip(bench.original.parameters(), task.model.parameters(), strict=True))


def test_a_pickled_one_measures_the_same(bench: Workbench) -> None:
    pipeline = Pipeline(bench, Recovery(200, finetune_steps=2), 0)
    elsewhere = pickle.loads(pickle.dumps(pipeline))
    policy = Policy({"conv1": 0.5, "conv2": 0.25})
    here, there = pipeline(policy), elsewhere(policy)
    assert (here.id, here.measurements, here.failure) == (there.id, there.measurements, there.failure)
    assert torch.equal(elsewhere.bench.whole.losses, bench.whole.losses)
    assert torch.equal(elsewhere.bench.dense.losses, bench.dense.losses)
