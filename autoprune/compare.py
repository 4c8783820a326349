"""The comparison: several agents on one task, each with the same number of evaluations, over several seeds.

Every agent and seed is an ordinary search in a folder of its own. What is the same for all is measured once: groups one
by one, moments, the precision, which count as nobody's evaluations; and each policy that more than one search asks for
(in a race, against one rival), which counts for every one of them. The searches run one after another and share one
executor, whose workers evaluate candidates of one search at a time; or several run together, once the first has left
what all share, each in a process that evaluates its own.
"""

import copy
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from autoprune import registry
from autoprune.cost import Cost
from autoprune.devices import nearest
from autoprune.errors import ConfigError, RunError, TaskError
from autoprune.evaluation import Candidate, Executor, InProcess, Ledger, Once, Outcome, outcomes
from autoprune.export import load
from autoprune.finaliser import FULL_LR, read_test
from autoprune.pareto import pick
from autoprune.progress import Progress, Silent
from autoprune.result import dense_as_searched, measured, open_run, pickable, record_of, render
from autoprune.run import FORMAT, RunFolder, write_json
from autoprune.search import identity_of, search, versions
from autoprune.sensitivity import SensitivityReport
from autoprune.settings import SearchSettings
from autoprune.standings import RANDOM, Standings, Trace, standings
from autoprune.task import Task
from autoprune.tracking import NullTracker

__all__ = ["Comparison", "compare"]

BASELINES = ("uniform", RANDOM)
"""Agents that are always compared."""
_OWN = ("agent", "agent_seed")  # settings that the comparison makes
_UNEQUAL = {
    "max_drop": "agents are compared by their accuracy within a budget",
    "time_limit": "agents are compared at equal evaluations, whatever time they take",
    "protocol": "agents are compared by their accuracy within a budget",
}
_SHARED = ("sensitivity", "precision", "latency", "moments", "shared", "shared_moments", "baseline")


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What a comparison found.

    Attributes:
        out: Its folder; `out/AGENT/SEED` is the run of a search.
        standings: Tables, differences and words.
        document: The contents of `compare.json`.
    """

    out: Path
    standings: Standings
    document: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the result in short, as `autoprune compare --json` prints it."""
        keys = ("evaluations", "seeds", "evaluated", "dense", "table", "differences", "words")
        return {key: self.document[key] for key in keys} | {"out": str(self.out)}


