"""The comparison: every policy measured once, every agent charged for it, nothing lost when it is killed."""

import functools
import importlib
import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from optuna.samplers import RandomSampler
from torch import Tensor, nn

import autoprune
from autoprune import export
from autoprune.agents.base import Objectives
from autoprune.agents.optuna import OptunaAgent, TPEAgent
from autoprune.compare import Comparison, compare
from autoprune.environment import PruningEnv
from autoprune.errors import ConfigError, ExecutorError, RunError, TestSetError, UnknownNameError
from autoprune.evaluation import InProcess, Ledger, Outcome, Pipeline, Raced, Work
from autoprune.finetuning import Recipe, train
from autoprune.policy import Policy
from autoprune.progress import Silent
from autoprune.result import open_run
from autoprune.run import RunFolder
from autoprune.search import search
from autoprune.task import Task, cross_entropy
from autoprune.testing import TinyNet
from autoprune.tracking import NullTracker

pytestmark = pytest.mark.usefixtures("global_rng_untouched", "light")

SETTINGS: dict[str, Any] = {
    "agents": ["tpe"],
    "seeds": 2,
    "candidates": 4,
    "control": 1,
    "budget": "macs<=50%",
    "calibration_images": 100,
    "sensitivity": (0.5,),
}
AGENTS = ("tpe", "uniform", "random")


def lighten(patch: pytest.MonkeyPatch) -> None:
    """Leave out what takes the time at the end of each search: reports, figures and the exported program."""
    for name in ("search", "result", "compare"):  # of which some are functions as the package's attributes
        patch.setattr(importlib.import_module(f"autoprune.{name}"), "render", lambda folder: folder.report)
    patch.setattr(export, "_save_program", lambda *_: None)
    patch.setattr("autoprune.report.write_comparison", lambda folder: folder / "compare.html")


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    lighten(monkeypatch)


