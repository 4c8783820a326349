import copy
import importlib.util
import itertools
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import BaseDistribution
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GridSampler,
    NSGAIISampler,
    PartialFixedSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, TrialState

from autoprune.agents.base import Agent
from autoprune.agents.optuna import (
    CMAESAgent,
    GPAgent,
    MultiObjectiveTPEAgent,
    NSGA2Agent,
    NSGA3Agent,
    OptunaAgent,
    QMCAgent,
    TPEAgent,
    UnivariateTPEAgent,
)
from autoprune.environment import PruningEnv
from autoprune.errors import ConfigError
from autoprune.evaluation.candidate import Candidate
from autoprune.policy import Policy
from autoprune.registry import make, names, resolve
from autoprune.testing import AgentContract, _sequence, run_agent, synthetic_env


class TestTPEAgent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return TPEAgent()


class TestNSGA2Agent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return NSGA2Agent()


BY_NAME = [
    kind for kind in (resolve("agent", name) for name in names("agent")) if kind.__module__ == "autoprune.agents.optuna"
]


class _InOneProcess(AgentContract):
    """The contract; another process is started for all of these together, below, as it takes seconds to begin."""

    test_same_seed_gives_same_policies_in_another_process = None  # type: ignore[assignment]


class TestUnivariateTPEAgent(_InOneProcess):
    @pytest.fixture
    def agent(self) -> Agent:
        return UnivariateTPEAgent()


class TestMultiObjectiveTPEAgent(_InOneProcess):
    @pytest.fixture
    def agent(self) -> Agent:
        return MultiObjectiveTPEAgent()


class TestGPAgent(_InOneProcess):
    @pytest.fixture
    def agent(self) -> Agent:
        return GPAgent(startup=13)  # of 16: few proposals by the process, which are the slow ones


class TestCMAESAgent(_InOneProcess):
    @pytest.fixture
    def agent(self) -> Agent:
        return CMAESAgent()


class TestQMCAgent(_InOneProcess):
    @pytest.fixture
    def agent(self) -> Agent:
        return QMCAgent()


class TestNSGA3Agent(_InOneProcess):
    @pytest.fixture
    def agent(self) -> Agent:
        return NSGA3Agent()


class TestOptunaAgent(_InOneProcess):
    @pytest.fixture
    def agent(self) -> Agent:
        return OptunaAgent(partial(TPESampler, n_startup_trials=5))


def warm_starts(env: PruningEnv, number: int) -> list[Policy]:
    """Return at most two policies, of points far from each other."""
    dimensions = len(env.space.dimensions)
    return [env.space.decode(np.linspace(start, 1 - start, dimensions).tolist()) for start in range(number)]


def proposed(agent: Agent, seed: int = 3, evaluations: int = 16, warm: int = 0, at_once: int = 1) -> list[str]:
    """Return the ids of the policies that an agent has evaluated."""
    env, evaluator = synthetic_env(evaluations=evaluations, objectives=agent.objectives)
    warmed = PruningEnv(
        env.feasible,
        env.space,
        evaluator.submit,
        value=lambda candidate: candidate.accuracy,
        evaluations=evaluations,
        at_once=at_once,
        warm_starts=warm_starts(env, warm),
    )
    run_agent(agent, warmed, seed=seed)
    return [candidate.id for candidate in evaluator.candidates]