def compare(
    task: Task,
    *,
    out: str | Path,
    agents: Sequence[Any] | Mapping[str, Any] = ("surrogate",),
    seeds: int = 5,
    finalize: int | None = None,
    finalize_lr: float = FULL_LR,
    progress: Progress | None = None,
    source: Mapping[str, Any] | None = None,
    reuse: str | Path | None = None,
    executor: Executor | None = None,
    parallel: int = 1,
    **settings: Any,
) -> Comparison:
    """Search with several agents and seeds, and say how they stand, and which differences are larger than the noise.

    Called again with the same arguments, it goes on where it stopped; with more agents or seeds, it searches those that
    are missing.

    Args:
        task: Network, data and measures.
        out: The folder; made if it is not there.
        agents: Names, also with settings, as in `"tpe:warm_start=false"`, or agents, or a name for each agent. Uniform
            and random are always among them. Each search has a copy of its agent, as it was handed in.
        seeds: How many; agents draw from the seeds 0, 1, …, while the task's own seed, `seed`, is the same for all:
            what becomes of a policy does not depend on who proposes it, but in a race on the rival that is named.
        finalize: Epochs of full fine-tuning that each agent's pick gets, after which the test set is read, once, for
            all of them; None for neither.
        finalize_lr: Peak learning rate of that.
        progress: Who watches.
        source: How the command line made the task.
        reuse: A sensitivity report of the same network and data.
        executor: Where candidates are evaluated, as for `autoprune.search`. How many are under way together is part of
            what the searches are, and stays as it was when the comparison began.
        parallel: Searches, and later picks that are fine-tuned, that run together, each in a process of its own with an
            equal share of the threads and all of the data in memory. What they find is what they find one after
            another, but for what rounding with fewer threads changes, and for seconds, which are of a busy machine. A
            policy that two of them propose while both run is evaluated twice, and counted as it always is. Not together
            with an `executor`.
        settings: The fields of `SearchSettings`: `budget`, `candidates`, `seed`, ...; the agents' picks are the most
            accurate of their proposals within the budget, so there must be one.

    Raises:
        ConfigError: A setting is wrong, or makes agents unequal.
        InfeasibleBudgetError: No policy meets the budget.
        RunError: The folder holds another comparison, or was finalised otherwise.
        TestSetError: The test set was read before.
        ExecutorError: A process died, or the task can't be sent to one.
    """
    options = _options(settings)
    if parallel < 1 or (parallel > 1 and executor is not None):
        raise ConfigError(
            f"`parallel >= 1` must hold, and be 1 with an `executor`, but got parallel={parallel}: either searches run "
            "together, or candidates of one search do"
        )
    if seeds < 1:
        raise ConfigError(f"`seeds >= 1` must hold, but got seeds={seeds}")
    if finalize is not None and (finalize < 1 or not finalize_lr > 0):
        raise ConfigError(
            f"`finalize >= 1` and `finalize_lr > 0` must hold, but got finalize={finalize}, finalize_lr={finalize_lr}"
        )
    contestants = _contestants(agents, seeds, race=options.race)
    watcher = progress or Silent()
    folder = RunFolder(out)
    runs = InProcess() if executor is None else executor
    described = task.describe()
    common = {key: value for key, value in options.to_dict().items() if key not in _OWN}
    config = {
        "format": FORMAT,
        "task": described,
        "digest": task.digest(),
        "measures": {key: described[key] for key in ("augment", "metric", "loss")},
        "search": common,
        "parallel": {"at_once": runs.at_once},
        "source": None if source is None else dict(source),
        "versions": versions(),
    }
    folder.claim(config, ("digest", "measures", "search"))
    at_once = folder.read(folder.config)["parallel"]["at_once"]
    plan = _Plan(task, folder.path, contestants, seeds, settings, source, reuse, at_once)
    told = _Told(watcher, len(plan.runs), 1 + options.control_size + options.candidates)
    begun = any(run.finished for run in plan.runs)
    left = [number for number, run in enumerate(plan.runs) if not run.finished][0 if begun else 1 :]
    work = _packed(_search_apart, plan) if parallel > 1 and left else None  # before an agent has learnt anything
    in_turn = plan.runs if parallel == 1 else plan.runs[: 0 if begun else 1]  # the first leaves what all share
    once = Once(runs, _known(folder), at_once)
    try:
        for number, run in enumerate(in_turn):
            told.turn(number, f"{run.agent}, seed {run.seed}")
            if not run.finished:
                _search(plan, run, once, told)
            _share(run.folder, folder)
        if work is not None:
            _search_together(plan, work, left, parallel, told)
    finally:
        once.stop()
        told.over()
    if finalize is not None:
        _finalize(plan, finalize, finalize_lr, watcher, parallel)
    return _concluded(folder, task, common, plan.runs, options)


# -- who is compared ------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """One search."""

    agent: str
    seed: int
    proposer: Any  # a registered name, or an agent
    folder: RunFolder

    @property
    def finished(self) -> bool:
        """Whether the search is done.

        Raises:
            RunError: It is one of another agent.
        """
        if not self.folder.result.exists():
            return False
        there = self.folder.read(self.folder.config)["agent"]
        mine = json.loads(json.dumps(identity_of(_made(self.proposer))))
        if there != mine:
            raise RunError(
                f"{self.folder.path} holds a search of {there}, not of {mine}; name another folder with --out"
            )
        return True

    @property
    def proposed(self) -> list[Candidate]:
        """What the agent proposed, in that order."""
        ledger = Ledger(self.folder.ledger)
        found = [ledger.get(identity) for identity in self.folder.read(self.folder.result)["proposed"]]
        return [candidate for candidate in found if candidate is not None]

    def pick(self, fits: Callable[[Candidate], bool]) -> Candidate:
        """Return the best of what the agent proposed.

        Raises:
            TaskError: None of it could be measured.
        """
        own = pickable(filter(fits, self.proposed))
        if not own:
            raise TaskError(f"nothing that {self.agent} proposed with seed {self.seed} could be measured: no pick")
        return pick(own, fits=fits)[0]


