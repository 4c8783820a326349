import numpy as np
import pytest
import torch

from autoprune.agents.base import Agent
from autoprune.agents.global_ranking import GlobalRankingAgent, normalised
from autoprune.errors import ConfigError
from autoprune.search_spaces.per_group import PerGroup
from autoprune.testing import AgentContract, run_agent, synthetic_env


class TestGlobalRankingAgent(AgentContract):
    deterministic = True
    brief = True

    @pytest.fixture
    def agent(self) -> Agent:
        return GlobalRankingAgent()


def test_the_least_important_of_all_groups_go() -> None:
    """One after another, until the budget is met."""
    env, evaluator = synthetic_env(evaluations=1, widths=(8, 8, 8))
    draw = torch.Generator().manual_seed(0)
    env.scores = {
        name: 10.0**power * torch.rand(8, generator=draw) for power, name in enumerate(("conv1", "conv2", "conv3"))
    }
    relative = [(score / score.mean()).tolist() for score in env.scores.values()]
    removed = np.zeros(3, dtype=np.int64)
    for _, index in sorted((score, index) for index, scores in enumerate(relative) for score in scores):
        if env.feasible.utilisation(removed) <= 1:
            break
        removed[index] += 1
    run_agent(GlobalRankingAgent(), env, seed=0)
    (found,) = evaluator.candidates
    assert list(found.removed.values()) == removed.tolist()


def test_of_equal_scores_all_groups_lose_alike() -> None:
    env, evaluator = synthetic_env(evaluations=1, widths=(16, 16, 16))
    env.scores = {name: torch.ones(16) for name in env.feasible.structure.names}
    run_agent(GlobalRankingAgent(), env, seed=0)
    removed = np.array(list(evaluator.candidates[0].removed.values()))
    assert np.ptp(removed) <= 1


def test_scores_are_divided_by_a_power_of_their_mean() -> None:
    scores = [np.array([1.0, 3.0]), np.array([-4.0, 4.0]), np.zeros(2)]
    assert [list(s) for s in normalised(scores)] == [[0.5, 1.5], [-1.0, 1.0], [0.0, 0.0]]
    assert [list(s) for s in normalised(scores, 0.0)] == [list(s) for s in scores]


def test_other_normalisations_follow_until_they_bring_nothing_new() -> None:
    env, evaluator = synthetic_env(evaluations=40, widths=(8, 8))
    GlobalRankingAgent().run(env, seed=0)  # returns
    policies = [candidate.policy for candidate in evaluator.candidates]
    assert evaluator.calls == len(policies) == len(set(policies))
    assert 1 < len(policies) < 40


def test_where_the_share_of_the_budget_is_free_it_solves_evenly_smaller_ones() -> None:
    env, evaluator = synthetic_env(evaluations=5)
    env.space = PerGroup(env.feasible, spend=(0.0, 1.0))
    GlobalRankingAgent().run(env, seed=0)
    macs = [candidate.macs for candidate in evaluator.candidates]
    assert len(macs) == 5
    assert macs == sorted(macs, reverse=True)
    assert evaluator.candidates[-1].cost == env.feasible.smallest


def test_without_scores_it_says_so() -> None:
    env, _ = synthetic_env(evaluations=5)
    env.scores = {"conv1": torch.ones(8)}
    with pytest.raises(ConfigError, match="group 'conv2' has none"):
        GlobalRankingAgent().run(env, seed=0)
