"""The product on CUDA: what it finds there is what it finds on the CPU. `make gpu` runs only these.

Without a CUDA device they are skipped; what can be tested without one is in test_pretended_device.py.
"""

import copy
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune import data, export, models
from autoprune.cost import count, measure_latency
from autoprune.devices import exact, streamed
from autoprune.evaluation import Precision
from autoprune.evaluation.precision import choose
from autoprune.finetuning import Recipe, recalibrate, reconstruct, train
from autoprune.moments import Moments, influences, readers_of
from autoprune.result import SearchResult, open_run
from autoprune.scoring import Evidence
from autoprune.scoring.taylor import taylor_scores
from autoprune.search import search
from autoprune.seeds import seeded_torch
from autoprune.structure import Structure, analyse, cut, plan
from autoprune.task import Task, cross_entropy, top1
from autoprune.tracking import NullTracker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

CUDA = torch.device("cuda:0")
ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, Any] = {
    "budget": "macs<=50%",
    "agent": "random",
    "candidates": 4,
    "control": 1,
    "sensitivity": (0.5,),
    "calibration_images": 200,
    "precision": "float32",
    "tracker": NullTracker(),
}


@pytest.fixture(scope="module", autouse=True)
def exactly() -> Iterator[None]:
    """No TF32 in what the tests themselves compute."""
    torch.cuda.init()
    with exact():
        yield


def samples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of four noisy patterns, `(n, 1, 8, 8)`, and which of them each is."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    targets = torch.arange(n) % 4
    return patterns[targets] + torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), targets


@pytest.fixture(scope="module")
def task() -> Task:
    """On the CPU; trained a little."""
    model = models.build("resnet8", num_classes=4, in_channels=1, input_size=8)
    task = Task(model, train=samples(400, 1), val=samples(200, 2), test=samples(60, 3), augment=data.RandomShift(1))
    train(model, task.train_batches(50, 0), 60, recipe=Recipe(lr=0.1), loss=cross_entropy, seed=0)
    return task


@pytest.fixture(scope="module")
def structure(task: Task) -> Structure:
    return analyse(task.model, task.example_input)


@pytest.fixture(scope="module")
def runs(task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchResult, SearchResult]:
    """The same search on the CPU and on CUDA."""
    folder = tmp_path_factory.mktemp("runs")
    return search(task, out=folder / "cpu", **SETTINGS), search(task.on(CUDA), out=folder / "cuda", **SETTINGS)


def alike(there: nn.Module, here: nn.Module, tolerance: float = 1e-4) -> None:
    expected = here.state_dict()
    for name, tensor in there.state_dict().items():
        torch.testing.assert_close(tensor.cpu(), expected[name], rtol=tolerance, atol=tolerance, msg=name)


def test_a_whole_search_finds_what_it_finds_on_the_cpu(runs: tuple[SearchResult, SearchResult]) -> None:
    here, there = runs
    assert [candidate.id for candidate in there.candidates] == [candidate.id for candidate in here.candidates]
    for one, other in zip(there.candidates, here.candidates, strict=True):
        assert one.cost == other.cost
        assert one.accuracy == pytest.approx(other.accuracy, abs=0.015)  # three samples of 200 at most


def test_what_was_begun_on_cuda_goes_on_on_the_cpu(runs: tuple[SearchResult, SearchResult], task: Task) -> None:
    there = runs[1]
    again = open_run(there.run, task)
    assert again.pick().model.get_parameter("conv1.weight").device.type == "cpu"
    ids = [candidate.id for candidate in there.candidates]
    assert [c.id for c in search(task, out=there.run, **SETTINGS).candidates] == ids
    (Path(there.run) / "result.json").unlink()
    ledger = Path(there.run) / "ledger.jsonl"
    ledger.write_text("".join(line for line in ledger.read_text().splitlines(keepends=True)[:-2]))
    assert {c.id for c in search(task, out=there.run, **SETTINGS).candidates} == set(ids)


def test_pick_fine_tune_save_load_and_export(
    runs: tuple[SearchResult, SearchResult], task: Task, tmp_path: Path
) -> None:
    there = open_run(runs[1].run, task.on(CUDA))
    network = there.pick().finetune(epochs=1)
    assert network.model.get_parameter("conv1.weight").device == CUDA
    assert sum(measured.accuracy for measured in network.test()) > 0
    network.save(tmp_path / "pruned")
    assert (tmp_path / "pruned" / export.PROGRAM).is_file()
    loaded = autoprune.load(tmp_path / "pruned", build=task.fresh_model)
    alike(network.model, loaded, 0.0)
    export.to_onnx(network.model, tmp_path / "network.onnx", task.example_input.to(CUDA))


def test_bfloat16_runs_where_it_is_chosen(task: Task, tmp_path: Path) -> None:
    settings = {**SETTINGS, "precision": "bfloat16", "finetune_steps": 5}
    found = search(task.on(CUDA), out=tmp_path / "run", **settings)
    assert found.pick().accuracy == pytest.approx(found.summary["picked"]["accuracy"], abs=0.03)


def test_precisions_are_timed(task: Task) -> None:
    there = task.on(CUDA)
    inputs, targets = (part.to(CUDA) for part in samples(100, 4))
    choice = choose(there.fresh_model(), inputs, targets, top1, cross_entropy)
    assert [trial.failure for trial in choice.trials] == [None] * 3
    assert all(trial.seconds > 0 for trial in choice.trials)
    assert any(trial.training > 0 for trial in choice.trials)  # in the layout that measures fastest


