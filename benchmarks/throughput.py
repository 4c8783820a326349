"""How fast candidates are evaluated, beside the loops that people write by hand, at identical work.

    python benchmarks/throughput.py --data-root DIR --weights resnet20-12fca82f.th --json throughput.json
    python benchmarks/throughput.py --network torchvision:resnet18 --size 224 --val 100 --calibration 50 --steps 0 \
        --repeats 3 --ratios 0.5 --raced 0

One candidate is: remove the same share of every group inside a block (the residual stages of the CIFAR networks, padded
with zeros, are beyond Torch-Pruning), recalibrate batch-norm on augmented training images (2,000), and
measure the accuracy on the validation split (5,000); then the same with 20 steps of fine-tuning in between.

- ours: the evaluator of the product, at its rung `recalibrated` so that the work is the same, and at its default rung
  `reconstructed`, which fits layers too.
- by hand: `copy.deepcopy`, a pruner of Torch-Pruning with its dependency graph, float32 as torch lays it out.
- masked: the dense network with zeros in place of what is removed, float32, as the published AMC code evaluates.

They alternate in one process; medians, and ratios of them. Besides: what the framework and agents take of a candidate's
time, the share of the machine's measured matrix-product rate in bfloat16, where measuring spends its time, what a race
saves, what torch's compiler takes and saves (`--compiled`), and sensitivity cells, nine ratios a group, beside as many
candidates by hand, and as many that FastNAS of NVIDIA's ModelOpt scores. FastNAS too chooses by scores of one layer at
a time; it recalibrates and measures the whole network for each, in float32. It is left out where it can't be imported
(pip install nvidia-modelopt huggingface_hub torchprofile==0.0.4).

Without `--data-root` the network has random weights and the images are noise: time does not depend on either.
"""

import argparse
import contextlib
import copy
import fnmatch
import importlib.metadata
import io
import itertools
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

import autoprune as ap
from autoprune import models, registry
from autoprune.data import Batch
from autoprune.devices import resolve, synchronise
from autoprune.environment import PruningEnv, layer_facts
from autoprune.evaluation import RUNGS, Evaluator, Ledger, Pipeline, Raced, workbench
from autoprune.fidelity import kendall
from autoprune.finetuning import Recipe
from autoprune.finetuning.train import one_cycle
from autoprune.policy import Policy
from autoprune.preparation import Prepared, prepare
from autoprune.search_spaces.per_group import PerGroup
from autoprune.settings import SearchSettings
from autoprune.testing import SyntheticEvaluator, run_agent


class Ours:
    """The product's evaluator."""

    def __init__(self, task: ap.Task, calibration: int, recover: str, sparsity: float, groups: str) -> None:
        settings = SearchSettings(budget="macs<=99%", recover=recover, calibration_images=calibration)
        self.prepared: Prepared = prepare(task, settings)
        self.bench = self.prepared.bench
        self.evaluator = Evaluator(Pipeline(self.bench, settings.recovery, 0), self.prepared.costs, Ledger())
        self.names = fnmatch.filter(self.prepared.structure.names, groups)
        self.removed = self.prepared.structure.removed(Policy(dict.fromkeys(self.names, sparsity)))
        self.macs = self.prepared.costs.cost(self.removed).macs

    def __call__(self, steps: int) -> float:
        """Evaluate a candidate, and return its accuracy."""
        model = self.bench.recovered(self.removed)
        if steps:
            self.evaluator.pipeline.train(model, steps, Recipe(), 0, self.removed)
        return self.bench.measure(model).summary("").accuracy

    def overhead(self, ledger: Path, candidates: int = 50) -> float:
        """Return the seconds a candidate that are no forward pass, no backward pass and no data.

        The network is cut, copied for each thread and its batch-norm folded; then nothing is recovered or measured, and
        a line is written and synced.

        Args:
            ledger: The file that gets the lines.
            candidates: Random ones, of which the median is taken.
        """
        evaluator = Evaluator(self.evaluator.pipeline, self.prepared.costs, Ledger(ledger))
        measured = self.bench.dense
        rng = torch.Generator().manual_seed(0)
        shares = torch.rand(candidates, len(self.removed), generator=rng) * 0.5
        policies = [Policy(dict(zip(self.removed, row.tolist(), strict=True))) for row in shares]
        seconds = []
        with (
            mock.patch.object(self.bench, "recover", return_value=None),
            mock.patch.object(workbench, "measure", return_value=measured),
        ):
            for policy in policies:
                started = time.perf_counter()
                evaluator.evaluate(policy, arm="search", agent="none")
                seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)


