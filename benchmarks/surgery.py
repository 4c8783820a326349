"""Building a candidate: `plan` and `cut` against `copy.deepcopy` and Torch-Pruning's pruner, for the same removal.

    python benchmarks/surgery.py --json surgery.json

What is compared, on ResNet-50 and MobileNetV2 with random weights (one thread, float32, on the CPU):

- ours: `plan` (which indices stay) and `cut` (the copy that has only those), for given elements of every group. The
  analysis that finds and proves the groups is done once for a network, and its time is reported by itself.
- Torch-Pruning: `copy.deepcopy` of the network, as its surgery is in place; a `BasePruner` on the copy, which builds
  its dependency graph; and `step()`, which ranks and removes. The graph points at the modules of one copy and can't be
  copied (`TypeError: cannot pickle 'module' object`), so that every candidate needs its own. It gets its cheapest
  ranking, `RandomImportance`, the network's last layer as `ignored_layers`, and the same ratio everywhere.

Both remove the same number of channels of every layer: that every tensor of both networks has the same shape is
checked. Which channels differs, and takes no part in the time. The two alternate in one process, and the collector runs
between. The ratio is of the medians, with the graph's time and without it.

Memory, each in a fresh process, after one candidate was built and dropped: what tensors take at most while one
candidate is built, by torch's own account, beside the candidate's tensors; and the growth of the process's resident
memory, at its peak and what of it stays, Python objects and pages begun included, with an allocator told to give memory
back at once (Linux with glibc).
"""

import argparse
import copy
import ctypes
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from autoprune.structure import Structure, analyse, cut, plan

NETWORKS = ("resnet50", "mobilenet_v2")


class Subject:
    """One network and the two ways to build the same candidate of it."""

    def __init__(self, name: str, size: int, sparsity: float) -> None:
        import torchvision

        torch.manual_seed(0)
        self.model: nn.Module = torchvision.models.get_model(name, weights=None).eval()
        self.example_input = torch.randn(1, 3, size, size)
        self._sparsity = sparsity

    def analyse(self) -> None:
        """Find the groups, and choose the elements that go."""
        self._structure: Structure = analyse(self.model, self.example_input)
        generator = torch.Generator().manual_seed(0)
        self._removed = {
            group.name: torch.randperm(group.size, generator=generator)[: int(group.size * self._sparsity)]
            for group in self._structure
        }

    def ours(self) -> nn.Module:
        """Return a candidate."""
        return cut(self.model, plan(self.model, self._structure, self._removed))

    def theirs(self, laps: list[float] | None = None) -> nn.Module:
        """Return a candidate; the seconds of copying, of building the graph and of removing go into `laps`."""
        import torch_pruning as tp

        times = [time.perf_counter()]
        model = copy.deepcopy(self.model)
        times.append(time.perf_counter())
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.BasePruner(
                model,
                self.example_input,
                importance=tp.importance.RandomImportance(),
                pruning_ratio=self._sparsity,
                ignored_layers=[last],
            )
        times.append(time.perf_counter())
        pruner.step()
        times.append(time.perf_counter())
        if laps is not None:
            laps.extend(after - before for before, after in itertools.pairwise(times))
        return model


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured of one network."""
    torch.set_num_threads(1)
    subject = Subject(name, options.size, options.sparsity)
    started = time.perf_counter()
    subject.analyse()
    analysis = time.perf_counter() - started
    ours, theirs = subject.ours(), subject.theirs()  # also the warm-up
    shapes = [{key: tuple(tensor.shape) for key, tensor in m.state_dict().items()} for m in (ours, theirs)]
    if shapes[0] != shapes[1]:
        differ = [key for key in shapes[0] if shapes[0][key] != shapes[1].get(key)]
        raise SystemExit(f"{name}: the two don't remove the same: {differ[:3]}")
    removed = 1 - _numel(ours) / _numel(subject.model)
    del ours, theirs
    rows: list[dict[str, float]] = []
    for _ in range(options.repeats):
        laps: list[float] = []
        row = {"ours": _seconds(subject.ours)}
        row["theirs"] = _seconds(partial(subject.theirs, laps))
        row |= dict(zip(("copy", "graph", "remove"), laps, strict=True))
        row["theirs_without_graph"] = row["theirs"] - row["graph"]
        rows.append(row)
    seconds = {key: _spread([row[key] for row in rows]) for key in rows[0]}
    return {
        "network": name,
        "parameters_removed": round(removed, 4),
        "analysis_seconds": round(analysis, 3),
        "seconds": seconds,
        "ratio": round(seconds["theirs"]["median"] / seconds["ours"]["median"], 1),
        "ratio_without_graph": round(seconds["theirs_without_graph"]["median"] / seconds["ours"]["median"], 1),
        "memory": {way: _memory(name, way, options) for way in ("ours", "theirs")},
    }


def _seconds(build: Callable[[], nn.Module]) -> float:
    gc.collect()
    started = time.perf_counter()
    candidate = build()
    seconds = time.perf_counter() - started
    del candidate
    return seconds


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": round(median, 5), "low_quartile": round(low, 5), "high_quartile": round(high, 5)}


def _numel(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# -- memory -----------------------------------------------------------------------------------------------------------


def _memory(name: str, way: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Return what one candidate takes in a fresh process, or None where that can't be measured."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, str(Path(__file__).resolve()), "--networks", name, "--memory", way]
    command += ["--size", str(options.size), "--sparsity", str(options.sparsity)]
    # A fixed threshold: every tensor of a page or more is mapped by itself, and unmapped when it is dropped.
    settings = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"measuring the memory of {name} failed: {done.stderr.strip().splitlines()[-1]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def memory_of(name: str, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return how much this process grew, at its peak, while it built one candidate."""
    torch.set_num_threads(1)
    subject = Subject(name, options.size, options.sparsity)
    if way == "ours":
        subject.analyse()
    build = subject.ours if way == "ours" else subject.theirs
    build()  # loads what is loaded once; dropped
    allocated = allocated_at_peak(build)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # gives back what is free inside the heap, or it would be filled unseen
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    candidate = build()
    peak = _resident("VmHWM") - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    stays = _resident("VmRSS") - before
    tensors = sum(t.numel() * t.element_size() for t in candidate.state_dict().values())
    grown = {"peak_mb": peak, "stays_mb": stays, "allocated_mb": allocated, "tensors_mb": tensors}
    return {key: round(number / 2**20, 1) for key, number in grown.items()}


