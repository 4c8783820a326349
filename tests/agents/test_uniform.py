import pytest

from autoprune.agents.base import Agent
from autoprune.agents.uniform import UniformAgent
from autoprune.search_spaces.uniform import Uniform
from autoprune.testing import AgentContract, run_agent, synthetic_env


class TestUniformAgent(AgentContract):
    deterministic = True

    @pytest.fixture
    def agent(self) -> Agent:
        return UniformAgent()


def test_starts_at_the_budget_and_ends_at_the_smallest() -> None:
    env, evaluator = synthetic_env(evaluations=10)
    UniformAgent().run(env, seed=0)
    policies = [candidate.policy for candidate in evaluator.candidates]
    assert policies[0] == Uniform(env.feasible, spend=(1.0, 1.0)).decode([])
    assert policies[-1] == env.feasible.policy(env.feasible.upper)
    macs = [candidate.macs for candidate in evaluator.candidates]
    assert macs == sorted(macs, reverse=True)


def test_returns_when_it_is_done() -> None:
    env, evaluator = synthetic_env(evaluations=10)
    UniformAgent().run(env, seed=0)
    assert evaluator.calls == 10
    run_agent(UniformAgent(), env, seed=0)
    assert evaluator.calls == 20  # all known, so nothing ended it
