"""The sensitivity analyzer: one group at a time, the others dense, and what its report is good for.

A cell is one group at one sparsity, sliced and recovered as candidates are, but not fine-tuned. The report is an open
JSON file, written as cells come; cells that are there are not measured again, so that a killed analysis goes on, a
finer grid costs its new cells only, and another budget costs nothing. Beside the cells it holds what moments predict.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, final

import numpy as np
import torch

from autoprune import separable
from autoprune.analytic import Analytic
from autoprune.cost import CostModel, FeasibleSet
from autoprune.errors import ConfigError, ExecutorError, RunError
from autoprune.evaluation import Executor, Measurement, Precision, Probe, Workbench
from autoprune.finetuning import SharedWeights
from autoprune.policy import Policy
from autoprune.run import write_json
from autoprune.scoring import Evidence
from autoprune.scoring.taylor import taylor_scores
from autoprune.structure import Structure
from autoprune.task import Task
from autoprune.threads import suited_threads

__all__ = ["SPARSITIES", "Cell", "Curve", "GroupSensitivity", "SensitivityReport", "analyse", "conditions"]

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The grid where none is asked for."""

_FORMAT = 2

_WRITING = 0.01  # share of the time that may go into writing cells down as they come

_Probed = tuple[tuple[str, int], Measurement, float, float | None]
"""Group and elements removed, what that measures, the error of its drop, and the share of a whole pass that it took."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One group at one sparsity, all others dense, recovered but not fine-tuned.

    Attributes:
        sparsity: Exactly `removed` over the group's size.
        removed: Elements removed.
        accuracy: Mean of the task's metric.
        accuracy_se: Its standard error.
        loss: Mean loss.
        loss_se: Its standard error.
        drop_se: Standard error of the accuracy lost against the dense network, paired by sample.
        taylor_loss: The loss that first-order Taylor predicts, from one pass for all cells.
        executed: Share of the multiply-adds of a whole pass of the dense network that ran for it (see `Workbench`), or
            None. What it took, not what it is: it depends on which cells were measured before it, and where.
    """

    sparsity: float
    removed: int
    accuracy: float
    accuracy_se: float
    loss: float
    loss_se: float
    drop_se: float
    taylor_loss: float
    executed: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class GroupSensitivity:
    """One row of the report: a group with its cells, or one that can't be pruned with the reason.

    Attributes:
        name: The group.
        kind: Of its elements.
        size: How many elements it has.
        layers: The coupled layers, one row for all.
        prunable: Whether it is offered.
        reason: Why not.
        macs_share: Share of the dense multiply-adds in the layers that it touches; neighbours overlap.
        cells: By elements removed, ascending.
        predicted: Elements removed, and the loss that moments predict for it (see `autoprune.analytic`): the share of
            the power of the network's outputs that is lost; empty if not known.
    """

    name: str
    kind: str
    size: int
    layers: tuple[str, ...]
    prunable: bool
    reason: str | None
    macs_share: float
    cells: tuple[Cell, ...] = ()
    predicted: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """A group's loss and accuracy against elements removed, monotone, interpolated between cells.

    Attributes:
        removed: `(k,)` counts, starting at 0.
        loss: `(k,)` never falling, convex.
        drop: `(k,)` accuracy lost, never falling.
    """

    removed: np.ndarray[Any, np.dtype[np.float64]]
    loss: np.ndarray[Any, np.dtype[np.float64]]
    drop: np.ndarray[Any, np.dtype[np.float64]]

    def loss_at(self, removed: float) -> float:
        """Return the loss; beyond the last cell it goes on as steep as it got."""
        return _along(self.removed, self.loss, removed)

    def drop_at(self, removed: float) -> float:
        """Return the accuracy lost; beyond the last cell it goes on as steep as it got."""
        return _along(self.removed, self.drop, removed)