def allocated_at_peak(build: Callable[[], nn.Module]) -> int:
    """Return how many bytes of tensors are held at most while something is built, by torch's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        build()
    results = seen.profiler.kineto_results  # type: ignore[union-attr]
    changes = [event.nbytes() for event in results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


# -- the report -------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the measurements as a Markdown table."""
    lines = [
        "| network | ours, ms | Torch-Pruning, ms | of it copy / graph / removal | ratio | without the graph | "
        "ours: tensors at peak / of the candidate | Torch-Pruning: the same | "
        "ours: process at peak / after | Torch-Pruning: the same |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms = {
            key: f"{1e3 * s['median']:.1f} ({1e3 * s['low_quartile']:.1f} to {1e3 * s['high_quartile']:.1f})"
            for key, s in row["seconds"].items()
        }
        parts = " / ".join(f"{1e3 * row['seconds'][key]['median']:.1f}" for key in ("copy", "graph", "remove"))
        memory = [f"{m['allocated_mb']} / {m['tensors_mb']} MB" if m else "" for m in row["memory"].values()]
        memory += [f"{m['peak_mb']} / {m['stays_mb']} MB" if m else "" for m in row["memory"].values()]
        cells = [row["network"], ms["ours"], ms["theirs"], parts]
        cells += [f"{row['ratio']} ×", f"{row['ratio_without_graph']} ×", *memory]
        lines.append(f"| {' | '.join(cells)} |")
    analysed = ", ".join(f"{row['network']} {row['analysis_seconds']:.1f} s" for row in rows)
    return "\n".join([*lines, "", f"Medians and quartiles. Finding and proving the groups, once: {analysed}."])


def main() -> None:
    """Measure and print."""
    options = _options()
    if options.memory:
        print(json.dumps(memory_of(options.networks[0], options.memory, options)))
        return
    rows = [compare(name, options) for name in options.networks]
    print(table(rows))
    if options.json:
        document = {
            "machine": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torch_pruning": version("torch-pruning"),
                "threads": 1,
            },
            "settings": {key: getattr(options, key) for key in ("repeats", "size", "sparsity")},
            "rows": rows,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="of torchvision")
    parser.add_argument("--repeats", type=int, default=11, help="7 or more")
    parser.add_argument("--sparsity", type=float, default=0.5, help="the same for all groups")
    parser.add_argument("--size", type=int, default=224, help="height and width of the example input")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--memory", choices=("ours", "theirs"), help=argparse.SUPPRESS)  # a process of its own
    options = parser.parse_args()
    if options.repeats < 7:
        parser.error("--repeats must be 7 or more, for a median and quartiles that mean something")
    return options


if __name__ == "__main__":
    main()
