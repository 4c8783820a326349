"""The command line: reads options, calls the library, prints. What a command does is elsewhere."""

import contextlib
import dataclasses
import json
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any, final

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table
from torch import nn

import autoprune
from autoprune import bounds, data, devices, export, models, registry
from autoprune.compare import Comparison
from autoprune.cost import count
from autoprune.errors import AutopruneError, ConfigError, RunError, WeightsError
from autoprune.evaluation import Executor, Measurement, Pipeline, Precision, chosen, measure
from autoprune.finaliser import FULL_LR
from autoprune.finetuning import Recipe, train
from autoprune.preparation import Prepared, prepare
from autoprune.progress import Progress, Silent
from autoprune.result import SearchResult, open_run
from autoprune.run import RunFolder
from autoprune.seeds import derive
from autoprune.sensitivity import SPARSITIES, GroupSensitivity, SensitivityReport
from autoprune.sensitivity import analyse as analyse_sensitivity
from autoprune.settings import SearchSettings
from autoprune.structure import Structure
from autoprune.task import Task, load_task
from autoprune.threads import suited_threads

__all__ = ["app", "main", "watching"]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(autoprune.__version__)
        raise typer.Exit


app = typer.Typer(
    help="Find how much to remove from each layer of a trained PyTorch network, prove it, and get the smaller network.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
_out = Console(markup=False, highlight=False)
_err = Console(stderr=True, markup=False, highlight=False)
_INTERRUPTED = 130  # what typer exits with at Ctrl-C
_SETTINGS = (
    "A name may bring settings, such as tpe:warm_start=false (what the analyzer suggests is not tried first) or "
    "evolution:survivors=2:offspring=8; a wrong one is answered with those that the agent has."
)

# -- options that several commands share --------------------------------------------------------------------------

_TASK = "The task"
TaskFile = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="FILE:FUNCTION",
        help="Your own network and data: a function that returns an autoprune.Task.",
        rich_help_panel=_TASK,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help=f"A named network: {', '.join(models.names())}, or torchvision:NAME. For digits the default is resnet8.",
        rich_help_panel=_TASK,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help=f"A named data set: {', '.join(data.names())}. The default, digits, ships with scikit-learn.",
        rich_help_panel=_TASK,
    ),
]
DataRoot = Annotated[
    Path | None, typer.Option(help="The folder that torchvision's data set lies in.", rich_help_panel=_TASK)
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="The trained weights (.safetensors, .pt, .th). Without them a network for digits is trained on the spot.",
        rich_help_panel=_TASK,
    ),
]
Download = Annotated[bool, typer.Option("--download", help="Let torchvision fetch the data.", rich_help_panel=_TASK)]
ValFraction = Annotated[
    float | None,
    typer.Option(
        help="Share of the training samples cut off for validation; by default a tenth, of digits a quarter.",
        rich_help_panel=_TASK,
    ),
]
SplitSeed = Annotated[int, typer.Option(help="Seed of that cut.", rich_help_panel=_TASK)]
Device = Annotated[
    str,
    typer.Option(
        help="Where networks run: cpu, cuda, cuda:1; auto: on the accelerator if there is one, and a --task where its "
        "function leaves it. Not part of what a search is: it may go on elsewhere.",
        rich_help_panel=_TASK,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines, as in a pipe, and fewer of them.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Criterion = Annotated[str, typer.Option(help=f"How elements are ranked: {', '.join(registry.names('criterion'))}.")]
Calibration = Annotated[int, typer.Option(help="Augmented training images that candidates are recovered with.")]
Space = Annotated[
    str, typer.Option(help=f"What has a sparsity of its own: {', '.join(registry.names('search space'))}.")
]
FinetuneSteps = Annotated[int, typer.Option(help="Gradient steps of short fine-tuning for every candidate.")]
Race = Annotated[
    bool,
    typer.Option(
        "--race",
        help="Measure candidates no further that are clearly worse than uniform, or for evolution than their parent.",
    ),
]
MaxSparsity = Annotated[float, typer.Option(help="Highest sparsity of any group.")]
BoundsFile = Annotated[
    Path | None, typer.Option("--bounds", help="A TOML table [groups] that locks or bounds single groups.")
]
Reuse = Annotated[
    Path | None, typer.Option(help="A sensitivity report to start from; its cells are not measured again.")
]
Recover = Annotated[
    str,
    typer.Option(
        help="How candidates are recovered before fine-tuning: reconstructed (layers fitted in closed form) or "
        "recalibrated (batch-norm statistics only)."
    ),
]
MomentsMemory = Annotated[float, typer.Option(help="GB that the moments of the layers' inputs may take.")]
ActivationsMemory = Annotated[
    float, typer.Option(help="GB of the dense network's activations that may be kept while groups are probed.")
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        help="What candidates run in: float32, bfloat16, or auto (the fastest here that agrees with float32). "
        "Final numbers are in float32.",
    ),
]
Units = Annotated[
    str,
    typer.Option(
        help="What may be removed: channels, heads, blocks; and as zeros in place: weights, N:M such as 2:4, tiles "
        "such as 16x16."
    ),
]
Multiple = Annotated[int, typer.Option(help="The channels that stay in a layer are a multiple of this.")]
Normalised = Annotated[
    bool, typer.Option("--normalised", help="Offer groups that a norm such as LayerNorm runs across, too.")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes that evaluate; more than one needs autoprune[ray].")]
RayAddress = Annotated[
    str | None,
    typer.Option(help="A running Ray cluster to find the workers on: auto, or HOST:PORT. By default this machine."),
]
WorkerCpus = Annotated[
    int | None,
    typer.Option(
        min=1, help="Cores, and threads, of a worker; by default a share of this machine's, and 1 with --ray-address."
    ),
]
WorkerGpus = Annotated[
    float | None, typer.Option(help="GPUs of a worker, such as 0.25; by default 1 if the network is on one.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a search.", show_default=False)]


def _source(
    task: str | None,
    model: str | None,
    data_name: str | None,
    data_root: Path | None,
    weights: Path | None,
    download: bool,
    val_fraction: float | None,
    split_seed: int,
) -> dict[str, Any]:
    """Return how the task was named, as it is kept in `config.json`."""
    if task is not None:
        named = {"--model": model, "--data": data_name, "--data-root": data_root, "--weights": weights}
        given = [option for option, value in named.items() if value is not None]
        if given:
            raise ConfigError(f"--task brings network and data; leave out {', '.join(given)}")
        return {"task": _absolute(task)}
    data_name = data_name or "digits"
    model = model or ("resnet8" if data_name == "digits" else None)
    if model is None:
        raise ConfigError(f"no network is named for {data_name}; give --model, for example --model resnet20")
    return {
        "model": model,
        "data": data_name,
        "data_root": None if data_root is None else str(data_root.resolve()),
        "weights": None if weights is None else str(weights.resolve()),
        "download": download,
        "val_fraction": val_fraction,
        "split_seed": split_seed,
    }


def _absolute(task: str) -> str:
    file, colon, function = task.rpartition(":")
    return f"{Path(file).resolve()}{colon}{function}" if colon else task


def _task(source: dict[str, Any], *, device: str, baseline: Path, progress: Progress, trained: bool = True) -> Task:
    """Make the task that a source names; for digits, train its network on the spot where no weights are given."""
    if "task" in source:
        return _placed(load_task(source["task"]), device)
    place = devices.resolve(device)
    options = {key: source[key] for key in ("download", "val_fraction", "split_seed")}
    task = Task.named(source["model"], source["data"], root=source["data_root"], weights=source["weights"], **options)
    task = task.on(place)
    if source["weights"] is not None or not trained:
        return task
    if source["data"] != "digits":
        raise WeightsError(
            f"a search starts from a trained network; give --weights FILE, or make one: "
            f"autoprune train --model {source['model']} --data {source['data']} --out {source['model']}.safetensors"
        )
    if baseline.exists():
        try:
            return Task.named(source["model"], source["data"], weights=baseline, **options).on(place)
        except WeightsError as error:
            raise RunError(
                f"{baseline.parent} holds another search's network; name another folder with --out"
            ) from error
    RunFolder(baseline.parent).create()
    model = _trained(task, epochs=20, lr=0.1, batch_size=64, seed=0, progress=progress)
    task = Task.named(source["model"], source["data"], model=model, **options)
    models.save_weights(model, baseline)
    return task


def _placed(task: Task, device: str) -> Task:
    """Return a user's own task on a device; left where it is, if nobody said."""
    return task if device == devices.AUTO else task.on(devices.resolve(device))


def _trained(task: Task, *, epochs: int, lr: float, batch_size: int, seed: int, progress: Progress) -> Any:
    model = task.fresh_model()
    steps = epochs * max(1, task.n_train // batch_size)
    progress.begin("training", steps)
    recipe = Recipe(lr=lr, batch_size=batch_size)
    batches = task.train_batches(batch_size, derive(seed, "baseline"))

    def step(done: int, loss: float) -> None:
        progress.step(done, f"loss {loss:.3f}")

    cost = count(model, task.example_input).cost
    precision = chosen(task, model, cost).training
    if precision.channels_last:
        model.to(memory_format=torch.channels_last)
    device = task.example_input.device
    placed = precision.placed(batches, device)
    running = partial(precision.running, device)
    with suited_threads(cost.macs):
        train(
            model,
            placed,
            steps,
            recipe=recipe,
            loss=task.loss,
            seed=derive(seed, "baseline"),
            running=running,
            progress=step,
        )
    progress.end()
    return model


def _measured(model: nn.Module, task: Task, fidelity: str) -> Measurement:
    """Measure a network on the validation split, in float32."""
    batches = Precision().placed(task.val_batches(500), task.example_input.device)
    return measure(model, batches, task.metric, task.loss).summary(fidelity)


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# -- commands -----------------------------------------------------------------------------------------------------


@app.command(epilog="Example: `autoprune search --budget 'macs<=50%' --candidates 40 --out runs/digits`")
def search(
    out: Annotated[Path, typer.Option(help="The run folder; a search that was stopped goes on in it.")],
    task: TaskFile = None,
    model: Model = None,
    data_name: Data = None,
    data_root: DataRoot = None,
    weights: Weights = None,
    download: Download = False,
    val_fraction: ValFraction = None,
    split_seed: SplitSeed = 0,
    device: Device = devices.AUTO,
    budget: Annotated[
        str | None, typer.Option(help="Upper limits, such as 'macs<=50%', 'macs<=20M,params<=0.4', 'latency<=5ms'.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Largest tolerated loss of accuracy (0.01 is a point); without a budget: the cheapest within it."
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="What is raised: resource (the accuracy within the budget), or AMC's accuracy-guaranteed reward "
            "-error*log(cost): accuracy (of the MACs), accuracy-params."
        ),
    ] = "resource",
    agent: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"What proposes policies: {', '.join(registry.names('agent'))}. {_SETTINGS}",
        ),
    ] = "surrogate",
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A database for an Optuna agent's trials, such as sqlite:///trials.db or postgresql://HOST/DB; "
            "searches that share a study there learn from each other.",
        ),
    ] = None,
    study: Annotated[str | None, typer.Option(metavar="NAME", help="The study's name in it.")] = None,
    space: Space = "group",
    candidates: Annotated[int, typer.Option(help="Distinct policies that the agent may have evaluated.")] = 60,
    control: Annotated[
        int | None, typer.Option(help="Random policies evaluated as a control; by default a tenth of the candidates.")
    ] = None,
    finetune_steps: FinetuneSteps = 0,
    promote: Annotated[
        str,
        typer.Option(
            help="Share of the candidates that get them, the best, after the search; 1: all, as proposed; auto: "
            "as many as it takes, learnt from some."
        ),
    ] = "1",
    shared_steps: Annotated[
        int,
        typer.Option(
            help="Gradient steps, once and first, that train one set of weights under many policies; all candidates "
            "are cut from it."
        ),
    ] = 0,
    race: Race = False,
    lr: Annotated[float, typer.Option(help="Peak learning rate of short fine-tuning, and of shared steps.")] = 0.01,
    recover: Recover = "reconstructed",
    calibration_images: Calibration = 2000,
    moments_memory: MomentsMemory = 2.0,
    activations_memory: ActivationsMemory = 2.0,
    precision: PrecisionOption = "auto",
    criterion: Criterion = "l1",
    sensitivity: Annotated[
        str, typer.Option(help="Sparsities at which every group is measured first; empty for none.")
    ] = "0.25,0.5,0.75",
    units: Units = "channels,heads",
    multiple: Multiple = 1,
    normalised: Normalised = False,
    max_sparsity: MaxSparsity = 0.9,
    bounds_file: BoundsFile = None,
    reuse: Reuse = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which nothing new is evaluated.")] = None,
    workers: Workers = 1,
    ray_address: RayAddress = None,
    worker_cpus: WorkerCpus = None,
    worker_gpus: WorkerGpus = None,
    seed: Seed = 0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print groups, bounds and the widths of the uniform policy, and evaluate nothing."
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Search layer-wise sparsities, and leave the picked network, the report and every candidate in a folder."""
    settings: dict[str, Any] = {
        "budget": budget,
        "max_drop": max_drop,
        "space": space,
        "candidates": candidates,
        "control": control,
        "finetune_steps": finetune_steps,
        "protocol": protocol,
        "promote": _share(promote),
        "shared_steps": shared_steps,
        "race": race,
        "lr": lr,
        "recover": recover,
        "calibration_images": calibration_images,
        "moments_memory": moments_memory,
        "activations_memory": activations_memory,
        "precision": precision,
        "criterion": criterion,
        "sensitivity": _numbers(sensitivity),
        "units": _names(units),
        "multiple": multiple,
        "normalised": normalised,
        "max_sparsity": max_sparsity,
        "bounds": {} if bounds_file is None else bounds.read_bounds(bounds_file),
        "time_limit": time_limit,
        "seed": seed,
    }
    options = SearchSettings.of({**settings, "agent": agent})  # refuses what is wrong before anything is loaded
    agent_settings = {key: value for key, value in {"storage": storage, "study": study}.items() if value is not None}
    registry.make("agent", agent, agent_settings)
    source = _source(task, model, data_name, data_root, weights, download, val_fraction, split_seed)
    with watching(quiet) as progress:
        work = _task(source, device=device, baseline=RunFolder(out).baseline, progress=progress, trained=not dry_run)
        if dry_run:
            _print_widths(prepare(work, dataclasses.replace(options, shared_steps=0)))
            return
        executor = _executor(workers, ray_address, worker_cpus, worker_gpus)
        places: dict[str, Any] = {"out": out, "progress": progress, "source": source, "executor": executor}
        result = autoprune.search(work, agent=agent, agent_settings=agent_settings, reuse=reuse, **places, **settings)
    _print_result(result)
    if as_json:
        _print_json(result.to_dict())


@app.command(
    epilog="Example: `autoprune compare --agents tpe,tpe:warm_start=false --seeds 3 --candidates 20 "
    "--budget 'macs<=15%' --out runs/compare`"
)
def compare(
    out: Annotated[Path, typer.Option(help="The folder; a comparison that was stopped goes on in it.")],
    budget: Annotated[str, typer.Option(help="Upper limits within which every agent picks, such as 'macs<=50%'.")],
    agents: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help=f"Some of {', '.join(registry.names('agent'))}; uniform and random are always among them. {_SETTINGS} "
            "Agents that differ in settings alone can be compared.",
        ),
    ] = "surrogate",
    seeds: Annotated[int, typer.Option(help="Searches of each agent, with the agent's seeds 0, 1, ...")] = 5,
    finalize: Annotated[
        int | None,
        typer.Option(help="Fine-tune every pick for so many epochs, then read the test set once, for all of them."),
    ] = None,
    finalize_lr: Annotated[float, typer.Option(help="Peak learning rate of that.")] = FULL_LR,
    task: TaskFile = None,
    model: Model = None,
    data_name: Data = None,
    data_root: DataRoot = None,
    weights: Weights = None,
    download: Download = False,
    val_fraction: ValFraction = None,
    split_seed: SplitSeed = 0,
    device: Device = devices.AUTO,
    space: Space = "group",
    candidates: Annotated[int, typer.Option(help="Distinct policies that each agent may have evaluated.")] = 60,
    control: Annotated[
        int | None, typer.Option(help="Random policies beside each search, the same for all; by default a tenth.")
    ] = None,
    finetune_steps: FinetuneSteps = 0,
    race: Race = False,
    lr: Annotated[float, typer.Option(help="Peak learning rate of short fine-tuning.")] = 0.01,
    recover: Recover = "reconstructed",
    calibration_images: Calibration = 2000,
    moments_memory: MomentsMemory = 2.0,
    activations_memory: ActivationsMemory = 2.0,
    precision: PrecisionOption = "auto",
    criterion: Criterion = "l1",
    sensitivity: Annotated[
        str, typer.Option(help="Sparsities at which every group is measured, once for all; empty for none.")
    ] = "0.25,0.5,0.75",
    units: Units = "channels,heads",
    multiple: Multiple = 1,
    normalised: Normalised = False,
    max_sparsity: MaxSparsity = 0.9,
    bounds_file: BoundsFile = None,
    reuse: Reuse = None,
    workers: Workers = 1,
    ray_address: RayAddress = None,
    worker_cpus: WorkerCpus = None,
    worker_gpus: WorkerGpus = None,
    parallel: Annotated[
        int, typer.Option(min=1, help="Searches that run together, each in a process with its share of the cores.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the task, the same for all: what a policy measures.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Search with several agents and seeds at equal evaluations, and say which differences are larger than the noise.

    One search after another, whose candidates --workers evaluates, or --parallel searches together. What is the same
    for all is measured once.
    """
    settings: dict[str, Any] = {
        "budget": budget,
        "space": space,
        "candidates": candidates,
        "control": control,
        "finetune_steps": finetune_steps,
        "race": race,
        "lr": lr,
        "recover": recover,
        "calibration_images": calibration_images,
        "moments_memory": moments_memory,
        "activations_memory": activations_memory,
        "precision": precision,
        "criterion": criterion,
        "sensitivity": _numbers(sensitivity),
        "units": _names(units),
        "multiple": multiple,
        "normalised": normalised,
        "max_sparsity": max_sparsity,
        "bounds": {} if bounds_file is None else bounds.read_bounds(bounds_file),
        "seed": seed,
    }
    SearchSettings.of(settings)  # refuses what is wrong before anything is loaded
    for agent in _names(agents):
        registry.make("agent", agent)
    source = _source(task, model, data_name, data_root, weights, download, val_fraction, split_seed)
    with watching(quiet) as progress:
        result = autoprune.compare(
            _task(source, device=device, baseline=RunFolder(out).baseline, progress=progress),
            out=out,
            agents=_names(agents),
            seeds=seeds,
            finalize=finalize,
            finalize_lr=finalize_lr,
            progress=progress,
            source=source,
            reuse=reuse,
            executor=_executor(workers, ray_address, worker_cpus, worker_gpus),
            parallel=parallel,
            **settings,
        )
    _print_comparison(result)
    if as_json:
        _print_json(result.to_dict())


