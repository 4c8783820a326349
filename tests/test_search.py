"""The search from end to end: what it leaves, that nothing is lost when it is killed, and what its numbers mean."""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune import export
from autoprune.agents.amc import AMCAgent
from autoprune.agents.random import RandomAgent
from autoprune.cost import Cost, CostModel, count
from autoprune.data import TensorSplit
from autoprune.environment import Observation, PruningEnv, layer_facts
from autoprune.errors import (
    ConfigError,
    DivergedError,
    InfeasibleBudgetError,
    RecoveryWarning,
    RunError,
    TaskError,
    TestSetError,
    UnknownNameError,
)
from autoprune.evaluation import Candidate, InProcess, Measurement, Outcome, Pipeline, Runs, Work, measure, workbench
from autoprune.evaluation import Probe as CellProbe
from autoprune.evaluation.ladder import best, promotion, sample
from autoprune.fidelity import FEWEST, kendall
from autoprune.finaliser import PrunedNetwork
from autoprune.finetuning import Recipe, recalibrate, train
from autoprune.pareto import front, hypervolume
from autoprune.policy import Policy
from autoprune.progress import Silent
from autoprune.result import SearchResult, open_run
from autoprune.search import identity_of, search
from autoprune.sensitivity import SensitivityReport
from autoprune.structure import analyse
from autoprune.task import FINALISER, Task, cross_entropy, top1
from autoprune.testing import run_agent, synthetic_env
from autoprune.tracking import NullTracker

importlib.import_module("stable_baselines3")  # which draws from a global generator, so not inside a test
result_module = importlib.import_module("autoprune.result")
search_module = importlib.import_module("autoprune.search")  # the package's attribute of that name is the function
pytestmark = pytest.mark.usefixtures("global_rng_untouched")

