"""How soon a policy is found, beside the loop that people write by hand with Optuna and Torch-Pruning.

    python benchmarks/time_to_policy.py --data-root DIR --weights resnet20-12fca82f.th --out time_to_policy.jsonl
    python benchmarks/time_to_policy.py --out time_to_policy.jsonl --show

Half of the multiply-adds of ResNet-20 on CIFAR-10 go. Both search the same space, the channels inside every block (the
residual stages, padded with zeros, are beyond Torch-Pruning; here they are locked), on the same validation split.

- by hand: Optuna's TPE (multivariate, seeded, the uniform policy first) proposes a ratio a layer; a trial is
  `copy.deepcopy`, a pruner of Torch-Pruning with these ratios and L1, batch-norm recalibrated on 2,000 training images,
  and the accuracy on the validation split in float32 (`ByHand` of `throughput.py`). The drawn ratios are scaled until
  they just meet the budget, by arithmetic on multiply-adds a channel that are counted once. That is fairer to the loop
  than a penalty for what is over the budget: no trial is lost, and it takes no time.
- ours: `autoprune.search` as a user calls it, from the dense network to the written report, with tracing, moments,
  sensitivity, controls and MLflow; `analytic:1` is the agent `analytic` with one candidate, without sensitivity.
- FastNAS of NVIDIA's ModelOpt, with `--fastnas`: its own grid of channels (in multiples of 4; its default, 32, is as
  much as most layers have), every layer scored alone on the same images, the policy chosen by a threshold.

Seconds are the wall time until a policy is there, from a task in memory; importing packages does not count.
Multiply-adds are autoprune's for all (Torch-Pruning also counts batch-norm and activations). The best policy of the
loop after some trials, and ours, are then fine-tuned alike (the same code, steps, batches and seeds, in float32), once
each from the weights that its tool leaves (sliced and recalibrated; reconstructed), and once all from reconstructed
weights, where only the policies differ. Accuracies are on all test images, which take no part in anything else.

Every finished piece is a line of `--out`; called again, what is there is not measured again.
"""

import argparse
import contextlib
import fnmatch
import importlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from throughput import ByHand, by_fastnas
from torch import nn

import autoprune as ap
from autoprune.cost import count
from autoprune.evaluation import measure
from autoprune.finetuning import Recipe, train
from autoprune.preparation import Prepared, prepare
from autoprune.settings import SearchSettings
from autoprune.task import FINALISER
from autoprune.threads import suited_threads

Row = dict[str, Any]

MOST = 0.9  # of a layer's channels, as in the product
PACKAGES = ("gymnasium", "mlflow", "optuna", "plotly", "torch_pruning")
STARTS = {"own": "from its own weights", "same": "from weights recovered alike"}


class Rows:
    """The finished pieces of a measurement, and the file that holds them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[Row] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def of(self, piece: str, **values: Any) -> list[Row]:
        """Return the rows of a kind that have these values, in order."""
        wanted = {"piece": piece, **values}
        return [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]

    def add(self, piece: str, **values: Any) -> None:
        """Write a row down."""
        self.rows.append({"piece": piece, **values})
        with self.file.open("a") as out:
            out.write(json.dumps(self.rows[-1]) + "\n")
        sys.stderr.write(".")
        sys.stderr.flush()

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Write down what was asked for, or refuse to go on with something else."""
        known = self.of("settings")
        if not known:
            self.add("settings", **settings)
        for key, value in settings.items():
            if known and known[0].get(key) != value:
                raise SystemExit(
                    f"{self.file} was begun with {key} {known[0].get(key)}, not {value}; give another --out"
                )


