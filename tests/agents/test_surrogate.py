import dataclasses

import numpy as np
import pytest

from autoprune.agents.base import Agent
from autoprune.agents.evolution import EvolutionAgent
from autoprune.agents.surrogate import SurrogateAgent
from autoprune.environment import PruningEnv
from autoprune.errors import ConfigError
from autoprune.evaluation import Candidate
from autoprune.search_spaces.per_group import PerGroup
from autoprune.testing import AgentContract, run_agent, synthetic_env

WIDTHS = (16, 16, 16, 32, 32, 32)


class TestSurrogateAgent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return SurrogateAgent(drawn=20)


def _best(agent: Agent, seed: int, interaction: float = 1.0) -> float:
    env, evaluator = synthetic_env(evaluations=30, seed=seed, widths=WIDTHS, interaction=interaction)
    run_agent(agent, env, seed=seed)
    return max(candidate.accuracy for candidate in evaluator.candidates)


@pytest.mark.parametrize("interaction", [1.0, 10.0])
def test_beats_evolution_at_equal_evaluations(interaction: float) -> None:
    """It is evolution with a model; random is behind evolution."""
    agents = SurrogateAgent(), EvolutionAgent()
    ours, theirs = ([_best(agent, seed, interaction) for seed in range(2)] for agent in agents)
    gains = np.subtract(ours, theirs)
    assert gains.min() > 0


def test_finds_the_known_optimum_of_a_small_space() -> None:
    env, evaluator = synthetic_env(evaluations=30, widths=(8, 8, 8), seed=1)
    run_agent(SurrogateAgent(), env, seed=0)
    found = max(candidate.accuracy for candidate in evaluator.candidates)
    assert found == pytest.approx(evaluator.accuracy(evaluator.optimum()), abs=1e-3)


def test_warm_starts_come_first_and_uniform_where_there_are_none() -> None:
    env, evaluator = synthetic_env(evaluations=5)
    uniform = env.feasible.policy(env.feasible.uniform())
    assert env.measured is not None
    env.warm_starts = (env.measured.allocate(env.feasible), uniform, uniform)
    run_agent(SurrogateAgent(), env, seed=0)
    assert tuple(candidate.policy for candidate in evaluator.candidates[:2]) == env.warm_starts[:2]
    assert evaluator.candidates[2].policy != uniform
    cold, evaluator = synthetic_env(evaluations=5)
    cold.warm_starts = env.warm_starts
    run_agent(SurrogateAgent(warm_start=False), cold, seed=0)
    assert evaluator.candidates[0].policy == uniform
    assert env.warm_starts[0] not in [candidate.policy for candidate in evaluator.candidates]


@pytest.mark.parametrize("known", ["predicted", "measured", "some predicted", "nothing"])
def test_it_goes_by_what_there_is(known: str) -> None:
    def made() -> PruningEnv:
        env, _ = synthetic_env(evaluations=20, widths=WIDTHS)
        predicted = env.predicted
        assert predicted is not None
        if known == "some predicted":
            losses = {name: predicted.losses[name] for name in ("conv1", "conv4")}
            env.predicted = dataclasses.replace(predicted, losses=losses)
        if known in ("measured", "nothing"):
            env.predicted = None
        if known == "nothing":
            env.measured = None
        return env

    values = []
    env = made()
    value = env.value
    env.value = lambda candidate: values.append(value(candidate)) or values[-1]  # type: ignore[method-assign,func-returns-value]
    run_agent(SurrogateAgent(), env, seed=0)
    assert len(values) == 20
    assert max(values[7:]) > max(values[:7])


def test_of_what_is_under_way_nothing_is_drawn_twice() -> None:
    env, evaluator = synthetic_env(evaluations=24, widths=WIDTHS)
    env.at_once = 6
    run_agent(SurrogateAgent(), env, seed=0)
    assert len(evaluator.candidates) == 24
    assert evaluator.calls == 24 + 1  # the last is told that the search is over


def test_where_nothing_can_be_switched_it_ends() -> None:
    env, evaluator = synthetic_env(evaluations=9, widths=(8,))
    SurrogateAgent().run(env, seed=0)  # returns
    assert len(evaluator.candidates) == 1


def test_where_the_share_of_the_budget_is_free_it_is_searched_too() -> None:
    env, evaluator = synthetic_env(evaluations=40)
    env.space = PerGroup(env.feasible, spend=(0.0, 1.0))
    dense = env.feasible.costs.dense.macs

    def tolerant(candidate: Candidate) -> float:
        missing = 0.8 - candidate.accuracy
        return -missing if missing > 0 else 1 - candidate.macs / dense

    env.value = tolerant  # type: ignore[method-assign]
    run_agent(SurrogateAgent(drawn=30), env, seed=0)
    picked = max(evaluator.candidates, key=tolerant)
    assert picked.accuracy >= 0.8
    assert picked.macs < 0.8 * evaluator.candidates[0].macs


@pytest.mark.parametrize("name", ["drawn", "survivors", "step"])
def test_useless_settings_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name} > 0` must hold, but got {name}=0"):
        SurrogateAgent(**{name: 0})
    with pytest.raises(ConfigError, match="`optimism >= 0` must hold, but got optimism=-1"):
        SurrogateAgent(optimism=-1)