def samples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of ten noisy patterns, `(n, 1, 8, 8)`, and which of them each is."""
    patterns = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    targets = torch.arange(n) % 10
    return patterns[targets] + 0.6 * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), targets


@functools.cache
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = TinyNet()
    task = Task(model, train=samples(200, 1), val=samples(100, 2))
    train(model, task.train_batches(40, 0), 60, recipe=Recipe(lr=0.2), loss=cross_entropy, seed=0)
    return model.eval()


def make_task(**changes: Any) -> Task:
    return Task(network(), **({"train": samples(200, 1), "val": samples(100, 2), "test": samples(60, 3)} | changes))


def run(out: Path, task: Task | None = None, **changes: Any) -> Comparison:
    return compare(make_task() if task is None else task, out=out, **(SETTINGS | changes))


def table(out: Path) -> Any:
    """Return the contents of `compare.json`, without the time that anything took."""
    document = json.loads((out / "compare.json").read_text())
    for row in document["table"]:
        del row["seconds"]
    return document


class Counting:
    """Runs policies here, counts them, and may be killed."""

    def __init__(self, at_once: int = 1, kill_at: int | None = None) -> None:
        self.at_once = at_once
        self.evaluated: Counter[str] = Counter()
        self.starts = 0
        self._kill_at = kill_at
        self._inner = InProcess()

    def start(self, pipeline: Any) -> None:
        self.starts += 1
        self._inner.start(pipeline)

    def submit(self, work: Work) -> None:
        self._inner.submit(work)

    def finished(self) -> Outcome:
        outcome = self._inner.finished()
        self.evaluated[outcome.id] += 1
        if self.evaluated.total() == self._kill_at:
            raise KeyboardInterrupt
        return outcome

    def close(self) -> None:
        self._inner.close()


class Fixed:
    """Proposes the same policies with every seed."""

    objectives: ClassVar[Objectives] = "one"

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift

    def run(self, env: PruningEnv, *, seed: int) -> None:
        for value in np.linspace(0.1, 0.9, env.evaluations):
            env.submit(env.space.decode([(value + self.shift) % 1] * len(env.space.dimensions)))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Counting, Comparison]]:
    """A comparison that many tests look at."""
    out, counting = tmp_path_factory.mktemp("compare") / "out", Counting()
    with pytest.MonkeyPatch.context() as patch:
        lighten(patch)
        yield out, counting, run(out, executor=counting)


# -- what it leaves ---------------------------------------------------------------------------------------------------


def test_every_agent_and_seed_is_a_search_of_its_own(done: tuple[Path, Counting, Comparison]) -> None:
    out, _, result = done
    for agent in AGENTS:
        for seed in range(2):
            opened = open_run(out / agent / str(seed), make_task())
            assert opened.summary["agent"] == agent
            assert opened.summary["candidates"] == 4
            assert opened.pick().candidate.macs <= 0.5 * opened.dense["macs"]
    assert {row["agent"] for row in result.document["table"]} == set(AGENTS)
    assert result.document["seeds"] == 2
    assert result.document["search"]["seed"] == 0
    assert "agent" not in result.document["search"]
    assert result.to_dict()["table"] == result.document["table"]
    assert json.loads(json.dumps(result.to_dict()))["out"] == str(out)


def test_each_policy_is_evaluated_once_and_every_agent_charged_for_its_own(
    done: tuple[Path, Counting, Comparison],
) -> None:
    out, counting, result = done
    ledgers = [Ledger(out / agent / str(seed) / "ledger.jsonl") for agent in AGENTS for seed in range(2)]
    policies = {candidate.id for ledger in ledgers for candidate in ledger}
    candidates = {name: number for name, number in counting.evaluated.items() if not name.startswith("probe")}
    assert candidates == dict.fromkeys(policies, 1)
    assert result.document["evaluated"] <= len(policies)  # which count the controls, too
    assert result.document["evaluated"] < 4 * len(AGENTS) * 2  # uniform's are the same with every seed
    assert all(row["evaluations"]["values"] == [4, 4] for row in result.document["table"])
    assert counting.starts == 1  # one executor for all


def test_what_is_the_same_for_all_is_measured_once(done: tuple[Path, Counting, Comparison]) -> None:
    out, counting, result = done
    probes = [number for name, number in counting.evaluated.items() if name.startswith("probe")]
    assert probes == [1, 1]  # two groups at one sparsity
    assert result.document["shared_by_all"] == {"sensitivity_cells": 2, "file": "sensitivity.json"}
    assert json.loads((out / "compare.json").read_text())["shared_by_all"] == result.document["shared_by_all"]
    for name in ("sensitivity.json", "precision.json", "moments.safetensors"):
        assert len({(out / agent / str(seed) / name).read_bytes() for agent in AGENTS for seed in range(2)}) == 1


def test_the_agents_seed_changes_proposals_and_not_what_becomes_of_them(
    done: tuple[Path, Counting, Comparison], tmp_path: Path
) -> None:
    out, _, _ = done
    proposed = [
        RunFolder(out / "random" / str(seed)).read(out / "random" / str(seed) / "result.json") for seed in (0, 1)
    ]
    assert proposed[0]["proposed"] != proposed[1]["proposed"]
    for agent, seed in (("random", 1), ("tpe", 0)):
        options = {key: value for key, value in SETTINGS.items() if key not in ("agents", "seeds")}
        alone = search(
            make_task(), out=tmp_path / agent, agent=agent, agent_seed=seed, tracker=NullTracker(), **options
        )
        here = {c.id: (c.measurements, c.number) for c in Ledger(out / agent / str(seed) / "ledger.jsonl")}
        assert {c.id: (c.measurements, c.number) for c in alone.candidates} == here


def test_the_pick_is_the_agents_own(done: tuple[Path, Counting, Comparison]) -> None:
    out, _, result = done
    for row in result.standings.table:
        for seed in range(2):
            folder = RunFolder(out / row.agent / str(seed))
            own = [Ledger(folder.ledger).get(identity) for identity in folder.read(folder.result)["proposed"]]
            assert len(own) == 4
            assert row.accuracies[seed] == max(candidate.accuracy for candidate in own if candidate is not None)


def test_the_dense_network_stands_beside_picks_in_their_precision(tmp_path: Path) -> None:
    def likelihood(outputs: Tensor, targets: Tensor) -> Tensor:  # in which every rounding shows
        return outputs.softmax(1).gather(1, targets[:, None])[:, 0]

    task = make_task(metric=likelihood)
    result = run(tmp_path / "out", task, agents=[], seeds=1, precision="bfloat16", sensitivity=())
    folder = RunFolder(tmp_path / "out" / "random" / "0")
    written = folder.read(folder.result)
    searched = written["dense_as_searched"]["accuracy"]
    assert result.document["dense"]["accuracy"] == searched != written["dense"]["accuracy"]
    assert result.document["dense"]["macs"] == written["dense"]["macs"]
    ledger = Ledger(folder.ledger)
    own = max(ledger.get(identity).accuracy for identity in written["proposed"])  # type: ignore[union-attr]
    assert next(row for row in result.standings.table if row.agent == "random").accuracies == (own,)


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill_at", [1, 4, 9])
def test_killed_anywhere_and_run_again_it_ends_with_the_same_table(
    done: tuple[Path, Counting, Comparison], tmp_path: Path, kill_at: int
) -> None:
    out, whole, _ = done
    first, second = Counting(kill_at=kill_at), Counting()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", executor=first)
    run(tmp_path / "out", executor=second)
    assert table(tmp_path / "out") == table(out)
    assert set(first.evaluated) | set(second.evaluated) == set(whole.evaluated)
    again = [name for name in first.evaluated if name in second.evaluated]
    assert len(again) <= 1  # what it was killed in
    for agent in AGENTS:
        mine, theirs = (
            [(c.id, c.number, c.measurements) for c in Ledger(folder / agent / "1" / "ledger.jsonl")]
            for folder in (tmp_path / "out", out)
        )
        assert mine == theirs


RACE: dict[str, Any] = {"agents": ["evolution"], "candidates": 8, "sensitivity": (), "race": True, "seeds": 1}


@pytest.mark.parametrize("kill_at", [6, 14])
def test_in_a_race_what_is_known_is_known_of_a_policy_and_its_rival(tmp_path: Path, kill_at: int) -> None:
    """Evolution's offspring race against their parents, and others against uniform."""
    whole, first, second = Counting(), Counting(kill_at=kill_at), Counting()
    run(tmp_path / "whole", executor=whole, **RACE)
    against = Counter(work.partition(" against ")[2] for work in whole.evaluated)
    assert len(against) >= 3  # uniform alone, others against it, and offspring against what is better
    assert set(whole.evaluated.values()) == {1}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", executor=first, **RACE)
    run(tmp_path / "out", executor=second, **RACE)
    assert table(tmp_path / "out") == table(tmp_path / "whole")
    assert set(first.evaluated) | set(second.evaluated) == set(whole.evaluated)
    assert len(set(first.evaluated) & set(second.evaluated)) <= 1  # what it was killed in


