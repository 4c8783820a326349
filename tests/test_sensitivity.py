"""The analyzer: cells against a computation by hand, files that survive anything, and what a report is good for."""

import dataclasses
import itertools
import json
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from autoprune.cost import CostModel, FeasibleSet
from autoprune.errors import ConfigError, ExecutorError, RunError
from autoprune.evaluation import Measurement, Outcome, Pipeline, Precision, Recovery, Runs, Work, Workbench, workbench
from autoprune.finetuning import Recipe, SharedWeights, recalibrate, train
from autoprune.policy import Policy
from autoprune.scoring import Evidence, removal_orders
from autoprune.scoring.l1 import L1
from autoprune.scoring.taylor import taylor_scores
from autoprune.sensitivity import Cell, GroupSensitivity, SensitivityReport, analyse, conditions
from autoprune.structure import analyse as analyse_structure
from autoprune.structure import cut, plan
from autoprune.task import Task, cross_entropy
from autoprune.testing import TinyNet, TinyResNet
from autoprune.testing import chain as chain_of_layers

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

SETTINGS = {"criterion": "l1", "calibration_images": 200, "seed": 0}
GRID = (0.25, 0.5, 0.75)


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


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make()
    task = Task(model, train=samples(200, 1), val=samples(101, 2))
    train(model, task.train_batches(40, 0), 60, recipe=Recipe(lr=0.2), loss=cross_entropy, seed=0)
    recalibrate(model, task.calibration_batches(200, 250, 0))
    return model


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return trained(TinyResNet)


def chain(widths: Sequence[int], budget: str) -> FeasibleSet:
    with torch.random.fork_rng(devices=[]):  # its weights are drawn, but nobody looks at them
        return chain_of_layers(widths, budget)


@dataclasses.dataclass
class Setup:
    """A task made ready, and a count of the passes over its validation split."""

    task: Task
    bench: Workbench
    costs: CostModel
    passes: int = 0

    def analyse(self, path: Path, sparsities: Sequence[float] = GRID, **options: Any) -> SensitivityReport:
        evidence = Evidence(list(self.task.calibration_batches(200, 50, 0)), self.task.loss, 0)
        options = {"settings": SETTINGS, "evidence": evidence} | options
        return analyse(self.bench, self.costs, path, sparsities=sparsities, **options)


