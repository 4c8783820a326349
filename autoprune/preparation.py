"""A task made ready to search: groups, prices, the order of elements, and the evaluator. Nothing here is evaluated."""

import dataclasses
import functools
import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from autoprune import registry
from autoprune.analytic import Analytic
from autoprune.bounds import parse_bounds
from autoprune.cost import CostModel, FeasibleSet, LatencyTable, count
from autoprune.data import Batch
from autoprune.errors import TaskError, UncountedOperatorWarning
from autoprune.evaluation import Choice, Evaluator, Executor, Ledger, Pipeline, Workbench, chosen
from autoprune.finetuning import SharedWeights, recalibrate, train_shared
from autoprune.moments import Moments, influences, readers_of
from autoprune.progress import Progress, Silent
from autoprune.run import RunFolder, write_json
from autoprune.scoring import Evidence, Orders, Scores, removal_orders, removals
from autoprune.seeds import derive
from autoprune.settings import SearchSettings
from autoprune.structure import Structure, plan
from autoprune.structure import analyse as analyse_structure
from autoprune.task import Task
from autoprune.threads import suited_threads

__all__ = ["Prepared", "evaluator_of", "prepare"]

_DRAWN: Final = 2  # random policies of a step of shared training, as many as the paper has
_LEAST: Final = (
    0.25  # share of the budget that policies in it use at least, where candidates may use less than all of it
)


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
        evidence: What predictions are made from: batches and moments. The moments are those of the network that
            candidates are cut from, with shared weights where there are any: a prediction says what happens to its
            layers when elements of it go, and sensitivity cells and candidates lose just those. The criterion saw the
            moments of the network's own weights, since the order of removal is settled before anything is trained.
        scores: How much every element matters, to the criterion.
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


