"""How well recovery without training tells policies apart, and how far it gets, on CIFAR-10 and Fashion-MNIST.

    python benchmarks/closed_form.py rank  --data-root DIR --weights FILE --out rank.jsonl
    python benchmarks/closed_form.py long  --data-root DIR --weights FILE --images 10000 --out long.jsonl
    python benchmarks/closed_form.py shared --data-root DIR --weights FILE --out shared.jsonl
    python benchmarks/closed_form.py rank  --data-root DIR --weights FILE --out rank.jsonl --long long.jsonl --show
    python benchmarks/closed_form.py rank  --data-root DIR --weights FILE --out rank.jsonl --shared shared.jsonl --show
    python benchmarks/closed_form.py table --data-root DIR --weights FILE --out table.jsonl
    python benchmarks/closed_form.py weights --data-root DIR --weights FILE --out weights.jsonl
    python benchmarks/closed_form.py finalist --data-root DIR --weights FILE --out finalist.jsonl
    python benchmarks/closed_form.py memory --data-root DIR --weights FILE --out memory.jsonl

`rank`: random policies at equal cost (half of the MACs) and at mixed costs (30 to 90 %), each measured at every rung:
what the moments predict without evaluating; sliced; recalibrated; reconstructed from cached moments, without and with
recalibration; reconstructed in one pass (the rung `reconstructed`); and from there after 20, 50 and 200 steps of
fine-tuning. Kendall's tau of each rung with the last, with a bootstrap interval of 95 %, over all policies and over the
better half of them; how many points the one that a rung would pick of half of them is behind the best of these at the
last, on average over halves; and the seconds that a rung takes after what is made once.

`long`: the same policies, fine-tuned from the rung `reconstructed` for whole epochs, as `autoprune finalize` does; with
`--long`, `rank` compares its rungs with that instead of with 200 steps.

`shared`: the same policies, cut from one set of weights that was trained first under many policies, for 200 and for 400
steps: recalibrated, and reconstructed. Those at equal cost from weights that were trained at that cost, those at mixed
costs from weights that were trained between a quarter of the network and the whole, as a search with a tolerated drop
does. With `--shared`, `rank` has them among its rungs. The weights lie in folders beside the file.

`table`: uniform, the policy of least predicted loss (nothing evaluated) and the one of least measured loss (three cells
a group, found with the first seed), with elements in L1 and in OBS order, at half of the MACs, at the same rungs, for
several seeds of moments, fits and fine-tuning.

`weights`: weights that are zeroed in place, as many of every layer: single ones, N:M patterns and tiles, by magnitude
and by Optimal Brain Surgeon, at the same rungs.

`finalist`: full fine-tuning of the policy of least predicted loss, from recalibrated and from reconstructed weights, at
several peak learning rates.

`memory`: the uniform policy, reconstructed from cached moments that are held to less and less memory.

Accuracies are on 5,000 test images, which take no part in anything else: checkpoints have seen all training images.
Lines that the file holds are not measured again.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import autoprune as ap
from autoprune import data, models
from autoprune.cost import Budget
from autoprune.evaluation import Pipeline
from autoprune.fidelity import kendall
from autoprune.finaliser import FULL_LR
from autoprune.finetuning import Recipe, recalibrate, reconstruct
from autoprune.policy import Policy
from autoprune.preparation import Prepared, prepare
from autoprune.progress import Progress, Silent
from autoprune.run import RunFolder
from autoprune.search_spaces.per_group import PerGroup
from autoprune.seeds import derive
from autoprune.sensitivity import analyse as analyse_sensitivity
from autoprune.settings import SearchSettings
from autoprune.structure import Cut, cut
from autoprune.threads import suited_threads

STEPS = (20, 50, 200)
SHARED_STEPS = (200, 400)
RUNGS = ("sliced", "recalibrated", "cached", "cached_recalibrated", "reconstructed", *(f"steps_{n}" for n in STEPS))
NAMES = {
    "predicted": "predicted loss, nothing evaluated",
    "predicted_1": "the same, exponent 1",
    "sliced": "sliced",
    "recalibrated": "recalibrated",
    "cached": "reconstructed from cached moments",
    "cached_recalibrated": "the same, recalibrated",
    "reconstructed": "reconstructed in one pass",
    **{
        f"shared_{n}_{rung}": f"{rung}, from {n} shared steps"
        for n in SHARED_STEPS
        for rung in ("recalibrated", "reconstructed")
    },
    **{f"steps_{n}": f"{n} steps from there" for n in STEPS},
    "long": "whole epochs from there",
}


class Bench:
    """A prepared task, and what every policy of it goes through."""

    def __init__(
        self,
        options: argparse.Namespace,
        criterion: str = "l1",
        seed: int = 0,
        unit: str | None = None,
        memory: float = 2.0,
        folder: RunFolder | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> None:
        source = data.load(options.data, options.data_root)
        shape = {"in_channels": source.in_channels, "input_size": source.input_size}
        model = models.build(options.network, num_classes=source.num_classes, **shape)
        models.load_weights(model, options.weights)
        images = data.subset(source.test, torch.arange(options.images))
        task = ap.Task(model, train=source.train, val=images, augment=source.augment)
        chosen = {
            "budget": None if unit else options.budget,
            "criterion": criterion,
            "seed": seed,
            "precision": options.precision,
            "moments_memory": memory,
            "units": (unit,) if unit else ("channels", "heads"),
        }
        made = SearchSettings(**chosen | settings)
        started = time.perf_counter()
        self.prepared: Prepared = prepare(task, made, folder, progress)
        self.moments = self.prepared.evidence.moments(self.prepared.bench.model, self.prepared.structure)
        self.analytic = self.prepared.analytic()
        self.once = time.perf_counter() - started
        self.pipeline = Pipeline(self.prepared.bench, made.recovery, derive(seed, "benchmark"))
        self.prepared.bench.recovered({})  # makes what is made once

    def accuracy(self, model: torch.nn.Module) -> float:
        """Return the accuracy on the images."""
        return self.prepared.bench.measure(model).summary("").accuracy

    def measure(self, policy: Policy, steps: Sequence[int] = STEPS) -> dict[str, Any]:
        """Return accuracies and seconds of a policy at every rung."""
        bench = self.prepared.bench
        removed = bench.structure.removed(policy)
        change = bench.change(removed)
        row: dict[str, Any] = {"seconds": {}}

        def timed(rung: str, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
            started = time.perf_counter()
            model = build()
            row["seconds"][rung] = time.perf_counter() - started
            row[rung] = self.accuracy(model)
            return model

        timed("sliced", lambda: cut(bench.model, change))
        timed("recalibrated", lambda: self.recalibrated(cut(bench.model, change)))
        cached = timed("cached", lambda: self._cached(change))
        timed("cached_recalibrated", lambda: self.recalibrated(cached))
        fitted = timed("reconstructed", lambda: bench.recovered(removed))
        for number in steps:
            timed(f"steps_{number}", lambda number=number: self._trained(fitted, number, policy, removed))
        started = time.perf_counter()
        self.accuracy(fitted)
        row["seconds"]["measuring"] = time.perf_counter() - started
        return row

    def recover(self, policy: Policy) -> dict[str, Any]:
        """Return accuracies and seconds of a policy that is recovered without a gradient."""
        bench, removed = self.prepared.bench, self.prepared.structure.removed(policy)
        row: dict[str, Any] = {"seconds": {}}
        builds: dict[str, Callable[[], torch.nn.Module]] = {
            "recalibrated": lambda: self.recalibrated(cut(bench.model, bench.change(removed))),
            "reconstructed": lambda: bench.recovered(removed),
        }
        for rung, build in builds.items():
            started = time.perf_counter()
            model = build()
            row["seconds"][rung] = time.perf_counter() - started
            row[rung] = self.accuracy(model)
        return row

    def predict(self, policy: Policy) -> dict[str, float]:
        """Return what moments say of a policy, higher is better, and the seconds that it takes them."""
        removed = self.prepared.structure.removed(policy)
        counts = np.array([removed[name] for name in self.prepared.structure.names])
        started = time.perf_counter()
        loss = float(self.analytic.predict(counts))
        seconds = time.perf_counter() - started
        return {"predicted": -loss, "predicted_1": -float(self.analytic.predict(counts, power=1.0)), "spent": seconds}

    def recalibrated(self, model: torch.nn.Module) -> torch.nn.Module:
        """Recalibrate a network in place, and return it."""
        with suited_threads(self.prepared.bench.macs):
            recalibrate(model, self.prepared.bench.calibration)
        return model

    def _cached(self, change: Any) -> torch.nn.Module:
        model = cut(self.prepared.bench.model, change)
        reconstruct(self.prepared.bench.model, model, change, self.moments)
        return model

    def _trained(self, model: torch.nn.Module, steps: int, policy: Policy, removed: Any) -> torch.nn.Module:
        copied = cut(model, Cut())
        self.pipeline.train(copied, steps, Recipe(), derive(self.pipeline.seed, policy.id, steps), removed)
        return copied


# -- rank -------------------------------------------------------------------------------------------------------------


def policies(prepared: Prepared, number: int) -> Iterator[tuple[str, Policy]]:
    """Yield random policies: at the budget, and at mixed costs."""
    rng = np.random.default_rng(0)
    space = PerGroup(prepared.feasible, spend=(1.0, 1.0))
    for _ in range(number):
        yield "equal", space.decode(rng.random(len(space.dimensions)))
    for _ in range(number):
        budget = Budget.parse(f"macs<={rng.uniform(30, 90):.1f}%")
        feasible = dataclasses.replace(prepared.feasible, budget=budget)
        space = PerGroup(feasible, spend=(1.0, 1.0))
        yield "mixed", space.decode(rng.random(len(space.dimensions)))


def rank(options: argparse.Namespace) -> None:
    """Measure random policies, and print how the rungs rank them."""
    rows = _lines(options.out)
    bench = Bench(options)
    drawn = list(policies(bench.prepared, options.policies))
    for kind, policy in drawn[: 0 if options.show else None]:
        if any(row["id"] == policy.id and row["kind"] == kind for row in rows):
            continue
        cost = bench.prepared.costs.cost(bench.prepared.structure.removed(policy)).macs
        share = cost / bench.prepared.costs.dense.macs
        row = {"kind": kind, "id": policy.id, "macs": share, **bench.measure(policy)}
        row["precision"] = str(bench.prepared.bench.choice)
        rows.append(row)
        _append(options.out, row)
    if options.shared:
        rows = with_shared(rows, _lines(options.shared))
    target = f"steps_{STEPS[-1]}"
    if options.long:
        target = "long"
        after = {(row["kind"], row["id"]): row for row in _lines(options.long)}
        found = [(row, after.get((row["kind"], row["id"]))) for row in rows]
        rows = [
            row | {"long": last["after"], "seconds": row["seconds"] | {"long": last["seconds"]}}
            for row, last in found
            if last is not None
        ]
    for kind in ("equal", "mixed"):
        predictions = {policy.id: bench.predict(policy) for of, policy in drawn if of == kind}
        chosen = [row | predictions[row["id"]] for row in rows if row["kind"] == kind and row["id"] in predictions]
        if len(chosen) > 3:
            print(f"\n{len(chosen)} policies at {kind} cost\n")
            print(rank_table(chosen, target))


class Clock(Silent):
    """Measures the one stage that a preparation has: the training of shared weights."""

    seconds = 0.0

    def begin(self, stage: str, total: int) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def end(self) -> None:
        """Stop it."""
        self.seconds = time.perf_counter() - self._started


def shared(options: argparse.Namespace) -> None:
    """Measure the policies of `rank`, cut from shared weights."""
    rows = _lines(options.out)
    for steps, kind in itertools.product(() if options.show else options.steps, options.kinds):
        done = {row["id"] for row in rows if (row["steps"], row["kind"]) == (steps, kind)}
        folder, clock = RunFolder(options.out.with_suffix(f".{kind}_{steps}")), Clock()
        folder.create()
        trade: dict[str, Any] = {} if kind == "equal" else {"budget": None, "max_drop": 0.1}
        bench = Bench(options, folder=folder, progress=clock, shared_steps=steps, **trade)
        workbench = bench.prepared.bench
        if "training" not in done:
            row = {"steps": steps, "kind": kind, "id": "training", "seconds": clock.seconds or None}
            row |= {
                name: m.summary("").accuracy for name, m in (("dense", workbench.dense), ("whole", workbench.whole))
            }
            rows.append(row | {"precision": str(workbench.choice)})
            _append(options.out, rows[-1])
        for policy in (policy for of, policy in policies(bench.prepared, options.policies) if of == kind):
            if policy.id in done:
                continue
            cost = bench.prepared.costs.cost(bench.prepared.structure.removed(policy)).macs
            row = {"steps": steps, "kind": kind, "id": policy.id, "macs": cost / bench.prepared.costs.dense.macs}
            row |= bench.recover(policy)
            rows.append(row)
            _append(options.out, row)
    print("| shared steps | policies | seconds | the whole network | recalibrated | reconstructed |")
    print("|---|---|---|---|---|---|")
    for first in (row for row in rows if row["id"] == "training"):
        own = [
            row for row in rows if (row["steps"], row["kind"]) == (first["steps"], first["kind"]) and row is not first
        ]
        means = (
            [f"{np.mean([row[rung] for row in own]):.1%}" for rung in ("recalibrated", "reconstructed")] if own else []
        )
        whole = f"{first['dense']:.1%} → {first['whole']:.1%}"
        cells = (first["steps"], f"{len(own)} {first['kind']}", f"{first['seconds'] or np.nan:.0f}", whole, *means)
        print(f"| {' | '.join(map(str, cells))} |")


def with_shared(rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of `rank` with what `shared` found of their policies, without those of which not all is there.

    Seconds are those of a policy alone; training comes once before all.
    """
    merged = []
    wanted = {row["steps"] for row in found}
    of = {(row["steps"], row["kind"], row["id"]): row for row in found}
    for row in rows:
        its = {steps: of.get((steps, row["kind"], row["id"])) for steps in sorted(wanted)}
        if all(its.values()):
            row = row | {"seconds": dict(row["seconds"])}
            for (steps, one), rung in itertools.product(its.items(), ("recalibrated", "reconstructed")):
                row[f"shared_{steps}_{rung}"] = one[rung]
                row["seconds"][f"shared_{steps}_{rung}"] = one["seconds"][rung]
            merged.append(row)
    return merged