SETTINGS: dict[str, Any] = {
    "budget": "macs<=50%",
    "candidates": 6,
    "control": 2,
    "finetune_steps": 2,
    "lr": 0.05,
    "calibration_images": 200,
    "seed": 3,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Faster for networks this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """Three convolutions, two of them around a shortcut: two groups of 12 and 10, and one of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(12)
        self.conv1 = nn.Conv2d(12, 10, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 12, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.head = nn.Conv2d(12, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        stream = functional.relu(self.bn0(self.stem(images)))
        inner = functional.relu(self.bn1(self.conv1(stream)))
        stream = functional.relu(stream + self.bn2(self.conv2(inner)))
        return self.fc(functional.relu(self.head(stream)).mean((2, 3)))  # type: ignore[no-any-return]


def samples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of four noisy patterns, `(n, 1, 8, 8)`, and which of them each is."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    targets = torch.arange(n) % 4
    return patterns[targets] + torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), targets


class SealedSplit:
    """A test split that notes every sample that is read of it."""

    def __init__(self) -> None:
        self._split = TensorSplit(*samples(60, 3))
        self.passes = 0

    def __len__(self) -> int:
        return len(self._split)

    def batches(self, batch_size: int, *, shuffle: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return self._split.batches(batch_size, shuffle=shuffle)

    def digest(self) -> str:
        return self._split.digest()


@functools.cache
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Net()
    task = Task(model, train=samples(200, 1), val=samples(101, 2))
    train(model, task.train_batches(40, 0), 80, recipe=Recipe(lr=0.2), loss=cross_entropy, seed=0)
    recalibrate(model, task.calibration_batches(200, 250, 0))
    return model


def make_task(**changes: Any) -> Task:
    options = {"train": samples(200, 1), "val": samples(101, 2), "test": samples(60, 3)} | changes
    return Task(options.pop("model", network()), **options)


class Probe(NullTracker):
    """Notes what a search tells its tracker, and stops it there if wanted."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.calls: list[str] = []
        self.candidates: list[Candidate] = []
        self.finished: dict[str, Any] = {}
        self._kill_at = kill_at

    def start(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        self.calls.append("start")

    def candidate(self, candidate: Candidate) -> None:
        self.calls.append("candidate")
        self.candidates.append(candidate)
        if len(self.candidates) == self._kill_at:
            raise KeyboardInterrupt

    def finish(self, **outcome: Any) -> None:
        self.calls.append("finish")
        self.finished = outcome


class Watcher(Silent):
    """Keeps all lines and steps, and calls back at every step."""

    def __init__(self, at_step: Callable[[str, int], None] = lambda *_: None) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[str, int, str]] = []
        self._at_step = at_step
        self._stage = ""

    def line(self, text: str) -> None:
        self.lines.append(text)

    def begin(self, stage: str, total: int) -> None:
        self._stage = stage

    def step(self, done: int, text: str) -> None:
        self.steps.append((self._stage, done, text))
        self._at_step(self._stage, done)


def run(out: Path, task: Task | None = None, **changes: Any) -> SearchResult:
    options: dict[str, Any] = {"tracker": NullTracker()} | SETTINGS | changes
    return search(make_task() if task is None else task, out=out, **options)


def cells_of(out: Path) -> SensitivityReport:
    """The sensitivity report; two are equal whatever their cells took."""
    return SensitivityReport.load(out / "sensitivity.json")


def ledger_of(out: Path) -> list[dict[str, Any]]:
    """Return the ledger's lines, without the time that they took."""
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def one_line(error: pytest.ExceptionInfo[Any]) -> bool:
    return "\n" not in str(error.value)


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes the time at the end: report, figures and the exported program."""
    monkeypatch.setattr(search_module, "render", lambda folder: folder.report)
    monkeypatch.setattr(result_module, "render", lambda folder: folder.report)
    monkeypatch.setattr(export, "_save_program", lambda *_: None)


Formula = Callable[[Mapping[str, int], Cost], float]


@pytest.fixture
def formula(light: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Formula], None]:
    """Let a formula in the counts and the cost stand in for what candidates measure."""

    def use(accuracy: Formula) -> None:
        def recovered(
            self: Pipeline, policy: Policy, *, final: bool = False, rival: Policy | None = None
        ) -> tuple[nn.Module, tuple[Measurement, ...]]:
            removed = self.bench.structure.removed(policy)
            network = self.bench.recovered(removed)
            value = accuracy(removed, count(network, self.bench.task.example_input).cost)
            if math.isnan(value):
                raise DivergedError("the loss is nan at fine-tuning step 1 of 2")
            return network, (Measurement("reconstructed", value, 0.01, 1 - value, 0.01),)

        monkeypatch.setattr(Pipeline, "recovered", recovered)

    return use


@dataclasses.dataclass
class Done:
    """One finished search that many tests look at."""

    out: Path
    task: Task
    split: SealedSplit
    tracker: Probe
    watcher: Watcher
    result: SearchResult
    before: dict[str, Tensor]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    out, split = tmp_path_factory.mktemp("search") / "run", SealedSplit()
    task, tracker, watcher = make_task(test=split), Probe(), Watcher()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    result = run(out, task, tracker=tracker, progress=watcher)
    return Done(out, task, split, tracker, watcher, result, before)


# --------------------------------------------------------------------------------------------------- what it leaves


def test_all_files_are_there(done: Done) -> None:
    names = {path.name for path in done.out.iterdir()}
    assert {"config.json", "sensitivity.json", "ledger.jsonl", "front.json", "result.json", "report.html"} <= names
    assert {path.name for path in (done.out / "pruned").iterdir()} == {
        *("model.safetensors", "recipe.json", "program.pt2")
    }
    assert not [name for name in names if name.startswith(".")]


def test_the_config_holds_everything_resolved(done: Done) -> None:
    config = read(done.out / "config.json")
    assert config["format"] == 3
    assert config["task"] == done.task.describe()
    assert config["digest"] == done.task.digest()
    assert config["search"] == SETTINGS | {
        **{"agent": "surrogate", "space": "group", "max_drop": None, "criterion": "l1"},
        **{"sensitivity": [0.25, 0.5, 0.75], "max_sparsity": 0.9, "bounds": {}},
        **{"units": ["channels", "heads"], "multiple": 1, "normalised": False},
        **{"recover": "reconstructed", "moments_memory": 2.0, "precision": "auto"},
        **{"activations_memory": 2.0, "promote": 1.0, "race": False, "protocol": "resource", "shared_steps": 0},
        **{"agent_seed": None},
    }
    assert {"python", "torch", "optuna", "autoprune"} <= config["versions"].keys()


def test_a_line_of_the_ledger_for_every_candidate_in_order(done: Done) -> None:
    lines = ledger_of(done.out)
    assert [line["number"] for line in lines] == list(range(len(lines)))
    assert len({line["id"] for line in lines}) == len(lines)
    arms = [line["arm"] for line in lines]
    assert arms[0] == "uniform"
    assert arms.count("random") == 2
    assert {line["agent"] for line in lines if line["arm"] == "search"} == {"surrogate"}
    structure = analyse(done.task.model, done.task.example_input)
    costs = CostModel(done.task.model, done.task.example_input, structure)
    for line in lines:
        assert structure.removed(Policy(line["policy"])) == line["removed"]
        assert costs.cost(line["removed"]) == Cost.from_dict(line)
        assert [m["fidelity"] for m in line["measurements"]] == ["reconstructed", "short"]
        assert line["macs"] <= costs.dense.macs / 2
        assert line["failure"] is None


def test_the_result_says_what_happened(done: Done) -> None:
    result = read(done.out / "result.json")
    lines = ledger_of(done.out)
    assert result == json.loads(json.dumps(done.result.summary))
    assert (result["agent"], result["budget"], result["max_drop"]) == ("surrogate", "macs<=50%", None)
    assert result["evaluations"] == len(lines)
    assert result["candidates"] == 6
    assert result["stopped"] is None
    assert result["seconds"] > result["proposing_seconds"] > 0
    assert len(set(result["proposed"])) == result["candidates"]
    dense = measure(done.task.model, done.task.val_batches(500), top1, cross_entropy).summary("dense")
    assert result["dense"]["accuracy"] == dense.accuracy
    assert result["dense"]["accuracy_se"] == pytest.approx(dense.accuracy_se)
    assert result["dense"]["macs"] == count(done.task.model, done.task.example_input).cost.macs
    best = max(lines, key=lambda line: (line["measurements"][-1]["accuracy"], -line["macs"]))
    assert result["picked"] == {
        **{key: best[key] for key in ("id", "arm", "policy", "removed", "macs", "params", "bytes")},
        "level": 0,
        **{key: best[key] for key in ("activations", "nonzero_params", "nonzero_macs")},
        **{key: best["measurements"][-1][key] for key in ("accuracy", "accuracy_se", "fidelity")},
        "rule": "most accurate within macs<=50%",
    }


def test_the_front_is_that_of_all_candidates(done: Done) -> None:
    document = read(done.out / "front.json")
    members = front(done.result.candidates)
    reference = {"accuracy": 0.0, **{key: done.result.dense[key] for key in ("macs", "params")}}
    assert document["objectives"] == ["accuracy", "macs", "params"]
    assert document["reference"] == reference
    assert document["hypervolume"] == pytest.approx(hypervolume(members, reference))
    assert [point["id"] for point in document["points"]] == [member.id for member in members]
    assert list(document["points"][0]) == [
        *("id", "arm", "policy", "accuracy", "accuracy_se", "macs", "params", "bytes"),
        *("activations", "nonzero_params", "nonzero_macs", "fidelity"),
    ]
    assert done.result.front == members


def test_in_short_it_is_one_json_object(done: Done) -> None:
    short = json.loads(json.dumps(done.result.to_dict()))
    assert list(short) == ["dense", "candidates", "front", "picked", "run"]
    assert list(short["dense"]) == ["accuracy", "macs", "params"]
    assert list(short["picked"]) == ["policy", "accuracy", "macs", "params", "fidelity"]
    assert short["candidates"] == 6
    assert short["run"] == str(done.out)


# ------------------------------------------------------------------------------------------------- what it compares


def test_uniform_at_the_picked_candidates_cost_is_evaluated(done: Done) -> None:
    """The least uniform sparsity that costs no more: no other multiple of the highest counts comes nearer."""
    picked, uniform = done.result.summary["picked"], done.result.summary["uniform"]
    structure = analyse(done.task.model, done.task.example_input)
    costs = CostModel(done.task.model, done.task.example_input, structure)
    highest = np.array([group.count(0.9) for group in structure])
    line = [np.rint(share * highest).astype(np.int64) for share in np.linspace(0, 1, 4001)]
    nearest = max(macs for counts in line if (macs := costs.cost(counts).macs) <= picked["macs"])
    assert uniform["macs"] == nearest
    assert uniform["id"] in {entry["id"] for entry in ledger_of(done.out)}


def test_the_random_control_has_the_stated_size(done: Done) -> None:
    control = done.result.summary["random"]
    randoms = [line for line in ledger_of(done.out) if line["arm"] == "random"]
    assert control["size"] == len(randoms) == 2
    assert control["best"]["accuracy"] == max(line["measurements"][-1]["accuracy"] for line in randoms)


def test_the_gap_between_predicted_and_joint_accuracy(done: Done) -> None:
    report = SensitivityReport.load(done.out / "sensitivity.json")
    picked = done.result.summary["picked"]
    lost = sum(report.curve(name).drop_at(removed) for name, removed in picked["removed"].items())
    joint = next(c for c in done.result.candidates if c.id == picked["id"]).measurements[0]
    predicted = done.result.summary["predicted"]
    assert joint.fidelity == "reconstructed"
    assert predicted["accuracy"] == pytest.approx(max(0.0, report.dense.accuracy - lost))
    assert predicted["gap"] == pytest.approx(joint.accuracy - predicted["accuracy"])


def test_the_picked_network_reloads_to_the_accuracy_that_was_measured(done: Done) -> None:
    picked = done.result.summary["picked"]
    loaded = export.load(done.out / "pruned", build=Net)
    assert count(loaded, done.task.example_input).cost.macs == picked["macs"]
    measured = measure(loaded, done.task.val_batches(33), top1, cross_entropy).summary("short")
    assert measured.accuracy == picked["accuracy"]
    assert export.recipe_of(done.out / "pruned")["measured"]["accuracy"] == picked["accuracy"]
    program = torch.export.load(done.out / "pruned" / "program.pt2").module()
    images, targets = samples(101, 2)
    with torch.no_grad():
        assert float(top1(program(images), targets).double().mean()) == pytest.approx(picked["accuracy"])


def likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    """A score in which every rounding shows, `(n,)`."""
    return outputs.softmax(1).gather(1, targets[:, None])[:, 0]


def test_final_numbers_are_in_float32_and_the_search_in_its_own_precision(tmp_path: Path, light: None) -> None:
    out, task = tmp_path / "run", make_task(metric=likelihood)
    result = run(out, task, precision="bfloat16", sensitivity=(), candidates=4, max_drop=0.9)
    written = read(out / "result.json")
    ledger = {c.id: c for c in result.candidates}

    def in_float32(model: nn.Module, fidelity: str) -> Measurement:
        return measure(model, task.val_batches(33), likelihood, cross_entropy).summary(fidelity)

    beside = {"picked": written["picked"], "uniform": written["uniform"], "random": written["random"]["best"]}
    for point in beside.values():
        own = in_float32(result.network(ledger[point["id"]]).model, "short")
        assert point["accuracy"] == pytest.approx(own.accuracy, abs=1e-7)
        assert point["accuracy_se"] == pytest.approx(own.accuracy_se, abs=1e-7)
        assert point["fidelity"] == "short"
    rounding = {abs(point["accuracy"] - ledger[point["id"]].accuracy) for point in beside.values()}
    assert 2e-6 < max(rounding) < 0.01
    assert len(rounding) > 1
    reloaded = in_float32(export.load(out / "pruned", build=Net), "short")
    assert written["picked"]["accuracy"] == pytest.approx(reloaded.accuracy, abs=1e-7)
    dense, searched = in_float32(task.model, "dense"), written["dense_as_searched"]
    for key in ("accuracy", "accuracy_se", "loss", "loss_se"):
        assert written["dense"][key] == pytest.approx(getattr(dense, key), abs=1e-7)
        assert searched[key] == getattr(result._prepared.bench.dense.summary("dense"), key)
    assert searched["precision"] == "bfloat16 channels-last"
    assert abs(searched["accuracy"] - dense.accuracy) > 2e-6
    points = read(out / "front.json")["points"]
    assert [point["accuracy"] for point in points] == [ledger[point["id"]].accuracy for point in points]
    assert open_run(out, make_task(metric=likelihood)).summary == written
    other = next(c for c in result.candidates if c.id != written["picked"]["id"])
    result.choose(result.network(other))
    chosen = read(out / "result.json")
    assert chosen["picked"]["accuracy"] == result.network(other).accuracy
    assert chosen["uniform"]["accuracy"] == result.network(ledger.get(chosen["uniform"]["id"], other)).accuracy


def test_a_drop_counts_from_the_dense_network_in_the_precision_of_the_candidates(tmp_path: Path, light: None) -> None:
    given: dict[str, Any] = {"precision": "bfloat16", "sensitivity": (), "candidates": 3, "finetune_steps": 0}
    result = run(tmp_path / "run", make_task(metric=likelihood), **given)
    best = max(result.candidates, key=lambda candidate: candidate.accuracy)
    drop = result.summary["dense_as_searched"]["accuracy"] - best.accuracy
    assert result.pick(max_drop=drop).candidate.id == best.id
    with pytest.raises(ConfigError, match="none of"):
        result.pick(max_drop=drop - 1e-7)


def test_in_float32_the_result_is_what_the_ledger_says(done: Done) -> None:
    assert "dense_as_searched" not in done.result.summary
    ledger = {line["id"]: line["measurements"][-1] for line in ledger_of(done.out)}
    for point in (done.result.summary["uniform"], done.result.summary["random"]["best"]):
        assert {key: point[key] for key in ("accuracy", "accuracy_se", "fidelity")} == {
            key: ledger[point["id"]][key] for key in ("accuracy", "accuracy_se", "fidelity")
        }


# ------------------------------------------------------------------------------------------- what it leaves alone


def test_the_input_network_and_the_test_set_are_untouched(done: Done) -> None:
    for name, tensor in done.task.model.state_dict().items():
        assert torch.equal(done.before[name], tensor)
    assert [p.name for p in done.out.iterdir() if p.name == "final.json"] == []


def test_no_sample_of_the_test_split_is_read(tmp_path: Path, light: None) -> None:
    split = SealedSplit()
    task = make_task(test=split)
    passes = split.passes  # the check that splits do not overlap
    run(tmp_path / "run", task, candidates=2, sensitivity=(0.5,)).pick().finetune(epochs=1)
    assert split.passes == passes
    with pytest.raises(TestSetError):
        _ = task.test


# -------------------------------------------------------------------------------------------------------- watching it


def test_how_what_was_known_early_ranks_the_candidates(done: Done, tmp_path: Path, light: None) -> None:
    assert done.result.summary["fidelity"] == []  # too few
    result = run(tmp_path / "run", candidates=10, control=2, sensitivity=(0.5,))
    own = [c for c in result.candidates if c.arm != "uniform"]
    assert len(own) >= FEWEST
    found = {one["known"]: one for one in result.summary["fidelity"]}
    assert list(found) == ["predicted", "sensitivity", "reconstructed"]
    assert {(one["last"], one["candidates"]) for one in found.values()} == {("short", len(own))}
    expected = kendall([c.measurements[0].accuracy for c in own], [c.accuracy for c in own])
    assert found["reconstructed"]["all"] == [pytest.approx(value, abs=1e-4) for value in expected]


def test_it_says_first_what_can_be_reached_and_what_it_will_cost(done: Done) -> None:
    table, precision, preview, predicted, work = done.watcher.lines
    rows = table.splitlines()
    macs = [cell.replace(",", "") for cell in rows[1].split()]
    dense = done.result.dense["macs"]
    assert macs[:2] == ["macs", str(dense)]
    assert macs[-1] == f"{dense / 2:.0f}"
    assert rows[-1] == "3 groups can be pruned; locked: fc (its elements are the network's output)"
    assert precision == "candidates are measured in float32 channels-last (small: not timed)"
    assert preview.startswith("at most 9 sensitivity cells of ")
    assert " and 10 evaluations of " in preview
    assert predicted.startswith("predicted the loss of every policy from moments in ")
    assert work.startswith("9 cells took ")


def test_it_says_that_data_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbench, "_IN_MEMORY", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    watcher = Watcher()
    run(tmp_path / "run", candidates=1, control=0, sensitivity=(), progress=watcher)
    assert watcher.lines[2].startswith("calibration images are read again for each network: ")
    assert watcher.lines[3].startswith("validation samples are read again for each network: ")


def test_every_cell_and_candidate_is_a_step(done: Done) -> None:
    searched = sum(c.arm == "search" for c in done.result.candidates)  # the others of its six, a control had before
    assert [stage for stage, *_ in done.watcher.steps] == ["sensitivity"] * 9 + ["search"] * (1 + 2 + searched)
    assert [number for stage, number, _ in done.watcher.steps if stage == "search"] == list(range(1, 4 + searched))
    last = done.watcher.steps[-1][2]
    best = max(c.accuracy for c in done.result.candidates if c.number < 3 + searched)
    assert last.startswith(f"best {best:.4f}; surrogate accuracy 0.")
    assert last.endswith("of the MACs")


def test_the_tracker_hears_of_every_candidate_once_and_of_the_end(done: Done) -> None:
    calls = done.tracker.calls
    assert (calls[0], calls[-1]) == ("start", "finish")
    assert [c.id for c in done.tracker.candidates] == [c.id for c in done.result.candidates]
    finished = done.tracker.finished
    assert finished["status"] == "FINISHED"
    assert finished["metrics"]["picked.accuracy"] == done.result.summary["picked"]["accuracy"]
    assert {"config.json", "sensitivity.json", "ledger.jsonl", "front.json", "report.html"} <= {
        path.name for path in finished["artifacts"]
    }
    assert isinstance(finished["model"], nn.Module)


def test_how_many_decisions_had_no_choice_is_told(done: Done, tmp_path: Path, light: None) -> None:
    """One of three groups is bound to four of its eight elements, and the budget binds nobody."""
    tracker, watcher = Probe(), Watcher()
    bounds = {"head": {"min": 0.5, "max": 0.5}}
    given: dict[str, Any] = {"agent": "amc", "sensitivity": (), "finetune_steps": 0, "candidates": 4, "bounds": bounds}
    result = run(tmp_path / "run", budget="macs<=100%", tracker=tracker, progress=watcher, **given)
    assert result.summary["saturated"] == read(tmp_path / "run" / "result.json")["saturated"] == 1 / 3
    assert "33% of the decisions had no choice" in watcher.lines
    assert tracker.finished["metrics"]["saturated"] == 1 / 3
    assert done.result.summary["saturated"] is None  # whole policies decide nothing group by group
    assert not any("had no choice" in line for line in done.watcher.lines)
    assert "saturated" not in done.tracker.finished["metrics"]


def test_the_tracker_is_told_whether_it_was_stopped_or_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = Probe(kill_at=1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", tracker=killed, sensitivity=())
    assert killed.finished["status"] == "KILLED"

    def broken(self: Pipeline, policy: Policy, *, final: bool = False, rival: Policy | None = None) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(Pipeline, "recovered", broken)
    failed = Probe()
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "failed", tracker=failed, sensitivity=())
    assert failed.finished["status"] == "FAILED"
    assert failed.finished["model"] is None


# ------------------------------------------------------------------------------------------- repeating and resuming


def test_the_same_seed_gives_the_same_ledger_and_another_does_not(done: Done, tmp_path: Path, light: None) -> None:
    again = run(tmp_path / "again")
    assert ledger_of(tmp_path / "again") == ledger_of(done.out)
    assert again.summary["picked"] == done.result.summary["picked"]
    run(tmp_path / "other", seed=4)
    assert ledger_of(tmp_path / "other") != ledger_of(done.out)


def test_killed_anywhere_and_started_again_it_ends_with_the_same_ledger(
    done: Done, tmp_path: Path, light: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During the analysis, in each arm, in the middle of a write, and while it concludes."""
    out, whole = tmp_path / "run", ledger_of(done.out)

    def in_the_analysis(stage: str, number: int) -> None:
        if (stage, number) == ("sensitivity", 4):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, progress=Watcher(in_the_analysis))
    cells = [cell for row in SensitivityReport.load(out / "sensitivity.json").groups for cell in row.cells]
    assert len(cells) == 4
    for kill_at in (1, 3, 4, 6, 8):
        tracker = Probe(kill_at)
        with pytest.raises(KeyboardInterrupt):
            run(out, tracker=tracker)
        assert ledger_of(out) == whole[:kill_at]  # nothing of it was lost
        assert [c.id for c in tracker.candidates] == [line["id"] for line in whole[:kill_at]]
        with (out / "ledger.jsonl").open("a") as file:
            file.write('{"number": 7, "id": "torn')
    with pytest.raises(RunError, match=r"has no result\.json"):
        open_run(out, make_task())

    def killed(self: PrunedNetwork, folder: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PrunedNetwork, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(out)
    assert not (out / "result.json").exists()
    watcher = Watcher()
    result = run(out, progress=watcher)
    assert ledger_of(out) == whole
    timed: dict[str, Any] = {"seconds": 0, "proposing_seconds": 0, "latency": {}}
    assert result.summary | timed == done.result.summary | timed
    assert read(out / "front.json") == read(done.out / "front.json")
    assert cells_of(out) == cells_of(done.out)
    assert watcher.lines[0] == f"going on with {out}: {len(whole)} candidates are there"


class OutOfTurn:
    """An executor that has several under way and finishes the newest first."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self.pipeline: Runs | None = None
        self.under_way: list[Work] = []
        self.probes = 0

    def start(self, pipeline: Runs) -> None:
        self.pipeline = pipeline

    def submit(self, work: Work) -> None:
        self.probes += isinstance(work, CellProbe)
        self.under_way.append(work)

    def finished(self) -> Outcome:
        assert self.pipeline is not None
        return self.pipeline(self.under_way.pop())

    def close(self) -> None:
        self.pipeline = None
        self.under_way.clear()


@pytest.mark.parametrize(
    "agent", ["surrogate", "tpe", "nsga2", "amc", "ppo", "analytic", "spdy", "evolution", "legr", "random", "cmaes"]
)
def test_with_several_under_way_it_is_the_same_search_whoever_is_faster_and_wherever_it_is_killed(
    agent: str, tmp_path: Path, light: None
) -> None:
    def ledger(name: str) -> list[dict[str, Any]]:
        return sorted(ledger_of(tmp_path / name), key=lambda line: line["number"])

    grid = {"surrogate": (0.5,), "tpe": (0.5,), "random": (0.5,), "spdy": (0.25, 0.75)}.get(agent, ())
    settings: dict[str, Any] = {"agent": agent, "finetune_steps": 0, "candidates": 9, "sensitivity": grid}
    executor = OutOfTurn(4)
    whole = run(tmp_path / "whole", executor=executor, **settings)
    assert bool(executor.probes) == bool(grid)
    assert executor.pipeline is None  # it was closed
    assert read(tmp_path / "whole" / "config.json")["parallel"] == {"at_once": 4}
    run(tmp_path / "in_turn", executor=InProcess(at_once=4), **settings)
    assert ledger("in_turn") == ledger("whole")
    if grid:
        assert cells_of(tmp_path / "in_turn") == cells_of(tmp_path / "whole")
    for kill_at in (2, 5, 9):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", tracker=Probe(kill_at), executor=OutOfTurn(4), **settings)
    result = run(tmp_path / "killed", **settings)  # without workers, it goes on with as many under way
    assert ledger("killed") == ledger("whole")
    assert result.summary["picked"] == whole.summary["picked"]
    assert [line["number"] for line in ledger("whole")] == list(range(len(ledger("whole"))))


def test_on_a_kept_study_it_goes_on_wherever_it_is_killed_and_every_candidate_is_a_trial(
    tmp_path: Path, light: None
) -> None:
    url, out = f"sqlite:///{tmp_path / 'trials.db'}", tmp_path / "run"
    kept = {"storage": url, "study": "s"}
    shared: dict[str, Any] = {"agent": "tpe", "agent_settings": kept, "finetune_steps": 0, "sensitivity": ()}
    for kill_at in (4, 6):
        with pytest.raises(KeyboardInterrupt):
            run(out, tracker=Probe(kill_at), executor=OutOfTurn(2), **shared)
    run(out, **shared)
    assert url not in (out / "config.json").read_text()  # it may hold a password
    ledger = {line["id"]: line["arm"] for line in ledger_of(out)}
    assert len(ledger) == len(ledger_of(out))
    storage = optuna.storages.RDBStorage(url)
    trials = optuna.load_study(study_name="s", storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    trials = [trial for trial in trials if trial.state != optuna.trial.TrialState.WAITING]  # which nobody asked for
    assert {trial.user_attrs["run"] for trial in trials} == {read(out / "config.json")["name"]}
    trials = [trial for trial in trials if "again" not in trial.user_attrs]
    assert {trial.state for trial in trials} == {optuna.trial.TrialState.COMPLETE}
    told = {trial.user_attrs["policy"] for trial in trials}
    assert len(told) == SETTINGS["candidates"]
    assert {policy for policy, arm in ledger.items() if arm == "search"} <= told <= set(ledger)  # uniform was tried too


@pytest.mark.parametrize("change", [{"warm_start": False}, {"drawn": 3}])
def test_what_an_agent_is_made_with_is_part_of_the_search(tmp_path: Path, light: None, change: dict[str, Any]) -> None:
    out = tmp_path / "run"
    run(out, candidates=1, control=0, sensitivity=())
    with pytest.raises(RunError, match=f"its {next(iter(change))} is"):
        run(out, candidates=1, control=0, sensitivity=(), agent_settings=change)


def test_so_is_what_its_name_brings_in_whatever_order(tmp_path: Path, light: None) -> None:
    out, settings = tmp_path / "run", {"candidates": 1, "control": 0, "sensitivity": ()}
    first = run(out, agent="tpe:warm_start=false:startup=3", **settings)
    assert first.summary["agent"] == "tpe:startup=3:warm_start=false"
    assert read(out / "config.json")["agent"]["startup"] == 3
    assert run(out, agent="tpe:startup=3:warm_start=false", **settings).summary == first.summary
    with pytest.raises(RunError, match="its agent is 'tpe:startup=3:warm_start=false', not 'tpe:warm_start=false'"):
        run(out, agent="tpe:warm_start=false", **settings)


def test_settings_that_the_agent_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no setting of the agent random 'warm_start'"):
        run(tmp_path / "run", agent="random", agent_settings={"warm_start": False})
    with pytest.raises(ConfigError, match="make yours with them"):
        run(tmp_path / "run", agent=RandomAgent(), agent_settings={"warm_start": False})


LADDER: dict[str, Any] = {"candidates": 12, "control": 2, "promote": 0.5, "sensitivity": (), "recover": "recalibrated"}


@pytest.mark.parametrize("agent", ["tpe", "nsga2"])
def test_the_best_are_fine_tuned_after_the_search_and_the_pick_is_one_of_them(
    agent: str, tmp_path: Path, light: None
) -> None:
    result = run(tmp_path / "run", agent=agent, **LADDER)
    ground = [Candidate.from_dict(line | {"seconds": 0}) for line in ledger_of(tmp_path / "run")]
    lines = [json.loads(line) for line in (tmp_path / "run" / "finalists.jsonl").read_text().splitlines()]
    finalists = [Candidate.from_dict(line) for line in lines]
    assert {c.fidelity for c in ground} == {"recalibrated"}
    assert {c.fidelity for c in finalists} == {"short"}
    promoted = [c for c in finalists if c.arm == "search"]
    own = sorted((c for c in ground if c.arm == "search"), key=lambda c: -c.accuracy)
    assert len(promoted) == 6
    if agent == "tpe":
        assert min(c.at("recalibrated").accuracy for c in promoted) >= own[6].accuracy  # type: ignore[union-attr]
    else:
        members = {c.id for c in front(own)}  # of accuracy, MACs and parameters, as its agent has it
        assert members <= {c.id for c in promoted} or members >= {c.id for c in promoted}
    assert sum(c.arm == "random" for c in finalists) == 1
    assert finalists[0].arm == "uniform"
    steps = [{"steps": 0, "candidates": len(ground)}, {"steps": 2, "candidates": len(finalists)}]
    assert result.summary["rungs"] == steps
    assert result.summary["picked"]["id"] in {c.id for c in finalists}
    assert result.summary["picked"]["fidelity"] == result.summary["uniform"]["fidelity"] == "short"
    assert {c.id: c.fidelity for c in result.candidates if c.id not in {f.id for f in finalists}}
    assert {c.fidelity for c in result.front} == {"short"}
    again = open_run(tmp_path / "run", make_task())
    assert again.pick().measured == result.pick().measured
    behind = again.network(ground[-1])
    assert behind.measured.fidelity == "recalibrated"
    again.choose(behind)  # beside a uniform of the same fidelity
    assert again.summary["uniform"]["fidelity"] == "recalibrated"
    final = open_run(tmp_path / "run", make_task()).finalize(1, tracker=NullTracker())
    assert final.candidate.id == behind.candidate.id


class Kept(OutOfTurn):
    """Counts its pipelines, and how often it was closed."""

    def __init__(self) -> None:
        super().__init__(4)
        self.pipelines: list[Runs] = []
        self.closed = 0

    def start(self, pipeline: Runs) -> None:
        super().start(pipeline)
        self.pipelines.append(pipeline)

    def close(self) -> None:
        super().close()
        self.closed += 1


@pytest.mark.parametrize("settings", [LADDER, LADDER | {"candidates": 24, "promote": "auto"}])
def test_all_rungs_share_one_executor(settings: dict[str, Any], tmp_path: Path, light: None) -> None:
    """It takes a pipeline a rung, and is closed once, in the end: its workers need not start again."""
    kept = Kept()
    result = run(tmp_path / "run", executor=kept, **settings)
    assert len(kept.pipelines) >= len(result.summary["rungs"]) >= 2
    assert kept.closed == 1


def test_finalists_that_all_diverge_leave_the_pick_to_the_search(
    tmp_path: Path, light: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(self: Pipeline, *_: Any) -> None:
        raise DivergedError("the loss is nan at fine-tuning step 1 of 2")

    monkeypatch.setattr(Pipeline, "train", diverging)
    watcher = Watcher()
    result = run(tmp_path / "run", progress=watcher, **LADDER)
    assert "fine-tuning for 2 steps is left out: fewer than two candidates bore it" in watcher.lines
    assert result.summary["picked"]["fidelity"] == "recalibrated"
    again = run(tmp_path / "again", **LADDER)
    assert again.summary["picked"] == result.summary["picked"]


def test_a_run_of_another_version_is_refused(tmp_path: Path, light: None) -> None:
    run(tmp_path / "run", candidates=2, control=0, sensitivity=(), finetune_steps=0)
    config = read(tmp_path / "run" / "config.json")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"format": 2}))
    with pytest.raises(RunError, match=r"is of another version of autoprune \(format 2, not 3\)"):
        open_run(tmp_path / "run", make_task())


def test_a_ladder_killed_anywhere_ends_the_same(tmp_path: Path, light: None) -> None:
    whole = run(tmp_path / "whole", **LADDER)

    def finalists(name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (tmp_path / name / "finalists.jsonl").read_text().splitlines()]
        return [line | {"seconds": 0} for line in lines]

    for kill_at in (4, 16, 19):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", tracker=Probe(kill_at), **LADDER)
    result = run(tmp_path / "killed", **LADDER)
    assert ledger_of(tmp_path / "killed") == ledger_of(tmp_path / "whole")
    assert finalists("killed") == finalists("whole")
    assert result.summary["picked"] == whole.summary["picked"]
    watcher = Watcher()
    assert run(tmp_path / "killed", progress=watcher, **LADDER).summary == result.summary
    assert watcher.lines[-1].endswith("holds this search's result already")


@pytest.mark.parametrize("agent", ["surrogate", "evolution"])
def test_a_race_measures_less_and_picks_as_well(agent: str, tmp_path: Path, light: None) -> None:
    given: dict[str, Any] = {"candidates": 10, "sensitivity": (), "finetune_steps": 0, "recover": "recalibrated"}
    given["agent"] = agent
    hard = make_task(val=samples(1200, 2))
    watcher = Watcher()
    raced = run(tmp_path / "raced", hard, race=True, progress=watcher, **given)
    whole = run(tmp_path / "whole", hard, **given)
    stopped = [c for c in raced.candidates if c.stopped]
    uniform = next(c for c in raced.candidates if c.arm == "uniform")
    known = {c.id: c for c in raced.candidates}
    assert stopped
    assert all(c.rival is not None and c.accuracy < known[c.rival].accuracy for c in stopped)
    measured = sum(c.measurements[-1].samples or 1200 for c in raced.candidates) / (1200 * len(known))
    said = f"{len(stopped)} of {len(known)} were clearly worse than their rival early: {measured:.0%} of their samples"
    assert f"{said} were measured" in watcher.lines
    assert ({c.rival for c in raced.candidates} > {None, uniform.id}) == (agent == "evolution")
    exact = {c.id: c for c in whole.candidates}
    same = [c for c in raced.candidates if c.measurements[-1].samples is None and c.id in exact]
    assert all(c.accuracy == pytest.approx(exact[c.id].accuracy) for c in same)
    assert raced.summary["picked"]["id"] not in {c.id for c in stopped}
    with pytest.raises(ConfigError, match="`race` compares at one cost"):
        run(tmp_path / "several", race=True, **{**given, "agent": "nsga2"})


@pytest.mark.parametrize("agent", ["tpe", "amc"])
def test_without_a_budget_the_second_protocol_trades_error_for_size(agent: str, tmp_path: Path, light: None) -> None:
    given: dict[str, Any] = {"agent": agent, "budget": None, "sensitivity": (), "finetune_steps": 0, "candidates": 8}
    result = run(tmp_path / "run", protocol="accuracy", **given)
    macs = {c.macs for c in result.candidates if c.arm == "search"}
    assert len(macs) > 3  # they do not fill a budget
    best = max(result.candidates, key=lambda c: -(1 - c.accuracy) * math.log(c.macs))
    assert result.summary["picked"]["id"] == best.id
    assert result.summary["picked"]["rule"] == "highest -error * log(MACs)"
    with pytest.raises(ConfigError, match="a search needs an aim: give a budget"):
        run(tmp_path / "other", **given)
    with pytest.raises(ConfigError, match="protocol accuracy is for agents with one objective"):
        run(tmp_path / "other", protocol="accuracy", **(given | {"agent": "nsga2"}))


@pytest.mark.parametrize(
    ("protocol", "budget", "stem", "rule"),
    [
        ("accuracy", None, 3, "highest -error * log(MACs)"),
        ("accuracy", "macs<=60%", 8, "highest -error * log(MACs) within macs<=60%"),
        ("accuracy-params", None, 8, "highest -error * log(parameters)"),
    ],
)
def test_the_second_protocol_picks_by_its_reward(
    protocol: str, budget: str | None, stem: int, rule: str, tmp_path: Path, formula: Callable[[Formula], None]
) -> None:
    """Of five policies: 0 is the most accurate, and 6 is so within 60 % of the MACs; 8 is the knee, 10 the cheapest."""
    accuracies = {0: 0.505, 3: 0.504, 6: 0.47, 8: 0.465, 10: 0.2}
    formula(lambda removed, cost: accuracies.get(removed["stem"], 0.1) if removed["head"] == 4 else 0.1)
    agent = Picky([Policy({"stem": removed / 12, "head": 0.5}) for removed in accuracies])
    given: dict[str, Any] = {"budget": budget, "sensitivity": (), "control": 0, "finetune_steps": 0}
    result = run(tmp_path / "run", agent=agent, protocol=protocol, **given)
    picked = result.summary["picked"]
    assert picked["removed"] == {"stem": stem, "conv1": 0, "head": 4}
    assert picked["rule"] == rule
    assert result.pick().candidate.id == picked["id"]
    asked = result.pick(budget="macs<=60%")
    assert (asked.candidate.removed["stem"], asked.rule) == (6, "most accurate within macs<=60%")
    assert result.pick(max_drop=0.9).candidate.removed["stem"] == 10


LEARNT: dict[str, Any] = LADDER | {"agent": "tpe", "candidates": 24, "promote": "auto"}


def test_who_is_promoted_is_learnt_from_some(tmp_path: Path, light: None) -> None:
    watcher = Watcher()
    result = run(tmp_path / "run", progress=watcher, **LEARNT)
    (said,) = (line for line in watcher.lines if "rank as before" in line)
    own = [c for c in result.candidates if c.arm == "search"]
    finalists = (tmp_path / "run" / "finalists.jsonl").read_text().splitlines()
    climbed = {line["id"] for line in map(json.loads, finalists) if line["arm"] == "search"}
    ranked = best(own, 24, lambda c: c.at("recalibrated").accuracy)  # type: ignore[union-attr]
    tried = sample(ranked)
    number = int(re.search(r"(\d+)% go on", said)[1]) * 24 // 100  # type: ignore[index]
    assert said.startswith(f"fine-tuned, {len(tried)} candidates rank as before with Kendall's tau ")
    promoted = result.summary["promoted"]
    assert [promoted[key] for key in ("known", "steps", "last", "last_steps", "candidates")] == [
        *("recalibrated", 0, "short", 2, len(tried))
    ]
    tau, low, high = promoted["all"]
    assert f"tau {tau:.2f} ({low:.2f} to {high:.2f}; of the better half {promoted['better'][0]:.2f}): " in said
    assert promoted["relied_on"] == min(low, promoted["better"][0])
    assert (promoted["share"], promoted["holds"]) == promotion(promoted["relied_on"], len(own))
    assert said.endswith(f"{promoted['share']:.0%} go on")
    assert climbed >= {c.id for c in [*tried, *ranked[:number]]}
    assert len(climbed) <= len(tried) + number + 1
    assert result.summary["picked"]["fidelity"] == "short"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", tracker=Probe(32), **LEARNT)
    again = run(tmp_path / "killed", **LEARNT)
    assert again.summary["picked"] == result.summary["picked"]
    assert len((tmp_path / "killed" / "finalists.jsonl").read_text().splitlines()) == len(finalists)


def test_without_time_for_two_finalists_the_pick_is_of_the_search(
    tmp_path: Path, light: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    slow = Watcher(lambda stage, number: clock.forward(10.0 if stage == "search" else 1000.0))
    result = run(tmp_path / "run", progress=slow, time_limit=300.0, **LADDER)
    assert result.summary["rungs"] == [{"steps": 0, "candidates": len(result.candidates)}]
    assert result.summary["picked"]["fidelity"] == "recalibrated"
    assert result.summary["stopped"] == "time limit"
    monkeypatch.undo()
    whole = run(tmp_path / "run", **LADDER)
    assert [rung["steps"] for rung in whole.summary["rungs"]] == [0, 2]


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def forward(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def test_uniform_at_the_same_cost_may_be_the_better_pick_and_killing_there_changes_nothing(
    tmp_path: Path, formula: Callable[[Formula], None]
) -> None:
    """The pick that was written is the one that the ledger gives, whenever one asks."""

    def cheap_uniform_is_best(removed: Mapping[str, int], cost: Cost) -> float:
        uniform = np.ptp([removed["stem"] / 12, removed["conv1"] / 10, removed["head"] / 8]) < 0.15
        return 0.95 if uniform and cost.macs < 60_000 else 0.8 - cost.macs / 1e6

    formula(cheap_uniform_is_best)
    whole = run(tmp_path / "whole", sensitivity=(), agent="random")
    assert whole.summary["picked"]["arm"] == "uniform"
    assert whole.summary["picked"]["accuracy"] == max(c.accuracy for c in whole.candidates)
    assert whole.pick().candidate.id == whole.summary["picked"]["id"]
    assert whole.summary["uniform"]["id"] == whole.summary["picked"]["id"]
    first_after_the_arms = 1 + 2 + 6 + 1
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", sensitivity=(), agent="random", tracker=Probe(first_after_the_arms))
    again = run(tmp_path / "killed", sensitivity=(), agent="random")
    assert ledger_of(tmp_path / "killed") == ledger_of(tmp_path / "whole")
    assert again.summary["picked"] == whole.summary["picked"]


def test_a_finished_folder_answers_without_evaluating(done: Done, monkeypatch: pytest.MonkeyPatch, light: None) -> None:
    def forbidden(*_: Any) -> Any:
        raise AssertionError("it was finished")

    monkeypatch.setattr(Pipeline, "recovered", forbidden)
    monkeypatch.setattr(search_module, "analyse_sensitivity", forbidden)
    before = {path: path.stat().st_mtime_ns for path in done.out.rglob("*")}
    tracker, watcher = Probe(), Watcher()
    again = run(done.out, tracker=tracker, progress=watcher)
    assert again.summary == json.loads(json.dumps(done.result.summary))
    assert again.candidates == done.result.candidates
    assert tracker.calls == []
    assert watcher.lines == [f"{done.out} holds this search's result already"]
    assert {path: path.stat().st_mtime_ns for path in done.out.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"budget": "macs<=60%"}, "budget"),
        ({"max_drop": 0.1}, "max_drop"),
        ({"agent": "random"}, "agent"),
        ({"candidates": 7}, "candidates"),
        ({"seed": 4}, "seed"),
        ({"finetune_steps": 1}, "finetune_steps"),
        ({"shared_steps": 1}, "shared_steps"),
        ({"bounds": {"stem": {"lock": True}}}, "bounds"),
    ],
)
def test_another_search_does_not_get_the_folder(done: Done, change: dict[str, Any], key: str) -> None:
    before = (done.out / "ledger.jsonl").read_bytes(), (done.out / "config.json").read_bytes()
    with pytest.raises(RunError, match=rf"holds another search: its {key} is .*, not .*; name another folder") as error:
        run(done.out, **change)
    assert one_line(error)
    assert ((done.out / "ledger.jsonl").read_bytes(), (done.out / "config.json").read_bytes()) == before


@pytest.mark.parametrize("key", ["weights", "data", "metric", "loss", "augment"])
def test_another_task_does_not_get_the_folder(done: Done, key: str) -> None:
    changes: dict[str, Any] = {
        "data": {"val": samples(101, 7)},
        "metric": {"metric": lambda outputs, targets: (outputs.argmax(1) == targets).float()},
        "loss": {"loss": lambda outputs, targets: 2 * cross_entropy(outputs, targets)},
        "augment": {"augment": lambda inputs, generator: inputs},
    }.get(key, {})
    task = make_task(**changes)
    if key == "weights":
        other = task.fresh_model()
        other.get_parameter("fc.bias").data[0] += 0.1
        task = make_task(model=other)
    with pytest.raises(RunError, match=f"holds another search: its {key} is"):
        run(done.out, task)


def test_a_budget_that_is_out_of_reach_does_not_block_its_folder(tmp_path: Path, light: None) -> None:
    with pytest.raises(InfeasibleBudgetError) as error:
        run(tmp_path / "run", budget="macs<=1%")
    assert one_line(error)
    corrected = run(tmp_path / "run", candidates=1, control=0, sensitivity=())
    assert corrected.summary["budget"] == "macs<=50%"


# ----------------------------------------------------------------------------------------------------- other questions


def test_max_drop_alone_looks_for_the_cheapest_within_it(tmp_path: Path, formula: Callable[[Formula], None]) -> None:
    formula(lambda removed, cost: 0.95 - removed["stem"] / 12 * 0.5 - removed["head"] / 8 * 0.01)
    task = make_task()
    dense = measure(task.model, task.val_batches(), top1, cross_entropy).summary("dense").accuracy
    result = run(tmp_path / "run", task, budget=None, max_drop=0.1, candidates=25, sensitivity=())
    picked = result.summary["picked"]
    assert picked["rule"] == "cheapest within a drop of 0.1"
    assert picked["accuracy"] >= dense - 0.1
    assert picked["macs"] < 0.7 * result.dense["macs"]
    within = [c for c in result.candidates if c.accuracy >= dense - 0.1 - 1e-9]
    assert picked["macs"] == min(c.macs for c in within)
    assert result.summary["max_drop"] == 0.1
    assert result.summary["budget"] is None


def test_nothing_within_the_drop_falls_back_and_says_so(tmp_path: Path, formula: Callable[[Formula], None]) -> None:
    formula(lambda removed, cost: 0.5 + cost.macs / 1e6)
    result = run(tmp_path / "run", max_drop=0.01, sensitivity=())
    picked = result.summary["picked"]
    assert picked["rule"] == "most accurate found; none is within a drop of 0.01"
    assert picked["accuracy"] == max(c.accuracy for c in result.candidates)
    with pytest.raises(ConfigError, match=r"none of \d+ candidates .*stays within max_drop=0\.01"):
        result.pick()


def test_budget_and_drop_hold_together(tmp_path: Path, formula: Callable[[Formula], None]) -> None:
    formula(lambda removed, cost: 0.95 + removed["stem"] / 1000)
    result = run(tmp_path / "run", max_drop=0.5, sensitivity=())
    assert result.summary["picked"]["rule"] == "cheapest within macs<=50% and a drop of 0.5"
    assert result.summary["picked"]["macs"] == min(c.macs for c in result.candidates)


def test_an_agent_for_several_objectives_needs_no_aim_and_gives_the_knee(
    tmp_path: Path, formula: Callable[[Formula], None]
) -> None:
    formula(lambda removed, cost: 1 - math.exp(-cost.macs / 5e4))
    result = run(tmp_path / "run", budget=None, agent="nsga2", candidates=12, sensitivity=())
    assert result.summary["picked"]["rule"] == "knee of the front"
    assert len(result.front) > 3


def test_an_agent_for_one_objective_needs_an_aim(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a search needs an aim: give a budget such as") as error:
        run(tmp_path / "run", budget=None)
    assert one_line(error)
    assert not (tmp_path / "run").exists()


def test_locked_and_bounded_groups_stay_within_their_bounds(tmp_path: Path, formula: Callable[[Formula], None]) -> None:
    formula(lambda removed, cost: 0.9)
    bounds = {"head": {"lock": True}, "conv1": {"min": 0.3, "max": 0.7}}
    result = run(tmp_path / "run", bounds=bounds, sensitivity=())
    assert {c.removed["head"] for c in result.candidates} == {0}
    assert {3 <= c.removed["conv1"] <= 7 for c in result.candidates} == {True}


# ----------------------------------------------------------------------------------------------------------- time limit


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that jumps ahead by what is appended to the list."""
    ahead: list[float] = []
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + sum(ahead))
    return ahead