@final
class _Plan:
    """What is searched, and how: all that a process needs of a comparison.

    Args:
        task: Network, data and measures.
        out: The comparison's folder.
        contestants: The agents by name.
        seeds: How many.
        settings: Of all searches.
        source: How the command line made the task.
        reuse: A sensitivity report.
        at_once: Candidates of a search that are under way together.

    Attributes:
        runs: The searches, in the order in which they are begun.
        device: Where the network is.
    """

    def __init__(
        self,
        task: Task,
        out: Path,
        contestants: Mapping[str, Any],
        seeds: int,
        settings: Mapping[str, Any],
        source: Mapping[str, Any] | None,
        reuse: str | Path | None,
        at_once: int,
    ) -> None:
        self.task, self.out = task, out
        self.settings, self.source, self.reuse, self.at_once = dict(settings), source, reuse, at_once
        self.device = task.example_input.device
        self.runs = [
            _Run(name, seed, agent, RunFolder(out / _folder_name(name) / str(seed)))
            for seed in range(seeds)
            for name, agent in contestants.items()
        ]

    def to_send(self) -> "_Plan":
        """Return a plan for another process: nothing of it is on an accelerator."""
        sent = copy.copy(self)
        sent.task = self.task.on("cpu")
        return sent

    def without_agents(self) -> "_Plan":
        """Return a plan of which nothing is searched any more: what agents have learnt is not to be sent."""
        done = copy.copy(self)
        done.runs = [dataclasses.replace(run, proposer=run.agent) for run in self.runs]
        return done

    def task_here(self) -> Task:
        """Return the task on its device, or on the nearest that there is where the plan was sent to."""
        return self.task.on(nearest(self.device))


def _options(settings: Mapping[str, Any]) -> SearchSettings:
    """Return the settings that all searches have in common, and refuse what would make them unequal."""
    for name in _OWN:
        if name in settings:
            raise ConfigError(f"`{name}` is what is compared; give `agents` and `seeds`")
    plain = SearchSettings()
    for name, reason in _UNEQUAL.items():
        if name in settings and settings[name] != getattr(plain, name):
            raise ConfigError(f"leave out `{name}`: {reason}")
    options = SearchSettings.of({**settings, "agent": RANDOM})
    if options.budget is None:
        raise ConfigError("a comparison needs a budget, such as macs<=50%, within which agents pick")
    if options.promote != 1:
        raise ConfigError("leave out `promote`: agents are compared at one fidelity; their picks can be finalised")
    return options


def _contestants(agents: Sequence[Any] | Mapping[str, Any], seeds: int, *, race: bool) -> dict[str, Any]:
    """Return the agents by name, with the baselines at the end."""
    if isinstance(agents, str):
        raise ConfigError(f"`agents` must be a list of agents, but got {agents!r}")
    named = agents.items() if isinstance(agents, Mapping) else ((_name_of(agent), agent) for agent in agents)
    found: dict[str, Any] = {}
    for name, agent in [*named, *((name, name) for name in BASELINES)]:
        if name in BASELINES and name in found:
            continue
        if name in found or _folder_name(name) in map(_folder_name, found):
            raise ConfigError(f"agent '{name}' is given twice; give each a name of its own: agents={{name: agent}}")
        made = _made(agent)
        if isinstance(made, type) or not hasattr(made, "run") or not hasattr(made, "objectives"):
            raise ConfigError(
                f"an agent is a name or an object with `objectives` and `run(env, *, seed)`, but got {agent!r}"
            )
        if race and made.objectives == "several":
            raise ConfigError(f"`race` compares at one cost, but {name} trades accuracy for cost; leave one out")
        if seeds > 1 and getattr(made, "ignores_seed", False):
            raise ConfigError(
                f"{name} has a seed of its own, so that {seeds} seeds would be {seeds} times the same search; hand in "
                "what makes its sampler from a seed, or compare with one seed"
            )
        try:
            copy.deepcopy(agent)
        except Exception as error:
            raise ConfigError(f"each search has a copy of its agent, but {name} can't be copied: {error}") from error
        found[name] = agent
    return found


def _made(agent: Any) -> Any:
    return registry.make("agent", agent) if isinstance(agent, str) else agent


