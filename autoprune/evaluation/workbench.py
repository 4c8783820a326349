"""The workbench: a network made ready for slicing and measuring, on one device, with its data beside it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import nn

from autoprune.cost import count
from autoprune.data import Batch
from autoprune.devices import nearest
from autoprune.evaluation.candidate import Measurement
from autoprune.evaluation.folding import Folding
from autoprune.evaluation.kept import Kept
from autoprune.evaluation.measure import Samples, measure
from autoprune.evaluation.precision import Choice, Precision, chosen, until
from autoprune.evaluation.prefix import CutPoint, Prefix, Resumed
from autoprune.evaluation.race import clearly_worse, legs
from autoprune.finetuning import Refit, SharedWeights, recalibrate
from autoprune.scoring import Orders, removals
from autoprune.seeds import derive
from autoprune.structure import Cut, Structure, cut, plan
from autoprune.structure.copying import twin
from autoprune.task import Task
from autoprune.threads import suited_threads

__all__ = ["Workbench"]

_IN_MEMORY = 2 << 30  # bytes of samples that are kept on the device; more are kept in a file
_FITTED_MEMORY = 1 << 30  # bytes of activations while layers are fitted, which takes all images at once
_MOST_FITTED, _FEWEST_FITTED = 500, 32  # images
_FITTED_EACH, _FITTED_ROWS = 20, 10_000  # output positions of an image, of all images
_FEWEST_MEASURED = 8  # samples of a batch
_CACHED = 16 << 20  # bytes of activations of a batch that is measured: what the caches of a processor hold
_COMPARED = 1000  # samples on which recalibration of the dense network is looked at
_SAMPLES = 3  # on which cut points are verified


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
        weights: Shared weights that candidates are cut from, in place of the network's own.
        race: Whether the validation samples are put in random order, so that some stand for all.

    Attributes:
        device: The network's.
        choice: What candidates are measured and trained in, and what it was chosen from.
        precision: What they are measured in.
        original: The dense network as the user brought it, in eval mode: what results are compared with.
        model: The dense network that candidates are cut from and fitted to, in eval mode: with shared weights, where
            there are any, else the original itself.
        executed: For every probe, the share of the dense network's multiply-adds that ran: of a whole pass over what is
            fitted and measured, with what made the activations that it began at.
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
        race: bool = False,
        weights: SharedWeights | None = None,
    ) -> None:
        self.task = task
        self.structure = structure
        self.orders = orders
        self.rung = rung
        self.weights = weights
        self.original = self.model = task.fresh_model().eval()
        counted = count(self.model, task.example_input)
        dense, self._macs_of = counted.cost, counted.macs_of
        self.macs = dense.macs
        self.activations_memory = activations_memory
        self._calibration_images, self._given_seed = calibration_images, seed
        self.executed: list[float] = []
        self._kept: tuple[CutPoint, list[torch.Tensor], list[torch.Tensor]] | None = None
        self._at_once = max(_FEWEST_FITTED, min(_MOST_FITTED, _FITTED_MEMORY // max(1, dense.activations)))
        self._seed = derive(seed, "fitted rows")
        self.device = next(iter(self.model.parameters())).device
        self.choice = precision if isinstance(precision, Choice) else chosen(task, self.model, dense, precision)
        self.precision = self.choice.precision
        if task.example_input.dim() == 4:
            layout = torch.channels_last if self.precision.channels_last else torch.contiguous_format
            self.original.to(memory_format=layout)
        if weights is not None:
            self.model = cut(self.original, Cut())
            weights.put_into(self.model)
        images = partial(task.calibration_batches, calibration_images, 250, derive(seed, "calibration"))
        self._calibration = self._ready(images(), calibration_images, images)
        on_cpu = self.device.type == "cpu"
        self._batch = max(_FEWEST_MEASURED, min(500, _CACHED // max(1, dense.activations))) if on_cpu else 500
        self.race = race
        self._val = self._validation()

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        """Pickle what the workbench is made from, without the test split; whoever unpickles it makes the rest again.

        That holds for a file with samples, too: each process has its own. On the same device, or on the nearest that
        there is; nothing is on one in between.
        """
        task = self.task.without_test().on("cpu")
        orders = {name: o.cpu() if isinstance(o, torch.Tensor) else o for name, o in self.orders.items()}
        given = (task, self.structure, orders, self._calibration_images, self._given_seed)
        how = (self.rung, self.choice, self.activations_memory, self.race, self.weights)
        return type(self)._on, (self.device, *given, *how)

    @classmethod
    def _on(cls, device: torch.device, task: Task, *given: Any) -> Self:
        return cls(task.on(nearest(device)), *given)

    def _validation(self) -> Kept:
        """Keep the validation batches; for a race in random order, so that the first stand for all."""
        seed = derive(self._given_seed, "order of samples") if self.race else None
        batches = self.task.val_batches(self._batch)
        return self._ready(batches, self.task.n_val, self.task.val_batches, seed, self._batch)

    def _ready(self, batches: Iterable[Batch], samples: int, again: Callable[[], Any], *order: Any) -> Kept:
        return Kept(batches, samples, self.precision, self.device, _IN_MEMORY, again, *order)

    @property
    def notes(self) -> Sequence[str]:
        """What is to be said of the data: why some of it is read again for every candidate; mostly nothing."""
        kept = {"calibration images": self._calibration, "validation samples": self._val}
        told = [f"{name} are read again for each network: {data.fault}" for name, data in kept.items() if data.fault]
        return [*told, "no candidate is stopped early"] if self.race and self._val.fault else told

    @property
    def races(self) -> bool:
        """Whether a candidate can be stopped: in a race, where the samples are kept."""
        return self.race and self._val.ready is not None

    def placed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches on the network's device, in its memory layout."""
        return self.precision.placed(batches, self.device)

    @property
    def calibration(self) -> Iterable[Batch]:
        """The calibration batches, on the network's device, as often as one likes."""
        return self._calibration

    def recovered(self, removed: Mapping[str, int]) -> nn.Module:
        """Return the network without the least important elements, so many of every group, recovered to `rung`."""
        change = self.change(removed)
        model = cut(self.model, change)
        self.recover(model, change)
        return model

    def change(self, removed: Mapping[str, int]) -> Cut:
        """Return what goes with the least important elements, so many of every group."""
        return plan(self.model, self.structure, removals(self.structure, self.orders, removed))

    @cached_property
    def _refit(self) -> Refit:
        images = self._fitting
        return Refit(self.model, images, each=max(_FITTED_EACH, _FITTED_ROWS // len(images)), seed=self._seed)

    @cached_property
    def _fitting(self) -> torch.Tensor:
        """The images that layers are fitted on."""
        images = torch.cat([inputs for inputs, _ in until(self._calibration, self._at_once)])[: self._at_once]
        return self.precision.place(images, self.device)

    def recover(self, model: nn.Module, change: Cut) -> None:
        """Recover a sliced network without a gradient, in place, as far as `rung` says.

        Args:
            model: What `cut` made of the dense network.
            change: The cut.
        """
        with suited_threads(self.macs):
            if self.rung == "recalibrated":
                side_by_side = self._threads if self._calibration.ready is not None else 1  # else it holds all of them
                recalibrate(model, self._calibration, self._running, side_by_side)
            else:
                self._refit(model, change)

    def _running(self) -> AbstractContextManager[Any]:
        return self.precision.running(self.device)

    def measure(self, model: nn.Module, precision: Precision | None = None, rival: Samples | None = None) -> Samples:
        """Measure a network on the validation split.

        Args:
            model: The network.
            precision: By default the one that candidates are measured in.
            rival: What another network did there; once this one is clearly worse, it is measured no further. Needs the
                samples kept, in random order (see `race` of the class); else all are taken.
        """
        if rival is not None and self.races:
            assert self._val.ready is not None
            return self._raced(model, self._val.ready, precision or self.precision, rival)
        with suited_threads(self.macs):
            return self._measured(model, self._val, precision or self.precision)

    def probe(self, removed: Mapping[str, int]) -> Samples:
        """Measure the network without some elements, recovered to `rung`; what runs before them is not run again.

        The same as `measure(recovered(removed))`, in less time, most of all where probes come in the order of the
        network (see `begins`): one cut point's outputs are kept, those of the last that `activations_memory` has room
        for. Where all is "recalibrated", what runs before is not the dense network's: its statistics are taken anew
        too, from other batches and in training mode. Nothing is kept there.
        """
        change = self.change(removed)
        point = None if self.rung == "recalibrated" or self._val.ready is None else self._prefix.point(change)
        if point is None:
            self.executed.append(1.0)
            return self.measure(self.recovered(removed))
        fitted, measured, ran = self._outputs(point)
        model = cut(self.model, change)
        with suited_threads(self.macs):
            with self._prefix.skipped(model, point) as handed:
                handed.give(fitted, len(self._fitting))
                self._refit(model, change)
            self.executed.append(ran + 1 - self._share_before(point))
            pairs = zip(self._val, measured, strict=True)
            batches = (((inputs, outputs), targets) for (inputs, targets), outputs in pairs)
            return self._measured(model, batches, self.precision, point)

    def _raced(self, model: nn.Module, batches: Sequence[Batch], precision: Precision, rival: Samples) -> Samples:
        found: Samples | None = None
        with suited_threads(self.macs):
            for leg in legs(batches):
                part = self._measured(model, self.placed(leg), precision)
                found = part if found is None else found.joined(part)
                if clearly_worse(found, rival):
                    break
        assert found is not None  # a split has samples
        return found

    def _measured(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Any, torch.Tensor]],
        precision: Precision,
        point: CutPoint | None = None,
    ) -> Samples:
        """Measure a network; from a cut point on, if one is given, each input being a pair with its outputs there."""
        if precision.dtype != "float32":  # which is rounded anyway
            model = self._folding(model, () if point is None else point.skipped)
        networks = [model, *(twin(model) for _ in range(1, self._threads))]
        with ExitStack() as stack:
            if point is not None:
                networks = [Resumed(m, stack.enter_context(self._prefix.skipped(m, point))) for m in networks]
            return measure(networks[0], batches, self.task.metric, self.task.loss, precision, networks[1:])

    @property
    def _threads(self) -> int:
        """Batches that run side by side."""
        return torch.get_num_threads() if self.device.type == "cpu" else 1

    def forget(self) -> None:
        """Drop the activations that are kept for probes."""
        self._kept = None

    def begins(self, removed: Mapping[str, int]) -> int:
        """Return when the first module that loses elements begins to run, in the order of modules."""
        return self._prefix.begins(self.change(removed))

    @cached_property
    def _folding(self) -> Folding:
        return Folding(self.model, self._fitting[:_SAMPLES])

    @cached_property
    def _prefix(self) -> Prefix:
        def fits(fitted: int, measured: int) -> bool:
            return fitted * len(self._fitting) + measured * self.task.n_val <= self.activations_memory

        return Prefix(self.model, self._fitting[:_SAMPLES], self._running, fits)

    def _outputs(self, point: CutPoint) -> tuple[torch.Tensor, Sequence[torch.Tensor], float]:
        """Return a cut point's outputs, of what layers are fitted on and of the validation batches.

        And the share of the dense network's multiply-adds that ran for them.
        """
        ran = 0.0
        if self._kept is None or self._kept[0] != point:
            there, self._kept = self._kept, None
            fitted = measured = None
            spared = 0.0
            if there is not None and there[0].end < point.end:  # each batch makes room for what becomes of it
                spared = self._share_before(there[0])
                fitted, measured = (there[0], _taken(there[1])), (there[0], _taken(there[2]))
            del there
            inputs = (batch for batch, _ in self._val)
            with suited_threads(self.macs):
                at_once = self._prefix.outputs(point, [self._fitting], nullcontext, fitted)
                self._kept = (point, at_once, self._prefix.outputs(point, inputs, self._running, measured))
            ran = self._share_before(point) - spared
        return self._kept[1][0], self._kept[2], ran

    def _share_before(self, point: CutPoint) -> float:
        """Return the share of the dense network's multiply-adds that come before a cut point."""
        inside = tuple(f"{name}." for name in point.skipped)
        saved = sum(macs for weight, macs in self._macs_of.items() if weight.startswith(inside))
        return saved / max(1, self.macs)

    def recalibrating(self) -> tuple[Measurement, Measurement]:
        """Return what the original network does as it is, and with batch-norm statistics of the calibration images.

        On some of both, enough to see whether those images are unlike what the network was trained on.
        """
        model = cut(self.original, Cut())
        some, images = list(until(self._val, _COMPARED)), list(until(self._calibration, _COMPARED))
        with suited_threads(self.macs):
            recalibrate(model, images, self._running, self._threads)
            found = [self._measured(m, some, self.precision) for m in (self.original, model)]
        return found[0].summary("dense"), found[1].summary("recalibrated")

    @cached_property
    def dense(self) -> Samples:
        """What the original network does on the validation split."""
        return self.measure(self.original)

    @cached_property
    def whole(self) -> Samples:
        """What the network that candidates are cut from does there, before anything is removed."""
        return self.dense if self.weights is None else self.measure(self.model)


def _taken(outputs: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield what a list holds, which is empty in the end."""
    while outputs:
        yield outputs.pop(0)