def test_at_the_time_limit_the_best_so_far_is_handed_back(
    tmp_path: Path, formula: Callable[[Formula], None], clock: list[float]
) -> None:
    formula(lambda removed, cost: 0.9 - cost.macs / 1e6)

    def late(stage: str, number: int) -> None:
        if stage == "search" and number == 5:
            clock.append(2000)

    watcher = Watcher(late)
    result = run(tmp_path / "run", candidates=50, time_limit=1000, sensitivity=(), progress=watcher)
    assert result.summary["stopped"] == "time limit"
    had = result.summary["candidates"]
    assert 2 <= had < 50  # what the ledger knew before is still answered
    assert 5 <= result.summary["evaluations"] <= 6  # uniform at the picked candidate's cost may be one more
    assert result.summary["picked"]["accuracy"] == max(c.accuracy for c in result.candidates)
    assert f"stopped after {had} of 50 candidates: time limit" in watcher.lines
    assert watcher.lines[2].endswith(", stopped after 16.7 min")


def test_the_analysis_gets_half_of_the_time(tmp_path: Path, light: None, clock: list[float]) -> None:
    def late(stage: str, number: int) -> None:
        if (stage, number) == ("sensitivity", 2):
            clock.append(600)

    result = run(tmp_path / "run", candidates=2, time_limit=1000, progress=Watcher(late))
    report = SensitivityReport.load(tmp_path / "run" / "sensitivity.json")
    assert sum(len(row.cells) for row in report.groups) == 2
    assert result.summary["stopped"] is None
    assert result.summary["candidates"] == 2


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_a_dense_accuracy_of_zero_is_refused(tmp_path: Path) -> None:
    task = make_task(metric=lambda outputs, targets: torch.zeros(len(targets)))
    tracker = Probe()
    with pytest.raises(
        TaskError, match="the dense network's accuracy on the 101 validation samples is 0; are"
    ) as error:
        run(tmp_path / "run", task, tracker=tracker)
    assert one_line(error)
    assert tracker.calls == []