class Loop(ByHand):
    """The loop by hand: Optuna proposes ratios, Torch-Pruning removes channels."""

    def __init__(self, task: ap.Task, calibration: int, groups: str, share: float) -> None:
        super().__init__(task, calibration, share, groups)
        self.sizes = {name: self.model.get_submodule(name).out_channels for name in self.ratios}
        self.dense = self.macs(self.model)
        self.limit = share * self.dense
        self.each = {name: (self.dense - self.macs(self.sliced(self.shares({name: 1})))) for name in self.sizes}

    def macs(self, model: nn.Module) -> int:
        """Return the multiply-adds of a network."""
        return count(model, self.task.example_input).cost.macs

    def shares(self, removed: Mapping[str, int]) -> dict[str, float]:
        """Return ratios at which Torch-Pruning, which rounds up, removes so many channels."""
        return {name: (number - 0.5) / self.sizes[name] for name, number in removed.items() if number}

    def fitted(self, ratios: Mapping[str, float]) -> dict[str, int]:
        """Return the channels to remove: the ratios, scaled as little as the budget allows.

        Layers inside different blocks don't meet, so that the multiply-adds are a sum over them.

        Raises:
            ValueError: The budget is out of reach.
        """

        def scaled(scale: float) -> dict[str, int]:
            shares = {name: min(MOST, scale * ratio) for name, ratio in ratios.items()}
            return {name: size - int(size * (1 - shares[name])) for name, size in self.sizes.items()}

        def left(removed: Mapping[str, int]) -> int:
            return self.dense - sum(self.each[name] * number for name, number in removed.items())

        low, high = 0.0, MOST / max(1e-6, min(ratios.values()))
        if left(scaled(high)) > self.limit:
            raise ValueError(f"{left(scaled(high))} multiply-adds are the least, and {self.limit:.0f} the budget")
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if left(scaled(middle)) <= self.limit else (middle, high)
        removed = scaled(high)
        for name in removed:  # several may have been rounded up at once
            fewer = removed | {name: max(0, removed[name] - 1)}
            removed = fewer if left(fewer) <= self.limit else removed
        return removed

    def candidate(self, removed: Mapping[str, int]) -> nn.Module:
        """Return the network without so many channels of the layers, recalibrated."""
        return self.recalibrated(self.sliced(self.shares(removed)))

    def run(self, rows: Rows, trials: int, seed: int) -> None:
        """Run the loop up to a number of trials; those that are there are told to the sampler again."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = {name: optuna.distributions.FloatDistribution(0.0, MOST) for name in self.sizes}
        study = optuna.create_study(sampler=_tpe(seed), direction="maximize")
        study.enqueue_trial(dict.fromkeys(space, 0.5))
        done = rows.of("trial")
        for number in range(max(trials, len(done))):
            started = time.perf_counter()
            trial = study.ask(space)
            if number < len(done):
                if done[number]["ratios"] != trial.params:
                    raise SystemExit(f"trial {number} was another: {rows.file} is of another version of Optuna")
                study.tell(trial, done[number]["accuracy"])
                continue
            removed = self.fitted(trial.params)
            model = self.candidate(removed)
            macs = self.macs(model)
            if macs > self.limit:
                raise RuntimeError(f"{macs} multiply-adds are over the budget, {self.limit:.0f}")
            accuracy = self.accuracy(model)
            study.tell(trial, accuracy)
            seconds = time.perf_counter() - started
            found = {"removed": removed, "macs": macs, "accuracy": accuracy, "seconds": seconds}
            rows.add("trial", number=number, ratios=trial.params, **found)


def _tpe(seed: int) -> Any:
    import warnings

    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multivariate is called experimental
        return optuna.samplers.TPESampler(multivariate=True, seed=seed)


def best_after(rows: Rows, trials: int) -> Row:
    """Return the loop's best trial among so many, with the seconds that all of these took."""
    among = rows.of("trial")[:trials]
    seconds = rows.of("setup")[0]["seconds"] + sum(row["seconds"] for row in among)
    return max(among, key=lambda row: row["accuracy"]) | {"seconds": seconds, "way": f"by hand, {trials} trials"}


def search(task: ap.Task, way: str, settings: Mapping[str, Any]) -> Row:
    """Search as a user does, in a temporary folder, and return what was picked and when.

    Args:
        task: The network and its data.
        way: Agent and candidates, as in `tpe:40`.
        settings: Of the search.
    """
    agent, number = way.split(":")
    alone = {"sensitivity": (), "control": 0} if number == "1" else {}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db"),  # a store of its own
    ):
        started = time.perf_counter()
        result = ap.search(task, out="run", agent=agent, candidates=int(number), **settings, **alone)
        seconds = time.perf_counter() - started
        picked = result.summary["picked"]
    removed = {name: number for name, number in picked["removed"].items() if number}
    return {
        "way": way,
        "seconds": seconds,
        "removed": removed,
        "macs": picked["macs"],
        "accuracy": picked["accuracy"],
        "evaluations": result.summary["evaluations"],
    }


def fastnas(loop: Loop, calibration: int, share: float, weights: Path) -> Row:
    """Have FastNAS choose a policy, keep its weights in a file, and return the policy."""
    started = time.perf_counter()
    model, ended = by_fastnas(loop.task, calibration, {"flops": f"{100 * share:g}%"}, None, 4)
    seconds = time.perf_counter() - started
    removed = {name: size - model.get_submodule(name).out_channels for name, size in loop.sizes.items()}
    if loop.macs(model) != loop.macs(loop.sliced(loop.shares(removed))):
        raise SystemExit("FastNAS took channels of other layers too, so that it can't be compared; leave out --fastnas")
    torch.save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
    return {
        "way": "FastNAS",
        "seconds": seconds,
        "removed": removed,
        "macs": loop.macs(model),
        "accuracy": loop.accuracy(model),
        "evaluations": len(ended),
    }