@app.command(epilog="Example: `autoprune sensitivity --out sensitivity.json`")
def sensitivity(
    out: Annotated[Path, typer.Option(help="The report's file; cells that it holds are not measured again.")],
    task: TaskFile = None,
    model: Model = None,
    data_name: Data = None,
    data_root: DataRoot = None,
    weights: Weights = None,
    download: Download = False,
    val_fraction: ValFraction = None,
    split_seed: SplitSeed = 0,
    device: Device = devices.AUTO,
    sparsities: Annotated[str, typer.Option(help="The grid, in (0, 1).")] = ",".join(map(str, SPARSITIES)),
    criterion: Criterion = "l1",
    units: Units = "channels,heads",
    multiple: Multiple = 1,
    normalised: Normalised = False,
    recover: Recover = "reconstructed",
    calibration_images: Calibration = 2000,
    moments_memory: MomentsMemory = 2.0,
    activations_memory: ActivationsMemory = 2.0,
    precision: PrecisionOption = "auto",
    analytic: Annotated[
        bool, typer.Option("--analytic", help="Predict the curves from moments alone, in seconds, and measure nothing.")
    ] = False,
    shard: Annotated[
        str, typer.Option(help="i/n: measure every n-th cell from the i-th; merge the files afterwards.")
    ] = "1/1",
    merge: Annotated[
        list[Path] | None, typer.Option(help="Files to merge into --out, instead of measuring; repeat it.")
    ] = None,
    workers: Workers = 1,
    ray_address: RayAddress = None,
    worker_cpus: WorkerCpus = None,
    worker_gpus: WorkerGpus = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure each group alone at several sparsities, the others dense; or predict that."""
    if merge:
        report = SensitivityReport.load(merge[0])
        for file in merge[1:]:
            report = report.merge(SensitivityReport.load(file))
        RunFolder(out.parent).create()
        report.save(out)
    else:
        if precision == "auto" and out.exists():  # its cells have one, which the clock must not choose anew
            precision = SensitivityReport.load(out).settings.get("precision", precision)
        settings = SearchSettings(
            criterion=criterion,
            units=_names(units),
            multiple=multiple,
            normalised=normalised,
            recover=recover,
            calibration_images=calibration_images,
            moments_memory=moments_memory,
            activations_memory=activations_memory,
            precision=precision,
            seed=seed,
        )
        source = _source(task, model, data_name, data_root, weights, download, val_fraction, split_seed)
        RunFolder(out.parent).create()
        with watching(quiet) as progress:
            baseline = out.with_suffix(".baseline.safetensors")
            work = _task(source, device=device, baseline=baseline, progress=progress)
            prepared = prepare(work, settings)
            grid = () if analytic else _numbers(sparsities)
            executor = _executor(workers, ray_address, worker_cpus, worker_gpus) if grid else None
            for note in prepared.bench.notes:
                progress.line(note)
            progress.begin("sensitivity", len(prepared.structure) * len(grid))
            with contextlib.ExitStack() as stack:
                if executor is not None:
                    stack.callback(executor.close)
                    executor.start(Pipeline(prepared.bench, settings.recovery, seed))
                report = analyse_sensitivity(
                    prepared.bench,
                    prepared.costs,
                    out,
                    sparsities=grid,
                    settings=settings.measured_with,
                    evidence=prepared.evidence,
                    predicted=prepared.analytic(),
                    shard=_shard(shard),
                    workers=executor,
                    progress=lambda group, done, _: progress.step(done, group),
                )
            progress.end()
            if report.work:
                progress.line(report.work)
    _print_sensitivity(report)
    _out.print(f"report: {out}")
    if as_json:
        _print_json(report.to_dict())


@app.command(epilog="Example: `autoprune pick runs/digits --max-drop 0.02`")
def pick(
    run: Run,
    max_drop: Annotated[float | None, typer.Option(help="The cheapest candidate that loses no more accuracy.")] = None,
    budget: Annotated[str | None, typer.Option(help="The most accurate candidate within these limits.")] = None,
    device: Device = devices.AUTO,
    as_json: Json = False,
) -> None:
    """Pick another candidate of a finished search, and save its network to RUN/pruned."""
    result = _reopened(run, device)
    result.choose(result.pick(max_drop=max_drop, budget=budget))
    _print_result(result)
    if as_json:
        _print_json(result.to_dict())


@app.command(epilog="Example: `autoprune finalize runs/digits --epochs 10`")
def finalize(
    run: Run,
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 10,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = FULL_LR,
    device: Device = devices.AUTO,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune the picked network fully, read the test set once, and save the network to RUN/pruned."""
    with watching(quiet) as progress:
        result = _reopened(run, device)
        progress.begin(f"fine-tuning for {epochs} epochs", 0)
        network = result.finalize(epochs, lr=lr, progress=lambda done, loss: progress.step(done, f"loss {loss:.3f}"))
        progress.end()
    final = RunFolder(run).read(RunFolder(run).final)
    table = Table("", "validation", "test", box=None, pad_edge=False)
    test, dense_test = (final.get(key, {}).get("accuracy") for key in ("test", "dense_test"))
    table.add_row("dense", f"{result.dense['accuracy']:.2%}", "-" if dense_test is None else f"{dense_test:.2%}")
    table.add_row("pruned", f"{network.accuracy:.2%}", "-" if test is None else f"{test:.2%}")
    _out.print(table)
    _out.print(f"network: {RunFolder(run).pruned}\nreport:  {RunFolder(run).report}", soft_wrap=True)
    if as_json:
        _print_json(final)


@app.command(epilog="Example: `autoprune report runs/digits`")
def report(run: Run) -> None:
    """Write RUN/report.html anew from the files of the run; of a comparison, compare.html."""
    from autoprune.report import write_comparison, write_report  # loads plotly

    compared = (run / "compare.json").exists()
    _out.print(f"report: {write_comparison(run) if compared else write_report(run)}", soft_wrap=True)


@app.command(epilog="Example: `autoprune evaluate runs/digits/pruned --data digits`")
def evaluate(
    pruned: Annotated[
        Path, typer.Argument(metavar="PRUNED", help="A saved network, such as RUN/pruned.", show_default=False)
    ],
    task: TaskFile = None,
    data_name: Data = None,
    data_root: DataRoot = None,
    download: Download = False,
    val_fraction: ValFraction = None,
    split_seed: Annotated[
        int | None, typer.Option(help="Seed of that cut; by default the one recorded.", rich_help_panel=_TASK)
    ] = None,
    device: Device = devices.AUTO,
    as_json: Json = False,
) -> None:
    """Load a saved network and measure it on the validation split, beside what was recorded when it was saved."""
    recipe = export.recipe_of(pruned)
    split = recipe["measured"].get("val_cut_from_train") or {}
    if task is None and recipe["model"] is None:
        raise ConfigError(
            f"{pruned} holds a {recipe['class']}; give the function that makes its task: --task FILE:FUNCTION"
        )
    if task is not None:
        work = _placed(load_task(task), device)
        model = autoprune.load(pruned, build=work.fresh_model).to(work.example_input.device)
    else:
        model = autoprune.load(pruned)
        name = recipe["model"]["name"]
        work = Task.named(
            name,
            data_name or "digits",
            root=data_root,
            download=download,
            val_fraction=split.get("fraction") if val_fraction is None else val_fraction,
            split_seed=split.get("seed", 0) if split_seed is None else split_seed,
            model=model,
        ).on(devices.resolve(device))
        model = work.fresh_model()
    started = time.perf_counter()
    found = _measured(model, work, "loaded")
    seconds = time.perf_counter() - started
    recorded = recipe["measured"]
    _out.print(
        f"accuracy {found.accuracy:.4f} ± {found.accuracy_se:.4f} on {work.n_val} samples in {seconds:.1f} s\n"
        f"recorded {recorded['accuracy']:.4f} ({recorded['fidelity']}); "
        f"{recorded['macs']:,} MACs, {recorded['params']:,} parameters"
    )
    if as_json:
        _print_json(
            {
                "accuracy": found.accuracy,
                "accuracy_se": found.accuracy_se,
                "loss": found.loss,
                "recorded": recorded["accuracy"],
            }
        )


@app.command(
    "train", epilog="Example: `autoprune train --model lenet-5 --data digits --epochs 10 --out lenet.safetensors`"
)
def train_command(
    out: Annotated[Path, typer.Option(help="Where the weights go (.safetensors).")],
    model: Model = None,
    data_name: Data = None,
    data_root: DataRoot = None,
    weights: Annotated[Path | None, typer.Option(help="Weights to start from.", rich_help_panel=_TASK)] = None,
    download: Download = False,
    val_fraction: ValFraction = None,
    split_seed: SplitSeed = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 20,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Samples a step.")] = 128,
    device: Device = devices.AUTO,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Train a dense baseline, on the training split without the validation samples."""
    source = _source(None, model, data_name, data_root, weights, download, val_fraction, split_seed)
    if epochs < 1 or batch_size < 1 or not lr > 0:
        raise ConfigError(
            f"`epochs >= 1`, `batch_size >= 1` and `lr > 0` must hold, but got {epochs}, {batch_size} and {lr}"
        )
    RunFolder(out.parent).create()
    options = {key: source[key] for key in ("weights", "download", "val_fraction", "split_seed")}
    with watching(quiet) as progress:
        task = Task.named(source["model"], source["data"], root=source["data_root"], **options)
        task = task.on(devices.resolve(device))
        network = _trained(task, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed, progress=progress)
    models.save_weights(network, out)
    found = _measured(network, task, "dense")
    _out.print(
        f"accuracy {found.accuracy:.4f} ± {found.accuracy_se:.4f} on {task.n_val} validation samples\nweights: {out}",
        soft_wrap=True,
    )


# -- reading ------------------------------------------------------------------------------------------------------


def _executor(workers: int, address: str | None, cpus: int | None, gpus: float | None) -> Executor | None:
    """Return what evaluates candidates; None for this process."""
    if workers == 1 and address is None:
        if cpus is not None or gpus is not None:
            raise ConfigError("--worker-cpus and --worker-gpus are a worker's; add --workers or --ray-address")
        return None
    try:
        from autoprune.evaluation.ray import RayExecutor
    except ModuleNotFoundError as error:
        raise ConfigError('workers need Ray; install with: pip install "autoprune[ray]"') from error
    return RayExecutor(workers, address=address, cpus=cpus, gpus=gpus)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"can't read {text!r} as numbers separated by commas, such as 0.25,0.5,0.75") from error


def _share(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ConfigError(f"a shard is written i/n, such as 1/4, but got {text!r}")
    return int(index) - 1, int(count)


def _reopened(run: Path, device: str) -> SearchResult:
    folder = RunFolder(run)
    source = folder.read(folder.config)["source"]
    if source is None:
        raise RunError(f"{run} was searched from Python objects; open it there: autoprune.open_run({str(run)!r}, task)")
    return open_run(run, _task(source, device=device, baseline=folder.baseline, progress=Silent()))


# -- showing ------------------------------------------------------------------------------------------------------


@final
class _Lines:
    """Plain lines on standard error; quietly, only those that matter."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._stage, self._total, self._shown = "", 0, 0.0

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def line(self, text: str) -> None:
        _err.print(text, soft_wrap=True, markup=False, highlight=False)

    def begin(self, stage: str, total: int) -> None:
        self._stage, self._total, self._shown = stage, total, time.monotonic()
        self.line(f"{stage} ({total} steps)" if total else stage)

    def step(self, done: int, text: str) -> None:
        if not self._quiet and time.monotonic() - self._shown >= 2:
            self._shown = time.monotonic()
            self.line(f"{self._stage} {done}{f'/{self._total}' if self._total else ''}: {text}")

    def end(self) -> None:
        pass


@final
class _Bar:
    """A progress bar on a terminal."""

    def __init__(self) -> None:
        fixed = [
            TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=11)),
            BarColumn(bar_width=12, table_column=Column(min_width=12)),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=5)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        ]
        said = TextColumn("{task.fields[said]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        self._bar = RichProgress(*fixed, said, console=_err)
        self._task: Any = None

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def line(self, text: str) -> None:
        self._bar.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def begin(self, stage: str, total: int) -> None:
        self._task = self._bar.add_task(stage, total=total or None, said="")

    def step(self, done: int, text: str) -> None:
        self._bar.update(self._task, completed=done, said=text)

    def end(self) -> None:
        task = next(t for t in self._bar.tasks if t.id == self._task)
        self._bar.update(self._task, completed=task.total or task.completed, total=task.total or task.completed)


def watching(quiet: bool) -> _Lines | _Bar:
    """Return a context that shows progress on standard error: a bar on a terminal, else lines."""
    return _Bar() if _err.is_terminal and not quiet else _Lines(quiet)


def _print_result(result: SearchResult) -> None:
    summary, folder = result.summary, RunFolder(result.run)
    dense, picked = summary["dense"], summary["picked"]
    masked = picked["nonzero_params"] < picked["params"]
    timed = "latency_ms" in picked
    more = (["not zero"] if masked else []) + (["predicted"] if timed else [])
    table = Table("", "accuracy", "MACs", "of dense", "parameters", "of dense", *more, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [
        ("dense", dense),
        ("uniform at this cost", summary["uniform"]),
        (f"best of {summary['random']['size']} random", summary["random"]["best"]),
    ]
    for name, row in [*rows, ("picked", picked)]:
        if row is not None:
            table.add_row(
                name,
                f"{row['accuracy']:.2%} ± {row['accuracy_se']:.2%}",
                f"{row['macs']:,}",
                f"{row['macs'] / dense['macs']:.1%}",
                f"{row['params']:,}",
                f"{row['params'] / dense['params']:.1%}",
                *([f"{row['nonzero_params'] / dense['params']:.1%}"] if masked else []),
                *([f"{row['latency_ms']:.3g} ms"] if timed else []),
            )
    _out.print(table)
    if masked:
        _out.print("zeros in place bring no speed-up in dense execution")
    time = {name: one["median_ms"] for name, one in summary["latency"].items()}
    _out.print(f"measured here: {time['picked']:.3g} ms a sample, dense {time['dense']:.3g} ms", highlight=False)
    _out.print(
        f"picked: {picked['rule']}, of {summary['evaluations']} evaluated in {summary['seconds']:.0f} s; "
        f"recovery: {picked['fidelity']}",
        highlight=False,
    )
    places = {"network": folder.pruned, "report": folder.report, "ledger": folder.ledger}
    if folder.tracking.exists():
        places["tracked"] = folder.read(folder.tracking)["location"]
    for name, place in places.items():
        _out.print(f"{name + ':':<9}{place}", soft_wrap=True, highlight=False)


def _print_comparison(result: Comparison) -> None:
    rows = result.document["table"]
    table = Table("", "picked, %", "hypervolume", "to 99 %", "evaluations", "seconds", box=None, pad_edge=False)
    tuned = Table("", "fine-tuned, %", "test, %", box=None, pad_edge=False)
    for column in (*table.columns[1:], *tuned.columns[1:]):
        column.justify = "right"
    for one in (table, tuned):
        one.columns[0].no_wrap = True  # names that bring settings are long
    for row in rows:
        table.add_row(
            row["agent"],
            _spread(row["accuracy"], 100, 2),
            _spread(row["hypervolume"], 1, 3),
            *(f"{row[name]['mean']:.0f}" for name in ("evaluations_to_99", "evaluations", "seconds")),
        )
        if "finetuned" in row:
            finals = [_spread(row[name], 100, 2) if name in row else "-" for name in ("finetuned", "test")]
            tuned.add_row(row["agent"], *finals)
    _out.print(table)
    if tuned.row_count:
        _out.print(tuned)
    for word in result.document["words"]:
        _out.print(word, soft_wrap=True)
    _out.print(f"page: {result.out / 'compare.html'}", soft_wrap=True)


def _spread(interval: dict[str, Any], scale: float, digits: int) -> str:
    """Return a mean over seeds, and how far its interval of 95 % goes to either side."""
    mean, high = (None if interval[key] is None else scale * interval[key] for key in ("mean", "high"))
    return f"{mean:.{digits}f}" + ("" if high is None or mean is None else f" ± {high - mean:.{digits}f}")


def _print_sensitivity(report: SensitivityReport) -> None:
    measured = sorted({round(c.sparsity, 2) for g in report.groups for c in g.cells})
    grid = measured if len(measured) <= 9 else list(SPARSITIES)
    table = Table("group", "size", *(f"{s:.0%}" for s in grid), box=None, pad_edge=False)
    for group in (g for g in report.groups if g.cells):
        table.add_row(group.name, str(group.size), *(_nearest(group, s) for s in grid))
    _out.print(f"accuracy of the dense network: {report.dense.accuracy:.2%} ± {report.dense.accuracy_se:.2%}")
    if any(g.cells for g in report.groups):
        _out.print(table)
    if any(g.predicted for g in report.groups):
        _out.print("predicted share of the network's output that is lost, when so much of a group goes")
        _out.print(_predicted_table(report))
    for group in (g for g in report.groups if not g.prunable):
        _out.print(f"locked: {group.name} ({group.reason})", highlight=False)


def _predicted_table(report: SensitivityReport) -> Table:
    grid = (0.1, 0.25, 0.5, 0.75, 0.9)
    table = Table("group", "size", *(f"{s:.0%}" for s in grid), box=None, pad_edge=False)
    for group in (g for g in report.groups if g.predicted):
        counts, losses = zip(*group.predicted, strict=True)
        shares = np.interp([s * group.size for s in grid], counts, losses)
        table.add_row(group.name, str(group.size), *(f"{share:.1%}" for share in shares))
    return table


def _nearest(group: GroupSensitivity, sparsity: float) -> str:
    """Return the accuracy of the cell that rounding to whole elements made of a sparsity, if it was measured."""
    cell = min(group.cells, key=lambda cell: abs(cell.sparsity - sparsity))
    return f"{cell.accuracy:.1%}" if abs(cell.sparsity - sparsity) <= 0.5 / group.size + 0.005 else ""


def _print_widths(prepared: Prepared) -> None:
    structure: Structure = prepared.structure
    feasible = prepared.feasible
    uniform = feasible.project(feasible.lower / feasible.sizes)
    table = Table("group", "dense", "smallest", "largest", "uniform at the budget", "layers", box=None, pad_edge=False)
    for group, low, high, removed in zip(structure, feasible.lower, feasible.upper, uniform, strict=True):
        widths = (group.size, group.size - high, group.size - low, group.size - removed)
        table.add_row(group.name, *map(str, widths), str(len(group.layers)))
    _out.print(table)
    for locked in structure.locked:
        _out.print(f"locked: {locked.name} ({locked.reason})", highlight=False)
    for given_up in structure.given_up:
        _out.print(f"given up: {given_up}", highlight=False)
    cost = prepared.costs.cost(uniform)
    _out.print(f"uniform: {cost.macs:,} MACs, {cost.params:,} parameters", highlight=False)


def _print_json(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _err.print(f"warning: {message}", soft_wrap=True, markup=False, highlight=False)


def main() -> None:
    """Run the command line; an error that the user can mend is one line, without a traceback."""
    warnings.showwarning = _one_line_warning
    try:
        app()
    except AutopruneError as error:
        _err.print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
        sys.exit(2)
    except SystemExit as leaving:
        if leaving.code == _INTERRUPTED:
            goes_on = sys.argv[1:2] in (["search"], ["compare"], ["sensitivity"])
            hint = "; what was measured is on disk, and the same command goes on from there" if goes_on else ""
            _err.print(f"stopped{hint}", soft_wrap=True)
        raise