def test_moments_influences_scores_and_layers_are_those_of_the_cpu(task: Task, structure: Structure) -> None:
    batches = list(task.calibration_batches(200, 100, 0))
    there = [(inputs.to(CUDA), targets.to(CUDA)) for inputs, targets in batches]
    here_model, there_model = task.fresh_model().eval(), task.on(CUDA).fresh_model().eval()
    wanted = readers_of(structure)
    here, on_cuda = (
        Moments.collect(here_model, batches, wanted),
        Moments.collect(there_model, there, wanted),
    )
    for name, layer in on_cuda.items():
        torch.testing.assert_close(layer.mean.cpu(), here[name].mean, rtol=1e-4, atol=1e-4)
    expected = influences(here_model, batches, wanted, 0)
    for name, values in influences(there_model, there, wanted, 0).items():
        torch.testing.assert_close(values.cpu(), expected[name], rtol=1e-3, atol=1e-5)
    scores = taylor_scores(here_model, structure, Evidence(batches, cross_entropy, 0))
    for name, values in taylor_scores(there_model, structure, Evidence(there, cross_entropy, 0)).items():
        torch.testing.assert_close(values, scores[name], rtol=1e-3, atol=1e-5)
    change = plan(here_model, structure, {structure.names[0]: [0, 1, 2], structure.names[1]: [3]})
    small, there_small = cut(here_model, change), cut(there_model, change)
    reconstruct(here_model, small, change, here)
    reconstruct(there_model, there_small, change, on_cuda)
    alike(there_small, small)
    recalibrate(small, batches)
    recalibrate(there_small, there)
    alike(there_small, small)


def test_structure_and_counts_are_those_of_the_cpu(task: Task, structure: Structure) -> None:
    there = task.on(CUDA)
    found = analyse(there.model, there.example_input, kinds=("channels", "heads"))
    assert (found.names, found.locked) == (structure.names, structure.locked)
    assert count(there.model, there.example_input).cost == count(task.model, task.example_input).cost


def test_training_repeats_and_leaves_generators_as_they_were(task: Task) -> None:
    there = task.on(CUDA)
    before = torch.cuda.get_rng_state(CUDA)
    trained = []
    for _ in range(2):
        model = nn.Sequential(there.fresh_model(), nn.Dropout(0.5))
        batches = Precision().placed(task.train_batches(50, 0), CUDA)
        train(model, batches, 10, recipe=Recipe(lr=0.01), loss=cross_entropy, seed=1)
        trained.append(model)
    alike(trained[0], trained[1].cpu(), 1e-5)
    assert torch.equal(torch.cuda.get_rng_state(CUDA), before)
    draws = []
    for _ in range(2):
        with seeded_torch(3, CUDA):
            draws.append(torch.rand(4, device=CUDA))
    assert torch.equal(*draws)


def test_batches_arrive_whole_however_slow_the_device_is() -> None:
    slow = torch.rand(2000, 2000, device=CUDA)
    sums = []
    expected = [torch.full((64, 3, 32, 32), float(number)) for number in range(20)]
    place = Precision("float32", True).place
    batches = ((batch.clone(), batch[:, 0, 0, 0].clone()) for batch in expected)
    for inputs, targets in streamed(batches, lambda batch: place(batch, CUDA), CUDA):
        for _ in range(10):
            slow = (slow @ slow).clamp(0, 1)
        sums.append((inputs.sum(), targets.sum()))
    for batch, (inputs, targets) in zip(expected, sums, strict=True):
        assert (inputs.item(), targets.item()) == (batch.sum().item(), batch[:, 0, 0, 0].sum().item())


def test_latency_is_told_with_its_device(task: Task) -> None:
    there = task.on(CUDA)
    measured = measure_latency(copy.deepcopy(there.model), there.example_input)
    assert measured.median_ms > 0
    assert measured.device == f"cuda: {torch.cuda.get_device_name(CUDA)}"


def test_two_workers_share_a_gpu(runs: tuple[SearchResult, SearchResult], task: Task, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from autoprune.evaluation.ray import RayExecutor

    found = search(task.on(CUDA), out=tmp_path / "run", executor=RayExecutor(2, gpus=0.5), **SETTINGS)
    expected = {candidate.id: candidate.accuracy for candidate in runs[1].candidates}
    for candidate in found.candidates:
        if candidate.id in expected:
            assert candidate.accuracy == pytest.approx(expected[candidate.id], abs=0.015)
    assert all(candidate.failure is None for candidate in found.candidates)


def test_the_command_line_takes_the_gpu_and_opens_the_run_without_it(tmp_path: Path) -> None:
    autoprune_command = str(Path(sys.executable).parent / "autoprune")
    quick = ["--candidates", "3", "--control", "1", "--calibration-images", "200", "--sensitivity", "", "--quiet"]
    command = [autoprune_command, "search", "--budget", "macs<=40%", "--agent", "random", *quick, "--out", "run"]
    subprocess.run([*command, "--device", "cuda"], check=True, cwd=tmp_path, env=dict(os.environ))
    hidden = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}
    for again in (["pick", "run", "--max-drop", "0.5"], ["evaluate", "run/pruned", "--data", "digits"]):
        subprocess.run([autoprune_command, *again], check=True, cwd=tmp_path, env=hidden)


def test_the_throughput_benchmark_runs_there() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "throughput.py"))
    given = ["--network", "resnet8", "--size", "8", "--val", "64", "--calibration", "64", "--device", "cuda"]
    task = script["_task"](script["_options"](given))
    ours = script["Ours"](task, 64, "recalibrated", 0.5, "*.conv1")
    ways = {"ours": ours, "masked": script["Masked"](task, 64, ours)}
    found = script["compare"](ways, 1, 1)
    assert ours.bench.device == CUDA
    assert all(row["median"] > 0 for row in found.values())
    assert script["peak"](CUDA, 256) > 0
