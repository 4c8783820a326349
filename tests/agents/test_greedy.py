import numpy as np
import pytest

from autoprune.agents.base import Agent
from autoprune.agents.greedy import GreedyAgent, lowered
from autoprune.evaluation import Candidate
from autoprune.search_spaces.per_group import PerGroup
from autoprune.testing import AgentContract, chain, run_agent, synthetic_env


class TestGreedyAgent(AgentContract):
    deterministic = True

    @pytest.fixture
    def agent(self) -> Agent:
        return GreedyAgent()


def test_a_group_gives_up_just_enough() -> None:
    feasible = chain((8, 12, 16), "macs<=50%")
    dense = feasible.lower
    for index in range(3):
        after = lowered(feasible, dense, index, 1.7)
        assert feasible.utilisation(after) <= 1.7
        after[index] -= 1
        assert feasible.utilisation(after) > 1.7
        assert np.array_equal(np.delete(after, index), np.delete(dense, index))
    assert lowered(feasible, dense, 0, 0.1).tolist() == [feasible.upper[0], 0, 0]  # all that it may
    assert lowered(feasible, feasible.upper, 1, 1.9).tolist() == feasible.upper.tolist()  # nothing comes back


def test_every_step_keeps_the_best_and_completes_it() -> None:
    """By hand: 12 evaluations of three groups are four steps."""
    env, evaluator = synthetic_env(evaluations=12, widths=(16, 16, 16))
    feasible = env.feasible
    run_agent(GreedyAgent(), env, seed=0)
    standing = feasible.lower
    order = sorted(range(3), key=lambda index: -feasible.costs.macs_share(feasible.structure.names[index]))
    expected = []
    for steps in (4, 3, 2, 1):
        target = feasible.utilisation(standing) + (1 - feasible.utilisation(standing)) / steps
        tried = [lowered(feasible, standing, index, target) for index in order]
        policies = [feasible.policy(feasible.project(counts / feasible.sizes)) for counts in tried]
        expected += policies
        standing = tried[int(np.argmax([evaluator.accuracy(policy) for policy in policies]))]
    proposed = [candidate.policy for candidate in evaluator.candidates]
    assert proposed == list(dict.fromkeys(expected))[: len(proposed)]
    assert len(proposed) >= 10


def test_all_evaluations_are_within_the_budget_and_more_steps_do_not_cost_more() -> None:
    for evaluations in (1, 2, 5, 24, 200):
        env, evaluator = synthetic_env(evaluations=evaluations, widths=(8, 8, 8))
        run_agent(GreedyAgent(), env, seed=0)
        assert 1 <= len(evaluator.candidates) <= evaluations
        for candidate in evaluator.candidates:
            assert env.feasible.utilisation(env.feasible.removed(candidate.policy)) <= 1


def test_a_policy_is_asked_for_once() -> None:
    env, evaluator = synthetic_env(evaluations=200, widths=(6, 6))
    GreedyAgent().run(env, seed=0)  # returns
    assert evaluator.calls == len(evaluator.candidates)


def test_locked_groups_are_left_alone() -> None:
    env, evaluator = synthetic_env(evaluations=20)
    env.feasible.upper[1] = env.feasible.lower[1] = 2
    run_agent(GreedyAgent(), env, seed=0)
    assert {candidate.removed["conv2"] for candidate in evaluator.candidates} == {2}


def test_where_a_drop_is_tolerated_it_walks_until_that_is_passed() -> None:
    env, evaluator = synthetic_env(evaluations=60, seed=1)
    env.feasible = chain((8, 8, 16, 16), "macs<=100%")
    env.space = PerGroup(env.feasible, spend=(0.0, 1.0))
    dense = env.feasible.costs.dense.macs

    def tolerant(candidate: Candidate) -> float:
        missing = 0.9 - candidate.accuracy
        return -missing if missing > 0 else 1 - candidate.macs / dense

    env.value = tolerant  # type: ignore[method-assign]
    GreedyAgent().run(env, seed=0)  # returns
    candidates = evaluator.candidates
    assert candidates[0].macs > 0.8 * dense  # nothing is completed
    picked = max(candidates, key=tolerant)
    assert picked.accuracy >= 0.9
    assert picked.macs < 0.5 * dense
    assert max(candidate.accuracy for candidate in candidates[-2:]) < 0.9
