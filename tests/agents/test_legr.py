import numpy as np
import pytest
import torch

from autoprune.agents.base import Agent
from autoprune.agents.global_ranking import GlobalRankingAgent
from autoprune.agents.legr import LeGRAgent, ranked
from autoprune.agents.random import RandomAgent
from autoprune.errors import ConfigError
from autoprune.search_spaces.per_group import PerGroup
from autoprune.testing import AgentContract, chain, run_agent, synthetic_env

WIDTHS = (16, 16, 16, 32, 32, 32)


class TestLeGRAgent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return LeGRAgent()


def test_without_shifts_and_with_unit_scales_it_is_the_global_ranking() -> None:
    for seed in range(3):
        env, evaluator = synthetic_env(evaluations=1, seed=seed, widths=WIDTHS)
        run_agent(GlobalRankingAgent(), env, seed=0)
        (found,) = evaluator.candidates
        plain = dict.fromkeys(env.feasible.structure.names, (1.0, 0.0))
        assert ranked(env.feasible, env.scores, plain) == found.policy
        again, first = synthetic_env(evaluations=1, seed=seed, widths=WIDTHS)
        agent = LeGRAgent()
        run_agent(agent, again, seed=0)
        assert first.candidates[0].policy == found.policy
        assert agent.ranking == plain


def test_a_shift_or_a_scale_spares_a_group() -> None:
    env, _ = synthetic_env(evaluations=1)
    plain = dict.fromkeys(env.feasible.structure.names, (1.0, 0.0))
    before = ranked(env.feasible, env.scores, plain)
    for pair in ((1.0, 5.0), (20.0, 0.0)):
        after = ranked(env.feasible, env.scores, plain | {"conv3": pair})
        assert after["conv3"] < before["conv3"]
        assert sum(after[name] for name in ("conv1", "conv2", "conv4")) > sum(
            before[name] for name in ("conv1", "conv2", "conv4")
        )


def test_what_it_learned_is_the_best_and_serves_every_budget() -> None:
    env, evaluator = synthetic_env(evaluations=40, seed=2, widths=WIDTHS)
    agent = LeGRAgent()
    assert not agent.ranking
    run_agent(agent, env, seed=0)
    best = max(evaluator.candidates, key=lambda candidate: candidate.accuracy)
    assert ranked(env.feasible, env.scores, agent.ranking) == best.policy
    gains = []
    for percent in (35, 65):
        other = chain(WIDTHS, f"macs<={percent}%")
        policy = ranked(other, env.scores, agent.ranking)
        assert other.utilisation(other.removed(policy)) <= 1
        plain = ranked(other, env.scores, dict.fromkeys(other.structure.names, (1.0, 0.0)))
        gains.append(evaluator.accuracy(policy) - evaluator.accuracy(plain))
    assert min(gains) > 0


def test_mutations_change_something_however_few_groups_there_are() -> None:
    env, evaluator = synthetic_env(evaluations=30, widths=(16, 16))  # a tenth of two groups is none
    run_agent(LeGRAgent(population=4), env, seed=0)
    assert len(evaluator.candidates) > 10
    assert evaluator.calls == len(evaluator.candidates)


def test_it_learns_which_group_matters() -> None:
    """All elements have the same score, but one group must not be touched."""
    feasible = chain((16, 16, 16))
    found = []
    for seed in range(3):
        env, evaluator = synthetic_env(evaluations=40, widths=(16, 16, 16))
        evaluator.weights, evaluator.interactions = np.array([0.0, 1.0, 0.0]), np.zeros(2)
        env.scores = {name: torch.linspace(0.9, 1.1, 16) for name in feasible.structure.names}
        run_agent(LeGRAgent(), env, seed=seed)
        found.append(max(evaluator.candidates, key=lambda candidate: candidate.accuracy).removed["conv2"])
    assert max(found) <= 2


def best(agent: Agent, seed: int) -> float:
    env, evaluator = synthetic_env(evaluations=40, seed=seed, widths=WIDTHS)
    run_agent(agent, env, seed=seed)
    return max(candidate.accuracy for candidate in evaluator.candidates)


def test_beats_random_at_equal_evaluations() -> None:
    assert np.mean([best(LeGRAgent(), seed) - best(RandomAgent(), seed) for seed in range(4)]) > 0.015


def test_where_the_share_of_the_budget_is_free_it_is_searched_too() -> None:
    env, evaluator = synthetic_env(evaluations=20)
    env.space = PerGroup(env.feasible, spend=(0.0, 1.0))
    run_agent(LeGRAgent(), env, seed=0)
    used = [env.feasible.utilisation(env.feasible.removed(c.policy)) for c in evaluator.candidates]
    assert used[0] > 0.9
    assert max(used) <= 1
    assert len({round(share, 2) for share in used}) > 5


def test_a_run_forgets_the_last_one() -> None:
    agent = LeGRAgent()
    run_agent(agent, synthetic_env(evaluations=5)[0], seed=0)
    env = synthetic_env(evaluations=0)[0]
    run_agent(agent, env, seed=0)
    assert not agent.ranking


def test_without_scores_it_says_so() -> None:
    env, _ = synthetic_env(evaluations=5)
    env.scores = {}
    with pytest.raises(ConfigError, match="group 'conv1' has none"):
        LeGRAgent().run(env, seed=0)


def test_a_population_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="`population >= 2` must hold, but got population=1"):
        LeGRAgent(population=1)
