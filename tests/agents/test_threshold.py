import dataclasses

import numpy as np
import pytest

from autoprune.agents.base import Agent
from autoprune.agents.threshold import ThresholdAgent
from autoprune.errors import ConfigError
from autoprune.search_spaces.per_group import PerGroup
from autoprune.testing import AgentContract, run_agent, synthetic_env

WIDTHS = (16, 16, 16, 32, 32, 32)


class TestThresholdAgent(AgentContract):
    deterministic = True
    brief = True

    @pytest.fixture
    def agent(self) -> Agent:
        return ThresholdAgent()


@pytest.mark.parametrize("seed", range(3))
def test_the_first_policy_lets_every_group_lose_the_same(seed: int) -> None:
    env, evaluator = synthetic_env(evaluations=1, seed=seed, widths=WIDTHS)
    run_agent(ThresholdAgent(), env, seed=0)
    measured = env.measured
    assert measured is not None
    (found,) = evaluator.candidates
    assert found.policy == measured.threshold(env.feasible)
    names = env.feasible.structure.names
    lost = np.array([measured.curve(name).loss_at(found.removed[name]) for name in names])
    more = np.array([measured.curve(name).loss_at(found.removed[name] + 1) for name in names])
    free = np.array([found.removed[name] for name in names]) < env.feasible.upper
    assert lost.max() < 1.5 * more[free].min()  # none lost much more than another would for one element more


def test_other_measures_follow_until_they_bring_nothing_new() -> None:
    env, evaluator = synthetic_env(evaluations=30, widths=WIDTHS)
    ThresholdAgent().run(env, seed=0)  # returns
    policies = [candidate.policy for candidate in evaluator.candidates]
    assert evaluator.calls == len(policies) == len(set(policies))
    assert 3 < len(policies) < 30


def test_the_accuracy_that_is_lost_is_a_measure_too() -> None:
    env, evaluator = synthetic_env(evaluations=40, widths=(16, 16))
    assert env.measured is not None
    rows = []
    for row, accuracy in zip(env.measured.groups, (0.0, 0.9), strict=True):  # by accuracy the first is to be spared
        loss = 0.1 if row.name == "conv1" else 5.0  # and by loss the second
        cells = [
            dataclasses.replace(c, accuracy=1 - (1 - accuracy) * c.sparsity, loss=loss * c.sparsity) for c in row.cells
        ]
        rows.append(dataclasses.replace(row, cells=tuple(cells)))
    env.measured = dataclasses.replace(env.measured, groups=tuple(rows))
    run_agent(ThresholdAgent(), env, seed=0)
    first = evaluator.candidates[0].removed
    assert first["conv1"] > first["conv2"]
    assert any(candidate.removed["conv2"] > candidate.removed["conv1"] for candidate in evaluator.candidates)


def test_where_the_share_of_the_budget_is_free_it_solves_evenly_smaller_ones() -> None:
    env, evaluator = synthetic_env(evaluations=5)
    env.space = PerGroup(env.feasible, spend=(0.0, 1.0))
    ThresholdAgent().run(env, seed=0)
    macs = [candidate.macs for candidate in evaluator.candidates]
    assert len(macs) == 5
    assert macs == sorted(macs, reverse=True)
    assert evaluator.candidates[-1].cost == env.feasible.smallest


def test_without_a_measurement_it_says_so() -> None:
    env, _ = synthetic_env(evaluations=5)
    env.measured = None
    with pytest.raises(ConfigError, match="none was measured"):
        ThresholdAgent().run(env, seed=0)