class Tuning:
    """The same fine-tuning for all.

    Args:
        prepared: The task, in float32.
        loop: The loop by hand.
        steps: Of fine-tuning.
        lr: Its peak learning rate.
        weights: What FastNAS left.
    """

    def __init__(self, prepared: Prepared, loop: Loop, steps: int, lr: float, weights: Path) -> None:
        self.prepared, self.loop, self.steps, self.weights = prepared, loop, steps, weights
        self.recipe = Recipe(lr=lr)
        self.test = list(prepared.bench.placed(prepared.task.open_test(FINALISER).batches(500)))

    def start(self, removed: Mapping[str, int], start: str) -> nn.Module:
        """Return the network without so many channels, recovered as the loop, FastNAS or the product does."""
        if start == "reconstructed":
            model = self.prepared.bench.recovered(removed)
        elif start == "recalibrated":
            model = self.loop.candidate(removed)
        else:
            model = self.loop.sliced(self.loop.shares(removed)).eval()
            model.load_state_dict(torch.load(self.weights, weights_only=True))
        spatial = self.prepared.bench.precision.channels_last
        return model.to(memory_format=torch.channels_last) if spatial else model

    def __call__(self, removed: Mapping[str, int], start: str, seed: int) -> float:
        """Fine-tune, and return the accuracy on the test images."""
        bench, task = self.prepared.bench, self.prepared.task
        model = self.start(removed, start)
        batches = bench.placed(task.train_batches(self.recipe.batch_size, seed))
        with suited_threads(bench.macs):
            train(model, batches, self.steps, recipe=self.recipe, loss=task.loss, seed=seed)
        return self.accuracy(model)

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the test images."""
        bench = self.prepared.bench
        with suited_threads(bench.macs):
            return measure(model, self.test, bench.task.metric, bench.task.loss, bench.precision).summary("").accuracy


def found_by(rows: Rows, checkpoints: Sequence[int]) -> Iterator[tuple[Row, dict[str, str]]]:
    """Yield the policies to compare, ours first, with the two starts of their fine-tuning."""
    for row in rows.of("search"):
        yield row, {"own": "reconstructed", "same": "reconstructed"}
    for row in rows.of("fastnas"):
        yield row, {"own": "as FastNAS leaves it", "same": "reconstructed"}
    trials = len(rows.of("trial"))
    for checkpoint in checkpoints:
        if checkpoint <= trials:
            yield best_after(rows, checkpoint), {"own": "recalibrated", "same": "reconstructed"}


def tuned(rows: Rows, row: Row, start: str, piece: str = "tuned") -> list[float]:
    """Return the accuracies of a policy after fine-tuning, one a seed; or the one before ("untuned")."""
    removed = {name: number for name, number in row["removed"].items() if number}
    return [other["test"] for other in rows.of(piece, removed=removed, start=start)]


def table(rows: Rows, checkpoints: Sequence[int]) -> str:
    """Return the measurements as Markdown."""
    steps = rows.of("settings")[0]["steps"]
    columns = " | ".join(f"test after {steps} steps {words}" for words in STARTS.values())
    lines = [f"| way | seconds | MACs | validation, as found | test, the same | {columns} |", f"|{'---|' * 7}"]
    dense = rows.of("dense")
    for row, starts in found_by(rows, checkpoints):
        macs = f"{row['macs']:,}" + (f" ({row['macs'] / dense[0]['macs']:.1%})" if dense else "")
        cells = [_spread(tuned(rows, row, starts["own"], "untuned"))]
        cells += [_spread(tuned(rows, row, start)) for start in starts.values()]
        lines.append(f"| {row['way']} | {row['seconds']:.0f} | {macs} | {row['accuracy']:.2%} | {' | '.join(cells)} |")
    if dense:
        lines += ["", f"Dense: {dense[0]['macs']:,} MACs, test {dense[0]['test']:.2%}."]
    lines += ["", *verdicts(rows, checkpoints)]
    return "\n".join(lines)


def verdicts(rows: Rows, checkpoints: Sequence[int]) -> Iterator[str]:
    """Yield when the loop by hand first is as accurate as each of ours, after fine-tuning, and how much later."""
    policies = list(found_by(rows, checkpoints))
    ours = [row for row, _ in policies if row["piece"] == "search"]
    by_hand = [(row, starts) for row, starts in policies if row["piece"] == "trial"]
    for mine in ours:
        wanted = tuned(rows, mine, "reconstructed")
        for which, words in STARTS.items():
            reached = [(row, tuned(rows, row, starts[which])) for row, starts in by_hand]
            if not wanted or not reached or not all(values for _, values in reached):
                continue
            aim = statistics.mean(wanted)
            first = next((row for row, values in reached if statistics.mean(values) >= aim), None)
            last = (first or reached[-1][0])["seconds"]
            times = f"{last / mine['seconds']:.1f} times as long"
            yield f"- {mine['way']} ({mine['seconds']:.0f} s, {aim:.2%}), {words}: " + (
                f"not reached {reached[-1][0]['way']} ({last:.0f} s, {times})."
                if first is None
                else f"reached {first['way']} ({last:.0f} s, {times})."
            )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2%} to {max(values):.2%})"


def measured(task: ap.Task, options: argparse.Namespace, rows: Rows) -> None:
    """Measure what is not there yet: first all that is timed, then what comes of it."""
    for package in (*PACKAGES, *(["modelopt.torch.prune"] if options.fastnas else [])):
        importlib.import_module(package)
    rows.claim(
        {
            "network": options.network,
            "data": options.data,
            "groups": options.groups,
            "share": options.share,
            "calibration": options.calibration,
            "seed": options.seed,
            "steps": options.steps,
            "lr": options.lr,
            "threads": options.threads,
        }
    )
    if not rows.of("machine"):
        rows.add("machine", torch=torch.__version__, python=platform.python_version(), cores=os.cpu_count())
    started = time.perf_counter()
    loop = Loop(task, options.calibration, options.groups, options.share)
    if not rows.of("setup"):
        rows.add("setup", seconds=time.perf_counter() - started)
    settings: dict[str, Any] = {
        "budget": f"macs<={100 * options.share:g}%",
        "calibration_images": options.calibration,
        "seed": options.seed,
    }
    prepared = prepare(task, SearchSettings(**settings, precision="float32"))
    names = fnmatch.filter(prepared.structure.names, options.groups)
    if set(names) != set(loop.sizes):
        raise SystemExit(f"--groups {options.groups} are the layers {list(loop.sizes)}, but the groups {names}")
    settings["bounds"] = {name: {"lock": True} for name in prepared.structure.names if name not in names}
    for way in options.ours:
        if not rows.of("search", way=way):
            rows.add("search", **search(task, way, settings))
    loop.run(rows, options.trials, options.seed)
    weights = options.out.with_suffix(".fastnas.pt")
    if options.fastnas and not rows.of("fastnas"):
        rows.add("fastnas", **fastnas(loop, options.calibration, options.share, weights))
    tuning = Tuning(prepared, loop, options.steps, options.lr, weights)
    if not rows.of("dense"):
        rows.add("dense", macs=loop.dense, test=tuning.accuracy(prepared.bench.model))
    for row, starts in found_by(rows, options.checkpoints):
        removed = {name: number for name, number in row["removed"].items() if number}
        for start in dict.fromkeys(starts.values()):
            if not rows.of("untuned", removed=removed, start=start):
                rows.add("untuned", removed=removed, start=start, test=tuning.accuracy(tuning.start(removed, start)))
            for seed in range(options.seeds):
                if not rows.of("tuned", removed=removed, start=start, seed=seed):
                    rows.add("tuned", removed=removed, start=start, seed=seed, test=tuning(removed, start, seed))


def main() -> None:
    """Measure and print."""
    options = _options()
    rows = Rows(options.out)
    if not options.show:
        torch.set_num_threads(options.threads)
        task = ap.Task.named(options.network, options.data, root=options.data_root, weights=options.weights)
        measured(task, options, rows)
    print(table(rows, options.checkpoints))


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--groups", default="*.conv1", help="which lose channels")
    parser.add_argument("--share", type=float, default=0.5, help="of the multiply-adds that may stay")
    parser.add_argument("--calibration", type=int, default=2000, help="images that batch-norm is recalibrated on")
    parser.add_argument("--trials", type=int, default=160, help="by hand")
    parser.add_argument(
        "--checkpoints", type=int, nargs="+", default=[10, 20, 40, 80, 160], help="trials to look after"
    )
    parser.add_argument("--ours", nargs="*", default=["analytic:1", "analytic:40", "tpe:40"], help="AGENT:CANDIDATES")
    parser.add_argument("--fastnas", action="store_true", help="also have ModelOpt's FastNAS choose (throughput.py)")
    parser.add_argument("--seed", type=int, default=0, help="of the searches")
    parser.add_argument("--seeds", type=int, default=2, help="of the fine-tuning")
    parser.add_argument("--steps", type=int, default=200, help="of the fine-tuning")
    parser.add_argument("--lr", type=float, default=0.01, help="its peak learning rate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True, help="a line for every piece; goes on where it stopped")
    parser.add_argument("--show", action="store_true", help="measure nothing, print what the file holds")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
