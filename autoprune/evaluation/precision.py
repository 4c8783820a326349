"""In which number format and memory layout candidates run: timed and verified on the dense network, not assumed.

Which is fastest depends on the processor and on the network: bfloat16 halves the time where matrix units take it and
multiplies it where they don't. Weights stay in float32 (autocast rounds what operators read), layers are fitted in
float32, and so are the numbers of the picked network.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final, Self

import torch
from torch import nn

from autoprune.cost import Cost
from autoprune.data import Batch
from autoprune.devices import streamed, synchronise
from autoprune.evaluation.folding import Folding
from autoprune.inputs import evaluating
from autoprune.seeds import seeded_torch
from autoprune.task import Task
from autoprune.threads import SMALL_MACS, suited_threads

__all__ = ["AGREEMENT", "GAIN", "PRECISIONS", "Choice", "Precision", "Trial", "choose", "chosen", "until"]

PRECISIONS: Final = ("auto", "float32", "bfloat16")
"""What a user may ask for; "auto" is the fastest that agrees."""
AGREEMENT: Final = 0.01
"""Share of the samples (one sample at least) on which another format may decide differently, or score differently by
more than this."""
GAIN: Final = 1.25
"""How many times as fast as float32 another format must be; less is not told from noise, and not worth the rounding."""
_HOPELESS: Final = 3.0  # times the fastest so far: what is slower on a part of the samples is tried no further
_MOST, _FEWEST, _MACS = 500, 64, 20_000_000_000  # samples that precisions are tried on
_TRAINED = 64  # of them, in a training step
_BYTES = 1 << 30  # of a layer's activations, for all of them
_BYTES_TRAINED = 1 << 26  # the same while training, which keeps those of all layers

Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Precision:
    """A number format and a memory layout.

    Attributes:
        dtype: "float32", or "bfloat16", in which operators that can run under autocast.
        channels_last: Whether images and convolutions lie with the channels innermost.
    """

    dtype: str = "float32"
    channels_last: bool = False

    def __str__(self) -> str:
        return f"{self.dtype} channels-last" if self.channels_last else self.dtype

    @property
    def full(self) -> Self:
        """The same layout in float32."""
        return type(self)("float32", self.channels_last)

    def place(self, inputs: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return inputs on a device, in the layout; from page-locked memory without waiting."""
        layout = torch.channels_last if self.channels_last and inputs.dim() == 4 else torch.contiguous_format
        return inputs.to(device, non_blocking=inputs.is_pinned(), memory_format=layout)

    def placed(self, batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
        """Yield batches on a device, in the layout (see `autoprune.devices.streamed`)."""
        return streamed(batches, partial(self.place, device=device), device)

    def running(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return what a network runs under."""
        return nullcontext() if self.dtype == "float32" else torch.autocast(device.type, getattr(torch, self.dtype))


@dataclass(frozen=True, slots=True)
class Trial:
    """The dense network in one precision.

    Attributes:
        precision: Which.
        seconds: For a thousand samples.
        differs: Share of the samples that it decides or scores otherwise than float32 does.
        training: Seconds that a thousand samples take to train on; 0 where that was not tried.
        failure: Why it can't run, or None.
    """

    precision: Precision
    seconds: float
    differs: float
    training: float = 0.0
    failure: str | None = None

    def __str__(self) -> str:
        told = self.failure or f"{self.seconds:.2f} s"
        told += f", training {self.training:.2f} s" if self.training else ""
        return f"{self.precision} {told}" + (f", {self.differs:.1%} differ" if 0 < self.differs < 1 else "")


@dataclass(frozen=True, slots=True)
class Choice:
    """The precisions that candidates are measured and trained in, and what was tried.

    Attributes:
        precision: In which they are measured.
        training: In which they are fine-tuned; of the same layout.
        trials: What was measured; empty where nothing had to be.
    """

    precision: Precision
    training: Precision
    trials: tuple[Trial, ...] = ()

    def __str__(self) -> str:
        says = f"measured in {self.precision}"
        says += f", trained in {self.training}" if self.training != self.precision else ""
        return says + (f" (a thousand samples: {'; '.join(map(str, self.trials))})" if self.trials else "")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object; beside the values it says them in words, for whoever only reads the file."""
        return asdict(self) | {"says": str(self)}

    @classmethod
    def of(cls, document: dict[str, Any]) -> Self:
        """Read what `to_dict` gave."""
        trials = [Trial(**{**trial, "precision": Precision(**trial["precision"])}) for trial in document["trials"]]
        return cls(Precision(**document["precision"]), Precision(**document["training"]), tuple(trials))


def chosen(task: Task, model: nn.Module, cost: Cost, wanted: str = "auto") -> Choice:
    """Return the precision that a user wants: one by name, or the fastest on some validation samples that agrees.

    Args:
        task: Has the samples.
        model: The dense network.
        cost: Its cost. Small networks stay in float32, unmeasured: their time is not arithmetic, and what they give
            does not depend on the clock. So do those for which there are hardly any samples, or hardly any room.
        wanted: Of `PRECISIONS`.
    """
    spatial = task.example_input.dim() == 4
    plain = Precision("float32" if wanted == "auto" else wanted, spatial)
    room = _BYTES // max(1, cost.activations)
    if wanted != "auto" or cost.macs < SMALL_MACS or min(room, task.n_val) < _FEWEST:
        return Choice(plain, plain)
    samples = min(room, max(_FEWEST, min(_MOST, _MACS // cost.macs)))
    batches = list(until(task.val_batches(samples), samples))
    inputs, targets = (torch.cat(parts)[:samples] for parts in zip(*batches, strict=True))
    device = task.example_input.device
    with suited_threads(cost.macs):
        trained = max(1, min(_TRAINED, _BYTES_TRAINED // max(1, cost.activations)))
        found = (inputs.to(device), targets.to(device), task.metric, task.loss)
        return choose(copy.deepcopy(model), *found, trained=trained)


def until(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """Yield batches until they hold so many samples, or there are no more."""
    there = 0
    for inputs, targets in batches:
        yield inputs, targets
        there += len(inputs)
        if there >= samples:
            return


def choose(
    model: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    metric: Measure,
    loss: Measure,
    *,
    trained: int = _TRAINED,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Time a network in every precision, and return the fastest that agrees with float32, for measuring and training.

    A sample differs where its score does, or, if outputs are `(n, classes)`, the class of highest output. Training is
    tried in the layout that measures fastest; it need not agree, since batches differ by more than rounding. What is
    several times slower on some of the samples is timed on no more of them, and not tried in training.

    Args:
        model: The dense network, whose layout and gradients change.
        inputs: `(n, ...)` validation samples, on the network's device.
        targets: `(n, ...)`.
        metric: Per-sample score, `(outputs, targets) -> (n,)`.
        loss: Per-sample loss, `(outputs, targets) -> (n,)`.
        trained: Samples of a training step.
        clock: Seconds, for tests.
    """
    spatial = inputs.dim() == 4
    layouts = (False, True) if spatial else (False,)
    tried = [*(Precision("float32", layout) for layout in layouts), Precision("bfloat16", spatial)]
    trials: list[Trial] = []
    hopeless: list[Precision] = []
    quickest = math.inf  # a sample, of a part of them: only like is compared with like, as a call has a cost of its own
    expected: tuple[torch.Tensor, ...] = ()
    with torch.no_grad(), evaluating(model):
        for precision in tried:
            try:
                part, each, outputs = _timed(model, precision, inputs, clock, _HOPELESS * quickest)
            except Exception as error:  # as much as networks can object to
                if not expected:
                    raise
                trials.append(Trial(precision, 0.0, 1.0, failure=f"fails: {' '.join(str(error).split())[:100]}"))
                continue
            quickest = min(quickest, part)
            hopeless += [precision] if len(outputs) < len(inputs) else []
            found = _decided(outputs, targets[: len(outputs)], metric)
            expected = expected or found
            pairs = zip((whole[: len(outputs)] for whole in expected), found, strict=True)
            differs = torch.stack([_apart(*pair) for pair in pairs]).any(0).float().mean()
            trials.append(Trial(precision, round(1000 * each, 4), float(differs)))
    allowed = max(AGREEMENT, 1.001 / len(inputs))
    agree = [t for t in trials if t.failure is None and (t.differs <= allowed or t.precision.dtype == "float32")]
    best = _fastest({trial.precision: trial.seconds for trial in agree})
    few, few_targets = inputs[:trained], targets[:trained]
    with seeded_torch(0, inputs.device):  # dropout draws
        training = {
            trial.precision: 1000 * _trained(model, trial.precision, few, few_targets, loss, clock) / len(few)
            for trial in trials
            if trial.failure is None
            and trial.precision.channels_last == best.channels_last
            and trial.precision not in hopeless
        }
    told = [replace(trial, training=round(training.get(trial.precision, 0.0), 4)) for trial in trials]
    finite = {precision: seconds for precision, seconds in training.items() if math.isfinite(seconds)}
    return Choice(best, _fastest(finite) if finite else best.full, tuple(told))


def _timed(
    model: nn.Module, precision: Precision, inputs: torch.Tensor, clock: Callable[[], float], limit: float
) -> tuple[float, float, torch.Tensor]:
    """Return the seconds a sample of a part of them, those of the shorter of two passes over all, and the outputs.

    Where the part takes longer than a limit, it stands for all, and the outputs are its own.
    """
    placed = _laid_out(model, precision, inputs)
    if precision.dtype != "float32":
        model = Folding(model, placed[:2])(model)

    def passed(samples: torch.Tensor) -> tuple[float, torch.Tensor]:
        started = clock()
        outputs = model(samples)
        synchronise(inputs.device)
        return (clock() - started) / len(samples), outputs.float()

    with precision.running(inputs.device):
        few = placed[: -(-len(placed) // 8)]
        model(few)
        synchronise(inputs.device)
        part, outputs = passed(few)
        if part > limit:
            return part, part, outputs
        first, _ = passed(placed)
        second, outputs = passed(placed)
    return part, min(first, second), outputs


@torch.enable_grad()
def _trained(
    model: nn.Module,
    precision: Precision,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    loss: Measure,
    clock: Callable[[], float],
) -> float:
    """Return the shorter of two steps' seconds, the optimizer's left out; infinite if it can't be trained so."""
    placed = _laid_out(model, precision, inputs)
    model.train()
    seconds = []
    try:
        for _ in range(3):  # the first warms up
            started = clock()
            with precision.running(inputs.device):
                outputs = model(placed)
            value = loss(outputs.float(), targets).mean()
            if not math.isfinite(value.item()):
                return math.inf
            value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            synchronise(inputs.device)
            seconds.append(clock() - started)
    except Exception:  # whoever trains it is told; here nothing is trained
        return math.inf
    return min(seconds[1:])


def _laid_out(model: nn.Module, precision: Precision, inputs: torch.Tensor) -> torch.Tensor:
    if inputs.dim() == 4:
        model.to(memory_format=torch.channels_last if precision.channels_last else torch.contiguous_format)
    return precision.place(inputs, inputs.device)


def _decided(outputs: torch.Tensor, targets: torch.Tensor, metric: Measure) -> tuple[torch.Tensor, ...]:
    scores = metric(outputs, targets)
    return (scores, outputs.argmax(1)) if outputs.dim() == 2 else (scores,)


def _apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return which samples are decided otherwise, or scored otherwise by more than a hundredth."""
    if not a.is_floating_point():
        return a != b
    return ~torch.isclose(a, b, rtol=0.0, atol=AGREEMENT, equal_nan=True)


def _fastest(seconds: Mapping[Precision, float]) -> Precision:
    """Return the fastest, or the fastest in float32 where that is hardly slower."""
    best = min(seconds, key=lambda precision: seconds[precision])
    exact = min((p for p in seconds if p.dtype == "float32"), key=lambda p: seconds[p], default=best)
    return best if seconds[best] * GAIN <= seconds[exact] else exact
