"""Latency, measured on the machine at hand.

Measured is what a caller waits for: from the call to the finished output, the accelerator synchronised, warm. Machines
are shared and their clocks move, so whatever is compared is measured alternately, and numbers are medians with their
interquartile range. What predicts latency is in `latency_table.py`.
"""

import itertools
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from autoprune.devices import synchronise
from autoprune.errors import ConfigError
from autoprune.inputs import call, evaluating

__all__ = [
    "Clock",
    "Latency",
    "compare",
    "device_of",
    "measure_latency",
    "runner",
    "summary",
    "timed",
]

Clock = Callable[[], float]
"""Returns seconds."""


@dataclass(frozen=True, slots=True)
class Latency:
    """How long one call of a network takes.

    Attributes:
        median_ms: Median over the repeats, in milliseconds.
        spread_ms: Their interquartile range.
        repeats: How often it was measured.
        device: What it ran on, such as "cpu: AMD EPYC".
        threads: Threads of the CPU that torch used.
        form: "eager" or "compiled".
        batch: Samples in the input.
    """

    median_ms: float
    spread_ms: float
    repeats: int
    device: str
    threads: int
    form: str
    batch: int

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ms ± {self.spread_ms / 2:.2g}"


def measure_latency(
    model: nn.Module,
    example_input: Any,
    *,
    warmup: int = 5,
    repeats: int = 30,
    compiled: bool = False,
    clock: Clock = time.perf_counter,
) -> Latency:
    """Measure how long a network takes, in eval mode and without gradients.

    Args:
        model: The network; its modes are restored.
        example_input: What it is called with, on its device: a tensor, a tuple of positional or a mapping of keyword
            arguments.
        warmup: Calls that are not timed, at least one; compiling happens in them.
        repeats: Calls that are timed, at least one.
        compiled: Whether to measure what `torch.compile` makes of it.
        clock: Returns seconds.

    Raises:
        ConfigError: A number is below one, or the network can't be compiled.
    """
    return compare({"": model}, example_input, warmup=warmup, repeats=repeats, compiled=compiled, clock=clock)[""]


def compare(
    models: Mapping[str, nn.Module],
    example_input: Any,
    *,
    warmup: int = 5,
    repeats: int = 30,
    compiled: bool = False,
    clock: Clock = time.perf_counter,
) -> dict[str, Latency]:
    """Measure several networks on one input alternately: one call of each, again and again.

    What disturbs the machine for a while falls on all of them, so their ratios are more certain than each number.

    Args:
        models: By name; all on one device.
        example_input: As for `measure_latency`.
        warmup: Calls of each that are not timed.
        repeats: Calls of each that are timed.
        compiled: Whether to measure what `torch.compile` makes of them.
        clock: Returns seconds.

    Returns:
        By the same names.

    Raises:
        ConfigError: A number is below one, or a network can't be compiled.
    """
    if warmup < 1 or repeats < 1:
        raise ConfigError(f"warm-up and repeats must be at least 1, but got warmup={warmup}, repeats={repeats}")
    samples: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad(), ExitStack() as stack:  # not inference mode, in which sparse weights do not run
        runs = {}
        for name, model in models.items():
            stack.enter_context(evaluating(model))
            runs[name] = runner(model, example_input, compiled)
        for number in range(warmup + repeats):
            for name, run in runs.items():
                seconds = timed(run, device_of(models[name], example_input), clock)
                if number >= warmup:
                    samples[name].append(seconds)
    return {name: summary(samples[name], model, example_input, compiled) for name, model in models.items()}


def runner(model: nn.Module, example_input: Any, compiled: bool) -> Callable[[], Any]:
    """Return what calls the network; if it is to be compiled, it is."""
    if not compiled:
        return lambda: call(model, example_input)
    # Isolated, since of one class torch compiles eight networks at most, and from the second on for sizes of any kind.
    fast = torch.compile(model, dynamic=False, isolate_recompiles=True)  # type: ignore[call-overload]  # torch forgets it
    try:
        call(fast, example_input)
    except Exception as error:  # whatever the compiler's many parts raise
        first_line = next(iter(str(error).splitlines()), "no message")
        raise ConfigError(
            f"torch.compile fails on {type(model).__name__} ({type(error).__name__}: {first_line}); "
            "measure it in eager form"
        ) from error
    return lambda: call(fast, example_input)


def timed(run: Callable[[], Any], device: torch.device, clock: Clock, calls: int = 1) -> float:
    """Return the seconds that one of several calls takes."""
    synchronise(device)
    start = clock()
    for _ in range(calls):
        run()
    synchronise(device)
    return (clock() - start) / calls


def summary(samples: Sequence[float], model: nn.Module, example_input: Any, compiled: bool) -> Latency:
    """Return samples, in seconds, as a record of what was measured."""
    low, middle, high = np.percentile(samples, (25, 50, 75)) * 1e3
    return Latency(
        median_ms=float(middle),
        spread_ms=float(high - low),
        repeats=len(samples),
        device=_device_text(device_of(model, example_input)),
        threads=torch.get_num_threads(),
        form="compiled" if compiled else "eager",
        batch=next((t.shape[0] for t in _tensors(example_input) if t.dim()), 1),
    )


def device_of(model: nn.Module, example_input: Any) -> torch.device:
    """Return the device that a network runs on."""
    tensors = itertools.chain(model.parameters(), model.buffers(), _tensors(example_input))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return str(device)
    told = Path("/proc/cpuinfo")  # Python's own `platform.processor` is empty or only the architecture on Linux
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"cpu: {next(names, platform.processor() or platform.machine())}"


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