def test_a_pipeline_that_costs_the_dense_network_accuracy_is_reported(tmp_path: Path, light: None) -> None:
    shifted = make_task(augment=lambda inputs, generator: 0.1 * inputs + 3)
    with pytest.warns(RecoveryWarning, match=r"cost the dense network \d+\.\d points .*raise calibration_images"):
        run(tmp_path / "run", shifted, candidates=1, control=0, sensitivity=())


def test_a_pipeline_that_costs_nothing_is_not(tmp_path: Path, light: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path / "run", candidates=1, control=0, sensitivity=())


def test_candidates_that_fail_are_on_record_and_the_search_goes_on(
    tmp_path: Path, formula: Callable[[Formula], None]
) -> None:
    formula(lambda removed, cost: math.nan if removed["head"] % 2 else 0.9)
    result = run(tmp_path / "run", agent="tpe", candidates=10)
    failed = [line for line in ledger_of(tmp_path / "run") if line["failure"] is not None]
    assert failed
    assert {line["failure"] for line in failed} == {"the loss is nan at fine-tuning step 1 of 2"}
    assert all(line["measurements"] == [] for line in failed)
    assert result.summary["candidates"] == 10
    assert result.summary["picked"]["removed"]["head"] % 2 == 0
    assert {c.id for c in result.front}.isdisjoint({line["id"] for line in failed})