class ByHand:
    """What a user writes: float32, batches of 256, as torch lays tensors out."""

    def __init__(self, task: ap.Task, calibration: int, sparsity: float, groups: str) -> None:
        self.task = task
        self.model = task.fresh_model().eval()
        convolutions = [name for name, module in self.model.named_modules() if isinstance(module, nn.Conv2d)]
        self.ratios = dict.fromkeys(fnmatch.filter(convolutions, groups), sparsity)
        self.val = list(self.placed(task.val_batches(256)))
        self.calibration = list(self.placed(task.calibration_batches(calibration, 250, 0)))

    def placed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches on the network's device."""
        device = self.task.example_input.device
        return ((inputs.to(device), targets.to(device)) for inputs, targets in batches)

    def __call__(self, steps: int) -> float:
        """Evaluate a candidate, and return its accuracy."""
        model = self.recalibrated(self.pruned())
        if steps:
            self.train(model, steps)
        return self.accuracy(model)

    def pruned(self) -> nn.Module:
        """Return a smaller copy."""
        return self.sliced(self.ratios)

    def sliced(self, ratios: Mapping[str, float]) -> nn.Module:
        """Return a copy without these shares of the convolutions' outputs, the smallest in L1."""
        import torch_pruning as tp

        model = copy.deepcopy(self.model)
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.MetaPruner(
                model,
                self.task.example_input,
                importance=tp.importance.MagnitudeImportance(p=1),
                pruning_ratio=0.0,
                pruning_ratio_dict={model.get_submodule(name): ratio for name, ratio in ratios.items()},
                ignored_layers=[last],
            )
            pruner.step()
        return model

    def recalibrated(self, model: nn.Module) -> nn.Module:
        """Take batch-norm statistics anew, in place, and return the network in eval mode."""
        model.train()
        norms = {module: module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        with torch.no_grad():
            for inputs, _ in self.calibration:
                model(inputs)
        for norm, momentum in norms.items():
            norm.momentum = momentum
        return model.eval()

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the validation split."""
        model.eval()
        right = 0
        with torch.no_grad():
            for inputs, targets in self.val:
                right += int((model(inputs).argmax(1) == targets).sum())
        return right / self.task.n_val

    def train(self, model: nn.Module, steps: int) -> None:
        """Fine-tune, by the recipe of the product."""
        recipe = Recipe()
        optimizer = torch.optim.SGD(
            model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
        )
        batches = self.placed(self.task.train_batches(recipe.batch_size, 0))
        model.train()
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = recipe.lr * one_cycle((step + 1) / steps, recipe.warmup)
            inputs, targets = next(batches)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            self.stepped(model)

    def stepped(self, model: nn.Module) -> None:
        """Do what has to be done after a step."""


class Masked(ByHand):
    """The dense network with zeros, as published code of AMC evaluates."""

    def __init__(self, task: ap.Task, calibration: int, ours: Ours) -> None:
        super().__init__(task, calibration, 0.0, "")
        change = ours.bench.change(ours.removed)
        self.masks: dict[str, torch.Tensor] = {}
        for name, tensor in self.model.named_parameters():
            kept = change.kept.get(name, {})
            mask = torch.ones_like(tensor)
            for dim, indices in kept.items():
                along = torch.zeros(tensor.shape[dim], device=tensor.device)
                along[indices] = 1
                mask *= along.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
            self.masks[name] = mask

    def pruned(self) -> nn.Module:
        """Return a copy with zeros."""
        model = copy.deepcopy(self.model)
        self.stepped(model)
        return model

    def stepped(self, model: nn.Module) -> None:
        """Put the zeros back."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(self.masks[name])


def compare(ways: dict[str, Callable[[int], float]], steps: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return seconds and accuracy of a candidate, the ways taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    accuracy = {}
    for number in range(repeats + 1):  # the first is the warm-up
        for name, way in ways.items():
            started = time.perf_counter()
            accuracy[name] = way(steps)  # a number, so that an accelerator has been waited for
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {
        name: {
            "median": statistics.median(values),
            "low": min(values),
            "high": max(values),
            "accuracy": accuracy[name],
        }
        for name, values in seconds.items()
    }


def sensitivity(ours: Ours, by_hand: ByHand, ratios: Sequence[float]) -> dict[str, float]:
    """Return the seconds of one cell a group and ratio, and of as many by hand.

    Three of those by hand are timed, at half of the first, the middle and the last group.
    """
    sizes = {name: ours.prepared.structure[name].size for name in ours.names}
    names = sorted(ours.names, key=lambda name: ours.bench.begins({name: ours.removed[name]}))
    started = time.perf_counter()
    for name in names:
        for ratio in ratios:
            ours.bench.probe({name: round(ratio * sizes[name])})
    mine = time.perf_counter() - started
    times = []
    for name in (names[0], names[len(names) // 2], names[-1]):
        started = time.perf_counter()
        by_hand.accuracy(by_hand.recalibrated(by_hand.sliced({name: 0.5})))
        times.append(time.perf_counter() - started)
    executed = ours.bench.executed
    cells = len(names) * len(ratios)
    return {
        "cells": cells,
        "ours": mine,
        "by_hand": statistics.mean(times) * cells,
        "executed": sum(executed) / len(executed),
    }


def raced(ours: Ours, number: int) -> dict[str, float]:
    """Return what a race saves: random policies at half of the multiply-adds, measured whole and as far as it goes."""
    settings = SearchSettings(budget="macs<=50%", race=True, calibration_images=2000)
    prepared = prepare(ours.prepared.task, settings)
    space = PerGroup(prepared.feasible, spend=(1.0, 1.0))
    rng = np.random.default_rng(0)
    policies = [space.decode(rng.random(len(space.dimensions)).tolist()) for _ in range(number)]
    uniform = prepared.feasible.policy(prepared.feasible.uniform(1.0))
    found: dict[str, list[Any]] = {}
    seconds = {}
    for name, racing in (("race", True), ("whole", False)):
        pipeline = Pipeline(prepared.bench, settings.recovery, 0)
        pipeline(uniform)
        started = time.perf_counter()
        found[name] = [pipeline(Raced(p, uniform) if racing else p).measurements[-1] for p in policies]
        seconds[name] = time.perf_counter() - started
    n_val = prepared.task.n_val
    accuracies = {name: [m.accuracy for m in ms] for name, ms in found.items()}
    return {
        "policies": number,
        "stopped": sum(m.samples is not None for m in found["race"]),
        "samples": sum((m.samples or n_val) / n_val for m in found["race"]) / number,
        "times": seconds["whole"] / seconds["race"],
        "tau": kendall(accuracies["race"], accuracies["whole"]).value,
        "error": float(np.sqrt(np.mean(np.square(np.subtract(accuracies["race"], accuracies["whole"]))))),
    }


def proposing(ours: Ours, agents: Sequence[str], candidates: int = 60) -> dict[str, float]:
    """Return the seconds a candidate that agents take themselves, over a whole search of so many, at half of the cost.

    A formula answers them, and its time does not count.
    """
    task, feasible = ours.prepared.task, ours.prepared.feasible.limited(0.5)
    layers = layer_facts(task.model, task.example_input, feasible.structure)
    found = {}
    for name in agents:
        answered: list[float] = []
        evaluator = SyntheticEvaluator(feasible, evaluations=candidates)

        def submit(
            policy: Policy,
            rival: Policy | None = None,
            evaluator: SyntheticEvaluator = evaluator,
            answered: list[float] = answered,
        ) -> Callable[[], Any]:
            started = time.perf_counter()
            candidate = evaluator.submit(policy)()
            answered.append(time.perf_counter() - started)
            return lambda: candidate

        space = PerGroup(feasible, spend=(1.0, 1.0))
        env = PruningEnv(
            feasible, space, submit, value=lambda candidate: candidate.accuracy, evaluations=candidates, layers=layers
        )
        agent = registry.resolve("agent", name)()
        started = time.perf_counter()
        run_agent(agent, env, seed=0)
        found[name] = (time.perf_counter() - started - sum(answered)) / len(answered)
    return found


def spent(ours: Ours) -> dict[str, float]:
    """Return the share of measuring a candidate that each kind of operator takes, on one thread."""
    model = ours.bench.recovered(ours.removed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours.bench.measure(model)
    torch.set_num_threads(threads)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    whole = sum(times.values())
    return {name: time / whole for name, time in sorted(times.items(), key=lambda item: -item[1])[:6]}


def compiled(ours: Ours, repeats: int = 10) -> dict[str, float]:
    """Return the seconds of a batch of a candidate as it is measured, and compiled, and of compiling.

    Every candidate has other shapes, and is compiled anew.
    """
    bench = ours.bench
    model = bench._folding(bench.recovered(ours.removed)).eval()
    inputs, _ = next(iter(bench._val))
    times = {}
    with torch.no_grad(), bench.precision.running(bench.device):
        faster = torch.compile(model)
        started = time.perf_counter()
        faster(inputs)
        times["compiling"] = time.perf_counter() - started
        for name, network in (("compiled", faster), ("as it is", model)):
            each = []
            for _ in range(repeats):
                started = time.perf_counter()
                network(inputs)
                synchronise(bench.device)
                each.append(time.perf_counter() - started)
            times[name] = statistics.median(each)
    return {**times, "samples": len(inputs)}


def by_fastnas(
    task: ap.Task,
    calibration: int,
    constraints: dict[str, str],
    ratios: Sequence[float] | None,
    divisor: int,
) -> tuple[nn.Module, list[float]]:
    """Return the network that FastNAS makes, and when each score was there; the first is the dense network's.

    Args:
        task: The network and its data.
        calibration: Images that batch-norm is recalibrated on for every score; in 50 batches, since it does not with
            fewer.
        constraints: As in `{"flops": "50%"}`.
        ratios: Shares of the channels that may stay; by default its own, in steps of 0.05.
        divisor: Of the channels that stay; its own, 32, suits larger networks.

    Raises:
        ImportError: ModelOpt is not there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.prune as mtp
        from modelopt.torch.nas.autonas import MODELOPT_QUEUE_MAXLEN

        val = list(task.val_batches(256))
        size = max(2, -(-calibration // MODELOPT_QUEUE_MAXLEN))
        images = list(task.calibration_batches(MODELOPT_QUEUE_MAXLEN * size, size, 0))
        ended = []

        def score(model: nn.Module) -> float:
            model.eval()  # here it recalibrates
            with torch.no_grad():
                right = sum(int((model(inputs).argmax(1) == targets).sum()) for inputs, targets in val)
            ended.append(time.perf_counter())
            return right / task.n_val

        rules = mtp.fastnas.FastNASConfig().model_dump()
        for layer, what in (("nn.Conv2d", "channel"), ("nn.BatchNorm2d", "feature")):
            rules[layer]["*"][f"{what}_divisor"] = divisor
            if ratios is not None:
                rules[layer]["*"][f"{what}s_ratio"] = tuple(ratios)
        config = {
            "data_loader": images,
            "score_func": score,
            "collect_func": lambda batch: batch[0],
            "verbose": False,
        }
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            model, _ = mtp.prune(
                task.fresh_model().eval(),
                mode=[("fastnas", rules)],
                constraints=constraints,
                dummy_input=task.example_input,
                config=config,
            )
    return model, ended


def fastnas(task: ap.Task, calibration: int, sparsity: float) -> dict[str, Any]:
    """Return the seconds that FastNAS takes for scores of single layers without a share of their channels.

    It finds the layers itself. A score is choosing the channels, recalibrating and measuring; what comes before the
    first and after the last, which is tracing the network, sorting channels and choosing a policy, does not count.
    """
    try:
        _, ended = by_fastnas(task, calibration, {"params": "100%"}, (1 - sparsity, 1.0), 1)
    except ImportError as error:
        return {"skipped": f"nvidia-modelopt can't be imported: {error}"}
    each = [after - before for before, after in itertools.pairwise(ended)]
    return {
        "version": importlib.metadata.version("nvidia-modelopt"),
        "cells": len(each),
        "seconds": sum(each),
        "median": statistics.median(each),
    }


def peak(device: torch.device, size: int = 4096) -> float:
    """Return multiply-adds a second of matrix products in bfloat16."""
    a, b = (torch.randn(size, size).bfloat16().to(device) for _ in range(2))
    seconds = []
    for _ in range(4):
        synchronise(device)
        started = time.perf_counter()
        a @ b
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return size**3 / min(seconds)


def table(found: dict[str, Any]) -> str:
    """Return the measurements as Markdown."""
    lines = [
        "| way | fine-tuning steps | seconds a candidate | a minute | times as fast as by hand | as masked |",
        "|---|---|---|---|---|---|",
    ]
    for steps, ways in found["candidates"].items():
        for name, row in ways.items():
            ratios = [f"{ways[other]['median'] / row['median']:.1f}" for other in ("by hand", "masked")]
            spread = f"{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            lines.append(f"| {name} | {steps} | {spread} | {60 / row['median']:.0f} | {' | '.join(ratios)} |")
    cells = found["sensitivity"]
    peer = found["fastnas"]
    lines += [
        "",
        f"Sensitivity, {cells['cells']} cells: {cells['ours']:.1f} s, by hand {cells['by_hand']:.1f} s: "
        f"{cells['by_hand'] / cells['ours']:.1f} times as fast; {cells['executed']:.0%} of the multiply-adds ran.",
        f"FastNAS: {peer['skipped']}."
        if "skipped" in peer
        else f"FastNAS of ModelOpt {peer['version']} scores single layers in {peer['median']:.2f} s each: "
        f"{peer['median'] * cells['cells'] / cells['ours']:.1f} times as long as our cells, "
        f"{peer['median'] * cells['cells'] / cells['by_hand']:.1f} as by hand.",
        "Measuring a candidate, on one thread: "
        + ", ".join(f"{name.removeprefix('aten::')} {share:.0%}" for name, share in found["spent"].items())
        + ".",
        f"Framework: {1e3 * found['overhead']:.1f} ms a candidate; agents: "
        + ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in found["agents"].items())
        + "."
        + ("" if found["share"] is None else f" Share of the matrix-product rate in bfloat16: {found['share']:.0%}."),
    ]
    race = found["race"]
    if race is not None:
        lines.append(
            f"A race, over {race['policies']} random policies: {race['stopped']} were stopped, {race['samples']:.0%} "
            f"of the samples were measured, {race['times']:.2f} times as fast; the accuracies are "
            f"{100 * race['error']:.1f} points off (root mean square), Kendall's tau with the whole {race['tau']:.2f}."
        )
    compared = found["compiled"]
    if compared is not None:
        lines.append(
            f"A batch of {compared['samples']} takes {1e3 * compared['as it is']:.1f} ms, compiled "
            f"{1e3 * compared['compiled']:.1f} ms, and compiling {compared['compiling']:.1f} s."
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.set_num_threads(options.threads)
    task = _task(options)
    ours = {rung: Ours(task, options.calibration, rung, options.sparsity, options.groups) for rung in RUNGS}
    same = ours["recalibrated"]
    ways: dict[str, Callable[[int], float]] = {f"ours, {rung}": way for rung, way in ours.items()}
    hand = ByHand(task, options.calibration, options.sparsity, options.groups)
    ways |= {"by hand": hand, "masked": Masked(task, options.calibration, same)}
    with contextlib.suppress(RuntimeError):  # set once a process
        torch.set_num_interop_threads(1)
    candidates = {steps: compare(ways, steps, options.repeats) for steps in options.steps}
    work = same.macs * (task.n_val + options.calibration)
    with tempfile.TemporaryDirectory() as folder:
        overhead = same.overhead(Path(folder) / "ledger.jsonl")
    found = {
        "machine": {"torch": torch.__version__, "python": platform.python_version(), "threads": options.threads},
        "settings": {k: v.name if isinstance(v, Path) else str(v) for k, v in vars(options).items()},
        "precision": str(same.bench.choice),
        "macs": same.macs,
        "candidates": candidates,
        "sensitivity": sensitivity(ours["reconstructed"], hand, options.ratios),
        "spent": spent(same),
        "race": raced(ours["reconstructed"], options.raced) if options.raced else None,
        "overhead": overhead,
        "agents": proposing(same, options.agents),
        "compiled": compiled(same) if options.compiled else None,
        "share": work / candidates[0]["ours, recalibrated"]["median"] / peak(same.bench.device)
        if 0 in candidates
        else None,
        "fastnas": fastnas(task, options.calibration, options.sparsity),  # last: it changes torch's modules
    }
    print(table(found))
    print(f"\nCandidates are {found['precision']}.")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _task(options: argparse.Namespace) -> ap.Task:
    device = resolve(options.device)
    if options.data_root is not None:
        task = ap.Task.named(options.network, options.data, root=options.data_root, weights=options.weights)
        return task.on(device)
    model = models.build(options.network, num_classes=10, in_channels=3, input_size=options.size)
    generator = torch.Generator().manual_seed(0)
    number = options.val + options.calibration
    images = torch.randn(number, 3, options.size, options.size, generator=generator)
    targets = torch.arange(number) % 10
    val = (images[: options.val], targets[: options.val])
    return ap.Task(model, train=(images[options.val :], targets[options.val :]), val=val).on(device)


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--size", type=int, default=32, help="of images of noise")
    parser.add_argument("--val", type=int, default=5000, help="images of noise that are measured on")
    parser.add_argument("--calibration", type=int, default=2000)
    parser.add_argument("--groups", default="*.conv1", help="which lose channels")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of each of them")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 20])
    parser.add_argument("--ratios", type=float, nargs="+", default=[n / 10 for n in range(1, 10)], help="of cells")
    parser.add_argument("--raced", type=int, default=40, help="random policies of the race; 0 for none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--agents", nargs="+", default=["tpe", "random"], help="whose own time is taken")
    parser.add_argument("--compiled", action="store_true", help="time torch's compiler too; it needs one of C++")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, auto")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