@dataclass(frozen=True, slots=True)
class SensitivityReport:
    """All cells of one network on one data set.

    Attributes:
        digest: Of network, weights and data; a report of another network is refused.
        settings: What the cells were measured with.
        dense: The network that cells are cut from, whole: the dense one as it is, or with shared weights where there
            are any, so that what a cell lost is what its group lost.
        groups: Every group, offered or locked.
    """

    digest: Mapping[str, str]
    settings: Mapping[str, Any]
    dense: Measurement
    groups: tuple[GroupSensitivity, ...]
    _rows: Mapping[str, GroupSensitivity] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", {group.name: group for group in self.groups})

    def __getitem__(self, group: str) -> GroupSensitivity:
        return self._rows[group]

    @property
    def executed(self) -> float | None:
        """Multiply-adds that ran for the cells, as a share of those of as many whole passes; None if not known."""
        known = [c.executed for group in self.groups for c in group.cells if c.executed is not None]
        return sum(known) / len(known) if known else None

    @property
    def work(self) -> str:
        """What was spared, in words; empty where nothing was."""
        if self.executed is None or self.executed >= 1:
            return ""
        cells = sum(len(group.cells) for group in self.groups)
        spared = f"{self.executed:.0%} of the multiply-adds of as many whole passes"
        return f"{cells} cells took {spared}: what runs before a group was kept"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "format": _FORMAT,
            "digest": dict(self.digest),
            "settings": dict(self.settings),
            "dense": asdict(self.dense),
            "groups": [asdict(group) for group in self.groups],
        }

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a report.

        Raises:
            RunError: The file is not a report.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            groups = [
                GroupSensitivity(
                    **{
                        **group,
                        "layers": tuple(group["layers"]),
                        "cells": tuple(Cell(**c) for c in group["cells"]),
                        "predicted": tuple((count, loss) for count, loss in group["predicted"]),
                    }
                )
                for group in document["groups"]
            ]
            return cls(document["digest"], document["settings"], Measurement(**document["dense"]), tuple(groups))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is not a sensitivity report ({error}); move it away to analyse anew") from error

    def save(self, path: Path) -> None:
        """Write the report, so that the file is always whole."""
        write_json(path, self.to_dict())

    def with_cell(self, group: str, cell: Cell) -> Self:
        """Return the report with one more cell."""
        cells = {c.removed: c for c in (*self[group].cells, cell)}
        row = replace(self[group], cells=tuple(cells[removed] for removed in sorted(cells)))
        return replace(self, groups=tuple(row if g.name == group else g for g in self.groups))

    def merge(self, other: "SensitivityReport") -> Self:
        """Return a report with the cells of both; what several processes measured in shards becomes one.

        Raises:
            RunError: The other is of another network, other data or other settings.
        """
        self.require(other.digest, other.settings)
        merged = self
        for group, cell in ((g, c) for g in other.groups for c in g.cells):
            merged = merged.with_cell(group.name, cell)
        return merged

    def require(self, digest: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """Refuse to be taken for a report of something else.

        Raises:
            RunError: The digest or the settings differ.
        """
        for what, mine, others in (("", self.digest, digest), ("setting ", self.settings, settings)):
            for key in {**mine, **others}:
                if mine.get(key) != others.get(key):
                    raise RunError(
                        f"the sensitivity report is of another {what}{key} ({mine.get(key)}, not {others.get(key)}); "
                        "name another file to analyse anew"
                    )

    def curve(self, group: str) -> Curve:
        """Return a group's curve, without cells that diverged; where none are left it is flat: no claim."""
        cells = [cell for cell in self[group].cells if math.isfinite(cell.loss)]
        removed = np.array([0.0, *(c.removed for c in cells)])
        loss = np.maximum.accumulate([self.dense.loss, *(c.loss for c in cells)])
        drop = np.maximum.accumulate([0.0, *(self.dense.accuracy - c.accuracy for c in cells)])
        hull = separable.hull(removed, loss)
        return Curve(removed, np.interp(removed, removed[hull], loss[hull]), drop)

    def predicted_accuracy(self, removed: Mapping[str, int]) -> float:
        """Return the accuracy of a policy if groups did not interact: the dense one minus every group's own drop."""
        drops = [self.curve(name).drop_at(count) for name, count in removed.items() if count]
        return max(0.0, self.dense.accuracy - sum(drops))

    def slope(self, group: str) -> float:
        """Return the mean rise of the loss over a group's cells, per unit of sparsity; an agent's state feature."""
        cells = self[group].cells
        return float(np.mean([(c.loss - self.dense.loss) / c.sparsity for c in cells])) if cells else 0.0

    def bounds(self, structure: Structure, tolerance: float, max_sparsity: float) -> dict[str, tuple[float, float]]:
        """Return for every group the sparsities at which it alone loses no more than `tolerance` of the accuracy.

        At least the first step of the grid stays open to every group, since fine-tuning recovers some of the loss.
        """
        result = {}
        for group in structure:
            curve, grid = self.curve(group.name), [c.sparsity for c in self[group.name].cells] or [max_sparsity]
            fits = [s for s in np.linspace(0, max_sparsity, 91) if curve.drop_at(s * group.size) <= tolerance]
            result[group.name] = (0.0, float(min(max_sparsity, max(grid[0], fits[-1]))))
        return result

    def missing(self, structure: Structure) -> tuple[str, ...]:
        """Return the groups of which nothing was measured, whose curves make no claim."""
        return tuple(group.name for group in structure if len(self.curve(group.name).removed) == 1)

    def loss_of(self, group: str, power: float = 1.0) -> separable.Loss:
        """Return what a group adds to the dense network's loss, to a power, by the number of elements removed."""
        curve = self.curve(group)
        dense = curve.loss_at(0)
        return lambda removed: (curve.loss_at(removed) - dense) ** power

    def allocate(self, feasible: FeasibleSet) -> Policy:
        """Return the policy of least predicted loss (see `autoprune.separable.allocate`).

        Groups of which nothing was measured stay whole, if the budget can be met without them.
        """
        whole = feasible.without(self.missing(feasible.structure))
        return separable.allocate(whole, self._losses(feasible))

    def threshold(self, feasible: FeasibleSet) -> Policy:
        """Return the policy of equal predicted losses (see `autoprune.separable.threshold`).

        Groups of which nothing was measured stay whole, if the budget can be met without them.
        """
        whole = feasible.without(self.missing(feasible.structure))
        return separable.threshold(whole, self._losses(feasible))

    def _losses(self, feasible: FeasibleSet) -> list[separable.Loss]:
        return [self.curve(group.name).loss_at for group in feasible.structure]


def analyse(
    bench: Workbench,
    costs: CostModel,
    path: Path,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    settings: Mapping[str, Any],
    evidence: Evidence,
    predicted: Analytic | None = None,
    shard: tuple[int, int] = (0, 1),
    deadline: float | None = None,
    workers: Executor | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> SensitivityReport:
    """Measure every offered group at every sparsity, and keep the file whole.

    It is written after a cell, unless that took more than a hundredth of the time of late, and whatever ends the
    analysis; only a process that is killed outright can lose the cells of a hundred times what a write takes.

    Args:
        bench: The network and its data.
        costs: Prices, for the groups' shares.
        path: The report's file; cells in it are not measured again.
        sparsities: In (0, 1); each becomes a whole number of elements. None, to measure nothing.
        settings: What the cells depend on besides network and data: criterion, calibration images, seed. The task's
            augmentation, metric and loss are added by name.
        evidence: Batches for the Taylor prediction.
        predicted: What moments predict, to be kept beside the cells.
        shard: `(i, n)`: measure only every n-th cell, from the i-th; merge the files afterwards.
        deadline: Value of `time.monotonic()` after which no further cell is begun.
        workers: Where cells are measured: an executor that was started with a pipeline of this workbench; here without.
        progress: Called with the group, the cells done and all cells.

    Raises:
        ConfigError: A sparsity outside (0, 1), or a shard that does not exist.
        RunError: The file is of another network, other data or other settings.
        ExecutorError: Workers died of a cell, one after another.
    """
    if not all(0 < s < 1 for s in sparsities) or not (sparsities or predicted):
        raise ConfigError(f"`0 < sparsity < 1` must hold for every one to be measured, but got {list(sparsities)}")
    if not 0 <= shard[0] < shard[1]:
        raise ConfigError(f"a shard i/n has 1 <= i <= n, but got {shard[0] + 1}/{shard[1]}")
    digest = bench.task.digest()
    settings = conditions(bench.task, settings, bench.precision, bench.weights)
    dense = bench.whole
    rows = tuple(_rows(bench.structure, costs, predicted))
    report = SensitivityReport(digest, settings, dense.summary("dense"), rows)
    if path.exists():
        loaded = SensitivityReport.load(path)
        loaded.require(digest, settings)
        report = loaded
    taylor: Mapping[str, torch.Tensor] = {}
    if sparsities:
        with suited_threads(bench.macs):
            taylor = taylor_scores(bench.model, bench.structure, evidence)
    grid = [(g, g.count(s)) for g in bench.structure for s in sorted(set(sparsities))]
    wanted = list(dict.fromkeys((group.name, removed) for group, removed in grid if removed > 0))
    mine = list(itertools.islice(wanted, shard[0], None, shard[1]))
    mine.sort(
        key=lambda cell: bench.begins({cell[0]: cell[1]})
    )  # so that what runs before is kept from one to the next
    missing = [(name, removed) for name, removed in mine if removed not in {c.removed for c in report[name].cells}]
    done = len(mine) - len(missing)
    late = (lambda: False) if deadline is None else lambda: time.monotonic() >= deadline

    def begin(name: str) -> None:
        progress(name, done, len(mine))

    probing = _here(bench, missing, late, begin) if workers is None else _there(bench, missing, late, begin, workers)
    file = _File(path)
    try:
        for (name, removed), measured, drop_se, executed in probing:
            gone = _gone(bench, name, removed, taylor[name])
            cell = Cell(
                sparsity=removed / bench.structure[name].size,
                removed=removed,
                accuracy=measured.accuracy,
                accuracy_se=measured.accuracy_se,
                loss=measured.loss,
                loss_se=measured.loss_se,
                drop_se=drop_se,
                taylor_loss=report.dense.loss + float(gone.sum()),
                executed=executed,
            )
            report = report.with_cell(name, cell)
            file.keep(report)
            done += 1
    finally:
        file.write()
    report.save(path)
    bench.forget()
    return report


@final
class _File:
    """A report's file while cells come: writing it whole takes longer the more there are.

    Args:
        path: Where.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: SensitivityReport | None = None
        self._due = -math.inf

    def keep(self, report: SensitivityReport) -> None:
        """Take a report with one more cell, and write it if it is time."""
        self._unwritten = report
        if time.perf_counter() >= self._due:
            self.write()

    def write(self) -> None:
        """Write what is not written yet."""
        if self._unwritten is not None:
            started = time.perf_counter()
            self._unwritten.save(self._path)
            self._unwritten = None
            now = time.perf_counter()
            self._due = now + (now - started) / _WRITING


def _here(
    bench: Workbench, cells: Sequence[tuple[str, int]], late: Callable[[], bool], begin: Callable[[str], None]
) -> Iterator[_Probed]:
    """Measure cells one after another, until it is late."""
    for name, removed in cells:
        begin(name)
        if late():
            return
        samples = bench.probe({name: removed})
        yield (name, removed), samples.summary(bench.rung), samples.drop_error(bench.dense), bench.executed[-1]


def _there(
    bench: Workbench,
    cells: Sequence[tuple[str, int]],
    late: Callable[[], bool],
    begin: Callable[[str], None],
    workers: Executor,
) -> Iterator[_Probed]:
    """Have workers measure cells, in whatever order they are done, until it is late."""
    under_way: dict[str, tuple[str, int]] = {}

    def finished() -> _Probed:
        outcome = workers.finished()
        if outcome.failure is not None or outcome.drop_se is None:
            raise ExecutorError(
                f"a sensitivity cell of {under_way[outcome.id][0]} can't be measured: {outcome.failure}"
            )
        return under_way.pop(outcome.id), outcome.measurements[0], outcome.drop_se, outcome.executed

    for name, removed in cells:
        if len(under_way) >= workers.at_once:
            yield finished()
        begin(name)
        if late():
            break
        probe = Probe(bench.structure.policy({name: removed}))
        under_way[probe.id] = (name, removed)
        workers.submit(probe)
    while under_way:
        yield finished()


def _gone(bench: Workbench, name: str, removed: int, scores: torch.Tensor) -> torch.Tensor:
    """Return the scores of what goes of one group."""
    group, order = bench.structure[name], bench.orders[name]
    if group.pattern is None:
        return scores[torch.as_tensor(order)[:removed]]
    return scores[bench.change({name: removed}).zeroed[group.pattern.tensor].cpu()]


def conditions(
    task: Task, settings: Mapping[str, Any], precision: Precision, weights: SharedWeights | None = None
) -> dict[str, Any]:
    """Return what cells depend on besides network and data: settings, format; augmentation, metric and loss by name.

    And the shared weights, where cells are cut from any: the same settings can train others on another machine.
    """
    described = task.describe()
    found = {**settings, "precision": precision.dtype, **{key: described[key] for key in ("augment", "metric", "loss")}}
    return found if weights is None else {**found, "shared weights": weights.digest}


def _rows(structure: Structure, costs: CostModel, predicted: Analytic | None) -> Iterator[GroupSensitivity]:
    for group in structure:
        share = costs.macs_share(group.name)
        row = GroupSensitivity(group.name, group.kind, group.size, group.layers, True, None, share)
        yield row if predicted is None else replace(row, predicted=predicted.points(group.name))
    for locked in structure.locked:
        yield GroupSensitivity(locked.name, locked.kind, locked.size, locked.layers, False, locked.reason, 0.0)


def _along(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], at: float) -> float:
    if at <= x[-1] or len(x) < 2:
        return float(np.interp(at, x, y))
    return float(y[-1] + (at - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2]))
