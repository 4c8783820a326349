"""`LatencyTable`: a network's latency under any policy, predicted from its layers' times, which are measured once.

The table follows Yang et al. (NetAdapt, ECCV 2018, section 3.2: layer-wise look-up tables) with two changes: layers are
measured at a few widths and interpolated between, and what is no layer (functional operators, caches, the time between
layers) is learnt from a few whole networks.
"""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import nn

from autoprune.cost.latency import Clock, Latency, compare, device_of, runner, summary, timed
from autoprune.cost.latency_layers import Entry, Plan, Removed, Shapes, Site, keyed, without
from autoprune.errors import ConfigError
from autoprune.inputs import evaluating
from autoprune.policy import Policy
from autoprune.run import write_json
from autoprune.structure.groups import Structure

__all__ = ["LatencyErrors", "LatencyTable", "Predicted", "check"]

_FORMAT: Final = 1  # of the table's file
_ROUNDS: Final = 3  # over all layers and sizes, so that a disturbance of the machine falls on few samples of each
_WARM: Final = 2  # calls of a whole network in each round that are not timed


@dataclass(frozen=True, slots=True, eq=False)
class LatencyTable:
    """Predicts a network's latency under any policy, from its layers' times.

    The times of all calls of leaf modules, interpolated over their widths, are added, and from that sum the latency of
    the whole is interpolated between the dense network's and those of evenly cut ones, which were measured too: a
    network takes longer than its layers (functional operators, colder caches), or less (layers compiled together).
    Times are made monotone in every width (the cumulative maximum): real latency is not, since some widths suit a
    machine better, but budgets are arithmetic that rests on "removing more never costs more". `check` says how far
    predictions are from measurement.

    Attributes:
        costs: Tells which leaf modules run on what under a policy.
        dense: The dense network's latency, measured.
        whole_ms: Of some evenly cut networks, and last the dense one, the sum of the layers' times with the latency
            measured, both increasing.
        dtype: Of the network's parameters.
        torch: Version of torch.
        entries: Times.
        sites: Where they apply.
        approximated: Layers whose time is known less well, with the reason.
    """

    costs: Shapes
    dense: Latency
    whole_ms: tuple[tuple[float, float], ...]
    dtype: str
    torch: str
    entries: tuple[Entry, ...]
    sites: tuple[Site, ...]
    approximated: tuple[str, ...]
    _site: Mapping[tuple[str, int], Site] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_site", {(site.module, site.nth): site for site in self.sites})

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        example_input: Any,
        structure: Structure,
        costs: Shapes,
        *,
        seconds: float = 60.0,
        repeats: int = 30,
        compiled: bool = False,
        clock: Clock = time.perf_counter,
    ) -> Self:
        """Measure a network's layers, each at several widths, and the network itself.

        Convolutions and linear layers are measured over all pairs of widths, made by narrowing their own weights; all
        else in networks cut evenly. Equal calls are measured once. Layers are measured in eager form also where whole
        networks are compiled.

        Args:
            model: The dense network; it is not changed.
            example_input: What it is called with, on its device; the latency is of this batch. Every layer's arguments
                are held in memory meanwhile.
            structure: Its groups.
            costs: Its cost model.
            seconds: About how long the layers may take. Each size is measured three times at least.
            repeats: How often whole networks are measured.
            compiled: Whether they are compiled, which takes its own time.
            clock: Returns seconds. On a busy machine and with one thread `time.process_time` is steadier: it stands
                still while others run.

        Raises:
            ConfigError: The network can't be compiled.
        """
        plan = Plan(model, example_input, structure, costs)
        device = device_of(model, example_input)
        share = seconds / (_ROUNDS * max(1, len(plan.jobs)))
        with torch.no_grad(), ExitStack() as stack:
            for network, _ in plan.whole:
                stack.enter_context(evaluating(network))
            runs = [runner(network, example_input, compiled) for network, _ in plan.whole]
            samples: list[list[float]] = [[] for _ in runs]
            for _ in range(_ROUNDS):
                for number in range(_WARM + -(-repeats // _ROUNDS)):
                    for taken, run in zip(samples, runs, strict=True):
                        seconds_taken = timed(run, device, clock)
                        if number >= _WARM:
                            taken.append(seconds_taken)
                for job in plan.jobs:
                    job.run(share, device, clock)
        table = cls(
            costs=costs,
            dense=summary(samples[-1], model, example_input, compiled),
            whole_ms=(),
            dtype=str(next((p.dtype for p in model.parameters()), torch.get_default_dtype())).removeprefix("torch."),
            torch=torch.__version__,
            entries=plan.entries(),
            sites=tuple(plan.sites),
            approximated=tuple(plan.approximated),
        )
        points = [
            (table._layers_ms(counts), statistics.median(taken) * 1e3)
            for (_, counts), taken in zip(plan.whole, samples, strict=True)
        ]
        return replace(table, whole_ms=_increasing(points))

    def predict(self, removed: Removed) -> float:
        """Return the latency in milliseconds after removing so many elements of every group.

        Args:
            removed: `(groups,)` counts in the structure's order, or a map from group name to count.
        """
        layers, below = self._layers_ms(removed), (0.0, 0.0)
        for point in self.whole_ms:
            if layers < point[0]:
                (low, fast), (high, slow) = below, point
                return min(slow, fast + (layers - low) * ((slow - fast) / (high - low)))
            below = point
        return below[1]

    def _layers_ms(self, removed: Removed) -> float:
        total = 0
        for key, made in keyed(self.costs.calls(removed)):
            site = self._site.get(key)
            if site is not None:
                sizes = site.sizes(made, lambda name: self.costs.shape(name, removed))
                time_ns, parts = self.entries[site.entry].numerator(*sizes)
                total += time_ns * site.positions_of(made) // (parts * site.positions)
        return total / 1e6

    def to_dict(self) -> dict[str, Any]:
        """Return all but the cost model, JSON-able."""
        return {
            "format": _FORMAT,
            "dense": asdict(self.dense),
            "whole_ms": [list(point) for point in self.whole_ms],
            "dtype": self.dtype,
            "torch": self.torch,
            "entries": [asdict(entry) for entry in self.entries],
            "sites": [asdict(site) for site in self.sites],
            "approximated": list(self.approximated),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], costs: Shapes) -> Self:
        """Read what `to_dict` wrote, for the network that it was measured on.

        Raises:
            ConfigError: It is no latency table, or another network's.
        """
        if document.get("format") != _FORMAT:
            raise ConfigError(f"a latency table of format {document.get('format')} can't be read; measure it again")
        try:
            table = cls(
                costs=costs,
                dense=Latency(**document["dense"]),
                whole_ms=tuple((float(layers), float(whole)) for layers, whole in document["whole_ms"]),
                dtype=document["dtype"],
                torch=document["torch"],
                entries=tuple(Entry.read(**entry) for entry in document["entries"]),
                sites=tuple(Site(**{**site, "matrices": tuple(site["matrices"])}) for site in document["sites"]),
                approximated=tuple(document["approximated"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"this is no latency table: {type(error).__name__} {error}; measure it again") from error
        table._refuse_other_network()
        return table

    def save(self, path: Path) -> None:
        """Write the table to a JSON file."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path, costs: Shapes) -> Self:
        """Read a table that `save` wrote.

        Raises:
            ConfigError: The file can't be read, is no latency table, or is another network's.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"can't read the latency table {path}: {error}") from error
        return cls.from_dict(document, costs)

    def _refuse_other_network(self) -> None:
        calls = dict(keyed(self.costs.calls({})))
        for site in self.sites:
            made = calls.get((site.module, site.nth))
            if made is None:
                raise ConfigError(f"the latency table is another network's: it has `{site.module}`; measure it again")
            here = (*site.sizes(made, lambda name: self.costs.shape(name, {})), site.positions_of(made))
            there = (*(sizes[-1] for sizes in self.entries[site.entry].sizes), site.positions)
            if here != there:
                raise ConfigError(
                    f"the latency table is another network's: `{site.module}` has sizes {there} in it, {here} here; "
                    "measure it again"
                )


def _increasing(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Return points of which both numbers increase: none takes longer than one with more layers does."""
    lowest: dict[float, float] = {}
    least = math.inf
    for layers, whole in sorted(points, reverse=True):
        least = min(least, whole)
        lowest.setdefault(layers, least)
    return tuple(sorted(lowest.items()))


# -- how far predictions are from measurement -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Predicted:
    """One policy's latency, predicted and measured.

    Attributes:
        policy: What was removed.
        predicted_ms: By the table.
        measured: Of the network built.
    """

    policy: Policy
    predicted_ms: float
    measured: Latency

    @property
    def error(self) -> float:
        """How much of the measured latency the prediction is off by; positive where it is too high."""
        return self.predicted_ms / self.measured.median_ms - 1


@dataclass(frozen=True, slots=True)
class LatencyErrors:
    """How far a table's predictions are from measurement.

    Attributes:
        rows: One a policy.
        dense: The dense network's latency, measured among the policies; where it is not the table's, the machine is
            not as it was.
        dense_predicted_ms: The table's.
    """

    rows: tuple[Predicted, ...]
    dense: Latency
    dense_predicted_ms: float

    @property
    def median(self) -> float:
        """Median of the absolute relative errors."""
        return statistics.median(abs(row.error) for row in self.rows)

    @property
    def worst(self) -> float:
        """The largest absolute relative error."""
        return max(abs(row.error) for row in self.rows)

    @property
    def drift(self) -> float:
        """How much slower the dense network runs than when the table was measured; negative if faster."""
        return self.dense.median_ms / self.dense_predicted_ms - 1

    @property
    def median_without_drift(self) -> float:
        """Median of the absolute relative errors of latencies in shares of the dense network's."""
        return statistics.median(abs((1 + row.error) * (1 + self.drift) - 1) for row in self.rows)

    def __str__(self) -> str:
        return (
            f"predicted latency is off by {self.median:.1%} (median) and {self.worst:.1%} (worst) over "
            f"{len(self.rows)} measured policies; since the table was measured the dense network's has changed by "
            f"{self.drift:+.1%}, without which the median is {self.median_without_drift:.1%}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            "median_error": self.median,
            "worst_error": self.worst,
            "drift": self.drift,
            "median_error_without_drift": self.median_without_drift,
            "dense": asdict(self.dense),
            "dense_predicted_ms": self.dense_predicted_ms,
            "rows": [
                {"policy": dict(row.policy), "predicted_ms": row.predicted_ms, "measured": asdict(row.measured)}
                for row in self.rows
            ],
        }


def check(
    table: LatencyTable,
    model: nn.Module,
    structure: Structure,
    example_input: Any,
    policies: Sequence[Policy],
    *,
    warmup: int = 3,
    repeats: int = 20,
    clock: Clock = time.perf_counter,
) -> LatencyErrors:
    """Build and measure some policies' networks, alternately, and compare with what the table predicts.

    Args:
        table: The model's.
        model: The dense network.
        structure: Its groups.
        example_input: As the table was measured with.
        policies: At least one; their networks are held in memory together.
        warmup: Calls of each network that are not timed.
        repeats: Calls of each that are timed.
        clock: Returns seconds.

    Raises:
        ConfigError: There is no policy, or a number is below one.
        PolicyError: A policy names a group that the structure does not have.
    """
    if not policies:
        raise ConfigError("a latency table is checked on policies, but got none; give at least one")
    removed = [structure.removed(policy) for policy in policies]
    networks = {str(number): without(model, structure, counts) for number, counts in enumerate(removed)}
    measured = compare(
        {"dense": model, **networks},
        example_input,
        warmup=warmup,
        repeats=repeats,
        compiled=table.dense.form == "compiled",
        clock=clock,
    )
    rows = [
        Predicted(policy, table.predict(counts), measured[str(number)])
        for number, (policy, counts) in enumerate(zip(policies, removed, strict=True))
    ]
    return LatencyErrors(tuple(rows), measured["dense"], table.predict({}))
