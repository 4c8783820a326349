"""The search: the one loop that joins analyzer, space, agent and evaluator.

Everything it does is written to the run folder as it happens, so that the same call goes on where a killed one stopped:
sensitivity cells and candidates that are there are not measured again, and the agent is run again from its seed,
answered from the ledger.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import math
import platform
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune import registry
from autoprune.analytic import Analytic
from autoprune.cost import FeasibleSet, compare
from autoprune.errors import (
    ConfigError,
    DivergedError,
    ExecutorError,
    RecoveryWarning,
    SearchOver,
    TaskError,
)
from autoprune.evaluation import TIME_LIMIT, Arm, Candidate, Evaluator, Executor, InProcess, Measurement
from autoprune.evaluation.ladder import FEWEST_SAMPLED, HIGHEST, Rung, best, promotion, rungs, sample
from autoprune.fidelity import agreement, agreements
from autoprune.finaliser import PrunedNetwork
from autoprune.pareto import OBJECTIVES, Direction
from autoprune.policy import Policy
from autoprune.preparation import Prepared, evaluator_of, prepare
from autoprune.progress import Progress, Silent
from autoprune.result import (
    SearchResult,
    evaluators_of,
    final_dense,
    final_point,
    measured,
    pick_from,
    point_of,
    predicted,
    rebuild,
    record_of,
    render,
    rungs_of,
    uniform_at,
    write_front,
)
from autoprune.rewards import PROTOCOLS, Reward, within_drop
from autoprune.run import FORMAT, RunFolder, write_json
from autoprune.seeds import derive
from autoprune.sensitivity import SensitivityReport, conditions
from autoprune.sensitivity import analyse as analyse_sensitivity
from autoprune.settings import SearchSettings
from autoprune.task import Task
from autoprune.threads import suited_threads
from autoprune.tracking import MLflowTracker, Tracker

if TYPE_CHECKING:
    from autoprune.environment import PruningEnv

__all__ = ["identity_of", "search", "versions"]

_CLEAR_LOSS = 0.005  # accuracy that the pipeline may cost the dense network without a warning
_UNTIL_PROMOTED = 0.6  # of the time limit, where there is a ladder
_ALONE = {"recalibrated": 0.3, "reconstructed": 0.05}  # accuracy that a group may lose alone and be searched that far


def search(
    task: Task,
    *,
    out: str | Path,
    agent: Any = "surrogate",
    agent_settings: Mapping[str, Any] = MappingProxyType({}),
    tracker: Tracker | None = None,
    progress: Progress | None = None,
    source: Mapping[str, Any] | None = None,
    reuse: str | Path | None = None,
    executor: Executor | None = None,
    **settings: Any,
) -> SearchResult:
    """Search layer-wise sparsities for a task, and leave everything in a folder.

    Called again with the same arguments, it goes on where it stopped, or returns what it found.

    Args:
        task: Network, data and measures.
        out: The run folder; made if it is not there.
        agent: An agent's name, also with settings, as in `"tpe:warm_start=false"`, or an agent (see
            `autoprune.agents`).
        agent_settings: What else a named agent is made with, whatever a name can't hold: `{"hidden": (64, 64)}`.
        tracker: Where candidates are logged; MLflow's own store by default.
        progress: Who watches.
        source: How the command line made the task, kept in `config.json` so that it can make it again.
        reuse: A sensitivity report of the same network and data, from another search or `autoprune sensitivity`;
            its cells are not measured again.
        executor: Where candidates are evaluated: by default here, one after another;
            `autoprune.evaluation.ray.RayExecutor` has workers, here or on a cluster. How many candidates are under way
            together is part of what a search is, as its seed is: one that goes on keeps the number that it began with,
            whatever workers it has.
        settings: The fields of `SearchSettings`: `budget`, `max_drop`, `candidates`, `finetune_steps`, ...

    Returns:
        The result; `result.pick()` is the network.

    Raises:
        ConfigError: A setting is wrong, or neither `budget` nor `max_drop` is given to an agent that needs one.
        InfeasibleBudgetError: No policy meets the budget.
        RunError: The folder holds another search, or can't be written.
        StructureError: The network's dependencies can't be traced.
        TaskError: The dense network's accuracy is 0.
        ExecutorError: No worker can be had.
    """
    name = registry.spelt("agent", agent) if isinstance(agent, str) else type(agent).__name__
    options = SearchSettings.of({**settings, "agent": name})
    if agent_settings and not isinstance(agent, str):
        raise ConfigError("`agent_settings` are for an agent that is named; make yours with them")
    searcher = registry.make("agent", agent, agent_settings) if isinstance(agent, str) else agent
    if isinstance(searcher, type) or not hasattr(searcher, "run") or not hasattr(searcher, "objectives"):
        raise ConfigError(
            f"an agent is a name or an object with `objectives` and `run(env, *, seed)`, but got {searcher!r}; "
            "see autoprune.agents.base"
        )
    aims = options.budget is not None or options.max_drop is not None or options.protocol != "resource"
    if searcher.objectives == "one" and not aims:
        raise ConfigError(
            "a search needs an aim: give a budget such as macs<=50%, or max_drop such as 0.01, or both; or a protocol"
        )
    if searcher.objectives == "several" and options.protocol != "resource":
        raise ConfigError(f"protocol {options.protocol} is for agents with one objective; this one has several")
    if options.race and searcher.objectives == "several":
        raise ConfigError("`race` compares at one cost, but this agent trades accuracy for cost; leave it out")
    watcher = progress or Silent()
    started = time.monotonic()
    folder = RunFolder(out)
    runs = InProcess() if executor is None else executor
    described = task.describe()
    config = {
        "format": FORMAT,
        "name": f"{folder.path.name}-{uuid.uuid4().hex[:8]}",
        "task": described,
        "digest": task.digest(),
        "measures": {key: described[key] for key in ("augment", "metric", "loss")},
        "search": options.to_dict(),
        "agent": identity_of(searcher),
        "parallel": {"at_once": runs.at_once},
        "source": None if source is None else dict(source),
        "versions": versions(),
    }
    going_on = folder.claim(config, ("digest", "measures", "search", "agent"))
    at_once = folder.read(folder.config)["parallel"]["at_once"]
    prepared = prepare(task, options, folder, watcher)
    if going_on and folder.result.exists():
        summary = folder.read(folder.result)
        if summary["stopped"] != TIME_LIMIT:
            watcher.line(f"{folder.path} holds this search's result already")
            return SearchResult(folder, prepared, evaluators_of(prepared, folder, summary), summary)
    evaluator = evaluator_of(prepared, folder, runs, at_once=at_once)
    if going_on:
        watcher.line(f"going on with {folder.path}: {len(evaluator.ledger)} candidates are there")
    if reuse is not None and not folder.sensitivity.exists():
        report = SensitivityReport.load(Path(reuse))
        bench = prepared.bench
        report.require(task.digest(), conditions(task, options.measured_with, bench.precision, bench.weights))
        report.save(folder.sensitivity)
    log = tracker or MLflowTracker(experiment="autoprune", run_name=folder.path.name, parent_run_id=_parent_run(folder))
    return _Search(prepared, evaluator, folder, watcher, log, started).run(searcher)


class _Search:
    """One search on its way; `run` is its story from top to bottom."""

    def __init__(
        self,
        prepared: Prepared,
        evaluator: Evaluator,
        folder: RunFolder,
        progress: Progress,
        tracker: Tracker,
        started: float,
    ) -> None:
        self.prepared = prepared
        self.settings = prepared.settings
        self.evaluator = evaluator
        self.folder = folder
        self.progress = progress
        self.tracker = tracker
        self.started = started
        self.executor = evaluator.executor
        self.late = False  # whether the time limit left somebody unpromoted
        limit = self.settings.time_limit
        self.deadline = None if limit is None else started + limit
        self.saturated: float | None = None  # share of the decisions that had no choice
        self.logged = 0
        self.best: list[float] = []  # values, as candidates came
        self.proposing = 0.0  # seconds that the agent took for itself
        self.predicted: Analytic | None = None
        self.promoted: dict[str, Any] | None = None  # what share of the candidates, and why, where that was learnt

    def run(self, agent: Any) -> SearchResult:
        dense = self.measure_dense()
        tracker = self.tracker
        tracker.start(self.settings.to_dict(), {"task": self.prepared.task.name, "run": str(self.folder.path)})
        status = "FAILED"
        network: PrunedNetwork | None = None
        summary: dict[str, Any] = {}
        try:
            self.evaluator.start()
            self.predicted = predicted = self.predict()
            sensitivity = self.analyse(predicted)
            arm = self.search(agent, sensitivity, predicted, dense)
            evaluators = self.promote(agent, dense)
            summary, network = self.conclude(arm, dense, evaluators)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            with contextlib.suppress(ExecutorError):
                self.executor.close()
            folder = self.folder
            files = (folder.config, folder.sensitivity, folder.ledger, folder.front, folder.report, folder.figures)
            metrics = {f"picked.{k}": v for k, v in summary.get("picked", {}).items() if isinstance(v, int | float)}
            metrics |= {} if self.saturated is None else {"saturated": self.saturated}
            tracker.finish(
                metrics=metrics,
                artifacts=[file for file in files if file.exists()],
                model=network.model if network else None,
                example_input=self.prepared.task.example_input if network else None,
                status=status,
            )
            if tracker.run_id is not None:
                write_json(self.folder.tracking, {"run_id": tracker.run_id, "location": tracker.location})
        return SearchResult(self.folder, self.prepared, evaluators_of(self.prepared, self.folder, summary), summary)

    # -- before ---------------------------------------------------------------------------------------------------

    def measure_dense(self) -> Measurement:
        """Measure the dense network as it is and through the pipeline, and say what the search will cost."""
        bench = self.prepared.bench
        started = time.monotonic()
        dense = bench.dense.summary("dense")
        passing = time.monotonic() - started
        if not dense.accuracy > 0:
            raise TaskError(
                f"the dense network's accuracy on the {self.prepared.task.n_val} validation samples is "
                f"{dense.accuracy:g}; are these its weights, its classes and its normalisation?"
            )
        self.progress.line(self._feasibility())
        self.progress.line(f"candidates are {bench.choice}")
        for note in bench.notes:
            self.progress.line(note)
        before, after = bench.recalibrating()
        if before.accuracy - after.accuracy > _CLEAR_LOSS:
            warnings.warn(
                "batch-norm statistics of its own training images, as candidates get them, cost the dense network "
                f"{(before.accuracy - after.accuracy) * 100:.1f} points of accuracy ({before.accuracy:.2%} to "
                f"{after.accuracy:.2%}); check that train is augmented as in training, or raise calibration_images "
                f"above {self.settings.calibration_images}",
                RecoveryWarning,
                stacklevel=4,
            )
        uniform = self.prepared.structure.removed(self._uniform)
        started = time.monotonic()
        model = bench.recovered(uniform)
        recovering = time.monotonic() - started
        steps = self.settings.finetune_steps
        training = 0.0
        if steps:
            tried = min(3, steps)
            started = time.monotonic()
            with contextlib.suppress(DivergedError):  # what candidates make of it is on record
                self.evaluator.pipeline.train(model, tried, self.settings.recovery.recipe, 0, uniform)
            training = (time.monotonic() - started) / tried * steps
        tuned = recovering + training + passing * (2 if steps else 1)
        each = recovering + passing if self._rungs() else tuned
        cells = len(self.prepared.structure) * len(self.settings.sensitivity)
        count = self.settings.candidates + self.settings.control_size + 2
        above = sum((rung.candidates + 2) * (tuned + training * (rung.steps / steps - 1)) for rung in self._rungs())
        self.progress.line(
            f"at most {cells} sensitivity cells of {recovering + passing:.1f} s and "
            f"{count} evaluations of {each:.1f} s"
            + (f", then {above:.0f} s of fine-tuning the best" if above else "")
            + f": {_minutes(cells * (recovering + passing) + count * each + above)}"
            + ("" if self.settings.time_limit is None else f", stopped after {_minutes(self.settings.time_limit)}")
        )
        return dense

    def analyse(self, predicted: Analytic | None) -> SensitivityReport | None:
        """Measure the groups one by one; at most half of the time limit goes into it."""
        if not self.settings.sensitivity:
            return None
        self.progress.begin("sensitivity", len(self.prepared.structure) * len(self.settings.sensitivity))
        report = analyse_sensitivity(
            self.prepared.bench,
            self.prepared.costs,
            self.folder.sensitivity,
            sparsities=self.settings.sensitivity,
            settings=self.settings.measured_with,
            evidence=self.prepared.evidence,
            predicted=predicted,
            deadline=self._analysis_deadline(),
            workers=None if isinstance(self.executor, InProcess) else self.executor,
            progress=lambda group, done, _: self.progress.step(done, group),
        )
        self.progress.end()
        if report.work:
            self.progress.line(report.work)
        return report

    def predict(self) -> Analytic | None:
        """Return what moments predict, or None where they know nothing of any group."""
        started = time.monotonic()
        predicted = self.prepared.analytic()
        if len(predicted.missing) == len(self.prepared.structure):
            return None
        self.progress.line(f"predicted the loss of every policy from moments in {time.monotonic() - started:.1f} s")
        for note in self.prepared.evidence.moments(self.prepared.bench.model, self.prepared.structure).notes:
            self.progress.line(f"moments: {note}")
        return predicted

    def _analysis_deadline(self) -> float | None:
        """Return when to stop measuring cells: at once where candidates are there, whose agent saw those cells."""
        if len(self.evaluator.ledger):
            return -math.inf
        limit = self.settings.time_limit
        share = _UNTIL_PROMOTED if self._rungs() else 1.0
        return None if limit is None else self.started + share * limit / 2

    # -- search ---------------------------------------------------------------------------------------------------

    def search(
        self, agent: Any, sensitivity: SensitivityReport | None, predicted: Analytic | None, dense: Measurement
    ) -> Arm:
        """Evaluate the controls, then run the agent until its evaluations are spent."""
        several = self._trades(agent)
        spend, shares = ((0.0, 1.0), (0.5, 0.75, 0.25)) if several else ((1.0, 1.0), (1.0,))
        controls = self.settings.control_size
        count = 1 + controls + self.settings.candidates
        self.progress.begin("search", count)
        value = self._value(dense)
        self.evaluator.watch = lambda candidate: self._watch(candidate, value)
        deadline = self._search_deadline()
        uniform = Arm(self.evaluator, "uniform", "uniform", 1, deadline)
        random = Arm(self.evaluator, "random", "random", controls, deadline)
        arm = Arm(self.evaluator, "search", self.settings.agent, self.settings.candidates, deadline)
        control_spend = spend if self.settings.budget is None else (1.0, 1.0)
        control_space = registry.resolve("search space", "group")(self.prepared.feasible, spend=control_spend)
        with contextlib.suppress(SearchOver):
            uniform(self._uniform)
        plain = registry.resolve("agent", "random")()
        environment = self._environment(self.prepared.feasible, control_space, random, value, None)
        _until_over(plain, environment, derive(self.settings.seed, "control"))
        random.drain()
        feasible = self._within(sensitivity)
        space = registry.resolve("search space", self.settings.space)(feasible, spend=spend)
        environment = self._environment(feasible, space, arm, value, sensitivity, shares, predicted)
        started, before = time.monotonic(), self.evaluator.waited
        _until_over(agent, environment, derive(self.settings.agents_own_seed, "agent"))
        arm.drain()
        self.proposing = time.monotonic() - started - (self.evaluator.waited - before)
        self.saturated = environment.saturated
        if self.saturated is not None:
            self.progress.line(f"{self.saturated:.0%} of the decisions had no choice")
        self.progress.end()
        self.evaluator.watch = self._log
        if self.settings.race:
            n_val = self.prepared.task.n_val
            ran = [c.measurements[-1].samples or n_val for c in measured(self.evaluator.ledger)]
            stopped = sum(candidate.stopped for candidate in self.evaluator.ledger)
            self.progress.line(
                f"{stopped} of {len(ran)} were clearly worse than their rival early: "
                f"{sum(ran) / max(1, n_val * len(ran)):.0%} of their samples were measured"
            )
        if arm.stopped is not None:
            self.progress.line(f"stopped after {len(arm.candidates)} of {arm.limit} candidates: {arm.stopped}")
        return arm

    def promote(self, agent: Any, dense: Measurement) -> list[Evaluator]:
        """Fine-tune the best candidates, and the best of these for longer; the controls beside them.

        Returns:
            The evaluators of all rungs, the search's first. A rung that the time limit, or failures, leave without two
            of the agent's candidates is not among them.
        """
        evaluators = [self.evaluator]
        aim = self._aim(agent, dense)
        below = measured(self.evaluator.ledger)
        uniform = self.prepared.structure.rounded(self._uniform).id
        ladder, tried = self._rungs(), list[Candidate]()
        if self.settings.promote == "auto":
            ladder, tried = self._learn_whom_to_promote([c for c in below if c.arm == "search"], aim)
        for rung in ladder:
            own = best([c for c in below if c.arm == "search"], rung.candidates, aim)
            controls = [c for c in below if c.id == uniform] + best([c for c in below if c.arm == "random"], 1, aim)
            evaluators[-1].leave()
            climbing = {c.id: c for c in [*controls, *own, *(tried if rung.level == 1 else ())]}
            evaluator, below = self._climb(rung, list(climbing.values()))
            if sum(c.arm == "search" for c in below) < 2:
                left = "no time for two candidates" if self.late else "fewer than two candidates bore it"
                self.progress.line(f"fine-tuning for {rung.steps} steps is left out: {left}")
                break
            evaluators.append(evaluator)
        return evaluators

    def _climb(self, rung: Rung, candidates: Sequence[Candidate]) -> tuple[Evaluator, list[Candidate]]:
        """Measure candidates on a rung, and return its evaluator and what they are there, those that bore it."""
        at_once = self.evaluator.at_once
        evaluator = evaluator_of(self.prepared, self.folder, self.executor, rung.level, rung.steps, at_once)
        self.progress.begin(f"fine-tuning for {rung.steps} steps", len(candidates))
        said = itertools.count(1)

        def watch(candidate: Candidate) -> None:
            self._log(candidate)
            self.progress.step(next(said), self._said(candidate, ()))

        evaluator.watch = watch
        results = []
        for candidate in candidates:
            evaluator.make_room()  # which takes time
            known = evaluator.ledger.get(candidate.id) is not None
            if known or self.deadline is None or time.monotonic() < self.deadline:
                results.append(evaluator.submit(candidate.policy, arm=candidate.arm, agent=candidate.agent))
            else:
                self.late = True
        found = measured(result() for result in results)
        self.progress.end()
        evaluator.watch = self._log
        return evaluator, found

    def _learn_whom_to_promote(
        self, own: Sequence[Candidate], aim: Reward | Mapping[str, Direction]
    ) -> tuple[tuple[Rung, ...], list[Candidate]]:
        """Fine-tune some candidates from the best to the worst, and return the ladder that how they rank asks for.

        Args:
            own: The agent's candidates.
            aim: What is to be raised, or the objectives that are traded for each other.

        Returns:
            The rungs, and the candidates that were tried, which have climbed to the first of them.
        """
        most = self._rungs()
        ranked = best(own, len(own), aim)
        tried = sample(ranked)
        if len(tried) < FEWEST_SAMPLED:
            return most, []
        evaluator, found = self._climb(most[0], tried)
        evaluator.leave()
        after = {c.id: c for c in found}
        pairs = [(c, after[c.id]) for c in ranked if c.id in after]
        if len(pairs) < FEWEST_SAMPLED:
            return most, tried
        order = [c.id for c in best(found, len(found), aim)]
        ranks = agreement(pairs, range(len(pairs), 0, -1), [-order.index(c.id) for c, _ in pairs])
        share, holds = promotion(ranks.relied_on, len(own))
        self.promoted = {**ranks.to_dict(), "relied_on": round(ranks.relied_on, 4), "share": share, "holds": holds}
        self.progress.line(
            f"fine-tuned, {len(pairs)} candidates rank as before with Kendall's tau {ranks.all.value:.2f} "
            f"({ranks.all.low:.2f} to {ranks.all.high:.2f}; of the better half {ranks.better.value:.2f}): "
            f"{share:.0%} go on"
        )
        return rungs(len(own), self.settings.finetune_steps, share), tried

    def _rungs(self) -> tuple[Rung, ...]:
        """Return the ladder, as high as it may be."""
        share = HIGHEST if isinstance(self.settings.promote, str) else self.settings.promote
        return rungs(self.settings.candidates, self.settings.finetune_steps, share)

    def _trades(self, agent: Any) -> bool:
        """Say whether accuracy is traded for cost, instead of making the best of the whole budget."""
        settings = self.settings
        return agent.objectives == "several" or settings.max_drop is not None or settings.protocol != "resource"

    def _aim(self, agent: Any, dense: Measurement) -> Reward | Mapping[str, Direction]:
        """Return by what candidates are promoted: what the agent raises, or what it trades for each other."""
        if agent.objectives == "several":
            return OBJECTIVES
        if not self._trades(agent):
            return self._value(dense)
        cost = "params" if self.settings.max_drop is None and self.settings.protocol == "accuracy-params" else "macs"
        return {"accuracy": "max", cost: "min"}

    def _search_deadline(self) -> float | None:
        """Return when the agent has to end: what is promoted needs time too."""
        limit = self.settings.time_limit
        return None if limit is None else self.started + (_UNTIL_PROMOTED if self._rungs() else 1.0) * limit

    def _watch(self, candidate: Candidate, value: Callable[[Candidate], float]) -> None:
        """Log a candidate, and say how the search stands."""
        self._log(candidate)
        if candidate.failure is None:
            self.best.append(max([*self.best[-1:], value(candidate)]))
        self.progress.step(self.logged, self._said(candidate, self.best))

    def _log(self, candidate: Candidate) -> None:
        self.logged += 1
        self.tracker.candidate(candidate)
        self._note_tracking()

    def _note_tracking(self) -> None:
        """Write down where the search is logged, once that is known, so that a resumed one goes on there."""
        if self.tracker.run_id is not None and not self.folder.tracking.exists():
            write_json(self.folder.tracking, {"run_id": self.tracker.run_id, "location": self.tracker.location})

    def _environment(
        self,
        feasible: FeasibleSet,
        space: Any,
        arm: Arm,
        value: Callable[[Candidate], float],
        sensitivity: SensitivityReport | None,
        shares: Sequence[float] = (1.0,),
        predicted: Analytic | None = None,
    ) -> "PruningEnv":
        from autoprune.environment import PruningEnv, layer_facts  # loads gymnasium

        structure = self.prepared.structure
        warm_starts: list[Policy] = []
        slopes: dict[str, float] = {}
        if sensitivity is not None:
            slopes = {name: sensitivity.slope(name) for name in structure.names}
        for share in shares:
            warm_starts += self._warm_starts(feasible, sensitivity, predicted, share)
        return PruningEnv(
            feasible,
            space,
            arm.submit,
            value=value,
            evaluations=arm.limit,
            at_once=self.evaluator.at_once,
            warm_starts=warm_starts,
            layers=layer_facts(self.prepared.task.model, self.prepared.task.example_input, structure),
            slopes=slopes,
            predicted=predicted,
            measured=sensitivity,
            scores=self.prepared.scores,
            worst=self._worst,
            name=self.folder.read(self.folder.config).get("name", ""),
            known=[candidate.policy for candidate in self.evaluator.ledger if candidate.arm == arm.name],
        )

    def _warm_starts(
        self, feasible: FeasibleSet, sensitivity: SensitivityReport | None, predicted: Analytic | None, share: float
    ) -> list[Policy]:
        """Return what the curves suggest, and uniform, in a set at a share of its budget; nothing if it is empty."""
        if sensitivity is None and predicted is None:
            return []
        within = feasible.limited(share)
        if within.utilisation(within.upper) > 1:
            return []
        starts = [] if predicted is None else [predicted.allocate(within)]
        if sensitivity is not None:
            starts += [sensitivity.allocate(within), sensitivity.threshold(within)]
        return [*starts, within.policy(within.uniform())]

    def _value(self, dense: Measurement) -> Reward:
        """Return what an agent with one objective is to raise."""
        max_drop = self.settings.max_drop
        if max_drop is None:
            return PROTOCOLS[self.settings.protocol]
        return within_drop(dense.accuracy - max_drop, self.prepared.costs.dense.macs)

    @property
    def _worst(self) -> float:
        """What a candidate that failed is worth: no more than any other."""
        if self.settings.max_drop is not None:
            return -1.0
        costs = self.prepared.costs.dense
        logs = {"resource": 0.0, "accuracy": math.log(costs.macs), "accuracy-params": math.log(costs.params)}
        return -logs[self.settings.protocol]

    def _within(self, sensitivity: SensitivityReport | None) -> FeasibleSet:
        """Return the feasible set within what the analyzer found bearable, if the budget can be met there."""
        user = self.prepared.feasible
        if sensitivity is None:
            return user
        highest = sensitivity.bounds(self.prepared.structure, _ALONE[self.settings.recover], self.settings.max_sparsity)
        upper = np.array([g.count(highest[g.name][1]) for g in self.prepared.structure], dtype=np.int64)
        upper = np.clip(upper, user.lower, user.upper)
        narrowed = dataclasses.replace(user, upper=upper)
        return narrowed if narrowed.utilisation(upper) <= 1 else user

    @property
    def _uniform(self) -> Policy:
        """The least uniform sparsity that meets the user's budget."""
        feasible = self.prepared.feasible
        return feasible.policy(feasible.uniform())

    # -- after ----------------------------------------------------------------------------------------------------

    def _fidelity(self, evaluators: Sequence[Evaluator]) -> list[dict[str, Any]]:
        """Return how well what was known early ranks the search's own candidates, and those of each rung."""
        own = [c for c in measured(self.evaluator.ledger) if c.arm in ("search", "random")]
        known: dict[str, list[float]] = {}
        if self.predicted is not None:
            names = self.prepared.structure.names
            counts = np.array([[c.removed[name] for name in names] for c in own]).reshape(len(own), len(names))
            known["predicted"] = (-self.predicted.predict(counts)).tolist()
        if self.folder.sensitivity.exists():
            report = SensitivityReport.load(self.folder.sensitivity)
            known["sensitivity"] = [report.predicted_accuracy(c.removed) for c in own]
        above = ([c for c in measured(evaluator.ledger) if c.arm == "search"] for evaluator in evaluators[1:])
        return [one.to_dict() for one in agreements([own, *above], known)]

    def conclude(
        self, arm: Arm, dense: Measurement, evaluators: Sequence[Evaluator]
    ) -> tuple[dict[str, Any], PrunedNetwork]:
        """Pick, compare with the controls at the same cost, rebuild, save and report; final numbers are in float32."""
        evaluator = evaluators[-1]
        costs, ledger, settings = self.prepared.costs, evaluator.ledger, self.settings
        aim = (settings.max_drop, settings.budget, settings.protocol)
        known = -1
        while known < len(ledger):  # uniform at the picked one's cost may be the better pick
            known = len(ledger)
            chosen, rule = pick_from(evaluator, dense.accuracy, *aim, fall_back=True)
            uniform = uniform_at(self.prepared, evaluator, chosen.cost)
        picked = rebuild(evaluator, chosen, rule)
        randoms = [c for c in ledger if c.arm == "random"]
        comparable = [c for c in measured(randoms) if settings.budget is not None or c.macs <= chosen.macs]
        best_random = max(comparable, key=lambda c: c.accuracy, default=None)
        precision = evaluator.bench.precision
        summary = {
            "agent": settings.agent,
            "evaluations": len(self.evaluator.ledger),
            "rungs": rungs_of(evaluators),
            "candidates": len(arm.candidates),
            "saturated": self.saturated,
            "proposed": list(arm.proposed),
            "proposing_seconds": round(self.proposing, 3),
            "seconds": round(time.monotonic() - self.started, 1),
            "stopped": TIME_LIMIT if self.late else arm.stopped,
            "dense": record_of(final_dense(evaluator.bench)) | costs.dense.to_dict(),
            "budget": settings.budget,
            "max_drop": settings.max_drop,
            "picked": point_of(chosen, picked.measured)
            | {"removed": dict(chosen.removed), "rule": rule, "level": len(evaluators) - 1},
            "uniform": final_point(evaluator, uniform, picked),
            "random": {
                "size": sum(c.arm == "random" for c in self.evaluator.ledger),
                "best": final_point(evaluator, best_random, picked),
            },
            "predicted": predicted(self.folder, chosen),
            "fidelity": self._fidelity(evaluators),
            "promoted": self.promoted,
            "latency": self._latency(picked),
        }
        if precision != precision.full:
            summary["dense_as_searched"] = {"precision": str(precision)} | record_of(dense)
        write_front(self.folder, evaluator)
        picked.save(self.folder.pruned)
        write_json(self.folder.result, summary)
        render(self.folder)
        return summary, picked

    def _latency(self, picked: PrunedNetwork) -> dict[str, Any]:
        """Return what the dense and the picked network take for one sample here, measured in turn."""
        bench, example = self.prepared.bench, self.prepared.task.example_input
        with suited_threads(bench.macs, repeatable=False):
            times = compare({"dense": bench.original, "picked": picked.model}, example)
        return {name: dataclasses.asdict(latency) for name, latency in times.items()}

    # -- words ----------------------------------------------------------------------------------------------------

    def _feasibility(self) -> str:
        feasible, costs = self.prepared.feasible, self.prepared.costs
        lines = ["                        dense     smallest reachable          budget"]
        limits = {limit.metric: limit for limit in feasible.budget.limits}
        for metric in dict.fromkeys(("macs", "params", "bytes", *limits)):
            full, least = getattr(costs.dense, metric), getattr(feasible.smallest, metric)
            allowed = f"{limits[metric].absolute(costs.dense):,.10g}" if metric in limits else "-"
            name = f"{metric} ms" if metric == "latency" else metric
            lines.append(f"{name:<15}{full:>14,.10g}  {least:>12,.10g} ({least / full:5.1%})  {allowed:>14}")
        locked = [f"{group.name} ({group.reason})" for group in self.prepared.structure.locked]
        lines.append(f"{len(self.prepared.structure)} groups can be pruned; locked: {'; '.join(locked) or 'none'}")
        return "\n".join(lines)

    def _said(self, candidate: Candidate, best: Sequence[float]) -> str:
        result = f"failed: {candidate.failure}" if candidate.failure else f"accuracy {candidate.accuracy:.4f}"
        macs = candidate.macs / self.prepared.costs.dense.macs
        top = ""
        if best and self.settings.protocol != "resource":
            top = f"best reward {best[-1]:.4f}; "
        elif best and self.settings.max_drop is None:
            top = f"best {best[-1]:.4f}; "
        elif best:
            within = f"best {1 - best[-1]:.1%} of the MACs within the drop; "
            top = within if best[-1] >= 0 else "none within the drop yet; "
        return f"{top}{candidate.agent} {result} at {macs:.1%} of the MACs"


def identity_of(agent: Any) -> dict[str, Any]:
    """Return what tells agents apart: the class, and those of its settings that are plain values, or tuples of them."""

    def is_plain(value: object) -> bool:
        return isinstance(value, str | int | float | bool | None)

    settings = getattr(agent, "__dict__", {})
    plain = {name: value for name, value in settings.items() if is_plain(value)}
    plain |= {k: list(v) for k, v in settings.items() if type(v) is tuple and all(map(is_plain, v))}  # as JSON has it
    return {"class": f"{type(agent).__module__}.{type(agent).__qualname__}", **plain}


def _until_over(agent: Any, environment: "PruningEnv", seed: int) -> None:
    with contextlib.suppress(SearchOver):
        agent.run(environment, seed=seed)


def _parent_run(folder: RunFolder) -> str | None:
    return folder.read(folder.tracking)["run_id"] if folder.tracking.exists() else None


def versions() -> dict[str, str]:
    """Return the versions of what a search runs on."""
    packages = (
        "autoprune",
        "torch",
        "torchvision",
        "optuna",
        "gymnasium",
        "stable-baselines3",
        "mlflow",
    )
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
