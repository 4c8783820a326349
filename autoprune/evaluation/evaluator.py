"""The evaluator: slice, recover, measure, write down. The one place that counts, caches and records evaluations.

Agents propose through an `Arm`, which ends them by `SearchOver`; they can't open a data set. An evaluation depends on
the policy and the search's seed alone, never on what was evaluated before, so that a ledger can be replayed.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from autoprune.cost import CostModel, count
from autoprune.data import Batch
from autoprune.errors import DivergedError, SearchOver
from autoprune.evaluation.candidate import Candidate, Measurement
from autoprune.evaluation.ledger import Ledger
from autoprune.evaluation.measure import Samples, measure
from autoprune.evaluation.precision import Choice, Precision, chosen, until
from autoprune.evaluation.prefix import CutPoint, Prefix
from autoprune.finetuning import Recipe, Refit, recalibrate, train
from autoprune.policy import Policy
from autoprune.scoring import Orders
from autoprune.seeds import derive
from autoprune.structure import Cut, Removal, Structure, Weakest, cut, plan
from autoprune.task import Task
from autoprune.threads import suited_threads

__all__ = ["TIME_LIMIT", "Arm", "Evaluator", "Recovery", "Workbench"]

_IN_MEMORY = 2 << 30  # bytes of validation inputs that are kept ready; a larger split is read for each measurement
TIME_LIMIT = "time limit"
"""`Arm.stopped` of an arm that ran out of time; such a search can go on."""
_FITTED_MEMORY = 1 << 30  # bytes of activations while layers are fitted, which takes all images at once
_MOST_FITTED, _FEWEST_FITTED = 500, 32  # images
_FITTED_EACH, _FITTED_ROWS = 20, 10_000  # output positions of an image, of all images
_CACHED = 16 << 20  # bytes of activations of a batch that is measured: what the caches of a processor hold
_COMPARED = 1000  # samples on which recalibration of the dense network is looked at
_NUMBER = 4  # bytes of an activation, at most
_SAMPLES = 3  # on which cut points are verified
_REPEATS = 200  # proposals in a row that were all evaluated before: the agent has converged


@dataclass(frozen=True, slots=True)
class Recovery:
    """How far a candidate's weights are recovered before it is measured.

    Attributes:
        calibration_images: Augmented training images for the batch-norm statistics.
        finetune_steps: Gradient steps of short fine-tuning; 0 stops at the first rung.
        recipe: Of the fine-tuning.
    """

    calibration_images: int = 2000
    finetune_steps: int = 0
    recipe: Recipe = field(default_factory=Recipe)


class Workbench:
    """A network made ready for slicing and measuring: on one device, in one layout, with its data beside it.

    Args:
        task: What the user brought; its network is copied.
        structure: The network's groups.
        orders: Group name → elements, least important first (see `autoprune.scoring.removal_orders`).
        calibration_images: How many augmented training images batch-norm statistics are made from.
        seed: Of the calibration images.
        rung: How candidates are recovered first: "recalibrated" or "reconstructed".
        precision: What candidates are trained and measured in: "float32" (channels-last for images), "bfloat16", "auto"
            (the fastest that agrees, see `autoprune.evaluation.precision`; small networks stay in float32), or what was
            chosen before.
        activations_memory: Bytes of the dense network's activations that may be kept for probes.

    Attributes:
        device: The network's.
        choice: What candidates are measured and trained in, and what it was chosen from.
        precision: What they are measured in.
        model: The dense network, in eval mode.
        executed: For every probe, the share of the dense network's multiply-adds that ran.
        macs: Its multiply-adds for one sample, which decide how many threads work (see `autoprune.threads`).
    """

    def __init__(
        self,
        task: Task,
        structure: Structure,
        orders: Orders,
        calibration_images: int,
        seed: int,
        rung: str = "reconstructed",
        precision: str | Choice = "float32",
        activations_memory: int = 2 << 30,
    ) -> None:
        self.task = task
        self.structure = structure
        self.orders = orders
        self.rung = rung
        self.model = task.fresh_model().eval()
        counted = count(self.model, task.example_input)
        dense, self._macs_of = counted.cost, counted.macs_of
        self.macs = dense.macs
        self.activations_memory = activations_memory
        self.executed: list[float] = []
        self._kept: tuple[CutPoint, torch.Tensor, Sequence[torch.Tensor]] | None = None
        self._at_once = max(_FEWEST_FITTED, min(_MOST_FITTED, _FITTED_MEMORY // max(1, dense.activations)))
        self._seed = derive(seed, "fitted rows")
        self.device = next(iter(self.model.parameters())).device
        self.choice = precision if isinstance(precision, Choice) else chosen(task, self.model, dense, precision)
        self.precision = self.choice.precision
        if task.example_input.dim() == 4:
            layout = torch.channels_last if self.precision.channels_last else torch.contiguous_format
            self.model.to(memory_format=layout)
        self._calibration = list(
            self.placed(task.calibration_batches(calibration_images, 250, derive(seed, "calibration")))
        )
        size = task.n_val * task.example_input.numel() * task.example_input.element_size()
        on_cpu = self.device.type == "cpu"
        self._batch = max(32, min(500, _CACHED // max(1, dense.activations))) if on_cpu else 500
        self._val = list(self.placed(task.val_batches(self._batch))) if size <= _IN_MEMORY else None

    def placed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches on the network's device, in its memory layout."""
        return self.precision.placed(batches, self.device)

    @property
    def calibration(self) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """The calibration batches, ready."""
        return self._calibration

    def recovered(self, removed: Mapping[str, int]) -> nn.Module:
        """Return the network without the least important elements, so many of every group, recovered to `rung`."""
        change = self.change(removed)
        model = cut(self.model, change)
        self.recover(model, change)
        return model

    def change(self, removed: Mapping[str, int]) -> Cut:
        """Return what goes with the least important elements, so many of every group."""
        removals: dict[str, Removal] = {}
        for name, number in removed.items():
            order = self.orders[name]
            weighs = self.structure[name].pattern is not None
            removals[name] = Weakest(number, torch.as_tensor(order)) if weighs else order[:number]
        return plan(self.model, self.structure, removals)

    @cached_property
    def _refit(self) -> Refit:
        images = self._fitting
        return Refit(self.model, images, each=max(_FITTED_EACH, _FITTED_ROWS // len(images)), seed=self._seed)

    @cached_property
    def _fitting(self) -> torch.Tensor:
        """The images that layers are fitted on."""
        enough = -(-self._at_once // max(1, len(self._calibration[0][0])))
        images = torch.cat([inputs for inputs, _ in self._calibration[:enough]])[: self._at_once]
        return self.precision.place(images, self.device)

    def recover(self, model: nn.Module, change: Cut) -> None:
        """Recover a sliced network without a gradient, in place, as far as `rung` says.

        Args:
            model: What `cut` made of the dense network.
            change: The cut.
        """
        with suited_threads(self.macs):
            if self.rung == "recalibrated":
                recalibrate(model, self._calibration, self._running)
            else:
                self._refit(model, change)

    def _running(self) -> AbstractContextManager[Any]:
        return self.precision.running(self.device)

    def measure(self, model: nn.Module, precision: Precision | None = None) -> Samples:
        """Measure a network on the validation split.

        Args:
            model: The network.
            precision: By default the one that candidates are measured in.
        """
        batches = self.placed(self.task.val_batches()) if self._val is None else self._val
        with suited_threads(self.macs):
            return measure(model, batches, self.task.metric, self.task.loss, precision or self.precision)

    def probe(self, removed: Mapping[str, int]) -> Samples:
        """Measure the network without some elements, recovered to `rung`; what runs before them is not run again.

        The same as `measure(recovered(removed))`, in less time, most of all where probes come in the order of the
        network (see `begins`): one cut point's outputs are kept.
        """
        change = self.change(removed)
        point = None if self.rung == "recalibrated" or self._val is None else self._prefix.point(change)
        needed = 0 if point is None else 2 * point.size * (self.task.n_val + self._at_once) * _NUMBER  # old and new
        if point is None or needed > self.activations_memory:
            self.executed.append(1.0)
            return self.measure(self.recovered(removed))
        fitted, measured = self._outputs(point)
        model = cut(self.model, change)
        with suited_threads(self.macs), self._prefix.skipped(model, point) as handed:
            handed.give(fitted, len(self._fitting))
            self._refit(model, change)

            def handing() -> Iterator[Batch]:
                for (inputs, targets), outputs in zip(self._val or (), measured, strict=True):
                    handed.give(outputs, len(inputs))
                    yield inputs, targets

            self.executed.append(self._left(point))
            return measure(model, handing(), self.task.metric, self.task.loss, self.precision)

    def forget(self) -> None:
        """Drop the activations that are kept for probes."""
        self._kept = None

    @property
    def work(self) -> str:
        """What was spared in probes, in words; empty where nothing was."""
        share = sum(self.executed) / len(self.executed) if self.executed else 1.0
        spared = f"{share:.0%} of the multiply-adds of as many whole passes"
        return f"{len(self.executed)} cells took {spared}: what runs before a group was kept" if share < 1 else ""

    def begins(self, removed: Mapping[str, int]) -> int:
        """Return when the first module that loses elements begins to run, in the order of modules."""
        return self._prefix.begins(self.change(removed))

    @cached_property
    def _prefix(self) -> Prefix:
        return Prefix(self.model, self._fitting[:_SAMPLES])

    def _outputs(self, point: CutPoint) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Return a cut point's outputs: of what layers are fitted on, and of the validation batches."""
        if self._kept is None or self._kept[0] != point:
            there = self._kept
            earlier = there if there is not None and there[0].end < point.end else None
            inputs = [batch for batch, _ in self._val or ()]
            with suited_threads(self.macs):
                before = (None, None) if earlier is None else ((earlier[0], [earlier[1]]), (earlier[0], earlier[2]))
                (fitted,) = self._prefix.outputs(point, [self._fitting], nullcontext, before[0])
                self._kept = (point, fitted, self._prefix.outputs(point, inputs, self._running, before[1]))
        return self._kept[1:]

    def _left(self, point: CutPoint) -> float:
        """Return the share of the dense network's multiply-adds that come after a cut point."""
        inside = tuple(f"{name}." for name in point.skipped)
        saved = sum(macs for weight, macs in self._macs_of.items() if weight.startswith(inside))
        return 1 - saved / max(1, self.macs)

    def recalibrating(self) -> tuple[Measurement, Measurement]:
        """Return what the dense network does as it is, and with batch-norm statistics of the calibration images.

        On some of both, enough to see whether those images are unlike what the network was trained on.
        """
        model = cut(self.model, Cut())
        batches = self.placed(self.task.val_batches(self._batch)) if self._val is None else self._val
        some, images = list(until(batches, _COMPARED)), list(until(self._calibration, _COMPARED))
        with suited_threads(self.macs):
            recalibrate(model, images, self._running)
            found = [measure(m, some, self.task.metric, self.task.loss, self.precision) for m in (self.model, model)]
        return found[0].summary("dense"), found[1].summary("recalibrated")

    @cached_property
    def dense(self) -> Samples:
        """What the dense network does on the validation split."""
        return self.measure(self.model)


class Evaluator:
    """Turns policies into candidates.

    Args:
        bench: The network and its data.
        costs: Prices policies.
        recovery: How far weights are recovered.
        ledger: Where candidates are written, and looked up before anything is evaluated.
        seed: Of fine-tuning.
    """

    def __init__(self, bench: Workbench, costs: CostModel, recovery: Recovery, ledger: Ledger, seed: int) -> None:
        self.bench = bench
        self.costs = costs
        self.recovery = recovery
        self.ledger = ledger
        self.seed = seed

    def evaluate(self, policy: Policy, *, arm: str, agent: str) -> Candidate:
        """Return the candidate of a policy, from the ledger if the same elements were removed before.

        Raises:
            PolicyError: The policy names a group that the network does not offer.
        """
        removed = self.bench.structure.removed(policy)
        rounded = self.bench.structure.policy(removed)
        known = self.ledger.get(rounded.id)
        if known is not None:
            return known
        started = time.perf_counter()
        failure = None
        measurements: tuple[Measurement, ...] = ()
        try:
            _, measurements = self.recovered(rounded)
        except DivergedError as error:
            failure = str(error)
        if failure is None and not all(math.isfinite(m.loss) for m in measurements):
            failure = f"the validation loss is {measurements[-1].loss}"
        candidate = Candidate(
            number=len(self.ledger),
            id=rounded.id,
            arm=arm,
            agent=agent,
            policy=rounded,
            removed=removed,
            cost=self.costs.cost(removed),
            measurements=measurements if failure is None else (),
            seconds=round(time.perf_counter() - started, 4),
            failure=failure,
        )
        self.ledger.append(candidate)
        return candidate

    def recovered(self, policy: Policy, *, final: bool = False) -> tuple[nn.Module, tuple[Measurement, ...]]:
        """Build a policy's network and recover its weights, always to the same result.

        Args:
            policy: Which network.
            final: Whether to measure it once only, when it is done, and in float32.

        Returns:
            The network, in eval mode, and what it measured, at every rung.

        Raises:
            DivergedError: The loss is not finite while fine-tuning.
        """
        bench, steps = self.bench, self.recovery.finetune_steps
        removed = bench.structure.removed(policy)
        model, rung = bench.recovered(removed), bench.rung
        measurements: list[Measurement] = []
        if steps > 0:
            measurements += [] if final else [bench.measure(model).summary(rung)]
            if not all(math.isfinite(m.loss) for m in measurements):
                return model, tuple(measurements)
            self.train(model, steps, self.recovery.recipe, derive(self.seed, "fine-tuning", policy.id), removed)
            rung = "short"
        measurements.append(bench.measure(model, bench.precision.full if final else None).summary(rung))
        return model, tuple(measurements)

    def train(
        self,
        model: nn.Module,
        steps: int,
        recipe: Recipe,
        seed: int,
        removed: Mapping[str, int],
        progress: Callable[[int, float], None] | None = None,
    ) -> None:
        """Fine-tune a network in place on the task's augmented training stream (see `autoprune.finetuning.train`).

        Weights that the counts `removed` keep at zero stay there.
        """
        task = self.bench.task
        patterns = [(group, group.pattern) for group in self.bench.structure if group.pattern is not None]
        zeroed = [pattern.tensor for group, pattern in patterns if removed.get(group.name)]
        zeroed = [name for name in zeroed if name in dict(model.named_parameters())]
        batches = self.bench.placed(task.train_batches(recipe.batch_size, seed))
        with suited_threads(self.bench.macs):
            train(
                model,
                batches,
                steps,
                recipe=recipe,
                loss=task.loss,
                seed=seed,
                zeroed=zeroed,
                running=partial(self.bench.choice.training.running, self.bench.device),
                progress=progress,
            )


class Arm:
    """One agent's access to the evaluator: counts what it proposes, and ends it.

    Distinct policies count, whether they were evaluated by this arm or found in the ledger, so that a search that is
    replayed from its ledger ends where it ended the first time.

    Args:
        evaluator: What evaluates.
        arm: "search", "uniform" or "random".
        agent: The agent's name.
        limit: Distinct policies that may be proposed.
        deadline: Value of `time.monotonic()` after which nothing new is evaluated, or None.

    Attributes:
        stopped: Why the arm ended before its limit, or None.
    """

    def __init__(self, evaluator: Evaluator, arm: str, agent: str, limit: int, deadline: float | None = None) -> None:
        self._evaluator = evaluator
        self._arm, self._agent = arm, agent
        self._deadline = deadline
        self._repeats = 0
        self.limit = limit
        self.candidates: dict[str, Candidate] = {}
        self.stopped: str | None = None

    def __call__(self, policy: Policy) -> Candidate:
        """Evaluate a policy.

        Raises:
            SearchOver: The limit, the deadline, or the end of new ideas is reached; nothing was evaluated.
        """
        policy_id = self._evaluator.bench.structure.rounded(policy).id
        if policy_id in self.candidates:
            self._repeats += 1
            if self._repeats >= _REPEATS:
                self._end(f"the agent proposed nothing new {_REPEATS} times in a row")
            return self.candidates[policy_id]
        if len(self.candidates) >= self.limit:
            raise SearchOver("all evaluations are spent")
        late = self._deadline is not None and time.monotonic() >= self._deadline
        if late and self._evaluator.ledger.get(policy_id) is None:
            self._end(TIME_LIMIT)
        candidate = self._evaluator.evaluate(policy, arm=self._arm, agent=self._agent)
        self.candidates[policy_id] = candidate
        self._repeats = 0
        return candidate

    def _end(self, reason: str) -> None:
        self.stopped = reason
        raise SearchOver(reason)
