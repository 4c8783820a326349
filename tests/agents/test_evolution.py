import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.agents.base import Agent
from autoprune.agents.evolution import EvolutionAgent, switched
from autoprune.cost import FeasibleSet
from autoprune.errors import ConfigError
from autoprune.evaluation import Candidate, Result
from autoprune.policy import Policy
from autoprune.search_spaces.per_group import PerGroup
from autoprune.testing import AgentContract, chain, run_agent, synthetic_env

FEASIBLE = chain((8, 12, 16, 5), "macs<=45%,params<=60%")
EVEN = dataclasses.replace(
    FEASIBLE,
    structure=dataclasses.replace(
        FEASIBLE.structure, groups=tuple(dataclasses.replace(group, multiple=2) for group in FEASIBLE.structure)
    ),
)


class TestEvolutionAgent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return EvolutionAgent()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([FEASIBLE, EVEN]), st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_a_switch_keeps_the_cost(feasible: FeasibleSet, seed: int, step: float) -> None:
    rng = np.random.default_rng(seed)
    before = feasible.project(rng.random(4))
    as_it_was = before.copy()
    after = switched(feasible, before, rng, step=step)
    assert np.array_equal(before, as_it_was)
    assert np.array_equal(feasible.settled(after), after)
    assert feasible.utilisation(after) <= 1
    for index in np.flatnonzero(after > feasible.lower):
        fewer = after.copy()
        fewer[index] = max(feasible.fewer(after)[index], feasible.lower[index])
        assert feasible.utilisation(fewer) > 1, "an element could come back"


def test_a_switch_moves_sparsity_from_some_groups_to_others() -> None:
    rng = np.random.default_rng(0)
    before = FEASIBLE.uniform()
    moved = [switched(FEASIBLE, before, rng) - before for _ in range(50)]
    assert sum(bool(change.any()) for change in moved) > 40
    assert all(change.max() > 0 > change.min() for change in moved if change.any())


def test_a_switch_brings_what_costs_too_much_to_the_budget() -> None:
    after = switched(FEASIBLE, FEASIBLE.lower, np.random.default_rng(0))
    assert 0.9 < FEASIBLE.utilisation(after) <= 1


def test_where_nothing_can_be_switched_nothing_is() -> None:
    locked = dataclasses.replace(FEASIBLE, lower=FEASIBLE.uniform(), upper=FEASIBLE.uniform())
    assert np.array_equal(switched(locked, locked.lower, np.random.default_rng(0)), locked.lower)
    env, evaluator = synthetic_env(evaluations=9, widths=(8,))
    EvolutionAgent().run(env, seed=0)  # returns
    assert len(evaluator.candidates) == 1


def test_warm_starts_come_first_and_uniform_where_there_are_none() -> None:
    env, evaluator = synthetic_env(evaluations=5)
    uniform = env.feasible.policy(env.feasible.uniform())
    run_agent(EvolutionAgent(), env, seed=0)
    assert evaluator.candidates[0].policy == uniform
    env, evaluator = synthetic_env(evaluations=5)
    assert env.measured is not None
    env.warm_starts = (env.measured.allocate(env.feasible), uniform, uniform)
    run_agent(EvolutionAgent(), env, seed=0)
    assert tuple(candidate.policy for candidate in evaluator.candidates[:2]) == env.warm_starts[:2]
    assert evaluator.candidates[2].policy != uniform
    cold, evaluator = synthetic_env(evaluations=5)
    cold.warm_starts = env.warm_starts
    run_agent(EvolutionAgent(warm_start=False), cold, seed=0)
    assert evaluator.candidates[0].policy == uniform
    assert env.warm_starts[0] not in [candidate.policy for candidate in evaluator.candidates]


def test_of_equal_ones_the_first_survives() -> None:
    env, evaluator = synthetic_env(evaluations=30)
    start = env.feasible.uniform()
    env.value = lambda candidate: 0.0  # type: ignore[method-assign]
    run_agent(EvolutionAgent(offspring=3), env, seed=0)
    for candidate in evaluator.candidates[1:]:  # all are bred from the first: one switch raises three groups at most
        assert (env.feasible.removed(candidate.policy) > start).sum() <= 3


@pytest.mark.parametrize(("survivors", "parents"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 0])])
def test_survivors_take_turns_as_parents(survivors: int, parents: list[int]) -> None:
    env, evaluator = synthetic_env(evaluations=15, widths=(32, 32, 32, 32))
    corners = ([0.1, 0.9, 0.1, 0.9], [0.9, 0.1, 0.9, 0.1], [0.1, 0.1, 0.9, 0.9])
    env.warm_starts = tuple(env.space.decode(list(corner)) for corner in corners)
    worth = dict(zip(env.warm_starts, (1.0, 3.0, 2.0), strict=True))
    env.value = lambda candidate: worth.get(candidate.policy, 0.0)  # type: ignore[method-assign]
    rivals: list[Policy | None] = []

    def submit(policy: Policy, rival: Policy | None = None) -> Result:
        rivals.append(rival)
        return evaluator.submit(policy)

    env._submit = submit
    run_agent(EvolutionAgent(survivors=survivors, step=0.02), env, seed=0)  # so that a child is beside its parent
    starts = np.array([env.feasible.removed(policy) for policy in env.warm_starts])
    children = [env.feasible.removed(candidate.policy) for candidate in evaluator.candidates[3:]]
    nearest = [int(np.abs(starts - child).sum(axis=1).argmin()) for child in children]
    turns = [parents[number % survivors] for number in range(4)]  # anew in each generation
    assert nearest == turns * 3
    against = [env.warm_starts[parent] for parent in turns * 3]
    assert rivals[:15] == [None, None, None, *against], "in a race, a child is to be as good as its parent"


def test_finds_the_known_optimum_of_a_small_space() -> None:
    env, evaluator = synthetic_env(evaluations=60, widths=(8, 8, 8), seed=1)
    run_agent(EvolutionAgent(), env, seed=0)
    found = max(candidate.accuracy for candidate in evaluator.candidates)
    assert found == pytest.approx(evaluator.accuracy(evaluator.optimum()), abs=1e-3)


def test_where_the_share_of_the_budget_is_free_it_is_searched_too() -> None:
    env, evaluator = synthetic_env(evaluations=40)
    env.space = PerGroup(env.feasible, spend=(0.0, 1.0))
    dense = env.feasible.costs.dense.macs

    def tolerant(candidate: Candidate) -> float:
        missing = 0.8 - candidate.accuracy
        return -missing if missing > 0 else 1 - candidate.macs / dense

    env.value = tolerant  # type: ignore[method-assign]
    run_agent(EvolutionAgent(), env, seed=0)
    picked = max(evaluator.candidates, key=tolerant)
    assert picked.accuracy >= 0.8
    assert picked.macs < 0.8 * evaluator.candidates[0].macs


@pytest.mark.parametrize("name", ["offspring", "survivors", "step"])
def test_useless_settings_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name} > 0` must hold, but got {name}=0"):
        EvolutionAgent(**{name: 0})