def prepare(
    task: Task, settings: SearchSettings, folder: RunFolder | None = None, progress: Progress | None = None
) -> Prepared:
    """Find a task's groups, score their elements and price policies; nothing is evaluated.

    Where settings ask for shared weights, they are trained here, or read.

    Args:
        task: What the user brought.
        settings: How to search.
        folder: Where the precision, the latency table, which a budget on latency needs, shared weights and the moments
            are read from, or written to if they are not there. A search that goes on must price, order and measure
            policies as before.
        progress: Who watches the training of shared weights.

    Raises:
        StructureError: The network's dependencies can't be traced.
        InfeasibleBudgetError: No policy within the bounds meets the budget.
        ConfigError: A bound or name is wrong.
        DivergedError: Shared weights can't be trained.
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
    seen = evidence = Evidence(placed, task.loss, derive(settings.seed, "scores"), known)
    criterion = registry.resolve("criterion", settings.criterion)()
    with suited_threads(costs.dense.macs):
        scores = criterion.score(task.fresh_model().eval(), structure, evidence)
    orders = removal_orders(scores)
    choice = _choice(task, settings, folder)
    weights: SharedWeights | None = None
    if settings.shared_steps:
        weights = _shared(task, settings, feasible, orders, choice, folder and folder.shared, progress or Silent())
        file = folder and folder.shared_moments
        known = functools.cache(lambda: _moments(task, settings, structure, placed, file, weights))
        seen = dataclasses.replace(evidence, known=known)
    bench = Workbench(
        task,
        structure,
        orders,
        settings.calibration_images,
        settings.seed,
        settings.recover,
        choice,
        int(settings.activations_memory * 1e9),
        settings.race,
        weights,
    )
    return Prepared(task, settings, structure, costs, feasible, bench, seen, scores)


def _choice(task: Task, settings: SearchSettings, folder: RunFolder | None) -> Choice:
    """Return the precisions: those written down, or chosen now and written down."""
    if folder is not None and folder.precision.exists():
        return Choice.of(folder.read(folder.precision))
    model = task.fresh_model().eval()
    choice = chosen(task, model, count(model, task.example_input).cost, settings.precision)
    if folder is not None:
        write_json(folder.precision, choice.to_dict())
    return choice


def _shared(
    task: Task,
    settings: SearchSettings,
    feasible: FeasibleSet,
    orders: Orders,
    choice: Choice,
    file: Path | None,
    progress: Progress,
) -> SharedWeights:
    """Return the weights that all candidates are cut from: read, or trained and written."""
    described, device = task.describe(), task.example_input.device
    depends = settings.measured_with | {key: described[key] for key in ("augment", "loss")}
    depends |= {"training": choice.training.dtype}
    digest = task.digest() | {name: json.dumps(value) for name, value in depends.items()}
    if file is not None and file.exists():
        return SharedWeights.load(file, digest)
    started, seed, recipe = time.monotonic(), derive(settings.seed, "shared"), settings.recipe
    model = task.fresh_model()
    if task.example_input.dim() == 4:
        layout = torch.channels_last if choice.precision.channels_last else torch.contiguous_format
        model.to(memory_format=layout)
    structure = feasible.structure
    changes = (
        [plan(model, structure, removals(structure, orders, removed)) for removed in policies]
        for policies in _drawn(feasible, settings)
    )
    progress.begin("training shared weights", settings.shared_steps)
    with suited_threads(feasible.costs.dense.macs):
        train_shared(
            model,
            choice.precision.placed(task.train_batches(recipe.batch_size, seed), device),
            changes,
            settings.shared_steps,
            recipe=recipe,
            loss=task.loss,
            seed=seed,
            running=functools.partial(choice.training.running, device),
            progress=lambda done, loss: progress.step(done, f"loss {loss:.4f}"),
        )
        images = task.calibration_batches(settings.calibration_images, 250, derive(settings.seed, "calibration"))
        placed = choice.precision.placed(images, device)
        # running averages remember the last few batches alone, and weights that still moved
        recalibrate(model, placed, functools.partial(choice.precision.running, device))
    progress.end()
    weights = SharedWeights.of(model)
    if file is not None:
        weights.save(file, digest)
    seconds = time.monotonic() - started
    progress.line(f"trained one set of weights for all candidates for {settings.shared_steps} steps in {seconds:.1f} s")
    return weights


def _drawn(feasible: FeasibleSet, settings: SearchSettings) -> Iterator[Sequence[Mapping[str, int]]]:
    """Yield the policies of one step of shared training after another, as counts: the smallest, and random ones.

    The smallest is the uniform policy at the least cost that candidates are likely to have, and not the smallest that
    can be reached: that one has lost almost everything everywhere, is of use to nobody, and its gradients would drown
    the others'. Under a budget alone all candidates use the whole of it, so that is where all policies lie. Where
    accuracy is traded for cost, they lie between a quarter of the way from the smallest to the whole budget, which is
    about where the search's own starts begin, and the whole. Random ones come from the search's space, so that they are
    of the sort that is searched.
    """
    least = 1.0 if settings.whole_budget else _LEAST
    reached = feasible.utilisation(feasible.upper)
    structure = feasible.structure
    smallest = structure.removed(feasible.policy(feasible.uniform(reached + least * (1 - reached))))
    generator = np.random.default_rng(derive(settings.seed, "shared policies"))
    space = registry.resolve("search space", settings.space)(feasible, spend=(least, 1.0))
    while True:
        points = generator.random((_DRAWN, len(space.dimensions)))
        yield [smallest, *(structure.removed(space.decode(point)) for point in points)]


def _moments(
    task: Task,
    settings: SearchSettings,
    structure: Structure,
    batches: Sequence[Batch],
    file: Path | None,
    weights: SharedWeights | None = None,
) -> Moments:
    digest = {
        **task.digest(),
        "readers": hashlib.sha256(",".join(sorted(readers_of(structure))).encode()).hexdigest()[:16],
        "images": str(sum(len(inputs) for inputs, _ in batches)),
        "memory": str(settings.moments_memory),
        "seed": str(settings.seed),
    }
    if weights is not None:
        digest["shared"] = weights.digest
    if file is not None and file.exists():
        return Moments.load(file, digest, task.example_input.device)
    model = task.fresh_model().eval()
    if weights is not None:
        weights.put_into(model)
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
    with suited_threads(costs.dense.macs, repeatable=False):
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
    pipeline = Pipeline(prepared.bench, recovery, prepared.settings.seed)
    return Evaluator(pipeline, prepared.costs, Ledger(folder.ledger_of(level)), executor, at_once, rival)