def test_when_every_candidate_fails_that_is_one_line(tmp_path: Path, light: None) -> None:
    with pytest.raises(TaskError, match="all 5 candidates failed; the first: the loss is nan") as error:
        run(tmp_path / "run", lr=1e30, finetune_steps=4, candidates=2)
    assert one_line(error)
    lines = ledger_of(tmp_path / "run")
    assert len(lines) == 1 + 2 + 2
    assert all(line["failure"].startswith("the loss is nan at fine-tuning step") for line in lines)


def test_a_network_without_groups_is_refused(tmp_path: Path) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.utils.skip_init(nn.Linear, 64, 4))
    nn.init.zeros_(linear[1].weight)
    nn.init.zeros_(linear[1].bias)
    with pytest.raises(TaskError, match=r"nothing in Sequential can be pruned \(1: its elements are the network's"):
        run(tmp_path / "run", make_task(model=linear))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agent": "tpee"}, "no agent 'tpee'. Did you mean 'tpe'"),
        ({"candidate": 3}, "no setting 'candidate'. Did you mean 'candidates'"),
        ({"bounds": {"sten": {"lock": True}}}, "no group 'sten'. Did you mean 'stem'"),
    ],
)
def test_unknown_names_are_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownNameError) as error:
        run(tmp_path / "run", **change)
    assert str(error.value).startswith(message)
    assert one_line(error)