def _name_of(agent: Any) -> str:
    return registry.spelt("agent", agent) if isinstance(agent, str) else type(agent).__name__


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.+=-]+", "-", name)


# -- searches -------------------------------------------------------------------------------------------------------


def _search(plan: _Plan, run: _Run, executor: Executor, progress: Progress) -> None:
    """Search with one agent and seed, or go on with it."""
    _share(RunFolder(plan.out), run.folder)
    search(
        plan.task_here(),
        out=run.folder.path,
        agent=copy.deepcopy(run.proposer),  # what one search learns is not for the next
        tracker=NullTracker(),
        progress=progress,
        source=plan.source,
        reuse=plan.reuse,
        executor=executor,
        agent_seed=run.seed,
        **plan.settings,
    )


def _search_together(plan: _Plan, work: bytes, left: Sequence[int], parallel: int, told: "_Told") -> None:
    """Do the searches that are left, several at a time."""
    for run in plan.runs:
        if run.finished:
            _share(run.folder, RunFolder(plan.out))
    told.together(min(parallel, len(left)), [run.folder for run in plan.runs])
    _apart(work, left, parallel, told.look)


def _search_apart(plan: _Plan, number: int) -> None:
    """Do one of the searches, in a process of its own."""
    once = Once(InProcess(), _known(RunFolder(plan.out)), plan.at_once)
    _search(plan, plan.runs[number], once, Silent())


def _packed(work: Callable[[_Plan, int], None], plan: _Plan) -> bytes:
    from autoprune.processes import packed  # loads cloudpickle

    return packed(work, plan.to_send())


