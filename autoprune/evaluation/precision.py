"""In which number format and memory layout candidates run: timed and verified on the dense network, not assumed.

Which is fastest depends on the processor and on the network: bfloat16 halves the time where matrix units take it and
multiplies it where they don't. Weights stay in float32 (autocast rounds what operators read), layers are fitted in
float32, and so are the numbers of the picked network.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
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

__all__ = ["AGREEMENT", "EXACT", "GAIN", "PRECISIONS", "Choice", "Precision", "Trial", "choose", "chosen", "until"]

PRECISIONS: Final = ("auto", "float32", "bfloat16")
"""What a user may ask for; "auto" is the fastest that agrees."""
AGREEMENT: Final = 0.01
"""Share of the samples (one sample at least) on which another format may decide differently, or score differently by
more than this."""
EXACT: Final = 1e-4
"""The same for float32 in another layout, which adds in another order and rounds no number: outputs are further apart
than this share of the largest on no more than those samples."""
GAIN: Final = 1.25
"""How many times as fast as float32 another format must be; less is not told from noise, and not worth the rounding."""
_ROUNDS: Final = 2  # of timing, in each of which all precisions take their turn
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
        trials: What was measured; empty where nothing was.
        untimed: Why nothing was measured, where the fastest was asked for; else empty.
    """

    precision: Precision
    training: Precision
    trials: tuple[Trial, ...] = ()
    untimed: str = ""

    def __str__(self) -> str:
        says = f"measured in {self.precision}"
        says += f", trained in {self.training}" if self.training != self.precision else ""
        says += f" ({self.untimed})" if self.untimed else ""
        return says + (f" (a thousand samples: {'; '.join(map(str, self.trials))})" if self.trials else "")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object; beside the values it says them in words, for whoever only reads the file."""
        return asdict(self) | {"says": str(self)}

    @classmethod
    def of(cls, document: dict[str, Any]) -> Self:
        """Read what `to_dict` gave."""
        trials = tuple(Trial(**{**trial, "precision": Precision(**trial["precision"])}) for trial in document["trials"])
        both = {name: Precision(**document[name]) for name in ("precision", "training")}
        return cls(**both, trials=trials, untimed=document["untimed"])


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
    if wanted != "auto":
        return Choice(plain, plain)
    if cost.macs < SMALL_MACS:
        return Choice(plain, plain, untimed="small: not timed")
    if min(room, task.n_val) < _FEWEST:
        return Choice(plain, plain, untimed="too few samples or too large activations: not timed")
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

    A sample differs where its score does, or, if outputs are `(n, classes)`, the class of highest output; in float32
    also where outputs do (see `EXACT`). All take turns, round after round, and the shortest pass counts, so that what
    else the machine does for a while is no precision's alone. Training is tried in the layout that measures fastest; it
    need not agree, since batches differ by more than rounding. What is several times slower on some of the samples is
    timed on no more of them, and not tried in training.

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
    runs = [_Run(precision, model) for precision in tried]
    with torch.no_grad(), evaluating(model):
        _take_turns(runs, inputs, clock)
    trials = [run.trial(runs[0], targets, metric) for run in runs]
    allowed = max(AGREEMENT, 1.001 / len(inputs))
    agree = [trial for trial in trials if trial.failure is None and trial.differs <= allowed]
    sound = {trial.precision.channels_last for trial in agree if trial.precision.dtype == "float32"}
    best = _fastest({t.precision: t.seconds for t in agree if t.precision.channels_last in sound})
    trainable = [run.precision for run in runs if run.seconds and run.precision.channels_last == best.channels_last]
    few, few_targets = inputs[:trained], targets[:trained]
    with seeded_torch(0, inputs.device):  # dropout draws
        steps = _trained(model, trainable, few, few_targets, loss, clock)
    training = {precision: 1000 * seconds / len(few) for precision, seconds in steps.items()}
    told = [replace(trial, training=round(training.get(trial.precision, 0.0), 4)) for trial in trials]
    finite = {precision: seconds for precision, seconds in training.items() if math.isfinite(seconds)}
    return Choice(best, _fastest(finite) if finite else best.full, tuple(told))


@dataclass(slots=True, eq=False)
class _Run:
    """The dense network in one precision while it is timed.

    Attributes:
        precision: Which.
        model: The network.
        part: Seconds a sample of a pass over some of the samples.
        seconds: The same of every pass over all of them; empty where it is hopeless or can't run.
        outputs: Of the last pass.
        failure: Why it can't run, or None.
    """

    precision: Precision
    model: nn.Module
    part: float = math.inf
    seconds: list[float] = field(default_factory=list)
    outputs: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    failure: str | None = None

    def prepare(self, inputs: torch.Tensor) -> None:
        """Fold the network where it is measured so, and warm up."""
        placed = _laid_out(self.model, self.precision, inputs)
        if self.precision.dtype != "float32":
            self.model = Folding(self.model, placed[:2])(self.model)
        with self.precision.running(inputs.device):
            self.model(placed)
        synchronise(inputs.device)

    def passed(self, inputs: torch.Tensor, clock: Callable[[], float]) -> float:
        """Run the network, and return the seconds a sample."""
        placed = _laid_out(self.model, self.precision, inputs)
        started = clock()
        with self.precision.running(inputs.device):
            outputs = self.model(placed)
        synchronise(inputs.device)
        seconds = (clock() - started) / len(inputs)
        self.outputs = outputs.float()
        return seconds

    def trial(self, plain: "_Run", targets: torch.Tensor, metric: Measure) -> Trial:
        """Return what was found, beside the network as it is."""
        if self.failure is not None:
            return Trial(self.precision, 0.0, 1.0, failure=self.failure)
        there = len(self.outputs)
        expected, targets = plain.outputs[:there], targets[:there]
        pairs = zip(_decided(expected, targets, metric), _decided(self.outputs, targets, metric), strict=True)
        apart = [_apart(*pair) for pair in pairs]
        if self.precision.dtype == "float32":
            largest = float(expected[expected.isfinite()].abs().max()) if bool(expected.isfinite().any()) else 0.0
            outputs = _apart(expected, self.outputs, EXACT * largest)
            apart.append(outputs.reshape(there, -1).any(1))
        seconds = min(self.seconds, default=self.part)
        return Trial(self.precision, round(1000 * seconds, 4), float(torch.stack(apart).any(0).float().mean()))


def _take_turns(runs: Sequence[_Run], inputs: torch.Tensor, clock: Callable[[], float]) -> None:
    """Time all on a part of the samples and then, but for the hopeless, on all of them, round after round.

    Like is compared with like, as a call has a cost of its own: what is hopeless, beside those before it, is told from
    parts alone.
    """
    few = inputs[: -(-len(inputs) // 8)]
    quickest = math.inf
    promising: list[_Run] = []
    for run in runs:
        with _noting(run, runs):
            run.prepare(few)
            run.part = run.passed(few, clock)
            promising += [run] if run.part <= _HOPELESS * quickest else []
            quickest = min(quickest, run.part)
    for _ in range(_ROUNDS):
        for run in promising:
            if run.failure is None:
                with _noting(run, runs):
                    run.seconds.append(run.passed(inputs, clock))


@contextmanager
def _noting(run: _Run, runs: Sequence[_Run]) -> Iterator[None]:
    """Note what goes wrong in all but the first, as much as networks can object to."""
    try:
        yield
    except Exception as error:
        if run is runs[0]:
            raise
        run.failure = f"fails: {' '.join(str(error).split())[:100]}"
        run.seconds.clear()


@torch.enable_grad()
def _trained(
    model: nn.Module,
    precisions: Sequence[Precision],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    loss: Measure,
    clock: Callable[[], float],
) -> dict[Precision, float]:
    """Return the shorter of two steps' seconds, the optimizer's left out; infinite if it can't be trained so.

    All take turns, and are of one layout.
    """
    model.train()
    seconds: dict[Precision, list[float]] = {precision: [] for precision in precisions}
    for _ in range(1 + _ROUNDS):  # the first warms up
        for precision, found in seconds.items():
            if math.inf not in found:
                found.append(_step(model, precision, inputs, targets, loss, clock))
    return {p: math.inf if math.inf in found else min(found[1:]) for p, found in seconds.items()}


def _step(
    model: nn.Module,
    precision: Precision,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    loss: Measure,
    clock: Callable[[], float],
) -> float:
    """Return a training step's seconds, or infinity."""
    placed = _laid_out(model, precision, inputs)
    started = clock()
    try:
        with precision.running(inputs.device):
            outputs = model(placed)
        value = loss(outputs.float(), targets).mean()
        if not math.isfinite(value.item()):
            return math.inf
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        synchronise(inputs.device)
    except Exception:  # whoever trains it is told; here nothing is trained
        return math.inf
    return clock() - started


def _laid_out(model: nn.Module, precision: Precision, inputs: torch.Tensor) -> torch.Tensor:
    if inputs.dim() == 4:
        model.to(memory_format=torch.channels_last if precision.channels_last else torch.contiguous_format)
    return precision.place(inputs, inputs.device)


def _decided(outputs: torch.Tensor, targets: torch.Tensor, metric: Measure) -> tuple[torch.Tensor, ...]:
    scores = metric(outputs, targets)
    return (scores, outputs.argmax(1)) if outputs.dim() == 2 else (scores,)


def _apart(a: torch.Tensor, b: torch.Tensor, tolerance: float = AGREEMENT) -> torch.Tensor:
    """Return where two differ, numbers by more than a tolerance."""
    if not a.is_floating_point():
        return a != b
    return ~torch.isclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)


def _fastest(seconds: Mapping[Precision, float]) -> Precision:
    """Return the fastest, or the fastest in float32 where that is hardly slower."""
    best = min(seconds, key=lambda precision: seconds[precision])
    exact = min((p for p in seconds if p.dtype == "float32"), key=lambda p: seconds[p], default=best)
    return best if seconds[best] * GAIN <= seconds[exact] else exact