def long(options: argparse.Namespace) -> None:
    """Fine-tune the policies of `rank` for whole epochs."""
    rows = _lines(options.out)
    bench = Bench(options)
    for kind, policy in policies(bench.prepared, options.policies):
        if kind not in options.kinds or any((row["kind"], row["id"]) == (kind, policy.id) for row in rows):
            continue
        removed = bench.prepared.structure.removed(policy)
        steps = options.epochs * bench.prepared.task.steps_per_epoch(Recipe().batch_size)
        started = time.perf_counter()
        model = bench.prepared.bench.recovered(removed)
        bench.pipeline.train(model, steps, Recipe(lr=FULL_LR), derive(bench.pipeline.seed, policy.id, steps), removed)
        seconds = time.perf_counter() - started
        row = {"kind": kind, "id": policy.id, "steps": steps, "seconds": seconds, "after": bench.accuracy(model)}
        rows.append(row)
        _append(options.out, row)
    print(f"{len(rows)} policies, {np.mean([row['after'] for row in rows]):.1%}")


def rank_table(rows: Sequence[dict[str, Any]], target: str) -> str:
    """Return Kendall's tau of each rung with the rung `target` as a Markdown table."""
    last = np.array([row[target] for row in rows])
    better = last >= np.median(last)
    lines = [
        "| what is known of a policy | tau, all | tau, better half | picked by it | accuracy, mean | seconds each |",
        "|---|---|---|---|---|---|",
    ]
    measuring = float(np.median([row["seconds"]["measuring"] for row in rows]))
    for rung, name in NAMES.items():
        if rung not in rows[0]:
            continue
        values = np.array([row[rung] for row in rows])
        predicted = rung.startswith("predicted")
        seconds = float(np.median([row["spent"] if predicted else row["seconds"][rung] for row in rows]))
        spent = f"{seconds:.1e}" if predicted else f"{seconds:.2f} + {measuring:.2f}"
        taus = [kendall(values, last), kendall(values[better], last[better])]
        texts = ["" if rung == target else f"{t:.2f} ({low:.2f} to {high:.2f})" for t, low, high in taus]
        accuracy = "" if predicted else f"{values.mean():.1%}"
        picked = "" if rung == target else f"{-100 * regret(values, last):.2f}"
        lines.append(f"| {name} | {texts[0]} | {texts[1]} | {picked} | {accuracy} | {spent} |")
    lines.append(f"| nothing: any | | | {-100 * regret(np.zeros(len(last)), last):.2f} | | |")
    return "\n".join(lines)