def _apart(work: bytes, numbers: Sequence[int], parallel: int, tick: Callable[[], None]) -> None:
    """Run what `_packed` made, as many together as may be, each with its share of the threads."""
    from autoprune.processes import apart

    processes = min(parallel, len(numbers))
    apart(work, numbers, processes=processes, threads=max(1, torch.get_num_threads() // processes), tick=tick)


# -- what is shared -------------------------------------------------------------------------------------------------


def _known(folder: RunFolder) -> list[Outcome]:
    """Return what searches of the folder have evaluated: their ledgers are the cache."""
    return outcomes(map(Ledger, sorted(folder.path.glob("*/*/ledger.jsonl"))))


def _share(giver: RunFolder, taker: RunFolder) -> None:
    """Give what all searches have in common, where it is there and not there yet."""
    taker.create()
    for name in _SHARED:
        file, copy = getattr(giver, name), getattr(taker, name)
        if file.exists() and not copy.exists():
            temporary = copy.with_name(f".{copy.name}.{os.getpid()}")
            shutil.copyfile(file, temporary)
            temporary.replace(copy)


@final
class _Told:
    """Tells of many searches as of one: their steps are counted on, and what all of them say is said once."""

    def __init__(self, progress: Progress, runs: int, steps: int) -> None:
        self._progress = progress
        self._runs, self._steps = runs, steps
        self._number, self._label = 0, ""
        self._stage: str | None = None
        self._begun = False
        self._folders: Sequence[RunFolder] = ()
        self._read: dict[Path, tuple[int, int]] = {}  # bytes and lines of each ledger so far

    def turn(self, number: int, label: str) -> None:
        """Go on with another search."""
        self._number, self._label = number, label

    def together(self, parallel: int, folders: Sequence[RunFolder]) -> None:
        """Go on with several searches, of which nothing is heard but what they leave on disk."""
        self._label, self._folders = f"{parallel} searches together", folders
        if not self._begun:
            self._begun = True
            self._progress.begin("comparing", self._runs * self._steps)

    def look(self) -> None:
        """Say how far they are."""
        done = 0
        for folder in self._folders:
            if folder.result.exists():
                done += self._steps
            elif folder.ledger.exists():
                done += min(self._lines(folder.ledger), self._steps)
        self._progress.step(done, self._label)

    def _lines(self, ledger: Path) -> int:
        size, lines = self._read.get(ledger, (0, 0))
        with ledger.open("rb") as file:
            file.seek(size)
            more = file.read()
        self._read[ledger] = size + len(more), lines + more.count(b"\n")
        return self._read[ledger][1]

    def over(self) -> None:
        """End."""
        if self._begun:
            self._progress.end()

    def line(self, text: str) -> None:
        if not self._begun:
            self._progress.line(text)

    def begin(self, stage: str, total: int) -> None:
        self._stage = stage
        if stage == "search" and not self._begun:
            self._begun = True
            self._progress.begin("comparing", self._runs * self._steps)
        elif not self._begun:
            self._progress.begin(stage, total)

    def step(self, done: int, text: str) -> None:
        if self._stage == "search":
            self._progress.step(self._number * self._steps + min(done, self._steps), f"{self._label}: {text}")
        elif not self._begun:
            self._progress.step(done, text)

    def end(self) -> None:
        if not self._begun:
            self._progress.end()
        self._stage = None


# -- the picks, fine-tuned ------------------------------------------------------------------------------------------


def _finalize(plan: _Plan, epochs: int, lr: float, progress: Progress, parallel: int) -> None:
    """Fine-tune every pick by one recipe; then read the test set once, for all that were not tested yet.

    Picks that are the same policy are fine-tuned once.
    """
    task, runs = plan.task, plan.runs
    chosen = [run.pick(_fits(run)) for run in runs]
    for run in runs:
        if run.folder.final.exists():
            final = run.folder.read(run.folder.final)
            if (final["epochs"], final["lr"]) != (epochs, lr):
                raise RunError(
                    f"{run.folder.path} was finalised with {final['epochs']} epochs at lr {final['lr']:g}, not "
                    f"{epochs} at {lr:g}; compare in another folder"
                )
    untested = [run for run in runs if not run.folder.final.exists() or "test" not in run.folder.read(run.folder.final)]
    if untested:
        task.require_test()
    if all(run.folder.final.exists() for run in runs):
        progress = Silent()
    progress.begin(f"fine-tuning picks for {epochs} epochs", len(runs))
    tuned = {c.id: r for r, c in zip(runs, chosen, strict=True) if r.folder.final.exists() and r.folder.pruned.exists()}
    first: dict[str, int] = {}  # whose pick it is
    for number, candidate in enumerate(chosen):
        if candidate.id not in tuned and not runs[number].folder.final.exists():
            first.setdefault(candidate.id, number)
    if parallel > 1 and len(first) > 1:

        def look() -> None:
            done = sum(run.folder.final.exists() for run in runs)
            progress.step(done, f"{parallel} picks together")

        work = _packed(partial(_finalize_apart, epochs=epochs, lr=lr), plan.without_agents())
        _apart(work, list(first.values()), parallel, look)
        tuned |= {identity: runs[number] for identity, number in first.items()}
    blind = task.without_test()
    for number, (run, candidate) in enumerate(zip(runs, chosen, strict=True), 1):
        if not run.folder.final.exists():
            _finalize_one(run, candidate, tuned.get(candidate.id), partial(open_run, task=blind), epochs, lr)
            tuned.setdefault(candidate.id, run)
        progress.step(number, f"{run.agent}, seed {run.seed}")
    progress.end()
    if untested and task.n_test:
        _test(task, untested)


def _finalize_apart(plan: _Plan, number: int, *, epochs: int, lr: float) -> None:
    """Fine-tune one of the picks, in a process of its own."""
    run, blind = plan.runs[number], plan.task_here().without_test()
    _finalize_one(run, run.pick(_fits(run)), None, partial(open_run, task=blind), epochs, lr)


def _finalize_one(
    run: _Run, candidate: Candidate, same: _Run | None, opened: Callable[[Path], Any], epochs: int, lr: float
) -> None:
    """Make an agent's pick its run's, and fine-tune it, or take it over from where the same policy was."""
    folder = run.folder
    own = folder.read(folder.result)["picked"]["id"] == candidate.id
    result = None if own and same is not None else opened(folder.path)
    if not own:  # a control was better
        assert result is not None
        result.choose(result.network(candidate, f"the best that {run.agent} proposed"))
    if same is None:
        assert result is not None
        result.finalize(epochs, lr=lr)
        return
    shutil.copytree(same.folder.pruned, folder.pruned, dirs_exist_ok=True)
    final = same.folder.read(same.folder.final)
    write_json(folder.final, {key: final[key] for key in ("epochs", "lr", "val")})
    render(folder)


def _test(task: Task, runs: Sequence[_Run]) -> None:
    """Read the test set, and write down what dense and fine-tuned networks do on it."""
    networks = (load(run.folder.pruned, build=task.fresh_model) for run in runs)
    dense, *tests = map(record_of, read_test(task, (task.fresh_model().eval(), *networks)))
    for run, test in zip(runs, tests, strict=True):
        final = run.folder.read(run.folder.final)
        write_json(run.folder.final, final | {"test": test, "dense_test": dense})
        render(run.folder)


# -- the outcome ----------------------------------------------------------------------------------------------------


def _fits(run: _Run) -> Callable[[Candidate], bool]:
    """Return whether a candidate of a run is within its budget."""
    limits = SearchSettings.of(run.folder.read(run.folder.config)["search"]).limits
    dense = Cost.from_dict(run.folder.read(run.folder.result)["dense"])
    return lambda candidate: limits.utilisation(candidate.cost, dense) <= 1


def _trace(run: _Run) -> Trace:
    own, fits = run.proposed, _fits(run)
    took = run.folder.read(run.folder.result)["proposing_seconds"] + math.fsum(one.seconds for one in own)
    accuracies = tuple(one.accuracy if fits(one) else math.nan for one in own)
    return Trace(accuracies, tuple(float(one.macs) for one in own), round(took, 2))


def _concluded(
    folder: RunFolder,
    task: Task,
    common: Mapping[str, Any],
    runs: Sequence[_Run],
    options: SearchSettings,
) -> Comparison:
    """Compare what the searches left, write it down, and draw the page."""
    from autoprune.report import write_comparison  # loads plotly

    summary = runs[0].folder.read(runs[0].folder.result)
    dense = {**summary["dense"], **dense_as_searched(summary)}  # beside picks whose numbers are the ledgers'
    agents = tuple(dict.fromkeys(run.agent for run in runs))
    traces = {agent: [_trace(run) for run in runs if run.agent == agent] for agent in agents}
    found = standings(
        traces,
        options.candidates,
        dense["macs"],
        tuned=_finals(runs, agents, "val"),
        tests=_finals(runs, agents, "test"),
        samples=(task.n_val, task.n_test),
    )
    fidelities = {one.fidelity for run in runs for one in measured(run.proposed)}
    document = found.to_dict() | {
        "format": FORMAT,
        "task": task.describe(),
        "search": dict(common),
        "dense": {key: dense[key] for key in ("accuracy", "accuracy_se", "macs", "params")},
        "fidelity": ", ".join(sorted(fidelities)),
        "evaluated": len({one.id for run in runs for one in run.proposed}),
        "shared_by_all": _shared_by_all(folder, options),
        "finalized": _recipe(runs),
        "versions": versions(),
    }
    write_json(folder.path / "compare.json", document)
    write_comparison(folder.path)
    return Comparison(folder.path, found, document)


def _shared_by_all(folder: RunFolder, options: SearchSettings) -> dict[str, Any]:
    """Return what was measured before any agent proposed anything, and is in no agent's count."""
    if not options.sensitivity:
        return {"sensitivity_cells": 0, "file": None}
    groups = SensitivityReport.load(folder.sensitivity).groups
    return {"sensitivity_cells": sum(len(group.cells) for group in groups), "file": folder.sensitivity.name}


def _finals(runs: Sequence[_Run], agents: Sequence[str], split: str) -> dict[str, list[float]] | None:
    """Return what the fine-tuned picks reach on a split; None unless that is known of all."""
    if not all(run.folder.final.exists() and split in run.folder.read(run.folder.final) for run in runs):
        return None
    found: dict[str, list[float]] = {agent: [] for agent in agents}
    for run in runs:
        found[run.agent].append(run.folder.read(run.folder.final)[split]["accuracy"])
    return found


def _recipe(runs: Sequence[_Run]) -> dict[str, Any] | None:
    """Return how the picks were fine-tuned, and what the dense network does on the test split, if they were."""
    if not all(run.folder.final.exists() for run in runs):
        return None
    final = runs[0].folder.read(runs[0].folder.final)
    return {key: final.get(key) for key in ("epochs", "lr", "dense_test")}
