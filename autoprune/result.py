"""What a search leaves: its result as Python objects, the files that say it, and the networks that it stands for."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoprune.cost import Budget, Cost, Limit
from autoprune.errors import ConfigError, RunError, TaskError
from autoprune.evaluation import AGREEMENT, Candidate, Evaluator, Measurement, Workbench
from autoprune.finaliser import FULL_LR, PrunedNetwork
from autoprune.pareto import front, hypervolume, pick
from autoprune.preparation import Prepared, evaluator_of, prepare
from autoprune.rewards import PROTOCOLS, WEIGHED
from autoprune.run import FORMAT, RunFolder, write_json
from autoprune.sensitivity import SensitivityReport
from autoprune.settings import SearchSettings
from autoprune.task import Task
from autoprune.tracking import MLflowTracker, Tracker

__all__ = [
    "SearchResult",
    "dense_as_searched",
    "final_dense",
    "final_point",
    "measured",
    "open_run",
    "pick_from",
    "point_of",
    "predicted",
    "rebuild",
    "record_of",
    "render",
    "uniform_at",
    "write_front",
]


class SearchResult:
    """What a search found.

    Args:
        run: The folder.
        prepared: The task.
        evaluators: One a rung of the ladder, lowest first; the last one's candidates are those to pick from.
        summary: The contents of `result.json`.

    Attributes:
        run: The folder's path.
        dense: Accuracy and cost of the dense network, in float32 as all that is final.
        candidates: Everything evaluated, controls included, in order; in the precision of the search.
    """

    def __init__(
        self, run: RunFolder, prepared: Prepared, evaluators: Sequence[Evaluator], summary: Mapping[str, Any]
    ) -> None:
        self.run = run.path
        self.dense: Mapping[str, Any] = summary["dense"]
        self.summary = summary
        self._folder = run
        self._prepared = prepared
        self._evaluators = tuple(evaluators)
        self._evaluator = self._evaluators[-1]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Everything evaluated, controls included, in order; at the highest fidelity that each was measured at."""
        latest = {candidate.id: candidate for evaluator in self._evaluators for candidate in evaluator.ledger}
        return tuple(latest.values())

    @property
    def front(self) -> list[Candidate]:
        """The candidates that no other beats in accuracy, MACs and parameters at once, cheapest first.

        Of the last rung, where there is a ladder.
        """
        return front(measured(self._evaluator.ledger))

    def pick(self, *, max_drop: float | None = None, budget: str | None = None) -> PrunedNetwork:
        """Return one of the candidates as a network, rebuilt and measured again.

        Args:
            max_drop: The cheapest candidate that loses no more accuracy than this.
            budget: The most accurate candidate within these limits; with `max_drop`, both must hold. With neither, the
                search's own protocol, budget or drop decides; if it had none, the knee of the front.

        Raises:
            ConfigError: No candidate qualifies.
        """
        protocol, settings = "resource", self._prepared.settings
        if max_drop is None and budget is None:
            max_drop, budget, protocol = settings.max_drop, settings.budget, settings.protocol
        dense_accuracy = dense_as_searched(self.summary)["accuracy"]
        return self.network(*pick_from(self._evaluator, dense_accuracy, max_drop, budget, protocol))

    def network(self, candidate: Candidate, rule: str = "chosen by hand") -> PrunedNetwork:
        """Return any candidate of this search as a network, rebuilt and measured again.

        Raises:
            RunError: It is not of this search, or does not measure what the ledger says.
        """
        return rebuild(self._evaluators[self._level(candidate)], candidate, rule)

    def _level(self, candidate: Candidate) -> int:
        """Return the rung that a candidate was measured on."""
        for level, evaluator in enumerate(self._evaluators):
            known = evaluator.ledger.get(candidate.id)
            if known is not None and known.measurements == candidate.measurements:
                return level
        raise RunError(f"candidate {candidate.id} is not one of {self.run}; give one of result.candidates")

    def to_dict(self) -> dict[str, Any]:
        """Return the result in short, as `autoprune search --json` prints it."""
        picked = self.summary["picked"]
        return {
            "dense": {key: self.dense[key] for key in ("accuracy", "macs", "params")},
            "candidates": self.summary["candidates"],
            "front": [point_of(candidate) for candidate in self.front],
            "picked": {key: picked[key] for key in ("policy", "accuracy", "macs", "params", "fidelity")},
            "run": str(self.run),
        }

    def choose(self, network: PrunedNetwork) -> None:
        """Make a network of this search the picked one: save it to `pruned/`, and renew result and report."""
        if self._folder.final.exists():
            raise RunError(
                f"{self.run} was finalised, and {self._folder.pruned} holds the fine-tuned network; "
                "save another candidate elsewhere: result.pick(...).save(folder)"
            )
        chosen = network.candidate
        level = self._level(chosen)
        evaluator = self._evaluators[level]
        uniform = uniform_at(self._prepared, evaluator, chosen.cost)
        picked = point_of(chosen, network.measured)
        self.summary = {
            **self.summary,
            "evaluations": len(self._evaluators[0].ledger),
            "rungs": rungs_of(self._evaluators),
            "picked": picked | {"removed": dict(chosen.removed), "rule": network.rule, "level": level},
            "uniform": final_point(evaluator, uniform, network),
            "predicted": predicted(self._folder, chosen),
        }
        network.save(self._folder.pruned)
        write_front(self._folder, self._evaluator)
        write_json(self._folder.result, self.summary)
        self.report()

    def finalize(
        self,
        epochs: int = 10,
        *,
        lr: float = FULL_LR,
        tracker: Tracker | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> PrunedNetwork:
        """Fine-tune the picked network fully, read the test set once, save the network and write `final.json`.

        Args:
            epochs: Passes over the training split.
            lr: Peak learning rate.
            tracker: Where the outcome is logged; by default the run's own record in MLflow, if it has one.
            progress: Called after every step with the steps done and the step's loss.

        Raises:
            RunError: The search was finalised before: the test set is read once.
            TestSetError: The task's test set was read before, by hand, or is not in this process.
        """
        if self._folder.final.exists():
            raise RunError(
                f"{self.run} was finalised before, and the test set is read once; "
                f"its numbers are in {self._folder.final}"
            )
        task = self._prepared.task
        task.require_test()
        picked = self.summary["picked"]
        evaluator = self._evaluators[picked["level"]]
        chosen = evaluator.ledger.get(picked["id"])
        if chosen is None:
            raise RunError(f"the picked candidate {picked['id']} is not in the ledger of {self.run}")
        recipe = dataclasses.replace(evaluator.pipeline.recovery.recipe, lr=lr)
        rebuilt = rebuild(evaluator, chosen, picked["rule"])
        network = rebuilt.finetune(epochs, recipe=recipe, progress=progress)
        final: dict[str, Any] = {"epochs": epochs, "lr": lr, "val": record_of(network.measured)}
        if task.n_test:
            test, dense_test = network.test()
            final |= {"test": record_of(test), "dense_test": record_of(dense_test)}
        network.save(self._folder.pruned)
        write_json(self._folder.final, final)
        self.report()
        self._log_final(network, final, tracker)
        return network

    def _log_final(self, network: PrunedNetwork, final: Mapping[str, Any], tracker: Tracker | None) -> None:
        folder = self._folder
        if tracker is None and not folder.tracking.exists():
            return
        parent = folder.read(folder.tracking)["run_id"] if folder.tracking.exists() else None
        log = tracker or MLflowTracker(experiment="autoprune", run_name=folder.path.name, parent_run_id=parent)
        log.start(self._prepared.settings.to_dict(), {"task": self._prepared.task.name, "run": str(folder.path)})
        metrics = {f"final.{k}.{n}": v for k, m in final.items() if isinstance(m, dict) for n, v in m.items()}
        example_input = self._prepared.task.example_input
        artifacts = [folder.final, folder.report]
        log.finish(metrics=metrics, artifacts=artifacts, model=network.model, example_input=example_input)

    def report(self) -> Path:
        """Write `report.html` and return its path."""
        return render(self._folder)


def open_run(path: str | Path, task: Task) -> SearchResult:
    """Return the result of a finished search.

    Args:
        path: Its folder.
        task: The task that it was made with.

    Raises:
        RunError: The folder holds no finished search, or one of another task.
    """
    folder = RunFolder(path)
    config, summary = folder.read(folder.config), folder.read(folder.result)
    if config["format"] != FORMAT:
        raise RunError(f"{folder.path} is of another version of autoprune (format {config['format']}, not {FORMAT})")
    for what, digest in task.digest().items():
        if config["digest"].get(what) != digest:
            raise RunError(
                f"{folder.path} was searched with another {what} than this task has; open it with its own "
                "(a function that makes the task must make the same weights and data each time)"
            )
    prepared = prepare(task, SearchSettings.of(config["search"]), folder)
    return SearchResult(folder, prepared, evaluators_of(prepared, folder, summary), summary)


def evaluators_of(prepared: Prepared, folder: RunFolder, summary: Mapping[str, Any]) -> list[Evaluator]:
    """Return the evaluators of a finished search, one a rung."""
    steps = [rung["steps"] for rung in summary["rungs"]]
    return [evaluator_of(prepared, folder, level=level, steps=number) for level, number in enumerate(steps)]


def rungs_of(evaluators: Sequence[Evaluator]) -> list[dict[str, int]]:
    """Return the rungs as the result holds them: gradient steps, and how many candidates were measured."""
    return [{"steps": e.pipeline.recovery.finetune_steps, "candidates": len(e.ledger)} for e in evaluators]


def measured(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates that did not fail."""
    return [candidate for candidate in candidates if candidate.failure is None]


def pickable(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates that did not fail, without those that a race stopped where others are there."""
    there = measured(candidates)
    return [candidate for candidate in there if not candidate.stopped] or there


def pick_from(
    evaluator: Evaluator,
    dense_accuracy: float,
    max_drop: float | None,
    budget: str | None,
    protocol: str = "resource",
    *,
    fall_back: bool = False,
) -> tuple[Candidate, str]:
    """Return one of the ledger's candidates and the rule that chose it (see `autoprune.pareto.pick`).

    Args:
        evaluator: Holds the ledger.
        dense_accuracy: What the drop is counted from, measured as the candidates are.
        max_drop: Largest tolerated loss of accuracy.
        budget: Limits, as text.
        protocol: What is raised; one of `autoprune.rewards.WEIGHED` is picked by, too.
        fall_back: Return the most accurate candidate where none is within the drop, and say so in the rule.

    Raises:
        ConfigError: No candidate qualifies.
        TaskError: All candidates failed.
    """
    limits = Budget.parse(budget)
    dense_cost = evaluator.costs.dense
    choices = measured(evaluator.ledger)
    if not len(evaluator.ledger):
        raise ConfigError("the time limit ended before the first candidate; raise it, and the same search goes on")
    failures = [candidate.failure for candidate in evaluator.ledger if candidate.failure is not None]
    if failures and not choices:
        raise TaskError(f"all {len(failures)} candidates failed; the first: {failures[0]}; a lower lr may help")
    fits = None if budget is None else lambda candidate: limits.utilisation(candidate.cost, dense_cost) <= 1
    offered = (
        pickable(one for one in choices if fits is None or fits(one)) or choices
    )  # else it is said what is nearest
    try:
        return pick(
            offered,
            max_drop=max_drop,
            dense_accuracy=dense_accuracy,
            fits=fits,
            budget_text=str(limits),
            reward=PROTOCOLS[protocol] if protocol in WEIGHED else None,
            reward_text=WEIGHED.get(protocol, ""),
        )
    except ConfigError:
        if not (fall_back and choices and max_drop is not None):
            raise
    return max(offered, key=lambda c: c.accuracy), f"most accurate found; none is within a drop of {max_drop:g}"


def write_front(folder: RunFolder, evaluator: Evaluator) -> None:
    """Write `front.json`."""
    dense = evaluator.costs.dense
    reference = {"accuracy": 0.0, "macs": dense.macs, "params": dense.params}
    members = front(measured(evaluator.ledger))
    write_json(
        folder.front,
        {
            "objectives": ["accuracy", "macs", "params"],
            "reference": reference,
            "hypervolume": hypervolume(members, reference),
            "points": [point_of(candidate) for candidate in members],
        },
    )


def uniform_at(prepared: Prepared, evaluator: Evaluator, cost: Cost) -> Candidate | None:
    """Evaluate the uniform policy that costs no more, and as little less as can be.

    No more in everything that the budget limits; in multiply-adds, where there is no budget.
    """
    metrics = [limit.metric for limit in prepared.feasible.budget.limits] or ["macs"]
    budget = Budget(tuple(Limit(metric, float(getattr(cost, metric)), relative=False) for metric in metrics))
    same = dataclasses.replace(prepared.feasible, budget=budget)
    policy = same.policy(same.uniform())
    candidate = evaluator.evaluate(policy, arm="uniform", agent="uniform")
    return candidate if candidate.failure is None else None


def predicted(folder: RunFolder, chosen: Candidate) -> dict[str, float] | None:
    """Return what the one-group curves predict for a policy, and how far the joint measurement is from it."""
    first = next(iter(chosen.measurements), None)
    if first is None or first.fidelity == "short" or not folder.sensitivity.exists():
        return None
    accuracy = SensitivityReport.load(folder.sensitivity).predicted_accuracy(chosen.removed)
    return {"accuracy": accuracy, "gap": first.accuracy - accuracy}


def rebuild(evaluator: Evaluator, candidate: Candidate, rule: str) -> PrunedNetwork:
    """Return a candidate's network, built and recovered as when it was measured, with its numbers in float32.

    Raises:
        RunError: It measures something else now.
    """
    model, (measured,) = evaluator.pipeline.recovered(candidate.policy, final=True)
    again = measured.accuracy
    rounding = AGREEMENT + 1 / evaluator.bench.task.n_val if evaluator.bench.precision.dtype != "float32" else 1e-9
    errors = 5 if candidate.stopped else 2  # it was measured on few samples, and may be the best by that
    noise = 0.0 if math.isnan(candidate.accuracy_se) else errors * candidate.accuracy_se
    if not math.isclose(again, candidate.accuracy, abs_tol=noise + rounding):
        raise RunError(
            f"candidate {candidate.id} was measured at {candidate.accuracy:.4f}, but its network, rebuilt from its "
            f"seed, at {again:.4f}; is this the same data, machine and version?"
        )
    return PrunedNetwork(evaluator, candidate, model, measured, rule)


def point_of(candidate: Candidate, measured: Measurement | None = None) -> dict[str, Any]:
    """Return a candidate as the result's files hold it: as it was measured last, or as is given."""
    last = measured or candidate.measurements[-1]
    return {
        "id": candidate.id,
        "arm": candidate.arm,
        "policy": dict(candidate.policy),
        "accuracy": last.accuracy,
        "accuracy_se": last.accuracy_se,
        **candidate.cost.to_dict(),
        "fidelity": last.fidelity,
    }


def final_point(evaluator: Evaluator, candidate: Candidate | None, picked: PrunedNetwork) -> dict[str, Any] | None:
    """Return a candidate that stands beside the picked one, in float32; built and measured again if it was not so."""
    if candidate is None:
        return None
    if candidate.id == picked.candidate.id:
        return point_of(candidate, picked.measured)
    if _is_full(evaluator.bench):
        return point_of(candidate)
    _, (again,) = evaluator.pipeline.recovered(candidate.policy, final=True)
    return point_of(candidate, again)


def final_dense(bench: Workbench) -> Measurement:
    """Return what the dense network does on the validation split, in float32."""
    samples = bench.dense if _is_full(bench) else bench.measure(bench.original, bench.precision.full)
    return samples.summary("dense")


def dense_as_searched(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the dense network does in the precision of the ledger: noted by itself where that is not float32."""
    found: Mapping[str, Any] = summary.get("dense_as_searched", summary["dense"])
    return found


def _is_full(bench: Workbench) -> bool:
    return bench.precision == bench.precision.full


def record_of(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement as the result's files hold it."""
    return {
        "accuracy": measurement.accuracy,
        "accuracy_se": measurement.accuracy_se,
        "loss": measurement.loss,
        "loss_se": measurement.loss_se,
    }


def render(folder: RunFolder) -> Path:
    """Write `report.html` and the figures beside it, and return the report's path."""
    from autoprune.report import figure_files, write_report  # loads plotly

    figure_files(folder.path, folder.figures)
    return write_report(folder.path)
