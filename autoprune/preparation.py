"""A task made ready to search: groups, prices, the order of elements, and the evaluator. Nothing here is evaluated."""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoprune import registry
from autoprune.analytic import Analytic
from autoprune.bounds import parse_bounds
from autoprune.cost import CostModel, FeasibleSet, LatencyTable, count
from autoprune.data import Batch
from autoprune.errors import TaskError, UncountedOperatorWarning
from autoprune.evaluation import Choice, Evaluator, Executor, Ledger, Pipeline, Workbench
from autoprune.moments import Moments, influences, readers_of
from autoprune.run import RunFolder, write_json
from autoprune.scoring import Evidence, Scores, removal_orders
from autoprune.seeds import derive
from autoprune.settings import SearchSettings
from autoprune.structure import Structure
from autoprune.structure import analyse as analyse_structure
from autoprune.task import Task
from autoprune.threads import suited_threads

__all__ = ["Prepared", "evaluator_of", "prepare"]


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A task made ready to search: what can be removed, in which order, at what price.

    Attributes:
        task: What the user brought.
        settings: How to search.
        structure: The groups.
        costs: Prices policies.
        feasible: The policies that meet the budget within the user's bounds.
        bench: The network and its data.
        evidence: What criteria may look at.
        scores: How much every element matters.
    """

    task: Task
    settings: SearchSettings
    structure: Structure
    costs: CostModel
    feasible: FeasibleSet
    bench: Workbench
    evidence: Evidence
    scores: Scores

    def analytic(self) -> Analytic:
        """Return what moments predict of any policy."""
        moments = self.evidence.moments(self.bench.model, self.structure)
        with suited_threads(self.bench.macs):
            seed = derive(self.settings.seed, "influence")
            influence = influences(self.bench.model, self.evidence.batches, readers_of(self.structure), seed)
            return Analytic.of(self.bench.model, self.structure, self.bench.orders, moments, influence)


def prepare(task: Task, settings: SearchSettings, folder: RunFolder | None = None) -> Prepared:
    """Find a task's groups, score their elements and price policies; nothing is evaluated.

    Args:
        task: What the user brought.
        settings: How to search.
        folder: Where the precision, the latency table, which a budget on latency needs, and the moments are read from,
            or written to if they are not there. A search that goes on must price, order and measure policies as before.

    Raises:
        StructureError: The network's dependencies can't be traced.
        InfeasibleBudgetError: No policy within the bounds meets the budget.
        ConfigError: A bound or name is wrong.
    """
    with suited_threads(0):  # an input or two at a time
        structure = analyse_structure(
            task.model,
            task.example_input,
            kinds=settings.units,
            multiple=settings.multiple,
            normalised=settings.normalised,
            seed=derive(settings.seed, "proof"),
        )
        costs = CostModel(task.model, task.example_input, structure)
    if not len(structure):
        reasons = (
            "; ".join(f"{group.name}: {group.reason}" for group in structure.locked) or "no convolution or linear layer"
        )
        raise TaskError(f"nothing in {task.name} can be pruned ({reasons})")
    if costs.unknown:
        listed = ", ".join(f"{name} ({times} times)" for name, times in costs.unknown.items())
        warnings.warn(
            f"the MACs leave out operators that are not known: {listed}", UncountedOperatorWarning, stacklevel=2
        )
    if any(limit.metric == "latency" for limit in settings.limits.limits):
        costs.latency = _latency_table(task, structure, costs, folder and folder.latency)
    bounds = parse_bounds(settings.bounds, structure, settings.max_sparsity)
    feasible = FeasibleSet.build(structure, costs, settings.limits, bounds, settings.max_sparsity)
    images = min(1000, settings.calibration_images)
    device = task.example_input.device
    batches = task.calibration_batches(images, 250, derive(settings.seed, "scoring"))
    placed = [(inputs.to(device), targets.to(device)) for inputs, targets in batches]
    known = functools.cache(lambda: _moments(task, settings, structure, placed, folder and folder.moments))
    evidence = Evidence(placed, task.loss, derive(settings.seed, "scores"), known)
    criterion = registry.resolve("criterion", settings.criterion)()
    with suited_threads(costs.dense.macs):
        scores = criterion.score(task.fresh_model().eval(), structure, evidence)
    chosen = folder is not None and folder.precision.exists() and Choice.of(folder.read(folder.precision))
    bench = Workbench(
        task,
        structure,
        removal_orders(scores),
        settings.calibration_images,
        settings.seed,
        settings.recover,
        chosen or settings.precision,
        int(settings.activations_memory * 1e9),
        settings.race,
    )
    if folder is not None and not chosen:
        write_json(folder.precision, bench.choice.to_dict())
    return Prepared(task, settings, structure, costs, feasible, bench, evidence, scores)


def _moments(
    task: Task, settings: SearchSettings, structure: Structure, batches: Sequence[Batch], file: Path | None
) -> Moments:
    digest = {
        **task.digest(),
        "readers": hashlib.sha256(",".join(sorted(readers_of(structure))).encode()).hexdigest()[:16],
        "images": str(sum(len(inputs) for inputs, _ in batches)),
        "memory": str(settings.moments_memory),
        "seed": str(settings.seed),
    }
    if file is not None and file.exists():
        return Moments.load(file, digest, task.example_input.device)
    model = task.fresh_model().eval()
    memory = int(settings.moments_memory * 1e9)
    with suited_threads(count(model, task.example_input).cost.macs):
        moments = Moments.collect(
            model, batches, readers_of(structure), memory=memory, seed=derive(settings.seed, "moments")
        )
    if file is not None:
        moments.save(file, digest)
    return moments


def _latency_table(task: Task, structure: Structure, costs: CostModel, file: Path | None) -> LatencyTable:
    if file is not None and file.exists():
        return LatencyTable.load(file, costs)
    with suited_threads(costs.dense.macs):
        table = LatencyTable.measure(task.fresh_model().eval(), task.example_input, structure, costs)
    if file is not None:
        table.save(file)
    return table


def evaluator_of(
    prepared: Prepared,
    folder: RunFolder,
    executor: Executor | None = None,
    level: int = 0,
    steps: int | None = None,
    at_once: int | None = None,
) -> Evaluator:
    """Return the evaluator of a run, with the candidates that its ledger holds.

    Args:
        prepared: The task.
        folder: The run.
        executor: Where evaluations run.
        level: Of the ladder; 0 is the search.
        steps: Gradient steps of every candidate; by default as many as the search has.
        at_once: How many may be under way; by default as many as the executor has.
    """
    recovery = prepared.settings.recovery
    if steps is not None:
        recovery = dataclasses.replace(recovery, finetune_steps=steps)
    racing = prepared.settings.race and recovery.finetune_steps == 0
    rival = prepared.feasible.policy(prepared.feasible.uniform(1.0)) if racing else None
    pipeline = Pipeline(prepared.bench, recovery, prepared.settings.seed, rival)
    return Evaluator(pipeline, prepared.costs, Ledger(folder.ledger_of(level)), executor, at_once)