def test_a_finished_one_evaluates_nothing(done: tuple[Path, Counting, Comparison]) -> None:
    out, _, _ = done
    before, counting = table(out), Counting()
    run(out, executor=counting)
    assert not counting.evaluated
    assert not counting.starts
    assert table(out) == before


def test_more_seeds_and_agents_go_on_with_what_is_there(tmp_path: Path) -> None:
    run(tmp_path / "out", agents=[], seeds=1)
    counting = Counting()
    result = run(tmp_path / "out", agents={"mine": Fixed()}, seeds=2, executor=counting)
    assert {row.agent for row in result.standings.table} == {"mine", "uniform", "random"}
    kept = Ledger(tmp_path / "out" / "random" / "0" / "ledger.jsonl")
    assert not {candidate.id for candidate in kept} & set(counting.evaluated)
    fewer = run(tmp_path / "out", agents=[], seeds=1)
    assert fewer.standings.seeds == 1
    assert fewer.standings.words[1].startswith("With one seed there are no intervals")


@pytest.mark.parametrize("settings", [{"seeds": 1}, RACE], ids=["whole", "race"])
def test_with_several_under_way_it_stays_as_it_began(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", executor=Counting(at_once=3, kill_at=5), **settings)
    run(tmp_path / "out", **settings)
    run(tmp_path / "whole", executor=Counting(at_once=3), **settings)
    assert table(tmp_path / "out")["table"] == table(tmp_path / "whole")["table"]
    folder = RunFolder(tmp_path / "out" / "random" / "0")
    assert folder.read(folder.config)["parallel"] == {"at_once": 3}


def test_what_all_searches_say_is_said_once_and_steps_are_counted_on(tmp_path: Path) -> None:
    class Watcher(Silent):
        def __init__(self) -> None:
            self.lines: list[str] = []
            self.stages: list[tuple[str, int]] = []
            self.steps: list[int] = []

        def line(self, text: str) -> None:
            self.lines.append(text)

        def begin(self, stage: str, total: int) -> None:
            self.stages.append((stage, total))

        def step(self, done: int, text: str) -> None:
            if self.stages[-1][0] == "comparing":
                self.steps.append(done)

    watcher = Watcher()
    run(tmp_path / "out", agents=[], seeds=1, progress=watcher)
    assert sum("smallest reachable" in line for line in watcher.lines) == 1
    assert watcher.stages == [("sensitivity", 2), ("comparing", 12)]
    assert watcher.steps == sorted(watcher.steps)
    assert watcher.steps[-1] <= 12


def test_agents_that_differ_in_settings_are_searches_of_their_own_and_go_on(tmp_path: Path) -> None:
    out, settings = tmp_path / "out", {"seeds": 1, "candidates": 2, "sensitivity": ()}
    agents, cold = ["tpe", "tpe:warm_start=false:startup=3"], "tpe:startup=3:warm_start=false"  # the one spelling
    with pytest.raises(KeyboardInterrupt):
        run(out, agents=agents, executor=Counting(kill_at=5), **settings)
    result = run(out, agents=agents, **settings)
    assert {row.agent for row in result.standings.table} == {"tpe", cold, "uniform", "random"}
    folders = {"tpe": out / "tpe" / "0", cold: out / "tpe-startup=3-warm_start=false" / "0"}
    found = {agent: RunFolder(path) for agent, path in folders.items()}
    configs = {agent: folder.read(folder.config) for agent, folder in found.items()}
    assert [config["search"]["agent"] for config in configs.values()] == ["tpe", cold]
    made = [(config["agent"]["startup"], config["agent"]["warm_start"]) for config in configs.values()]
    assert made == [(None, True), (3, False)]
    for agent, folder in found.items():
        results = folder.read(folder.result)
        assert results["agent"] == agent
        assert agent in {candidate.agent for candidate in Ledger(folder.ledger)}
    suggested, drawn = (folder.read(folder.result)["proposed"][0] for folder in found.values())
    assert suggested != drawn
    again = Counting()
    run(out, agents=["tpe", " tpe : startup = 3 : warm_start = false"], executor=again, **settings)
    assert not again.starts
    with pytest.raises(RunError, match="holds a search of"):
        run(out, agents={"tpe": "tpe:warm_start=false"}, **settings)


# -- together ---------------------------------------------------------------------------------------------------------


def test_searches_and_fine_tuning_together_find_what_they_find_in_turn(tmp_path: Path) -> None:
    class Watcher(Silent):
        stages: ClassVar[list[str]] = []
        steps: ClassVar[list[tuple[int, str]]] = []

        def begin(self, stage: str, total: int) -> None:
            self.stages.append(stage)

        def step(self, done: int, text: str) -> None:
            self.steps.append((done, text))

    class Remembering(Fixed):
        """Keeps what can't be sent anywhere."""

        def run(self, env: PruningEnv, *, seed: int) -> None:
            self.lock = threading.Lock()
            super().run(env, seed=seed)

    agents, task = {"mine": Remembering()}, make_task()  # of this file, which no other process could import
    together = run(tmp_path / "out", task, agents=agents, seeds=1, finalize=1, parallel=2, progress=Watcher())
    in_turn = run(tmp_path / "in turn", agents=agents, seeds=1, finalize=1)
    assert table(tmp_path / "out") == table(tmp_path / "in turn")
    assert together.standings.tested == in_turn.standings.tested
    assert together.standings.table[0].tests is not None
    assert task.test_read
    assert "comparing" in Watcher.stages
    assert any(text == "2 searches together" for _, text in Watcher.steps)
    for agent in ("mine", "random", "uniform"):
        here, there = (
            [(c.id, c.number, c.measurements) for c in Ledger(folder / agent / "0" / "ledger.jsonl")]
            for folder in (tmp_path / "out", tmp_path / "in turn")
        )
        assert here == there
        folder = RunFolder(tmp_path / "out" / agent / "0")
        assert folder.read(folder.config)["task"]["test"] == 60  # known there, but its samples are not


class Fragile(Fixed):
    """Has its process killed after two evaluations, the first time."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self._marker = marker

    def run(self, env: PruningEnv, *, seed: int) -> None:
        for number, value in enumerate(np.linspace(0.1, 0.9, env.evaluations)):
            env.evaluate(env.space.decode([value] * len(env.space.dimensions)))
            if number == 1 and not self._marker.exists():
                self._marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)


def test_a_search_whose_process_is_killed_goes_on_when_the_comparison_is_run_again(tmp_path: Path) -> None:
    agents = {"random": "random", "mine": Fragile(tmp_path / "killed")}
    settings: dict[str, Any] = {"agents": agents, "seeds": 1, "sensitivity": ()}
    with pytest.raises(ExecutorError, match=f"signal {signal.SIGKILL}"):
        run(tmp_path / "out", parallel=2, **settings)
    ledger = tmp_path / "out" / "mine" / "0" / "ledger.jsonl"
    before = ledger.read_text()
    arms = [one.arm for one in Ledger(ledger)]
    assert arms == ["uniform", "random", "search"]  # the first that it proposed is the uniform one
    run(tmp_path / "out", parallel=2, **settings)
    assert ledger.read_text().startswith(before)
    run(tmp_path / "whole", **settings)  # the process is not killed a second time
    assert table(tmp_path / "out") == table(tmp_path / "whole")


def test_what_a_search_raises_in_its_process_is_raised_here_and_others_go_on(tmp_path: Path) -> None:
    class Broken:
        objectives: ClassVar[Objectives] = "one"

        def run(self, env: PruningEnv, *, seed: int) -> None:
            raise ConfigError("this task is not for me")

    with pytest.raises(ConfigError, match="this task is not for me"):
        run(tmp_path / "out", agents={"random": "random", "mine": Broken()}, seeds=1, parallel=2, sensitivity=())
    folder = RunFolder(tmp_path / "out" / "random" / "0")
    assert folder.result.exists()
    again = run(tmp_path / "out", agents=["random"], seeds=1, parallel=2, sensitivity=(), finalize=1)  # goes on
    assert {row.agent for row in again.standings.table} == {"random", "uniform"}
    shutil.rmtree(folder.pruned)
    more = run(tmp_path / "out", agents=["random"], seeds=2, parallel=2, sensitivity=(), finalize=1)
    assert more.standings.table[0].tests is not None  # picks that were tested, whose networks are gone, are left alone


def test_each_search_has_a_copy_of_its_agent_as_it_was_handed_in(tmp_path: Path) -> None:
    class Remembering:
        objectives = "one"
        best = 0.0  # its own from the first candidate on

        def run(self, env: PruningEnv, *, seed: int) -> None:
            begun_with.append(self.best)
            point = np.random.default_rng(seed).random(len(env.space.dimensions))
            self.best = env.value(env.evaluate(env.space.decode(point)))

    begun_with: list[float] = []
    agent = Remembering()
    for _ in range(2):  # and so it goes on
        run(tmp_path / "out", agents={"mine": agent}, seeds=2)
    assert begun_with == [0.0, 0.0]
    assert "best" not in vars(agent)


# -- refusals ---------------------------------------------------------------------------------------------------------


class Locked(Fixed):
    """An agent that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": None}, "needs a budget"),
        ({"max_drop": 0.1}, "leave out `max_drop`"),
        ({"time_limit": 10.0}, "leave out `time_limit`"),
        ({"protocol": "accuracy"}, "leave out `protocol`: agents are compared by their accuracy within a budget"),
        ({"promote": 0.5, "finetune_steps": 1, "candidates": 8}, "leave out `promote`"),
        ({"agent": "tpe"}, "`agent` is what is compared"),
        ({"agent_seed": 1}, "give `agents` and `seeds`"),
        ({"agents": "tpe"}, "must be a list"),
        ({"agents": ["tpe", "tpe"]}, "given twice"),
        ({"agents": ["evolution:step=1:survivors=2", "evolution:survivors=2:step=1"]}, "given twice"),
        ({"agents": ["tpe:warm_start=no"]}, "must be bool.*settings of the agent tpe: startup, storage"),
        ({"agents": {"mine": "tpe:warm=false"}}, "no setting of the agent tpe 'warm'.*Known: startup, storage"),
        ({"agents": [Fixed(), Fixed(0.1)]}, "give each a name of its own"),
        ({"agents": {"a b": "tpe", "a-b": "tpe"}}, "given twice"),
        ({"agents": [TPEAgent]}, "an agent is a name or an object"),
        ({"agents": ["nsga2"], "race": True}, "nsga2 trades accuracy for cost"),
        ({"agents": {"mine": Locked()}}, "mine can't be copied: cannot pickle '_thread.lock'"),
        ({"agents": [OptunaAgent(RandomSampler(seed=0))], "seeds": 2}, "would be 2 times the same search"),
        ({"seeds": 0}, "`seeds >= 1`"),
        ({"parallel": 0}, "`parallel >= 1`"),
        ({"parallel": 2, "executor": Counting()}, "be 1 with an `executor`"),
        ({"finalize": 0}, "`finalize >= 1`"),
    ],
)
def test_what_would_be_unequal_or_wrong_is_refused_before_anything_is_done(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        run(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_what_is_the_default_anyway_may_be_said(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"agents": [], "seeds": 1, "candidates": 1, "sensitivity": ()}
    run(tmp_path / "out", protocol="resource", max_drop=None, time_limit=None, **plain)


def test_an_unknown_agent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'tpe'"):
        run(tmp_path / "out", agents=["tpee"])


def test_another_comparison_does_not_get_the_folder(done: tuple[Path, Counting, Comparison]) -> None:
    out, _, _ = done
    with pytest.raises(RunError, match="its candidates is 4, not 5"):
        run(out, candidates=5)
    with pytest.raises(RunError, match="holds another search"):
        run(out, seed=1)


def test_without_an_analysis_neither(tmp_path: Path) -> None:
    result = run(tmp_path / "out", agents=[], seeds=1, sensitivity=())
    assert result.document["shared_by_all"] == {"sensitivity_cells": 0, "file": None}
    with pytest.raises(RunError, match="its seed is 0, not 1"):
        run(tmp_path / "out", agents=[], seeds=1, sensitivity=(), seed=1)


def test_an_agent_of_other_settings_does_not_get_anothers_searches(tmp_path: Path) -> None:
    run(tmp_path / "out", agents={"mine": Fixed()}, seeds=1)
    with pytest.raises(RunError, match="holds a search of"):
        run(tmp_path / "out", agents={"mine": Fixed(0.2)}, seeds=1)


# -- fine-tuned picks -------------------------------------------------------------------------------------------------


def test_picks_are_fine_tuned_alike_and_the_test_set_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned: list[str] = []
    real = Pipeline.train

    def counted(self: Pipeline, model: nn.Module, steps: int, *others: Any, **more: Any) -> None:
        tuned.append(str(steps))
        real(self, model, steps, *others, **more)

    monkeypatch.setattr(Pipeline, "train", counted)
    task = make_task()
    result = run(tmp_path / "out", task, finalize=1)
    assert task.test_read
    table = {row.agent: row for row in result.standings.table}
    assert all(row.tuned is not None and row.tests is not None for row in table.values())
    assert table["uniform"].tests is not None
    assert len(set(table["uniform"].tests)) == 1
    finals = {
        (agent, seed): json.loads((tmp_path / "out" / agent / str(seed) / "final.json").read_text())
        for agent in AGENTS
        for seed in range(2)
    }
    assert len({json.dumps(final["dense_test"]) for final in finals.values()}) == 1
    picks = set()
    for agent in AGENTS:
        for seed in range(2):
            folder = RunFolder(tmp_path / "out" / agent / str(seed))
            picked = folder.read(folder.result)["picked"]
            picks.add(picked["id"])
            assert picked["id"] in folder.read(folder.result)["proposed"]
            assert export.recipe_of(folder.pruned)["measured"]["policy"] == picked["policy"]
    assert len(tuned) == len(picks)  # the same policy is fine-tuned once
    assert result.document["finalized"]["epochs"] == 1
    tuned.clear()
    assert run(tmp_path / "out", make_task(), finalize=1).document == result.document
    assert tuned == []
    with pytest.raises(RunError, match="was finalised with 1 epochs"):
        run(tmp_path / "out", make_task(), finalize=2)


def test_killed_while_fine_tuning_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", seeds=1, finalize=1)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("autoprune.compare"), "read_test", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", seeds=1, finalize=1)
    run(tmp_path / "out", seeds=1, finalize=1)
    assert table(tmp_path / "out") == table(tmp_path / "whole")
    assert whole.standings.table[0].tests is not None


def test_a_test_set_that_was_read_by_hand_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    task = make_task()
    result = run(tmp_path / "out", task, seeds=1)
    assert not task.test_read
    open_run(tmp_path / "out" / "tpe" / "0", task).pick().test()
    with pytest.raises(TestSetError, match="read already"):
        run(tmp_path / "out", task, seeds=1, finalize=1)
    assert not list((tmp_path / "out").glob("*/*/final.json"))
    assert result.document["finalized"] is None


def test_without_a_test_set_picks_are_fine_tuned_all_the_same(tmp_path: Path) -> None:
    result = run(tmp_path / "out", make_task(test=None), seeds=1, agents=[], finalize=1)
    assert result.standings.tested is None
    assert all(row.tuned is not None and row.tests is None for row in result.standings.table)


def test_it_is_a_public_name() -> None:
    assert autoprune.compare is compare
    assert autoprune.Comparison is Comparison


@pytest.mark.parametrize("race", [False, True])
def test_a_policy_that_fails_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, race: bool) -> None:
    calls: Counter[str] = Counter()
    real = Pipeline.__call__

    def failing(self: Pipeline, work: Any) -> Outcome:
        calls[work.id] += 1
        policy = work.policy if isinstance(work, Raced) else work
        if isinstance(policy, Policy) and max(policy.values()) > 0.6:
            return Outcome(work.id, (), 0.1, "the loss is nan")
        return real(self, work)

    monkeypatch.setattr(Pipeline, "__call__", failing)
    result = run(tmp_path / "out", agents=[], sensitivity=(), race=race)
    assert set(calls.values()) == {1}
    run(tmp_path / "out", agents=[], sensitivity=(), race=race, seeds=3)
    assert set(calls.values()) == {1}
    assert all(0 <= value < 1 for row in result.standings.table for value in row.accuracies)