@pytest.fixture
def setup(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Setup:
    return make_setup(network, monkeypatch)


def make_setup(network: nn.Module, monkeypatch: pytest.MonkeyPatch, **task_options: Any) -> Setup:
    task = Task(network, **{"train": samples(200, 1), "val": samples(101, 2)} | task_options)
    structure = analyse_structure(task.model, task.example_input)
    orders = removal_orders(L1().score(task.model, structure, Evidence([], task.loss, 0)))
    made = Setup(task, Workbench(task, structure, orders, 200, 0), CostModel(task.model, task.example_input, structure))
    real = workbench.measure

    def measured(*args: Any) -> Any:
        made.passes += 1
        return real(*args)

    monkeypatch.setattr(workbench, "measure", measured)
    return made


# -------------------------------------------------------------------------------------------------------------- cells


def test_cells_are_what_a_computation_by_hand_gives(setup: Setup, tmp_path: Path) -> None:
    report = setup.analyse(tmp_path / "sensitivity.json")
    val, targets = samples(101, 2)
    dense = setup.task.fresh_model().eval()
    with torch.no_grad():
        right = (dense(val).argmax(1) == targets).double()
    assert report.dense.accuracy == pytest.approx(float(right.mean()), abs=1e-12)
    for name in ("stem", "conv1"):
        assert [cell.removed for cell in report[name].cells] == [2, 4, 6]
        for cell in report[name].cells:
            order = setup.bench.orders[name][: cell.removed]
            change = plan(dense, setup.bench.structure, {name: order})
            model = cut(dense, change)
            setup.bench.recover(model, change)
            with torch.no_grad():
                outputs = model(val)
            correct = (outputs.argmax(1) == targets).double()
            losses = functional.cross_entropy(outputs, targets, reduction="none").double()
            assert cell.sparsity == cell.removed / 8
            assert cell.accuracy == pytest.approx(float(correct.mean()), abs=1e-12)
            assert cell.accuracy_se == pytest.approx(float(correct.std() / 101**0.5))
            assert cell.loss == pytest.approx(float(losses.mean()), rel=1e-4)
            assert cell.loss_se == pytest.approx(float(losses.std() / 101**0.5), rel=1e-4)
            assert cell.drop_se == pytest.approx(float((right - correct).std() / 101**0.5), abs=1e-12)


def test_a_residual_group_is_sensitive(setup: Setup, tmp_path: Path) -> None:
    """Analyzers that skip what is coupled show such groups as free to remove."""
    report = setup.analyse(tmp_path / "s.json")
    stream = report["stem"]
    assert stream.layers == ("stem", "conv2")
    assert report.dense.accuracy - stream.cells[-1].accuracy > 0.1
    assert stream.cells[-1].loss > report.dense.loss + 0.1
    assert report.slope("stem") > 0


def test_coupled_layers_are_one_row_and_what_is_locked_is_listed(setup: Setup, tmp_path: Path) -> None:
    report = setup.analyse(tmp_path / "s.json")
    assert [row.name for row in report.groups] == ["stem", "conv1", "fc"]
    locked = report["fc"]
    assert (locked.prunable, locked.cells) == (False, ())
    assert locked.reason == "its elements are the network's output"
    assert all(row.prunable and row.reason is None for row in report.groups[:2])
    written = [layer for row in report.groups for layer in row.layers]
    assert sorted(written) == ["conv1", "conv2", "fc", "stem"]


def test_shares_of_the_multiply_adds(setup: Setup, tmp_path: Path) -> None:
    report = setup.analyse(tmp_path / "s.json", (0.5,))
    convolution, stem, total = 8 * 8 * 9 * 64, 8 * 9 * 64, setup.costs.dense.macs
    assert total == 2 * convolution + stem + 80
    assert report["conv1"].macs_share == pytest.approx(2 * convolution / total)
    assert report["stem"].macs_share == pytest.approx(1.0)
    assert report["fc"].macs_share == 0.0


def test_the_taylor_prediction_is_the_sum_over_what_is_removed_and_rises(setup: Setup, tmp_path: Path) -> None:
    report = setup.analyse(tmp_path / "s.json")
    evidence = Evidence(list(setup.task.calibration_batches(200, 50, 0)), setup.task.loss, 0)
    scores = taylor_scores(setup.task.model, setup.bench.structure, evidence)
    for name in ("stem", "conv1"):
        predicted = [report.dense.loss, *(cell.taylor_loss for cell in report[name].cells)]
        assert all(after > before for before, after in itertools.pairwise(predicted))
        gone = [scores[name][setup.bench.orders[name][: cell.removed]].sum() for cell in report[name].cells]
        assert predicted[1:] == pytest.approx([report.dense.loss + float(loss) for loss in gone], rel=1e-5)


def test_a_sparsity_that_removes_nothing_or_twice_the_same_is_no_cell(setup: Setup, tmp_path: Path) -> None:
    report = setup.analyse(tmp_path / "s.json", (0.01, 0.5, 0.51, 0.99))
    assert [cell.removed for cell in report["stem"].cells] == [4, 7]
    assert setup.passes == 1 + 4


def test_dense_loss_of_zero_divides_nothing(
    monkeypatch: pytest.MonkeyPatch, network: nn.Module, tmp_path: Path
) -> None:
    def no_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum(1) * 0.0

    def no_score(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros(len(targets))

    report = make_setup(network, monkeypatch, loss=no_loss, metric=no_score).analyse(tmp_path / "s.json", (0.5,))
    assert report.dense.accuracy == report.dense.loss == report.slope("stem") == 0.0
    assert report.predicted_accuracy({"stem": 4, "conv1": 7}) == 0.0


# --------------------------------------------------------------------------------------------------------------- file


def test_the_file_is_open_json_and_reads_back(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    report = setup.analyse(path)
    document = json.loads(path.read_text())
    assert list(document) == ["format", "digest", "settings", "dense", "groups"]
    assert document["format"] == 2
    assert document["digest"] == setup.task.digest()
    assert SETTINGS.items() <= document["settings"].items()
    assert list(document["groups"][0]) == [
        *("name", "kind", "size", "layers", "prunable", "reason", "macs_share", "cells", "predicted")
    ]
    assert list(document["groups"][0]["cells"][0]) == [
        *("sparsity", "removed", "accuracy", "accuracy_se", "loss", "loss_se", "drop_se", "taylor_loss", "executed")
    ]
    assert SensitivityReport.load(path) == report
    assert [p.name for p in tmp_path.iterdir()] == ["sensitivity.json"]


@pytest.mark.parametrize("killed_at", range(6))
def test_a_killed_analysis_goes_on(setup: Setup, tmp_path: Path, killed_at: int) -> None:
    path, whole = tmp_path / "killed.json", setup.analyse(tmp_path / "whole.json")

    def kill(group: str, done: int, total: int) -> None:
        assert total == 6
        if done == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup.analyse(path, progress=kill)
    there = sum(len(row.cells) for row in SensitivityReport.load(path).groups) if path.exists() else 0
    assert there == killed_at
    setup.passes = 0
    assert setup.analyse(path) == whole
    assert setup.passes == 6 - killed_at  # the cells that were missing
    assert SensitivityReport.load(path) == whole


def test_writing_takes_a_hundredth_of_the_time(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write takes a second and a cell half a minute: the file is written after the first and the fifth, and last."""
    now, written = 0.0, list[int]()
    save = SensitivityReport.save

    def slow(self: SensitivityReport, path: Path) -> None:
        nonlocal now
        now += 1
        written.append(sum(len(row.cells) for row in self.groups))
        save(self, path)

    def begin(group: str, done: int, total: int) -> None:
        nonlocal now
        now += 30

    monkeypatch.setattr(SensitivityReport, "save", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    report = setup.analyse(tmp_path / "s.json", progress=begin)
    assert written == [1, 5, 6, 6]
    assert SensitivityReport.load(tmp_path / "s.json") == report


def test_what_ran_for_the_cells_is_counted_here_and_by_workers(setup: Setup, tmp_path: Path) -> None:
    """All cells of the stem run whole, and the first of conv1; the others begin behind the stem."""
    own = pickle.loads(pickle.dumps(Pipeline(setup.bench, Recovery(200), 0)))
    here = setup.analyse(tmp_path / "here.json")
    behind = 1 - 64 * 9 * 8 / setup.costs.dense.macs
    assert [[cell.executed for cell in row.cells] for row in here.groups[:2]] == [
        pytest.approx([1, 1, 1]),
        pytest.approx([1, behind, behind]),
    ]
    share = (4 + 2 * behind) / 6
    assert here.executed == pytest.approx(share)
    assert here.work == (
        f"6 cells took {share:.0%} of the multiply-adds of as many whole passes: what runs before a group was kept"
    )
    before = list(setup.bench.executed)
    there = setup.analyse(tmp_path / "there.json", workers=Newest(own))
    assert there.executed == pytest.approx(share)
    assert setup.bench.executed == before  # nothing ran here
    assert SensitivityReport.load(tmp_path / "there.json").executed == there.executed
    unknown = [dataclasses.replace(cell, executed=None) for cell in there["stem"].cells]
    for cell in unknown:
        there = there.with_cell("stem", cell)
    assert there.executed == pytest.approx((1 + 2 * behind) / 3)
    assert setup.analyse(tmp_path / "none.json", deadline=-1.0).work == ""


def test_a_finer_grid_costs_its_new_cells_only(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    setup.analyse(path, (0.25, 0.75))
    setup.passes = 0
    finer = setup.analyse(path, (0.125, 0.25, 0.5))
    assert setup.passes == 4
    assert [cell.removed for cell in finer["conv1"].cells] == [1, 2, 4, 6]
    assert finer == setup.analyse(tmp_path / "at_once.json", (0.125, 0.25, 0.5, 0.75))


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_shards_merge_into_the_unsharded_file(setup: Setup, tmp_path: Path, shards: int) -> None:
    whole = setup.analyse(tmp_path / "whole.json")
    setup.passes = 0
    parts = [setup.analyse(tmp_path / f"{i}.json", shard=(i, shards)) for i in range(shards)]
    assert setup.passes == 6
    merged = parts[-1]
    for part in parts[:-1]:
        merged = merged.merge(part)
    assert merged == whole
    merged.save(tmp_path / "merged.json")
    assert SensitivityReport.load(tmp_path / "merged.json") == whole


class Newest:
    """Workers of which the one that began last is done first."""

    at_once = 3

    def __init__(self, pipeline: Runs) -> None:
        self.pipeline, self.under_way, self.most = pipeline, list[Work](), 0

    def start(self, pipeline: Runs) -> None:
        raise AssertionError("whoever hands them in has started them")

    def submit(self, work: Work) -> None:
        self.under_way.append(work)
        self.most = max(self.most, len(self.under_way))

    def finished(self) -> Outcome:
        return self.pipeline(self.under_way.pop())

    def close(self) -> None:
        self.under_way.clear()


def test_workers_measure_the_same_cells(setup: Setup, tmp_path: Path) -> None:
    setup.analyse(tmp_path / "here.json")
    workers = Newest(Pipeline(setup.bench, Recovery(200), 0))
    begun: list[str] = []
    setup.analyse(tmp_path / "there.json", workers=workers, progress=lambda name, done, total: begun.append(name))
    assert workers.most == 3
    assert len(begun) == 6
    assert not workers.under_way
    there, here = (SensitivityReport.load(tmp_path / f"{name}.json") for name in ("there", "here"))
    assert there == here
    late = setup.analyse(tmp_path / "late.json", workers=workers, deadline=time.monotonic() - 1)
    assert all(not row.cells for row in late.groups)


def test_a_cell_that_workers_die_of_is_an_error(setup: Setup, tmp_path: Path) -> None:
    workers = Newest(lambda work: Outcome(work.id, (), 0.0, "5 workers died of it"))  # type: ignore[arg-type]
    with pytest.raises(ExecutorError, match=r"a sensitivity cell of \w+ can't be measured: 5 workers died of it"):
        setup.analyse(tmp_path / "s.json", workers=workers)


def test_after_the_deadline_no_cell_is_begun(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    late = setup.analyse(path, deadline=time.monotonic() - 1)
    assert all(not row.cells for row in late.groups)
    assert SensitivityReport.load(path) == late
    assert len(setup.analyse(path, deadline=time.monotonic() + 600)["stem"].cells) == 3


@pytest.mark.parametrize("what", ["network", "weights", "data", "criterion", "seed", "metric", "augment"])
def test_a_file_of_something_else_is_refused(
    setup: Setup, network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = tmp_path / "s.json"
    setup.analyse(path, (0.5,))
    before = path.read_bytes()
    other, options, settings = network, dict[str, Any](), dict(SETTINGS)
    if what == "network":
        other = trained(TinyNet)
    elif what == "weights":
        other = setup.task.fresh_model()
        other.get_parameter("fc.bias").data[0] += 1e-3
    elif what == "data":
        options["val"] = samples(101, 5)
    elif what == "metric":
        options["metric"] = lambda outputs, targets: (outputs.argmax(1) == targets).float()
    elif what == "augment":
        options["augment"] = lambda inputs, generator: inputs
    else:
        settings[what] = "other"  # type: ignore[assignment]
    elsewhere = make_setup(other, monkeypatch, **options)
    with pytest.raises(RunError, match=rf"is of another (setting )?{what} \(.*, not .*\); name another file") as error:
        elsewhere.analyse(path, settings=settings)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"digest": {}}', '{"groups": 3}'])
def test_a_file_that_is_no_report_is_refused(setup: Setup, tmp_path: Path, content: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(RunError, match=r"s\.json is not a sensitivity report \(.*\); move it away"):
        setup.analyse(path)


@pytest.mark.parametrize("sparsities", [(), (0.0,), (0.5, 1.0), (-0.1,), (float("nan"),)])
def test_sparsities_out_of_range_are_refused(setup: Setup, tmp_path: Path, sparsities: Sequence[float]) -> None:
    with pytest.raises(ConfigError, match="`0 < sparsity < 1` must hold"):
        setup.analyse(tmp_path / "s.json", sparsities)
    assert setup.passes == 0


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_shards_that_do_not_exist_are_refused(setup: Setup, tmp_path: Path, shard: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="a shard i/n has 1 <= i <= n"):
        setup.analyse(tmp_path / "s.json", shard=shard)


def test_the_network_stays_as_it_is(setup: Setup, network: nn.Module, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    setup.analyse(tmp_path / "s.json")
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_conditions_are_settings_and_the_names_of_what_measures(setup: Setup) -> None:
    assert conditions(setup.task, {"seed": 3}, Precision("bfloat16")) == {
        "seed": 3,
        "precision": "bfloat16",
        "augment": None,
        "metric": "top1",
        "loss": "cross_entropy",
    }


def test_conditions_tell_shared_weights_apart(setup: Setup) -> None:
    def found(weights: SharedWeights | None) -> dict[str, Any]:
        return conditions(setup.task, {}, Precision(), weights)

    model = setup.task.fresh_model()
    weights = SharedWeights.of(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1.0
    assert "shared weights" not in found(None)
    assert found(weights) == found(weights) != found(SharedWeights.of(model))
    assert found(weights) | found(None) == found(weights)


# ------------------------------------------------------------------------------------------------------------- curves


def synthetic(cells: dict[str, list[tuple[int, float, float]]], sizes: dict[str, int]) -> SensitivityReport:
    """A report of `(removed, accuracy, loss)` cells; the dense network has accuracy 0.9 and loss 0.2."""
    rows = [
        GroupSensitivity(
            *(name, "channels", sizes[name], (name,), True, None, 0.5),
            tuple(Cell(n / sizes[name], n, accuracy, 0.0, loss, 0.0, 0.0, 0.0) for n, accuracy, loss in line),
        )
        for name, line in cells.items()
    ]
    return SensitivityReport({}, {}, Measurement("dense", 0.9, 0.0, 0.2, 0.0), tuple(rows))


def powers(widths: Sequence[int], seed: int) -> SensitivityReport:
    """Smooth convex curves, some groups far more sensitive than others."""
    rng = np.random.default_rng(seed)
    cells = {}
    for number, width in enumerate(widths, 1):
        weight, power = np.exp(rng.uniform(-2, 2)), rng.uniform(1, 3)
        rises = [(n, weight * (n / width) ** power) for n in range(1, width)]
        cells[f"conv{number}"] = [(n, 0.9 - rise / 20, 0.2 + rise) for n, rise in rises]
    return synthetic(cells, {f"conv{number}": width for number, width in enumerate(widths, 1)})


noisy_cells = st.lists(
    st.tuples(st.integers(1, 31), st.floats(0, 1), st.floats(0, 5)), max_size=8, unique_by=lambda cell: cell[0]
).map(sorted)


@given(noisy_cells)
def test_curves_are_monotone_and_losses_convex(cells: list[tuple[int, float, float]]) -> None:
    curve = synthetic({"conv1": cells}, {"conv1": 32}).curve("conv1")
    counts = np.arange(32)
    losses = np.array([curve.loss_at(n) for n in counts])
    drops = np.array([curve.drop_at(n) for n in counts])
    assert losses[0] == pytest.approx(0.2)
    assert drops[0] == 0.0
    assert np.all(np.diff(losses) >= -1e-9)
    assert np.all(np.diff(drops) >= -1e-9)
    assert np.all(np.diff(losses, 2) >= -1e-9)
    highest = np.maximum.accumulate([0.2, *(loss for _, _, loss in cells)])
    assert np.all(curve.loss <= highest + 1e-9)  # a hull lies below what it wraps


def test_a_curve_runs_through_convex_cells_and_goes_on_as_steep_as_it_got() -> None:
    curve = synthetic({"conv1": [(8, 0.8, 0.3), (16, 0.6, 0.6)]}, {"conv1": 32}).curve("conv1")
    assert [curve.loss_at(n) for n in (0, 4, 8, 12, 16, 24)] == pytest.approx([0.2, 0.25, 0.3, 0.45, 0.6, 0.9])
    assert [curve.drop_at(n) for n in (0, 8, 12, 20)] == pytest.approx([0.0, 0.1, 0.2, 0.4])


def test_what_a_group_adds_is_0_where_it_is_whole() -> None:
    report = synthetic({"conv1": [(8, 0.8, 0.3), (16, 0.6, 0.6)]}, {"conv1": 32})
    assert [report.loss_of("conv1")(n) for n in (0, 8, 16)] == pytest.approx([0.0, 0.1, 0.4])
    assert [report.loss_of("conv1", 2.0)(n) for n in (0, 8, 16)] == pytest.approx([0.0, 0.01, 0.16])


def test_luck_is_not_believed() -> None:
    """A cell that measures better than the dense network claims nothing, and a later dip does not count."""
    curve = synthetic({"conv1": [(8, 0.95, 0.1), (16, 0.7, 0.5), (24, 0.8, 0.4)]}, {"conv1": 32}).curve("conv1")
    assert [curve.drop_at(n) for n in (8, 16, 24)] == pytest.approx([0.0, 0.2, 0.2])
    assert curve.loss_at(8) == pytest.approx(0.2)
    assert curve.loss_at(24) == pytest.approx(0.5)


def test_a_group_without_cells_is_flat() -> None:
    report = synthetic({"conv1": []}, {"conv1": 32})
    assert [report.curve("conv1").loss_at(n) for n in (0, 31)] == [0.2, 0.2]
    assert report.slope("conv1") == 0.0


def test_slope_is_the_mean_rise_of_the_loss() -> None:
    report = synthetic({"conv1": [(8, 0.8, 0.3), (16, 0.6, 0.6)]}, {"conv1": 32})
    assert report.slope("conv1") == pytest.approx((0.1 / 0.25 + 0.4 / 0.5) / 2)


def test_the_prediction_adds_up_single_drops() -> None:
    report = synthetic(
        {"a": [(4, 0.8, 0.3)], "b": [(4, 0.7, 0.3), (8, 0.5, 0.9)], "c": [(1, 0.1, 0.9)]}, {"a": 8, "b": 16, "c": 2}
    )
    assert report.predicted_accuracy({"a": 4, "b": 6, "c": 0}) == pytest.approx(0.9 - 0.1 - 0.3)
    assert report.predicted_accuracy({"a": 4, "b": 8, "c": 1}) == 0.0
    assert report.predicted_accuracy({}) == 0.9


# -------------------------------------------------------------------------------------------- bounds and allocations


def test_bounds_end_where_a_group_alone_loses_too_much() -> None:
    feasible = chain([20, 20, 20], "macs<=50%")
    report = synthetic(
        {
            "conv1": [(5, 0.89, 0.3), (10, 0.85, 0.4), (15, 0.45, 0.9)],
            "conv2": [(5, 0.89, 0.3), (10, 0.88, 0.4)],
            "conv3": [(5, 0.1, 2.0)],
        },
        {"conv1": 20, "conv2": 20, "conv3": 20},
    )
    bounds = report.bounds(feasible.structure, tolerance=0.25, max_sparsity=0.9)
    assert [low for low, _ in bounds.values()] == [0.0, 0.0, 0.0]
    assert bounds["conv1"][1] == pytest.approx(0.625, abs=0.011)  # between 10 and 15 removed
    assert bounds["conv2"][1] == 0.9
    assert bounds["conv3"][1] == 0.25  # the grid's first step stays open
    assert report.bounds(feasible.structure, 0.25, 0.2)["conv3"][1] == 0.2


def test_a_group_that_was_not_measured_keeps_the_highest_bound() -> None:
    feasible = chain([8], "macs<=100%")
    assert synthetic({"conv1": []}, {"conv1": 8}).bounds(feasible.structure, 0.1, 0.8) == {"conv1": (0.0, 0.8)}


def loss_of(report: SensitivityReport, feasible: FeasibleSet, removed: Sequence[int]) -> float:
    rises = [report.curve(n).loss_at(k) - 0.2 for n, k in zip(feasible.structure.names, removed, strict=True)]
    return sum(rises)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("widths", "tolerated"), [((8, 8, 8), 1.3), ((8, 16, 4), 1.3)])
def test_allocations_meet_the_budget_near_the_optimum_and_beat_uniform(
    seed: int, widths: tuple[int, ...], tolerated: float
) -> None:
    feasible, report = chain(widths, "macs<=50%"), powers(widths, seed)
    every = itertools.product(*(range(int(high) + 1) for high in feasible.upper))
    best = min(loss_of(report, feasible, c) for c in every if feasible.utilisation(np.array(c)) <= 1)
    uniform = loss_of(report, feasible, feasible.project(np.zeros(len(widths))).tolist())
    for policy, slack in ((report.allocate(feasible), tolerated), (report.threshold(feasible), 2 * tolerated)):
        removed = feasible.removed(policy)
        assert feasible.utilisation(removed) <= 1
        assert feasible.policy(removed) == policy
        assert best - 1e-9 <= loss_of(report, feasible, removed.tolist()) <= slack * best
    assert loss_of(report, feasible, feasible.removed(report.allocate(feasible)).tolist()) < uniform


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=4),
    st.integers(30, 120),
    st.data(),
)
def test_any_report_allocates_within_any_budget(widths: list[int], percent: int, data: st.DataObject) -> None:
    try:
        feasible = chain(widths, f"macs<={percent}%")
    except ConfigError:
        return  # no policy of these widths meets it
    cells = {
        f"conv{number}": [cell for cell in data.draw(noisy_cells) if cell[0] < width]
        for number, width in enumerate(widths, 1)
    }
    report = synthetic(cells, {f"conv{number}": width for number, width in enumerate(widths, 1)})
    for policy in (report.allocate(feasible), report.threshold(feasible)):
        removed = feasible.removed(policy)
        assert feasible.utilisation(removed) <= 1
        assert feasible.policy(removed) == policy  # within the bounds already


def test_locked_groups_keep_their_bounds() -> None:
    narrow = dataclasses.replace(chain([16, 16], "macs<=60%"), upper=np.array([0, 14]), lower=np.array([0, 3]))
    report = powers([16, 16], 0)
    for policy in (report.allocate(narrow), report.threshold(narrow)):
        assert policy["conv1"] == 0.0
        assert policy["conv2"] >= 3 / 16


def test_a_group_of_which_nothing_was_measured_stays_whole_if_the_budget_allows() -> None:
    cells = {"conv1": [(n, 0.9, 0.2 + n) for n in range(1, 16)], "conv2": [], "conv3": [(8, 0.0, float("nan"))]}
    report = synthetic(cells, dict.fromkeys(cells, 16))
    feasible = chain([16, 16, 16], "macs<=80%")
    assert report.missing(feasible.structure) == ("conv2", "conv3")
    for policy in (report.allocate(feasible), report.threshold(feasible)):
        assert policy["conv2"] == policy["conv3"] == 0.0
    narrow = chain([16, 16, 16], "macs<=10%")
    assert narrow.utilisation(narrow.removed(report.allocate(narrow))) <= 1


def test_a_sensitive_group_is_spared() -> None:
    feasible = chain([16, 16], "macs<=50%")
    flat, steep = [(n, 0.9, 0.2 + n / 1000) for n in range(1, 16)], [(n, 0.5, 0.2 + n) for n in range(1, 16)]
    sizes = {"conv1": 16, "conv2": 16}
    for cells, spared in (({"conv1": flat, "conv2": steep}, "conv2"), ({"conv1": steep, "conv2": flat}, "conv1")):
        report = synthetic(cells, sizes)
        assert report.allocate(feasible)[spared] == 0.0
        assert report.threshold(feasible)[spared] == 0.0


def test_a_budget_of_everything_removes_nothing() -> None:
    feasible = chain([8, 8], "macs<=100%")
    assert powers([8, 8], 0).allocate(feasible) == Policy({"conv1": 0.0, "conv2": 0.0})
