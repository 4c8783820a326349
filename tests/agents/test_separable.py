import dataclasses

import numpy as np
import pytest

from autoprune.agents.base import Agent
from autoprune.agents.random import RandomAgent
from autoprune.agents.separable import SeparableAgent
from autoprune.environment import PruningEnv
from autoprune.errors import ConfigError
from autoprune.search_spaces.per_group import PerGroup
from autoprune.testing import AgentContract, SyntheticEvaluator, chain, run_agent, synthetic_env


class TestSeparableAgent(AgentContract):
    deterministic = True
    brief = True

    @pytest.fixture
    def agent(self) -> Agent:
        return SeparableAgent()


@pytest.mark.parametrize("seed", range(4))
def test_finds_the_optimum_where_groups_do_not_interact(seed: int) -> None:
    feasible = chain((12, 10, 8))
    evaluator = SyntheticEvaluator(feasible, evaluations=1, seed=seed)
    evaluator.interactions[:] = 0
    env = PruningEnv(
        feasible,
        PerGroup(feasible, spend=(1.0, 1.0)),
        evaluator.submit,
        value=lambda candidate: candidate.accuracy,
        evaluations=1,
        measured=evaluator.measured(),
    )
    SeparableAgent().run(env, seed=0)
    (found,) = evaluator.candidates
    lost = 1 - evaluator.accuracy(evaluator.optimum())
    assert 1 - found.accuracy <= 1.1 * lost + 1e-9


def test_evaluates_what_the_report_allocates_and_nothing_else() -> None:
    env, evaluator = synthetic_env(evaluations=10)
    SeparableAgent().run(env, seed=0)
    assert env.measured is not None
    assert [candidate.policy for candidate in evaluator.candidates] == [env.measured.allocate(env.feasible)]


def test_one_evaluation_beats_twenty_of_random() -> None:
    best: dict[type, list[float]] = {SeparableAgent: [], RandomAgent: []}
    for kind, found in best.items():
        for seed in range(4):
            env, evaluator = synthetic_env(evaluations=20, seed=seed)
            run_agent(kind(), env, seed=seed)
            found.append(max(candidate.accuracy for candidate in evaluator.candidates))
    assert np.mean(best[SeparableAgent]) > np.mean(best[RandomAgent]) + 0.01


def test_where_the_share_of_the_budget_is_free_it_solves_evenly_smaller_ones() -> None:
    env, evaluator = synthetic_env(evaluations=5)
    env.space = PerGroup(env.feasible, spend=(0.0, 1.0))
    SeparableAgent().run(env, seed=0)
    macs = [candidate.macs for candidate in evaluator.candidates]
    assert macs == sorted(macs, reverse=True)
    assert evaluator.candidates[-1].cost == env.feasible.smallest
    steps = -np.diff(macs)
    assert steps.max() < 1.5 * steps.min()


def test_groups_that_were_not_measured_stay_whole() -> None:
    env, evaluator = synthetic_env(evaluations=1)
    assert env.measured is not None
    first, *others = env.measured.groups
    env.measured = dataclasses.replace(env.measured, groups=(dataclasses.replace(first, cells=()), *others))
    SeparableAgent().run(env, seed=0)
    assert evaluator.candidates[0].removed[first.name] == 0


def test_without_a_measurement_it_says_so() -> None:
    env, _ = synthetic_env(evaluations=5)
    env.measured = None
    with pytest.raises(ConfigError, match="none was measured"):
        SeparableAgent().run(env, seed=0)
