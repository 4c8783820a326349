import logging

import numpy as np
import optuna
import pytest

from autoprune.agents.base import Agent
from autoprune.agents.optuna import NSGA2Agent, TPEAgent
from autoprune.agents.random import RandomAgent
from autoprune.environment import PruningEnv
from autoprune.errors import ConfigError
from autoprune.evaluation.candidate import Candidate
from autoprune.policy import Policy
from autoprune.testing import AgentContract, run_agent, synthetic_env


class TestTPEAgent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return TPEAgent()


class TestNSGA2Agent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return NSGA2Agent()


def best(agent: Agent, seed: int) -> float:
    env, evaluator = synthetic_env(evaluations=50, seed=seed, widths=(16, 16, 16, 32, 32, 32))
    run_agent(agent, env, seed=seed)
    return max(candidate.accuracy for candidate in evaluator.candidates)


def test_tpe_beats_random_at_equal_evaluations() -> None:
    assert np.mean([best(TPEAgent(), seed) - best(RandomAgent(), seed) for seed in range(4)]) > 0.005


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


def test_what_is_told_belongs_to_the_point_that_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    env, evaluator = synthetic_env(evaluations=15)
    studies: list[optuna.Study] = []
    create = optuna.create_study

    def kept(**arguments: object) -> optuna.Study:
        studies.append(create(**arguments))  # type: ignore[arg-type]  # passed on as they are
        return studies[-1]

    monkeypatch.setattr(optuna, "create_study", kept)
    run_agent(TPEAgent(), env, seed=0)
    told = [trial for trial in studies[0].trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(told) >= 15
    for trial in told:
        policy = env.space.decode([trial.params[name] for name in env.space.dimensions])
        assert trial.value == evaluator.accuracy(policy)


def test_optunas_verbosity_is_put_back() -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        env, _ = synthetic_env(evaluations=2)
        run_agent(TPEAgent(), env, seed=0)
        assert optuna.logging.get_verbosity() == logging.DEBUG
    finally:
        optuna.logging.set_verbosity(before)


def test_nothing_is_written_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    env, _ = synthetic_env(evaluations=3)
    run_agent(TPEAgent(), env, seed=0)
    assert capfd.readouterr() == ("", "")


def test_no_search_goes_on_after_an_error_of_the_evaluator() -> None:
    env, _ = synthetic_env(evaluations=3)

    def broken(policy: Policy) -> Candidate:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        TPEAgent().run(PruningEnv(env.feasible, env.space, broken, value=float, evaluations=3), seed=0)  # type: ignore[arg-type]  # never called


@pytest.mark.parametrize(("agent", "settings"), [(TPEAgent, {"startup": 0}), (NSGA2Agent, {"population": 1})])
def test_useless_settings_are_refused(agent: type, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must hold"):
        agent(**settings)
