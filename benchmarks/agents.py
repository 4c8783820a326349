"""Agents side by side at equal evaluations, and what their picks are worth after the same fine-tuning.

    python benchmarks/agents.py --data-root DIR --weights-dir DIR --out runs/agents
    python benchmarks/agents.py --out runs/agents --show
    python benchmarks/agents.py --data-root DIR --weights-dir DIR --out runs/agents --tasks resnet20-50 --before 3000

Four tasks: ResNet-20 on CIFAR-10 at 50 % and at 35 % of its multiply-adds, plain-20 on Fashion-MNIST, and ResNet-8 on
the digits of scikit-learn; at 35 % and on the digits also at another rung. `--weights-dir` holds `resnet20-12fca82f.th`
(akamaster/pytorch_resnet_cifar10; it has seen the validation images), and what these two leave:

    autoprune train --model plain20 --data fashion-mnist --data-root DIR --epochs 6 --out plain20.safetensors
    autoprune train --model resnet8 --data digits --out resnet8.safetensors

For each task:

- `autoprune.compare`: all agents, `--seeds` seeds, `--candidates` evaluations each, reconstructed (the rung that ranks
  best a second, see `closed_form.md`), on the digits fine-tuned for 50 steps (there nothing less ranks the better half;
  `digits-reconstructed` is without), and so in `resnet20-35-short`, which takes four times as long; then every pick
  fine-tuned with one recipe and tested on all test images.
- The default agent once more with `--more-seeds`, beside random and uniform alone: what three seeds can't tell.
- Searches of other lengths: the default agent with `--few` evaluations, and AMC with the paper's settings and `--many`;
  their picks (of all that was measured, uniform included) are fine-tuned with the same recipe.

To bring this to hours, candidates are measured on `--val-images` validation images, and training images are the first
`--train-images` of a shuffle; test images are all there are. Called again, it goes on where it stopped.

`--before` prints what the picks of a comparison that is done reach on the first test images, before any fine-tuning.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import autoprune as ap
from autoprune import data, models
from autoprune.agents.amc import AMCAgent
from autoprune.cli import watching
from autoprune.evaluation import InProcess, Ledger, Once, measure, outcomes
from autoprune.preparation import Prepared, prepare
from autoprune.run import RunFolder
from autoprune.settings import SearchSettings
from autoprune.standings import t_interval
from autoprune.tracking import NullTracker

AGENTS: Mapping[str, Any] = {
    "surrogate": "surrogate",
    "tpe": "tpe",
    "evolution": "evolution",
    "spdy": "spdy",
    "amc": "amc",
    "amc, no warm start": "amc:warm_start=false",
    "legr": "legr",
    "global": "global",
    "greedy": "greedy",
    "threshold": "threshold",
    "separable": "separable",
    "analytic": "analytic",
}
DEFAULT = "surrogate"
PARTS = ("seeds", "few", "many")


@dataclass(frozen=True)
class Setting:
    """One task of the comparison."""

    network: str
    data: str
    weights: str
    budget: str
    epochs: int  # of fine-tuning the picks
    steps: int = 0  # of fine-tuning each candidate, after it is reconstructed


SETTINGS = {
    "digits": Setting("resnet8", "digits", "resnet8.safetensors", "macs<=15%", 20, steps=50),
    "digits-reconstructed": Setting("resnet8", "digits", "resnet8.safetensors", "macs<=15%", 20),
    "resnet20-50": Setting("resnet20", "cifar10", "resnet20-12fca82f.th", "macs<=50%", 2),
    "plain20": Setting("plain20", "fashion-mnist", "plain20.safetensors", "macs<=20%", 2),
    "resnet20-35": Setting("resnet20", "cifar10", "resnet20-12fca82f.th", "macs<=35%", 2),
    "resnet20-35-short": Setting("resnet20", "cifar10", "resnet20-12fca82f.th", "macs<=35%", 2, steps=50),
}


def made(setting: Setting, options: argparse.Namespace) -> ap.Task:
    """Return the task, with fewer validation and training images where there are more."""
    source = data.load(setting.data, options.data_root)
    shape = {"in_channels": source.in_channels, "input_size": source.input_size}
    model = models.build(setting.network, num_classes=source.num_classes, **shape)
    models.load_weights(model, options.weights_dir / setting.weights)
    train, val = data.cut(source.train, source.val_fraction, 0)
    return ap.Task(
        model,
        train=first(train, options.train_images),
        val=first(val, options.val_images),
        test=source.test,
        augment=source.augment,
        name=f"{setting.network} on {setting.data}",
    )


def first(split: data.Split, number: int) -> data.Split:
    """Return the first samples of a shuffle."""
    shuffled = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return data.subset(split, shuffled[:number].sort().values)


def compared(name: str, options: argparse.Namespace) -> None:
    """Compare all agents on a task, with as many evaluations each."""
    comparison(name, options, options.out / name, options.agents, options.seeds)


def repeated(name: str, options: argparse.Namespace) -> None:
    """Compare the default agent with random and uniform over more seeds; the first ones are taken over."""
    out, there = options.out / f"{name}-seeds", options.out / name
    if not out.exists():
        part = out.with_name(f".{out.name}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for file in there.iterdir():
            if file.is_file() and not file.name.startswith("compare."):
                shutil.copyfile(file, part / file.name)
        for agent in (DEFAULT, "random", "uniform"):
            if (there / agent).exists():
                shutil.copytree(there / agent, part / agent)
        part.rename(out)
    comparison(name, options, out, [DEFAULT], options.more_seeds)


def comparison(name: str, options: argparse.Namespace, out: Path, agents: Sequence[str], seeds: int) -> None:
    """Compare agents, and fine-tune what they pick."""
    setting = SETTINGS[name]
    with watching(quiet=True) as progress:
        ap.compare(
            made(setting, options),
            out=out,
            agents={agent: AGENTS[agent] for agent in agents},
            seeds=seeds,
            candidates=options.candidates,
            budget=setting.budget,
            finetune_steps=setting.steps,
            control=0,
            finalize=setting.epochs,
            finalize_lr=options.lr,
            parallel=options.parallel,
            progress=progress,
        )


def searched(name: str, options: argparse.Namespace, agent: Any, label: str, candidates: int) -> None:
    """Search a task with one agent and another number of evaluations, and fine-tune the picks by the same recipe."""
    setting, folder = SETTINGS[name], options.out / f"{name}-{label}"
    beside = [*sorted((options.out / name).glob("*/*/ledger.jsonl")), *sorted(folder.glob("*/ledger.jsonl"))]
    once = Once(InProcess(), outcomes(map(Ledger, beside)))
    try:
        for seed in range(options.seeds):
            out = folder / str(seed)
            if (out / "final.json").exists():
                continue
            out.mkdir(parents=True, exist_ok=True)
            for file in ("precision.json", "sensitivity.json"):  # or outcomes would not be the comparison's
                shutil.copyfile(options.out / name / file, out / file)
            with watching(quiet=True) as progress:
                result = ap.search(
                    made(setting, options),  # whose test split can be opened once
                    out=out,
                    agent=agent,
                    candidates=candidates,
                    agent_seed=seed,
                    budget=setting.budget,
                    finetune_steps=setting.steps,
                    control=0,
                    executor=once,
                    tracker=NullTracker(),
                    progress=progress,
                )
            result.finalize(setting.epochs, lr=options.lr)
    finally:
        once.stop()


def before(name: str, options: argparse.Namespace) -> Iterator[str]:
    """Yield, for every pick, its accuracy on the first test images before a gradient step, and on all after them."""
    task = made(SETTINGS[name], options)
    test = data.load(SETTINGS[name].data, options.data_root).test
    inputs, targets = (
        torch.cat(part) for part in zip(*data.subset(test, torch.arange(options.before)).batches(500), strict=True)
    )
    yield f"| {name}: agent | seed | validation | {options.before} test images, before | all test images, fine-tuned |"
    yield "|---|---|---|---|---|"
    searches = [RunFolder(file.parent) for file in sorted((options.out / name).glob("*/*/final.json"))]
    prepared: Prepared | None = None  # of one search, as they differ in their agents alone
    for run in searches:
        if prepared is None:
            prepared = prepare(task, SearchSettings.of(run.read(run.config)["search"]), run)
        picked = next(one for one in Ledger(run.ledger) if one.id == run.read(run.result)["picked"]["id"])
        network = prepared.bench.recovered(picked.removed)
        found = measure(network, zip(inputs.split(100), targets.split(100), strict=True), task.metric, task.loss)
        after = run.read(run.final)["test"]["accuracy"]
        cells = (picked.accuracy, float(found.scores.mean()), after)
        yield f"| {run.path.parent.name} | {run.path.name} | {' | '.join(f'{cell:.2%}' for cell in cells)} |"


def page(options: argparse.Namespace) -> Iterator[str]:
    """Yield what is there, as lines of Markdown."""
    for name in options.tasks:
        file = options.out / name / "compare.json"
        if file.exists():
            yield from table(name, json.loads(file.read_text()), options)
        more = options.out / f"{name}-seeds" / "compare.json"
        if more.exists():
            yield from lines(json.loads(more.read_text()))
            yield ""


def table(name: str, document: Mapping[str, Any], options: argparse.Namespace) -> Iterator[str]:
    """Yield a task's heading and table; what `autoprune.compare` says of them in words is on its pages."""
    yield f"## {document['task'].get('name', name)}, {document['search']['budget']}"
    yield ""
    yield from lines(document)
    tests = {row["agent"]: row["test"]["values"] for row in document["table"] if "test" in row}
    for label in ("few", "many"):
        found = others(options.out / f"{name}-{label}")
        if found:
            seeds, picks, values, evaluations = zip(*found, strict=True)
            what = {"few": DEFAULT, "many": "amc, as published"}[label]
            whole = "" if len(seeds) == document["seeds"] else f", {len(seeds)} of the seeds"
            asked = " to ".join(map(str, sorted({min(evaluations), max(evaluations)})))
            cells = [f"{what}, {max(evaluations)}{whole}", spread(t_interval(picks)._asdict()), "", "", asked]
            cells.append(spread(t_interval(values)._asdict()))
            for rival in ("random", "uniform"):
                there = tests.get(rival)
                cells.append(more(values, None if there is None else [there[seed] for seed in seeds]))
            yield f"| {' | '.join(cells)} |"
    yield ""


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a comparison is of, and its agents."""
    dense, recipe = document["dense"], document["finalized"]
    yield (
        f"Dense {dense['accuracy']:.2%} on validation"
        + ("" if recipe is None else f", {recipe['dense_test']['accuracy']:.2%} on test")
        + f"; {document['seeds']} seeds, {document['evaluations']} evaluations each, {document['evaluated']} policies "
        f"evaluated in all; {document['fidelity']}."
    )
    yield ""
    columns = ["agent", "pick, as found", "hypervolume", "evaluations to 99 %", "asked for", "test, fine-tuned"]
    yield f"| {' | '.join(columns)} | more than random | than uniform |"
    yield f"|{'---|' * 8}"
    tests = {row["agent"]: row["test"]["values"] for row in document["table"] if "test" in row}
    for row in document["table"]:
        cells = [row["agent"], spread(row["accuracy"]), f"{row['hypervolume']['mean']:.4f}"]
        cells += [f"{row['evaluations_to_99']['mean']:.0f}", f"{row['evaluations']['mean']:.0f}"]
        own = tests.get(row["agent"])
        cells.append("" if own is None else spread(row["test"]))
        cells += [more(own, tests.get(other)) for other in ("random", "uniform")]
        yield f"| {' | '.join(cells)} |"


def others(folder: Path) -> list[tuple[int, float, float, int]]:
    """Return seed, pick as found and fine-tuned, and evaluations, of the searches of another length that are done."""
    found = []
    for run in sorted((file.parent for file in folder.glob("*/final.json")), key=lambda run: int(run.name)):
        result, final = (json.loads((run / f"{file}.json").read_text()) for file in ("result", "final"))
        found.append((int(run.name), result["picked"]["accuracy"], final["test"]["accuracy"], result["candidates"]))
    return found


def more(own: Sequence[float] | None, other: Sequence[float] | None) -> str:
    """Return a mean difference in points with its standard error, in pairs of the seeds that both have."""
    pairs = [] if own is None or other is None or own is other else list(zip(own, other, strict=False))
    if len(pairs) < 2:
        return ""
    differences = torch.tensor([a - b for a, b in pairs], dtype=torch.float64)
    error = float(differences.std() / len(pairs) ** 0.5)
    return f"{100 * float(differences.mean()):+.2f} ± {100 * error:.2f}"


def spread(interval: Mapping[str, float | None]) -> str:
    """Return a mean in percent and half of its interval."""
    mean, high = interval["mean"], interval["high"]
    assert mean is not None
    return f"{mean:.2%}" + ("" if high is None or high - mean < 5e-5 else f" ± {100 * (high - mean):.2f}")


def main() -> None:
    """Compare, and print."""
    options = _options()
    if not options.show:
        if options.data_root is None or options.weights_dir is None:
            raise SystemExit("give --data-root and --weights-dir, or --show")
        if options.before:
            for name in options.tasks:
                print("\n".join(before(name, options)))
            return
        for name in options.tasks:
            compared(name, options)
            if "seeds" in options.parts:
                repeated(name, options)
            if "few" in options.parts:
                searched(name, options, DEFAULT, "few", options.few)
            if "many" in options.parts:
                searched(name, options, AMCAgent.published(episodes=options.many), "many", options.many)
    print("\n".join(page(options)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="where torchvision's data sets lie")
    parser.add_argument("--weights-dir", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a folder for all searches")
    parser.add_argument("--tasks", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument(
        "--agents", nargs="*", default=list(AGENTS), choices=list(AGENTS), help="uniform and random always"
    )
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, help="besides all agents")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--more-seeds", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--parallel", type=int, default=1, help="searches of the comparison that run together")
    parser.add_argument("--few", type=int, default=40)
    parser.add_argument("--many", type=int, default=400)
    parser.add_argument("--val-images", type=int, default=2000)
    parser.add_argument("--train-images", type=int, default=12_800)
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate of fine-tuning the picks")
    parser.add_argument("--before", type=int, metavar="IMAGES", help="only print what picks reach before fine-tuning")
    parser.add_argument("--show", action="store_true", help="only print what is there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
