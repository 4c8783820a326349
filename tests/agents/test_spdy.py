import numpy as np
import pytest

from autoprune.agents.base import Agent
from autoprune.agents.random import RandomAgent
from autoprune.agents.spdy import SPDYAgent
from autoprune.errors import ConfigError
from autoprune.search_spaces.per_group import PerGroup
from autoprune.testing import AgentContract, SyntheticEvaluator, run_agent, synthetic_env


class TestSPDYAgent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return SPDYAgent()


def best_of(evaluator: SyntheticEvaluator) -> float:
    return max(candidate.accuracy for candidate in evaluator.candidates)


def test_begins_with_the_separable_solution_and_improves_on_it() -> None:
    gains, over_random = [], []
    for seed in range(3):
        env, evaluator = synthetic_env(evaluations=15, seed=seed)
        evaluator.interactions *= 3  # which the measured curves do not show
        run_agent(SPDYAgent(), env, seed=seed)
        assert env.measured is not None
        assert evaluator.candidates[0].policy == env.measured.allocate(env.feasible)
        gains.append(best_of(evaluator) - evaluator.candidates[0].accuracy)
        control, drawn = synthetic_env(evaluations=15, seed=seed)
        drawn.interactions *= 3
        run_agent(RandomAgent(), control, seed=seed)
        over_random.append(best_of(evaluator) - best_of(drawn))
    assert min(gains) >= 0
    assert np.mean(gains) > 0
    assert np.mean(over_random) > 0.01


def test_where_the_share_of_the_budget_is_free_it_is_searched_too() -> None:
    env, evaluator = synthetic_env(evaluations=12)
    env.space = PerGroup(env.feasible, spend=(0.0, 1.0))
    run_agent(SPDYAgent(), env, seed=0)
    used = [env.feasible.utilisation(env.feasible.removed(c.policy)) for c in evaluator.candidates]
    assert max(used) > 0.95
    assert min(used) < 0.5
    assert len({round(share, 2) for share in used}) > 5


def test_without_a_measurement_it_says_so() -> None:
    env, _ = synthetic_env(evaluations=5)
    env.measured = None
    with pytest.raises(ConfigError, match="none was measured"):
        SPDYAgent().run(env, seed=0)


def test_steps_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="`step > 0` must hold, but got step=0"):
        SPDYAgent(step=0)