def test_all_propose_the_same_in_another_process() -> None:
    agents: dict[str, Agent] = {
        name: make("agent", name, {}) for name in ("cmaes", "motpe", "nsga3", "qmc", "tpe-univariate")
    }
    agents |= {"gp": GPAgent(startup=13), "any sampler": OptunaAgent(partial(TPESampler, n_startup_trials=5))}
    code = f"""
import json, pickle, sys, torch
from autoprune.testing import _sequence
torch.set_num_threads({torch.get_num_threads()})
found = {{name: _sequence(agent, 16, seed=3) for name, agent in pickle.load(sys.stdin.buffer).items()}}
print(json.dumps({{name: [policy.id for policy in policies] for name, policies in found.items()}}))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "271828", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, input=pickle.dumps(agents), capture_output=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr.decode()
    there = json.loads(run.stdout)
    assert there.keys() == agents.keys()
    for name, agent in agents.items():
        assert [policy.id for policy in _sequence(agent, 16, seed=3)] == there[name], name


@pytest.mark.parametrize("make", [TPEAgent, UnivariateTPEAgent])
def test_what_comes_again_gives_its_place_to_a_policy_near_to_it(
    make: Callable[[], Agent], stubborn: BaseSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies: list[optuna.Study] = []

    whole = optuna.create_study

    def created(**settings: Any) -> optuna.Study:
        studies.append(whole(**{**settings, "sampler": stubborn}))
        return studies[-1]

    monkeypatch.setattr(optuna, "create_study", created)
    ids = proposed(make(), evaluations=6)
    assert len(ids) == len(set(ids)) == 6
    states = [trial.state.name for trial in studies[0].trials[:11]]
    assert states == ["COMPLETE"] + ["FAIL", "COMPLETE"] * 5  # the point, then again, and what is tried for it
    points = [tuple(trial.params.values()) for trial in studies[0].trials[:11]]
    assert {points[0], *points[1::2]} == {points[0]}
    assert len(set(points[::2])) == 6


@pytest.mark.parametrize("make", [TPEAgent, UnivariateTPEAgent])
def test_where_all_near_it_is_known_a_search_goes_on_from_random_points(
    make: Callable[[], Agent], stubborn: BaseSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoprune.agents.optuna.neighbour", lambda *_, **__: None)
    monkeypatch.setattr("autoprune.agents.optuna.TPESampler", lambda **_: stubborn)
    assert len(proposed(make(), evaluations=6)) == 6


def test_without_switches_a_search_ends_where_its_sampler_repeats_itself(stubborn: BaseSampler) -> None:
    assert len(proposed(OptunaAgent(stubborn), evaluations=6)) == 1


@pytest.mark.parametrize("kind", [TPEAgent, UnivariateTPEAgent, MultiObjectiveTPEAgent])
def test_where_several_are_under_way_an_estimator_keeps_away_from_them(
    kind: Callable[..., Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    liars: list[bool] = []

    def sampler(*, constant_liar: bool, **settings: Any) -> TPESampler:
        liars.append(constant_liar)
        return TPESampler(constant_liar=constant_liar, **settings)

    monkeypatch.setattr("autoprune.agents.optuna.TPESampler", sampler)
    proposed(kind(), evaluations=2)
    proposed(kind(), evaluations=2, at_once=2)
    proposed(kind(storage=optuna.storages.InMemoryStorage(), study="s"), evaluations=2)  # as others may share it
    assert liars == [False, True, True]


# -- any sampler ------------------------------------------------------------------------------------------------------


def test_the_search_seeds_the_sampler_that_a_function_makes() -> None:
    for factory in (TPESampler, partial(TPESampler, n_startup_trials=5), lambda seed: RandomSampler(seed=seed)):
        agent = OptunaAgent(factory)
        assert proposed(agent, seed=1) == proposed(agent, seed=1) != proposed(agent, seed=2)


def test_a_sampler_object_is_copied_and_has_its_own_seed() -> None:
    agent = OptunaAgent(TPESampler(seed=5))
    first = proposed(agent, seed=1)
    assert (
        proposed(agent, seed=2) == first
    )  # the search's seed makes no difference, nor does it matter that it was used
    assert proposed(OptunaAgent(TPESampler(seed=6)), seed=1) != first


def test_a_sampler_of_ones_own_is_enough() -> None:
    class Middle(BaseSampler):
        """Walks from the middle along every coordinate."""

        def infer_relative_search_space(self, study: object, trial: object) -> dict[str, BaseDistribution]:
            return {}

        def sample_relative(self, study: object, trial: object, search_space: object) -> dict[str, object]:
            return {}

        def sample_independent(self, study: object, trial: FrozenTrial, name: str, distribution: object) -> float:
            return (0.5 + trial.number * ord(name[-1]) / 40) % 1

    assert len(proposed(OptunaAgent(Middle()), evaluations=5)) > 1


def test_several_objectives_with_any_sampler() -> None:
    agent = OptunaAgent(NSGAIISampler(seed=0, population_size=4), objectives="several")
    assert len(proposed(agent)) == 16


def test_a_sampler_without_a_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="this CmaEsSampler has no seed"):
        OptunaAgent(CmaEsSampler())


@pytest.mark.parametrize(("sampler", "message"), [("tpe", "must be an Optuna sampler"), (None, "but got None")])
def test_what_is_no_sampler_is_refused(sampler: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptunaAgent(sampler)  # type: ignore[arg-type]


def test_what_cannot_be_copied_is_refused() -> None:
    sampler = RandomSampler(seed=0)
    sampler.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="RandomSampler can't be copied"):
        OptunaAgent(sampler)


@pytest.mark.filterwarnings("ignore:PartialFixedSampler is experimental")
def test_another_sampler_is_another_agent() -> None:
    told = [
        OptunaAgent(sampler).described
        for sampler in (
            TPESampler,
            RandomSampler,
            partial(TPESampler, n_startup_trials=5),
            lambda seed: TPESampler(seed=seed, n_startup_trials=6),
            lambda seed: TPESampler(seed=seed, n_startup_trials=7),
            TPESampler(seed=5),
            TPESampler(seed=6),
            PartialFixedSampler({"x": 0.5}, TPESampler(seed=0, n_startup_trials=6)),
            PartialFixedSampler({"x": 0.5}, TPESampler(seed=0, n_startup_trials=7)),
            GridSampler({"x": [0.0, 1.0]}, seed=0),
            GridSampler({"x": [0.5, 1.0]}, seed=0),
        )
    ]
    assert len(set(told)) == len(told)
    assert OptunaAgent(TPESampler(seed=5)).described == told[5]
    assert OptunaAgent(lambda seed: TPESampler(seed=seed)).described == told[0]
    assert told[2].startswith("optuna.samplers._tpe.sampler.TPESampler(")
    assert "n_startup_trials=5" in told[2]


def test_what_makes_no_sampler_is_refused() -> None:
    with pytest.raises(ConfigError, match="must make an Optuna sampler, but it made 'tpe'"):
        OptunaAgent(lambda seed: "tpe")  # type: ignore[arg-type,return-value]


def test_copies_of_an_agent_share_their_study() -> None:
    storage = optuna.storages.InMemoryStorage()
    agent = OptunaAgent(RandomSampler, storage=storage, study="shared")
    proposed(copy.deepcopy(agent), evaluations=3)
    assert len(optuna.load_study(study_name="shared", storage=storage).trials) >= 3


# -- how good they are ------------------------------------------------------------------------------------------------


def test_tpe_finds_the_known_optimum_of_a_small_space() -> None:
    env, evaluator = synthetic_env(evaluations=60, widths=(8, 8), seed=1)
    run_agent(TPEAgent(), env, seed=0)
    found = max(evaluator.candidates, key=lambda candidate: candidate.accuracy)
    assert found.accuracy == pytest.approx(evaluator.accuracy(evaluator.optimum()), abs=0.02)


def test_nsga2_leaves_a_front() -> None:
    env, evaluator = synthetic_env(evaluations=60, objectives="several")
    run_agent(NSGA2Agent(), env, seed=0)
    points = np.array([env.objectives(candidate) for candidate in evaluator.candidates]) * [1, -1, -1]
    beaten = [np.any(np.all(points >= p, axis=1) & np.any(points > p, axis=1)) for p in points]
    assert len(points) - sum(beaten) >= 10
    late = np.mean(beaten[-20:])
    assert late < np.mean(beaten[:20])  # later generations are beaten less often


def test_warm_starts_come_first() -> None:
    env, evaluator = synthetic_env(evaluations=6)
    starts = [env.space.decode([0.1, 0.9, 0.5, 0.2]), env.space.decode([0.9, 0.1, 0.5, 0.2])]
    warm = PruningEnv(
        env.feasible, env.space, evaluator.submit, value=lambda c: c.accuracy, evaluations=6, warm_starts=starts
    )
    run_agent(TPEAgent(), warm, seed=0)
    assert [candidate.policy for candidate in evaluator.candidates[:2]] == starts


@pytest.mark.parametrize("kind", [*BY_NAME, OptunaAgent, partial(OptunaAgent, objectives="several")])
def test_warm_starts_are_a_switch(kind: Callable[..., Agent]) -> None:
    env, _ = synthetic_env(evaluations=2, objectives=kind().objectives)
    starts = [policy.id for policy in warm_starts(env, 2)]
    assert proposed(kind(), warm=2, evaluations=5)[:2] == starts
    without = proposed(kind(warm_start=False), warm=2, evaluations=5)
    assert without == proposed(kind(), evaluations=5)


def test_cmaes_begins_around_the_best_warm_start() -> None:
    def distance(agent: Agent) -> float:
        env, evaluator = synthetic_env(evaluations=12, widths=(32, 32, 32, 32))
        start = env.space.decode([0.05, 0.95, 0.05, 0.95])
        warmed = PruningEnv(
            env.feasible, env.space, evaluator.submit, value=lambda c: c.accuracy, evaluations=12, warm_starts=[start]
        )
        run_agent(agent, warmed, seed=0)
        counts = np.array([env.feasible.removed(c.policy) for c in evaluator.candidates[1:]])
        return float(np.abs(counts - env.feasible.removed(start)).mean())

    assert distance(CMAESAgent()) < 0.6 * distance(CMAESAgent(warm_start=False))


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> list[optuna.Study]:
    """Return the studies that are created, one after another."""
    found: list[optuna.Study] = []
    create = optuna.create_study

    def kept(**arguments: object) -> optuna.Study:
        found.append(create(**arguments))  # type: ignore[arg-type]  # passed on as they are
        return found[-1]

    monkeypatch.setattr(optuna, "create_study", kept)
    return found


def told(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials of which a study knows the values."""
    return study.get_trials(states=(TrialState.COMPLETE,))