def test_a_network_that_rebuilds_to_something_else_is_not_handed_out(
    done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Pipeline.recovered

    def other(self: Pipeline, policy: Policy, *, final: bool = False) -> tuple[nn.Module, tuple[Measurement, ...]]:
        model, measured = real(self, policy, final=final)
        return model, tuple(dataclasses.replace(m, accuracy=m.accuracy / 2) for m in measured)

    monkeypatch.setattr(Pipeline, "recovered", other)
    with pytest.raises(
        RunError, match=r"was measured at 0\.\d+, but its network, rebuilt from its seed, at 0\."
    ) as error:
        done.result.pick()
    assert one_line(error)


# --------------------------------------------------------------------------------------------------- after the search


def test_pick_asks_the_ledger_again(done: Done) -> None:
    candidates, dense = done.result.candidates, done.result.dense
    assert done.result.pick().candidate.id == done.result.summary["picked"]["id"]
    tight = sorted(c.macs for c in candidates)[len(candidates) // 2]
    network = done.result.pick(budget=f"macs<={tight}")
    within = [c for c in candidates if c.macs <= tight]
    assert network.accuracy == network.candidate.accuracy == max(c.accuracy for c in within)
    assert network.rule.startswith("most accurate within macs<=")
    assert count(network.model, done.task.example_input).cost == network.candidate.cost
    median = sorted(c.accuracy for c in candidates)[len(candidates) // 2]
    dropped = done.result.pick(max_drop=max(0.0, dense["accuracy"] - median) + 1e-6)
    enough = [c for c in candidates if c.accuracy >= min(median, dense["accuracy"]) - 1e-5]
    assert dropped.candidate.macs == min(c.macs for c in enough)
    assert dropped.rule.startswith("cheapest within a drop of ")
    with pytest.raises(ConfigError, match="none of"):
        done.result.pick(budget="macs<=5%")


def test_any_candidate_can_be_had_as_a_network(done: Done) -> None:
    for candidate in itertools.islice(done.result.candidates, 3):
        network = done.result.network(candidate)
        assert (network.candidate, network.accuracy, network.fidelity) == (candidate, candidate.accuracy, "short")


def test_opening_a_run_gives_the_same_result(done: Done) -> None:
    opened = open_run(done.out, make_task())
    assert opened.summary == json.loads(json.dumps(done.result.summary))
    assert opened.candidates == done.result.candidates
    assert opened.pick().candidate == done.result.pick().candidate
    other = make_task(val=samples(101, 7))
    with pytest.raises(RunError, match="was searched with another data than this task has; open it with its own"):
        open_run(done.out, other)


def test_choosing_renews_what_lies_in_the_folder(tmp_path: Path, light: None) -> None:
    result = run(tmp_path / "run", candidates=4, sensitivity=(0.5,))
    picked = result.summary["picked"]["id"]
    other = min((c for c in result.candidates if c.id != picked), key=lambda c: c.macs)
    result.choose(result.network(other, "the smallest"))
    written = read(tmp_path / "run" / "result.json")
    assert written["picked"]["id"] == other.id
    assert written["picked"]["rule"] == "the smallest"
    assert written["uniform"]["macs"] <= other.macs
    assert written["evaluations"] == len(ledger_of(tmp_path / "run"))
    assert count(export.load(tmp_path / "run" / "pruned", build=Net), make_task().example_input).cost == other.cost
    assert run(tmp_path / "run", candidates=4, sensitivity=(0.5,)).summary == written
    assert read(tmp_path / "run" / "front.json")["points"][0]["macs"] == min(c.macs for c in result.candidates)


def test_finalizing_trains_and_reads_the_test_set_once(tmp_path: Path, light: None) -> None:
    split = SealedSplit()
    task = make_task(test=split)
    result = run(tmp_path / "run", task, candidates=3, sensitivity=())
    passes, steps = split.passes, list[int]()
    network = result.finalize(epochs=2, progress=lambda step, _: steps.append(step))
    assert steps == [1, 2]  # 200 samples are one batch of 128 an epoch
    assert split.passes == passes + 1
    final = read(tmp_path / "run" / "final.json")
    assert final["epochs"] == 2
    images, targets = samples(60, 3)
    reloaded = export.load(tmp_path / "run" / "pruned", build=Net)
    with torch.no_grad():
        for key, model in (("test", reloaded), ("dense_test", task.fresh_model().eval())):
            scores = top1(model(images), targets).double()
            assert final[key]["accuracy"] == pytest.approx(float(scores.mean()))
            assert final[key]["accuracy_se"] == pytest.approx(float(scores.std() / 60**0.5))
    assert network.fidelity == "full"
    assert final["val"]["accuracy"] == network.accuracy
    assert export.recipe_of(tmp_path / "run" / "pruned")["measured"]["fidelity"] == "full"
    for again in (result, open_run(tmp_path / "run", make_task())):
        with pytest.raises(RunError, match="was finalised before, and the test set is read once") as error:
            again.finalize(epochs=1)
        assert one_line(error)
    assert split.passes == passes + 1


def test_a_finalised_network_is_not_replaced(tmp_path: Path, light: None) -> None:
    result = run(tmp_path / "run", make_task(), candidates=2, sensitivity=())
    result.finalize(epochs=1)
    before = (tmp_path / "run" / "pruned" / "recipe.json").read_bytes()
    with pytest.raises(RunError, match=r"was finalised, and .* holds the fine-tuned network") as error:
        result.choose(result.pick())
    assert one_line(error)
    assert (tmp_path / "run" / "pruned" / "recipe.json").read_bytes() == before


def test_finalizing_after_a_test_by_hand_is_refused_before_anything_is_trained(tmp_path: Path, light: None) -> None:
    result = run(tmp_path / "run", make_task(), candidates=2, sensitivity=())
    result.pick().test()
    before = (tmp_path / "run" / "pruned" / "recipe.json").read_bytes()
    with pytest.raises(TestSetError, match="has been read already"):
        result.finalize(epochs=1, progress=lambda *_: pytest.fail("it trains"))
    assert (tmp_path / "run" / "pruned" / "recipe.json").read_bytes() == before


def test_a_budget_with_a_drop_is_searched_below_the_budget_too(tmp_path: Path, light: None) -> None:
    result = run(tmp_path / "run", budget="macs<=90%", max_drop=0.9, candidates=6)
    macs = [c.macs / result.dense["macs"] for c in result.candidates if c.arm == "search"]
    assert min(macs) < 0.6
    controls = [c.macs / result.dense["macs"] for c in result.candidates if c.arm == "random"]
    assert min(controls) > 0.8  # the control fills the budget


def test_agents_of_other_settings_are_other_searches(tmp_path: Path, light: None) -> None:
    class Agent:
        objectives = "one"

        def __init__(self, setting: int) -> None:
            self.setting = setting

        def run(self, env: PruningEnv, *, seed: int) -> None:
            RandomAgent().run(env, seed=seed)

    run(tmp_path / "run", agent=Agent(1), candidates=1, sensitivity=())
    with pytest.raises(RunError, match="its setting is 1, not 2"):
        run(tmp_path / "run", agent=Agent(2), candidates=1, sensitivity=())


def test_tuples_tell_agents_apart_and_what_an_agent_has_learnt_does_not() -> None:
    plain, several = AMCAgent(updates=1), AMCAgent(updates=1, shares=(1.0, 0.5))
    before = identity_of(plain)
    assert before != identity_of(several)
    assert identity_of(several)["shares"] == [1.0, 0.5]
    run_agent(plain, synthetic_env(evaluations=4)[0], seed=0)
    assert hasattr(plain, "learner")
    assert identity_of(plain) == before


@pytest.mark.parametrize("agent", [RandomAgent, None, object()])
def test_what_is_no_agent_is_refused_at_once(tmp_path: Path, agent: object) -> None:
    with pytest.raises(ConfigError, match="an agent is a name or an object with") as error:
        run(tmp_path / "run", agent=agent)
    assert one_line(error)
    assert not (tmp_path / "run").exists()


def test_finalizing_without_a_test_set_leaves_it_out(tmp_path: Path, light: None) -> None:
    task = make_task(test=None)
    run(tmp_path / "run", task, candidates=1, control=0, sensitivity=()).finalize(epochs=1)
    assert list(read(tmp_path / "run" / "final.json")) == ["epochs", "lr", "val"]


# ------------------------------------------------------------------------------------------------- reusing an analysis


def test_cells_of_an_earlier_analysis_are_not_measured_again(
    done: Done, tmp_path: Path, light: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(self: SensitivityReport, *_: Any) -> Any:
        raise AssertionError("a cell was measured")

    monkeypatch.setattr(SensitivityReport, "with_cell", forbidden)
    run(tmp_path / "run", budget="macs<=60%", candidates=1, control=0, reuse=done.out / "sensitivity.json")
    assert (tmp_path / "run" / "sensitivity.json").read_bytes() == (done.out / "sensitivity.json").read_bytes()


def test_an_analysis_of_something_else_is_not_taken_over(done: Done, tmp_path: Path, light: None) -> None:
    reuse = done.out / "sensitivity.json"
    with pytest.raises(RunError, match="the sensitivity report is of another data"):
        run(tmp_path / "run", make_task(val=samples(101, 7)), reuse=reuse)
    with pytest.raises(RunError, match="the sensitivity report is of another setting seed"):
        run(tmp_path / "run", seed=4, reuse=reuse)
    assert not (tmp_path / "run" / "sensitivity.json").exists()


# ------------------------------------------------------------------------------------------------------ shared weights


SHARED: dict[str, Any] = {
    "shared_steps": 6,
    "finetune_steps": 0,
    "sensitivity": (0.5,),
    "candidates": 4,
    "control": 1,
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A search whose candidates are cut from one set of weights."""
    out, split = tmp_path_factory.mktemp("shared") / "run", SealedSplit()
    task, tracker, watcher = make_task(test=split), Probe(), Watcher()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "render", lambda folder: folder.report)
        patch.setattr(export, "_save_program", lambda *_: None)
        result = run(out, task, tracker=tracker, progress=watcher, **SHARED)
    return Done(out, task, split, tracker, watcher, result, {})


def test_shared_weights_are_trained_first_and_said_so(shared: Done) -> None:
    said = r"trained one set of weights for all candidates for 6 steps in \d+\.\d s"
    assert re.fullmatch(said, shared.watcher.lines[0])
    assert [step[:2] for step in shared.watcher.steps[:7]] == [
        *(("training shared weights", number) for number in range(1, 7)),
        ("sensitivity", 0),
    ]
    assert read(shared.out / "config.json")["search"]["shared_steps"] == 6
    assert SensitivityReport.load(shared.out / "sensitivity.json").settings["shared_steps"] == 6


def test_with_shared_weights_the_dense_network_is_still_the_users_own(shared: Done, done: Done) -> None:
    assert shared.result.dense == done.result.dense
    report = SensitivityReport.load(shared.out / "sensitivity.json")
    assert report.dense.loss != shared.result.dense["loss"]
    assert report.dense.loss == shared.result._prepared.bench.whole.summary("").loss


def test_killed_while_shared_weights_are_trained_or_later_it_ends_with_the_same_ledger(
    shared: Done, tmp_path: Path, light: None
) -> None:
    out, whole = tmp_path / "run", ledger_of(shared.out)

    def killed_in(stage: str, number: int) -> Callable[[str, int], None]:
        def at_step(now: str, done: int) -> None:
            if (now, done) == (stage, number):
                raise KeyboardInterrupt

        return at_step

    for stage, number, trained in (
        ("training shared weights", 4, False),
        ("sensitivity", 1, True),
        ("search", 3, True),
    ):
        with pytest.raises(KeyboardInterrupt):
            run(out, progress=Watcher(killed_in(stage, number)), **SHARED)
        assert (out / "shared.safetensors").exists() == trained
    written = (out / "shared.safetensors").stat().st_mtime_ns
    watcher = Watcher()
    result = run(out, progress=watcher, **SHARED)
    assert ledger_of(out) == whole
    assert result.summary["picked"] == shared.result.summary["picked"]
    assert cells_of(out) == cells_of(shared.out)
    assert (out / "shared.safetensors").stat().st_mtime_ns == written
    assert not any("trained one set" in line for line in watcher.lines)


def test_shared_weights_are_the_same_with_several_under_way(tmp_path: Path, light: None) -> None:
    settings: dict[str, Any] = SHARED | {"agent": "random", "sensitivity": ()}
    run(tmp_path / "one", **settings)
    run(tmp_path / "two", executor=InProcess(at_once=2), **settings)
    run(tmp_path / "elsewhere", executor=Elsewhere(), **settings)
    assert ledger_of(tmp_path / "two") == ledger_of(tmp_path / "elsewhere") == ledger_of(tmp_path / "one")


class Elsewhere(OutOfTurn):
    """An executor whose pipeline was pickled, as it is on its way to workers."""

    def __init__(self) -> None:
        super().__init__(at_once=1)

    def start(self, pipeline: Runs) -> None:
        super().start(pickle.loads(pickle.dumps(pipeline)))


def test_what_shared_weights_gave_is_rebuilt_and_finalised(shared: Done, tmp_path: Path, light: None) -> None:
    shutil.copytree(shared.out, tmp_path / "run")
    result = open_run(tmp_path / "run", make_task())
    for candidate in result.candidates:
        assert result.network(candidate).accuracy == candidate.accuracy
    network = result.finalize(epochs=1)
    assert export.load(tmp_path / "run" / "pruned", build=Net) is not None
    final = read(tmp_path / "run" / "final.json")
    assert final["val"]["accuracy"] == network.accuracy
    task = make_task()
    inputs, targets = zip(*task.open_test(FINALISER).batches(100), strict=True)
    with torch.no_grad():
        own = task.loss(task.fresh_model().eval()(torch.cat(inputs)), torch.cat(targets)).mean().item()
    assert final["dense_test"]["loss"] == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("steps", [0, 5])
def test_cells_of_other_shared_weights_are_not_taken_over(steps: int, shared: Done, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"report is of another setting shared_steps \\(6, not {steps or None}\\)"):
        run(tmp_path / "run", **SHARED | {"shared_steps": steps}, reuse=shared.out / "sensitivity.json")


def test_cells_of_the_same_shared_weights_are_taken_over(shared: Done, tmp_path: Path, light: None) -> None:
    watcher = Watcher()
    reuse = shared.out / "sensitivity.json"
    run(tmp_path / "run", **SHARED | {"candidates": 1, "control": 0}, reuse=reuse, progress=watcher)
    assert (tmp_path / "run" / "sensitivity.json").read_bytes() == reuse.read_bytes()


# ------------------------------------------------------------------------------------------------- agents as objects


class Picky:
    """An agent that a user wrote: proposes what it was given, one by one."""

    objectives = "one"

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._policies = policies

        self.values: list[float] = []

    def run(self, env: Any, *, seed: int) -> None:
        for policy in self._policies:
            self.values.append(env.value(env.evaluate(policy)))


def test_an_agent_may_be_an_object(tmp_path: Path, light: None) -> None:
    policies = [Policy({"stem": 0.5, "conv1": 0.5}), Policy({"conv1": 0.9})]
    result = run(tmp_path / "run", agent=Picky(policies), sensitivity=(), control=0)
    searched = [c for c in result.candidates if c.arm == "search"]
    assert [c.removed for c in searched] == [{"stem": 6, "conv1": 5, "head": 0}, {"stem": 0, "conv1": 9, "head": 0}]
    assert {c.agent for c in searched} == {"Picky"}
    assert result.summary["candidates"] == 2


@pytest.mark.parametrize(
    ("protocol", "max_drop"), [("resource", None), ("resource", 0.05), ("accuracy", None), ("accuracy-params", None)]
)
def test_what_an_agent_is_to_raise(
    tmp_path: Path, formula: Callable[[Formula], None], protocol: str, max_drop: float | None
) -> None:
    """The accuracy; with a tolerated drop what is missing, and once nothing is, the share of multiply-adds saved.

    By AMC's second protocol -error * log(cost). One that failed is worth no more than the worst that there can be.
    """
    results = {0: 1.0, 6: 0.5, 9: math.nan}
    formula(lambda removed, cost: results[removed["stem"]])
    agent = Picky([Policy({"stem": stem / 12}) for stem in results])
    task = make_task()
    dense = measure(task.model, task.val_batches(), top1, cross_entropy).summary("dense").accuracy
    options: dict[str, Any] = {"budget": "macs<=100%", "max_drop": max_drop, "sensitivity": (), "control": 0}
    result = run(tmp_path / "run", task, agent=agent, finetune_steps=0, protocol=protocol, **options)
    searched = {c.removed["stem"]: c for c in result.candidates if c.removed["conv1"] == c.removed["head"] == 0}
    assert searched[9].failure is not None
    if max_drop is not None:
        expected = [1 - searched[0].macs / result.dense["macs"], 0.5 - (dense - max_drop), -1.0]
    elif protocol == "resource":
        expected = [1.0, 0.5, 0.0]
    else:
        size = {"accuracy": "macs", "accuracy-params": "params"}[protocol]
        expected = [0.0, -0.5 * math.log(getattr(searched[6], size)), -math.log(result.dense[size])]
    assert agent.values == pytest.approx(expected)


class Looking:
    """Proposes nothing, and keeps what it was shown."""

    env: PruningEnv

    def __init__(self, objectives: str) -> None:
        self.objectives = objectives

    def run(self, env: PruningEnv, *, seed: int) -> None:
        self.env = env


@pytest.mark.parametrize("sensitivity", [(0.25, 0.5, 0.75), ()])
@pytest.mark.parametrize("objectives", ["one", "several"])
def test_warm_starts_are_what_was_predicted_and_measured_and_uniform(
    sensitivity: tuple[float, ...], objectives: str, tmp_path: Path, light: None
) -> None:
    agent = Looking(objectives)
    run(tmp_path / "run", agent=agent, sensitivity=sensitivity, finetune_steps=0, control=0)
    env = agent.env
    assert env.predicted is not None
    expected = []
    for share in (1.0,) if objectives == "one" else (0.5, 0.75, 0.25):
        within = env.feasible.limited(share)
        if within.utilisation(within.upper) <= 1:  # else it can't be reached
            expected.append(env.predicted.allocate(within))
            if sensitivity:
                assert env.measured is not None
                expected += [env.measured.allocate(within), env.measured.threshold(within)]
            expected.append(env.feasible.policy(env.feasible.uniform(share)))
    assert list(env.warm_starts) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("objectives", ["one", "several"])
def test_warm_starts_are_within_what_the_analysis_found_bearable(
    objectives: str, tmp_path: Path, light: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Looking(objectives)
    monkeypatch.setattr(
        SensitivityReport,
        "bounds",
        lambda self, structure, *rest: {
            group.name: (0.0, 0.25 if group.name == "conv1" else 0.9) for group in structure
        },
    )
    result = run(tmp_path / "run", agent=agent, finetune_steps=0, control=0)
    env = agent.env
    uniform = next(candidate for candidate in result.candidates if candidate.arm == "uniform")
    index = env.feasible.structure.names.index("conv1")
    assert env.feasible.removed(uniform.policy)[index] == env.feasible.upper[index] < uniform.removed["conv1"]
    for policy in env.warm_starts:
        removed = env.feasible.removed(policy)
        assert env.feasible.policy(removed) == policy
        assert env.feasible.utilisation(removed) <= 1


def test_an_agent_sees_the_layers_and_the_slopes_of_the_analysis(tmp_path: Path, light: None) -> None:
    class Looking:
        objectives = "one"

        def run(self, env: PruningEnv, *, seed: int) -> None:
            trying = env.without_evaluation()
            observation, info = trying.reset()
            for _ in env.feasible.structure.groups:
                seen[info["group"]] = Observation(*observation)
                observation, _, _ = trying.decide(np.zeros(1, np.float32))
                info = {"group": names[len(seen) % len(names)]}

    seen: dict[str, Observation] = {}
    task = make_task()
    structure = analyse(task.model, task.example_input)
    names = structure.names
    run(tmp_path / "run", task, agent=Looking(), sensitivity=(0.25, 0.5, 0.75), finetune_steps=0, control=0)
    report = SensitivityReport.load(tmp_path / "run" / "sensitivity.json")
    slopes = {name: max(0.0, report.slope(name)) for name in names}
    assert max(slopes.values()) > 0
    facts = layer_facts(task.model, task.example_input, structure)
    assert {name: (fact.inputs, fact.outputs, fact.kernel) for name, fact in facts.items()} == {
        **{"stem": (1, 12, 3), "conv1": (12, 10, 3), "head": (12, 8, 1)}
    }
    for name in names:
        assert seen[name].slope == pytest.approx(slopes[name] / max(slopes.values()))
        for slot in ("outputs", "inputs", "height", "width", "stride", "kernel"):
            most = max(getattr(fact, slot) for fact in facts.values())
            assert getattr(seen[name], slot) == pytest.approx(getattr(facts[name], slot) / most)
    assert len({seen[name].slope for name in names}) > 1
