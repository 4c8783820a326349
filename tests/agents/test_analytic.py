import copy

import numpy as np
import pytest

from autoprune.agents.analytic import AnalyticAgent
from autoprune.agents.base import Agent
from autoprune.errors import ConfigError
from autoprune.testing import AgentContract, run_agent, synthetic_env


class TestAnalyticAgent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return AnalyticAgent()


def test_the_first_policy_is_what_was_predicted() -> None:
    env, evaluator = synthetic_env(evaluations=1)
    run_agent(AnalyticAgent(), env, seed=0)
    assert env.predicted is not None
    assert [candidate.policy for candidate in evaluator.candidates] == [env.predicted.allocate(env.feasible)]


def test_evaluations_correct_the_prediction() -> None:
    gains = []
    for seed in range(5):
        env, evaluator = synthetic_env(evaluations=20, seed=seed)
        run_agent(AnalyticAgent(), env, seed=seed)
        values = [candidate.accuracy for candidate in evaluator.candidates]
        gains.append(max(values) - values[0])
    assert min(gains) >= 0
    assert np.mean(gains) > 0.0002


def test_without_a_prediction_it_says_so() -> None:
    env, _ = synthetic_env(evaluations=5)
    blind = copy.copy(env)
    blind.predicted = None
    with pytest.raises(ConfigError, match="needs to see what the groups' readers read"):
        AnalyticAgent().run(blind, seed=0)


def test_steps_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="`step > 0` must hold, but got step=0"):
        AnalyticAgent(step=0)
