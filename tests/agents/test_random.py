import pytest

from autoprune.agents.base import Agent
from autoprune.agents.random import RandomAgent
from autoprune.testing import AgentContract, run_agent, synthetic_env


class TestRandomAgent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return RandomAgent()


def test_beats_the_worst() -> None:
    env, evaluator = synthetic_env(evaluations=30)
    run_agent(RandomAgent(), env, seed=0)
    worst = evaluator.accuracy(env.feasible.policy(env.feasible.upper))
    assert min(candidate.accuracy for candidate in evaluator.candidates) > worst