def test_what_is_told_belongs_to_the_point_that_was_asked(studies: list[optuna.Study]) -> None:
    env, evaluator = synthetic_env(evaluations=15)
    run_agent(TPEAgent(), env, seed=0)
    assert len(told(studies[0])) >= 15
    for trial in told(studies[0]):
        policy = env.space.decode([trial.params[name] for name in env.space.dimensions])
        assert trial.value == evaluator.accuracy(policy)


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("kind", [TPEAgent, UnivariateTPEAgent, MultiObjectiveTPEAgent])
def test_an_estimator_goes_by_the_best_and_the_newest_of_many_trials(
    kind: Callable[..., Agent], at_once: int, studies: list[optuna.Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoprune.agents.optuna._MOST", 20)
    monkeypatch.setattr("autoprune.agents.optuna._BEST", 4)
    monkeypatch.setattr("autoprune.agents.optuna._NEWEST", 8)
    env, evaluator = synthetic_env(evaluations=60, objectives=kind().objectives)
    several = PruningEnv(
        env.feasible, env.space, evaluator.submit, value=lambda c: c.accuracy, evaluations=60, at_once=at_once
    )
    run_agent(kind(), several, seed=0)
    assert len(studies) >= 4
    values = set[float]()
    for before, after in itertools.pairwise(studies):
        known = told(before)
        assert len(known) == 20
        values |= {trial.values[0] for trial in known}
        kept = [trial.params for trial in told(after)]
        assert all(trial.params in kept for trial in known[-8:])
        if kind is MultiObjectiveTPEAgent:
            assert max(known, key=lambda trial: trial.values[0]).params in kept
        else:
            assert all(trial.params in kept for trial in sorted(known, key=lambda trial: -trial.values[0])[:4])
        for trial in told(after):
            policy = env.space.decode([trial.params[name] for name in env.space.dimensions])
            assert trial.values[0] == evaluator.accuracy(policy)
    values |= {trial.values[0] for trial in told(studies[-1])}
    under_way = len(evaluator.candidates) - len({c.accuracy for c in evaluator.candidates} & values)
    assert under_way < at_once + (at_once > 1)  # all else was told, whichever study it was asked from
    assert len(studies[-1].get_trials(states=(TrialState.RUNNING,))) <= at_once


def test_optunas_verbosity_is_put_back() -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        env, _ = synthetic_env(evaluations=2)
        run_agent(TPEAgent(), env, seed=0)
        assert optuna.logging.get_verbosity() == logging.DEBUG
    finally:
        optuna.logging.set_verbosity(before)


@pytest.mark.parametrize("name", ["cmaes", "gp", "motpe", "nsga2", "nsga3", "qmc", "tpe", "tpe-univariate"])
def test_nothing_is_written_to_the_terminal(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    proposed(resolve("agent", name)(), evaluations=6)
    assert capfd.readouterr() == ("", "")


def test_without_cmaes_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install \"autoprune\[samplers\]\""):
        CMAESAgent()


def test_no_search_goes_on_after_an_error_of_the_evaluator() -> None:
    env, _ = synthetic_env(evaluations=3)

    def broken(policy: Policy, rival: Policy | None = None) -> Candidate:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        TPEAgent().run(PruningEnv(env.feasible, env.space, broken, value=float, evaluations=3), seed=0)  # type: ignore[arg-type]  # never called


@pytest.mark.parametrize(
    ("agent", "settings"),
    [(TPEAgent, {"startup": 0}), (NSGA2Agent, {"population": 1}), (CMAESAgent, {"population": 2})],
)
def test_useless_settings_are_refused(agent: type, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must hold"):
        agent(**settings)


def test_the_dashboard_lists_a_study_and_its_trials(tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    env, evaluator = synthetic_env(evaluations=2)  # each waits for the disk
    env.name = "a search"
    run_agent(OptunaAgent(RandomSampler, storage=url, study="resnet"), env, seed=0)
    storage = optuna.storages.RDBStorage(url)
    app = dashboard.wsgi(storage)

    def got(path: str) -> Any:
        request: dict[str, Any] = {}
        setup_testing_defaults(request)
        statuses: list[str] = []
        body = b"".join(app(request | {"PATH_INFO": path}, lambda status, *_: statuses.append(status)))
        assert statuses == ["200 OK"]
        return json.loads(body)

    try:
        (study,) = got("/api/studies")["study_summaries"]
        assert (study["study_name"], study["directions"]) == ("resnet", ["maximize"])
        trials = got(f"/api/studies/{study['study_id']}")["trials"]
    finally:
        storage.remove_session()
        storage.engine.dispose()
    assert [trial["values"] for trial in trials] == [[candidate.accuracy] for candidate in evaluator.candidates]
    for trial, candidate in zip(trials, evaluator.candidates, strict=True):
        assert trial["state"] == "Complete"
        assert {param["name"] for param in trial["params"]} == set(env.space.dimensions)
        attributes = {attribute["key"]: attribute["value"] for attribute in trial["user_attrs"]}
        assert attributes == {
            "run": "a search",
            "policy": candidate.id,
            "number": str(candidate.number),
            "macs": str(candidate.macs),
            "params": str(candidate.params),
            "accuracy": str(candidate.accuracy),
            "fidelity": "short",
        }
