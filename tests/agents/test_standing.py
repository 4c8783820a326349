"""Every agent by its name and defaults against random at equal evaluations, on synthetic problems."""

from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import pytest

from autoprune.agents.base import Agent
from autoprune.agents.random import RandomAgent
from autoprune.agents.uniform import UniformAgent
from autoprune.pareto import hypervolume
from autoprune.registry import make, names
from autoprune.testing import SyntheticEvaluator, run_agent, synthetic_env

WIDTHS = (16, 16, 16, 32, 32, 32)
PROBLEMS = range(4)  # of the formula, and the agent's seed

Measure = Literal["accuracy", "volume"]


class Lead(NamedTuple):
    """After how many evaluations an agent is ahead of random, and in what.

    `least` is what it must be ahead by in the mean over the problems; it has twice that or more. With `warm` it first
    tries what the analyzer suggests, as in a search: from nothing, it has no lead after so few.
    """

    evaluations: int
    least: float
    measure: Measure = "accuracy"
    warm: bool = False


LEADS = {
    "amc": Lead(8, 0.01, warm=True),
    "analytic": Lead(10, 0.01),
    "cmaes": Lead(50, 0.005),
    "evolution": Lead(40, 0.01),
    "global": Lead(20, 0.01),
    "gp": Lead(20, 0.01),
    "greedy": Lead(20, 0.01),
    "legr": Lead(40, 0.01),
    "motpe": Lead(50, 0.02, "volume"),
    "nsga2": Lead(150, 0.005, "volume"),
    "nsga3": Lead(150, 0.01, "volume"),
    "ppo": Lead(100, 0.004),
    "sac": Lead(8, 0.01, warm=True),
    "separable": Lead(20, 0.01),
    "spdy": Lead(10, 0.01),
    "surrogate": Lead(10, 0.01),
    "td3": Lead(8, 0.01, warm=True),
    "threshold": Lead(20, 0.01),
    "tpe": Lead(20, 0.01),
    "tpe-univariate": Lead(50, 0.004),
}
CONTROLS = {"qmc", "random", "uniform"}  # they learn nothing


def reached(agent: Agent, problem: int, evaluations: int, measure: Measure, *, warm: bool = False) -> float:
    """Return the best accuracy that an agent found, or the volume that its candidates dominate."""
    objectives = "one" if measure == "accuracy" else "several"
    env, evaluator = synthetic_env(evaluations=evaluations, seed=problem, widths=WIDTHS, objectives=objectives)
    if warm:
        assert env.predicted is not None
        assert env.measured is not None
        env.warm_starts = (env.predicted.allocate(env.feasible), env.measured.allocate(env.feasible))
    run_agent(agent, env, seed=problem)
    if measure == "accuracy":
        return best(evaluator)
    dense = env.feasible.costs.dense
    return hypervolume(evaluator.candidates, {"accuracy": 0.0, "macs": dense.macs, "params": dense.params})


def best(evaluator: SyntheticEvaluator) -> float:
    return max(candidate.accuracy for candidate in evaluator.candidates)


@cache
def by_random(problem: int, evaluations: int, measure: Measure) -> float:
    return reached(RandomAgent(), problem, evaluations, measure)


@pytest.mark.parametrize("name", names("agent"))
def test_it_beats_random_at_equal_evaluations(name: str) -> None:
    if name in CONTROLS:
        assert name not in LEADS
        return
    if name not in LEADS:
        pytest.fail(f"say in LEADS after how many evaluations the agent {name} beats random, or list it in CONTROLS")
    evaluations, least, measure, warm = LEADS[name]
    assert (make("agent", name, {}).objectives == "one") == (measure == "accuracy")
    gains = [
        reached(make("agent", name, {}), problem, evaluations, measure, warm=warm)
        - by_random(problem, evaluations, measure)
        for problem in PROBLEMS
    ]
    assert np.mean(gains) > least > 0, f"by problem: {gains}"


def test_random_beats_uniform_where_groups_differ() -> None:
    gains = [
        by_random(problem, 20, "accuracy") - reached(UniformAgent(), problem, 20, "accuracy") for problem in PROBLEMS
    ]
    assert np.mean(gains) > 0.03
    assert min(gains) > 0


def test_uniform_beats_random_where_groups_are_alike() -> None:
    found = {}
    for agent in (UniformAgent(), RandomAgent()):
        env, evaluator = synthetic_env(evaluations=20, widths=(16,) * 6, interaction=0.0)
        evaluator.weights[:], evaluator.powers[:] = 1 / 6, 2.0
        run_agent(agent, env, seed=0)
        found[type(agent)] = best(evaluator)
    assert found[UniformAgent] > found[RandomAgent]