def regret(values: np.ndarray, last: np.ndarray, draws: int = 2000) -> float:
    """Return how far below the best of half of the policies the one of the highest value is, on average over halves."""
    rng = np.random.default_rng(0)
    halves = [rng.permutation(len(last))[: len(last) // 2] for _ in range(draws)]
    return float(np.mean([last[half].max() - last[half[values[half].argmax()]] for half in halves]))


# -- weights ----------------------------------------------------------------------------------------------------------


WEIGHTS = (("weights", 0.8), ("weights", 0.9), ("2:4", 0.5), ("1:4", 0.75), ("4x4", 0.5))


def weights(options: argparse.Namespace) -> None:
    """Measure weights that are zeroed, and print them."""
    rows = _lines(options.out)
    for unit, sparsity in WEIGHTS[: 0 if options.show else None]:
        for criterion in ("l1", "obs"):
            if any((row["unit"], row["sparsity"], row["criterion"]) == (unit, sparsity, criterion) for row in rows):
                continue
            bench = Bench(options, criterion, unit=unit)
            policy = Policy(dict.fromkeys(bench.prepared.structure.names, sparsity))
            row = {"unit": unit, "sparsity": sparsity, "criterion": criterion, **bench.measure(policy)}
            rows.append(row)
            _append(options.out, row)
    print(
        "\n".join(
            _recoveries([(f"{row['unit']}, {row['sparsity']:.0%} zero", row["criterion"], [row]) for row in rows])
        )
    )


# -- finalist ---------------------------------------------------------------------------------------------------------


def finalist(options: argparse.Namespace) -> None:
    """Fine-tune one policy from two beginnings, and print what comes of it."""
    rows = _lines(options.out)
    if not options.show:
        bench = Bench(options)
        task, policy = bench.prepared.task, bench.analytic.allocate(bench.prepared.feasible)
        removed = bench.prepared.structure.removed(policy)
        steps = options.epochs * task.steps_per_epoch(Recipe().batch_size)
        for start, lr in itertools.product(("recalibrated", "reconstructed"), (0.01, 0.02, 0.05)):
            if any((row["start"], row["lr"], row["steps"]) == (start, lr, steps) for row in rows):
                continue
            model = bench.prepared.bench.recovered(removed)
            if start == "recalibrated":
                model = bench.recalibrated(cut(bench.prepared.bench.model, bench.prepared.bench.change(removed)))
            row = {"start": start, "lr": lr, "steps": steps, "before": bench.accuracy(model)}
            bench.pipeline.train(model, steps, Recipe(lr=lr), derive(0, "finalist"), removed)
            rows.append(row | {"after": bench.accuracy(model)})
            _append(options.out, rows[-1])
    print("| from | peak learning rate | steps | before | after |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['start']} | {row['lr']} | {row['steps']} | {row['before']:.1%} | {row['after']:.1%} |")


# -- memory -----------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> None:
    """Reconstruct one policy from moments of several sizes, and print what comes of it."""
    rows = _lines(options.out)
    for limit in () if options.show else (2.0, 0.01, 0.005, 0.002, 0.001):
        if any(row["gb"] == limit for row in rows):
            continue
        bench = Bench(options, memory=limit)
        policy = bench.prepared.feasible.policy(bench.prepared.feasible.uniform())
        rows.append({"gb": limit, "notes": list(bench.moments.notes), **bench.measure(policy, steps=())})
        _append(options.out, rows[-1])
    print("| GB | from cached moments | the same, recalibrated | layers that keep rows |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['gb']} | {row['cached']:.1%} | {row['cached_recalibrated']:.1%} | {len(row['notes'])} |")


# -- table ------------------------------------------------------------------------------------------------------------


def table(options: argparse.Namespace) -> None:
    """Measure uniform and the policies that curves give, and print them."""
    rows = _lines(options.out)
    for seed in range(0 if options.show else options.seeds):
        for criterion in ("l1", "obs"):
            done = {row["policy"] for row in rows if (row["seed"], row["criterion"]) == (seed, criterion)}
            wanted = {"uniform", "predicted", *(("measured",) if criterion == "l1" else ())}
            if wanted <= done:
                continue
            bench = Bench(options, criterion, seed)
            for name in sorted(wanted - done):
                started = time.perf_counter()
                known = [row["sparsities"] for row in rows if row["policy"] == name == "measured"]
                cells = options.out.with_suffix(".sensitivity.json")
                policy = Policy(known[0]) if known else _policy(bench, name, cells)
                choosing = time.perf_counter() - started
                row = {"seed": seed, "criterion": criterion, "policy": name, "choosing": choosing, "once": bench.once}
                row |= {"precision": str(bench.prepared.bench.choice), "sparsities": dict(policy)}
                row |= bench.measure(policy)
                rows.append(row)
                _append(options.out, row)
    print(recovery_table(rows))


def _policy(bench: Bench, name: str, cells: Path) -> Policy:
    prepared = bench.prepared
    if name == "uniform":
        return prepared.feasible.policy(prepared.feasible.uniform())
    if name == "predicted":
        return bench.analytic.allocate(prepared.feasible)
    report = analyse_sensitivity(
        prepared.bench,
        prepared.costs,
        cells,
        sparsities=(0.25, 0.5, 0.75),
        settings=prepared.settings.measured_with,
        evidence=prepared.evidence,
    )
    return report.allocate(prepared.feasible)


def recovery_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return accuracies, means and standard deviations over seeds, as a Markdown table."""
    of = {key: [row for row in rows if (row["policy"], row["criterion"]) == key] for key in _keys(rows)}
    return "\n".join(_recoveries([(*key, chosen) for key, chosen in of.items()]))


def _keys(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return sorted({(row["policy"], row["criterion"]) for row in rows}, key=lambda key: (key[1], key[0]))


def _recoveries(chosen: Sequence[tuple[str, str, Sequence[dict[str, Any]]]]) -> list[str]:
    lines = [
        f"| policy | order | {' | '.join(NAMES[rung] for rung in RUNGS)} |",
        f"|---|---|{'---|' * len(RUNGS)}",
    ]
    for name, criterion, rows in chosen:
        cells = []
        for rung in RUNGS:
            values = 100 * np.array([row[rung] for row in rows])
            cells.append(f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""))
        lines.append(f"| {name} | {criterion} | {' | '.join(cells)} |")
    return lines


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
    sys.stderr.write(".")
    sys.stderr.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("rank", "long", "shared", "table", "weights", "finalist", "memory"))
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--budget", default="macs<=50%")
    parser.add_argument("--images", type=int, default=5000, help="test images that accuracies are measured on")
    parser.add_argument("--policies", type=int, default=40, help="of each of both kinds")
    parser.add_argument("--precision", default="auto", help="of measuring and fine-tuning; auto, float32 or bfloat16")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="of `finalist` and `long`")
    parser.add_argument("--kinds", nargs="+", default=["equal", "mixed"], help="of `long` and `shared`: equal, mixed")
    parser.add_argument("--steps", nargs="+", type=int, default=SHARED_STEPS, help="of `shared`")
    parser.add_argument("--shared", type=Path, help="what `shared` wrote, for `rank`")
    parser.add_argument("--long", type=Path, help="what `long` wrote, for `rank`")
    parser.add_argument("--out", type=Path, required=True, help="a line for every policy; goes on where it stopped")
    parser.add_argument("--show", action="store_true", help="measure nothing, print what the file holds")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = _options()
    parts = {part.__name__: part for part in (rank, long, shared, table, weights, finalist, memory)}
    parts[chosen.part](chosen)
