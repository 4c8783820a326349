"""For tests, ours and those of others: tiny networks, a synthetic evaluator, and the contracts of agents and spaces.

A contract is a class whose tests a subclass inherits by giving one fixture; pytest collects the subclass::

    class TestHillAgent(AgentContract):
        @pytest.fixture
        def agent(self):
            return HillAgent(step=0.1)

Nothing here is imported by the package itself, and pytest is not needed to import it.
"""

import dataclasses
import functools
import itertools
import math
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Protocol, final

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from autoprune.agents.base import Agent, Objectives
from autoprune.agents.random import RandomAgent
from autoprune.agents.uniform import UniformAgent
from autoprune.analytic import POWER, Analytic
from autoprune.cost import Budget, CostModel, FeasibleSet
from autoprune.environment import PruningEnv, layer_facts
from autoprune.errors import ConfigError, SearchOver
from autoprune.evaluation import Candidate, Executor, Measurement, Outcome, Result
from autoprune.policy import Policy
from autoprune.scoring import Scores
from autoprune.search_spaces.base import SearchSpace
from autoprune.search_spaces.per_group import PerGroup
from autoprune.seeds import derive
from autoprune.sensitivity import SPARSITIES, Cell, GroupSensitivity, SensitivityReport
from autoprune.standings import RANDOM, Standings, Trace, standings
from autoprune.structure import Group, Slice, Structure

__all__ = [
    "AgentContract",
    "ExecutorContract",
    "MakeSpace",
    "SearchSpaceContract",
    "SyntheticEvaluator",
    "SyntheticPipeline",
    "TinyNet",
    "TinyResNet",
    "chain",
    "compare_agents",
    "run_agent",
    "synthetic_env",
]


@final
class TinyNet(nn.Module):
    """Two convolutions with batch-norm and a linear layer: `(batch, 1, 8, 8)` to `(batch, 10)`, two groups of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return `(batch, 10)` scores of `(batch, 1, 8, 8)` images."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.relu(self.bn2(self.conv2(features)))
        scores: torch.Tensor = self.fc(features.mean((2, 3)))
        return scores


@final
class TinyResNet(nn.Module):
    """One residual block with a functional relu: `(batch, 1, 8, 8)` to `(batch, 10)`.

    Two groups of 8: the residual stream, which `stem` and `conv2` both write, and what lies within the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return `(batch, 10)` scores of `(batch, 1, 8, 8)` images."""
        stream = functional.relu(self.bn0(self.stem(images)))
        inner = functional.relu(self.bn1(self.conv1(stream)))
        stream = functional.relu(stream + self.bn2(self.conv2(inner)))
        scores: torch.Tensor = self.fc(functional.adaptive_avg_pool2d(stream, 1).flatten(1))
        return scores


def chain(
    widths: Sequence[int],
    budget: str = "macs<=50%",
    max_sparsity: float = 0.9,
    bounds: Mapping[str, tuple[float, float]] | None = None,
) -> FeasibleSet:
    """Return the feasible policies of a plain chain of 3x3 convolutions on 8x8 images, made without tracing it.

    Args:
        widths: Channels of each convolution; each is a group, `conv1`, `conv2`, ...
        budget: Limits as the user writes them.
        max_sparsity: Highest sparsity of the groups without bounds of their own.
        bounds: Lowest and highest sparsity of single groups.
    """
    model = _chain_model(widths)
    names = [f"conv{number + 1}" for number in range(len(widths))]
    groups = []
    for name, reader, width in zip(names, [*names[1:], "fc"], widths, strict=True):
        positions = torch.arange(width)[:, None]
        slices = (
            Slice(f"{name}.weight", 0, positions, "written"),
            Slice(f"{name}.bias", 0, positions, "written"),
            Slice(f"{reader}.weight", 1, positions, "read"),
        )
        groups.append(Group(name, "channels", width, slices, (name,), (reader,)))
    structure = Structure(tuple(groups))
    costs = CostModel(model, torch.zeros(1, 3, 8, 8), structure)
    return FeasibleSet.build(structure, costs, Budget.parse(budget), bounds, max_sparsity)


def _chain_model(widths: Sequence[int]) -> nn.Sequential:
    model = nn.Sequential()
    inputs = 3
    with torch.random.fork_rng(devices=[]):  # weights are drawn from the global generator, and are of no interest
        for number, width in enumerate(widths):
            model.add_module(f"conv{number + 1}", nn.Conv2d(inputs, width, 3, padding=1))
            inputs = width
        model.add_module("pool", nn.AdaptiveAvgPool2d(1))
        model.add_module("flatten", nn.Flatten())
        model.add_module("fc", nn.Linear(inputs, 10))
    return model


_Way = tuple[int, float, tuple[int, ...]]
"""A price, a loss, and the counts of the groups up to one."""


@final
class SyntheticEvaluator:
    """Gives candidates from a formula in place of a network, counting and caching as the real evaluator does.

    With sparsities s, a group g loses `weights[g] s_g ** powers[g]`, and two consecutive groups together lose another
    `interactions[g] s_g s_(g+1)`, so that the curves of single groups do not tell everything. Weights and interactions
    sum to 1: accuracy is 1 for the dense network and never below 0. Some groups are far more sensitive than others.

    What a candidate measures may have an error, normal, which depends on the policy and the seed alone.

    Args:
        feasible: Whose policies are priced.
        evaluations: How many different policies may be evaluated.
        seed: Of the formula and of the errors.
        repeats: How many policies in a row may be repetitions.
        interaction: How strong interactions are: 0, and groups' losses add up; 1 as a rule; at 10 the curves of single
            groups tell little.
        noise: Standard deviation of the error of a candidate's accuracy, which stays within [0, 1].

    Attributes:
        weights: `(groups,)`.
        powers: `(groups,)`.
        interactions: `(groups - 1,)`.
        candidates: All different candidates, in the order of evaluation.
        calls: How often it was called, repetitions included.
    """

    def __init__(
        self,
        feasible: FeasibleSet,
        *,
        evaluations: int,
        seed: int = 0,
        repeats: int = 50,
        interaction: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        rng = np.random.default_rng(seed)
        groups = len(feasible.structure)
        weights = np.exp(rng.uniform(-2.5, 2.5, groups))
        interactions = interaction * rng.uniform(0, 0.5, groups - 1) * np.minimum(weights[1:], weights[:-1])
        total = weights.sum() + interactions.sum()
        self.weights, self.interactions = weights / total, interactions / total
        self.powers = rng.uniform(1.0, 3.0, groups)
        self.candidates: list[Candidate] = []
        self.calls = 0
        self._seed, self._noise = seed, noise
        self._feasible = feasible
        self._evaluations = evaluations
        self._known: dict[Policy, Candidate] = {}
        self._repeats, self._allowed_repeats = 0, repeats

    def accuracy(self, policy: Policy) -> float:
        """Return the formula's value, without an error; counts nothing."""
        sparsities = np.array([policy[name] for name in self._feasible.structure.names])
        alone = self.weights @ sparsities**self.powers
        return float(1 - alone - self.interactions @ (sparsities[1:] * sparsities[:-1]))

    def predicted(self) -> Analytic:
        """Return what moments might predict: each group's own loss, off by a factor, and no interactions."""
        errors = np.exp(np.random.default_rng(len(self.weights)).normal(0, 0.5, len(self.weights)))
        structure = self._feasible.structure
        counts = {group.name: np.arange(group.size + 1.0) for group in structure}
        losses = {
            group.name: (weight * error * (counts[group.name] / group.size) ** power) ** (1 / POWER)
            for group, weight, error, power in zip(structure, self.weights, errors, self.powers, strict=True)
        }
        return Analytic(structure, counts, losses)

    def measured(self) -> SensitivityReport:
        """Return what the analyzer would measure: each group's own loss, nine cells a group, and no interactions."""
        rows = []
        for group, weight, power in zip(self._feasible.structure, self.weights, self.powers, strict=True):
            counts = sorted({group.count(sparsity) for sparsity in SPARSITIES} - {0})
            losses = [float(weight * (count / group.size) ** power) for count in counts]
            cells = [
                Cell(count / group.size, count, 1 - loss, 0.0, loss, 0.0, 0.0, loss)
                for count, loss in zip(counts, losses, strict=True)
            ]
            share = self._feasible.costs.macs_share(group.name)
            rows.append(
                GroupSensitivity(group.name, group.kind, group.size, group.layers, True, None, share, tuple(cells))
            )
        return SensitivityReport({}, {}, Measurement("dense", 1.0, 0.0, 0.0, 0.0), tuple(rows))

    def scores(self) -> Scores:
        """Return what a criterion might say: by how much each element adds to its group's loss, off by a factor."""
        errors = np.exp(np.random.default_rng(len(self.weights)).normal(0, 0.5, len(self.weights)))
        scores = {}
        for group, weight, power in zip(self._feasible.structure, self.weights * errors, self.powers, strict=True):
            losses = weight * (np.arange(group.size + 1) / group.size) ** power
            scores[group.name] = torch.from_numpy(np.diff(losses))
        return scores

    def told(self, policy: Policy) -> float:
        """Return the accuracy that a candidate has, with its error; counts nothing."""
        error = np.random.default_rng(derive(self._seed, "noise", policy.id)).normal(0.0, self._noise)
        return min(1.0, max(0.0, self.accuracy(policy) + float(error)))

    def regret(self, policy: Policy) -> float:
        """Return by how much a policy's accuracy is below the optimum's, both without error; counts nothing."""
        return self.accuracy(self.optimum()) - self.accuracy(policy)

    @functools.cache  # noqa: B019 - of a test, which ends
    def optimum(self) -> Policy:
        """Return the best feasible policy, exactly.

        By dynamic programming along the groups: what is removed from one only matters to its neighbour, in the formula
        and in the price. For each count of the last group, of all ways to come there, those are kept that no other
        beats in price and in loss.

        Raises:
            ValueError: The budget has another limit than one on MACs or on parameters, or the price is not one of
                neighbours.
        """
        alone, together = self._prices()
        sizes, limit = self._feasible.sizes, self._feasible.budget.limits[0].absolute(self._feasible.costs.dense)
        ranges = [range(low, high + 1) for low, high in zip(self._feasible.lower, self._feasible.upper, strict=True)]
        # count of the last group → prices ascending, losses descending, and the counts that lead there
        kept: dict[int, list[_Way]] = {
            count: [(alone[0][count], self.weights[0] * (count / sizes[0]) ** self.powers[0], (count,))]
            for count in ranges[0]
        }
        for index in range(1, len(sizes)):
            loss = {
                count: self.weights[index] * (count / sizes[index]) ** self.powers[index] for count in ranges[index]
            }
            reached: dict[int, list[_Way]] = {}
            for count in ranges[index]:
                ways = [
                    (
                        price + alone[index][count] + together[index - 1][before, count],
                        lost
                        + loss[count]
                        + self.interactions[index - 1] * (before / sizes[index - 1]) * (count / sizes[index]),
                        (*counts, count),
                    )
                    for before, several in kept.items()
                    for price, lost, counts in several
                ]
                reached[count] = _unbeaten(ways)
            kept = reached
        within = [way for several in kept.values() for way in several if way[0] <= limit]
        return self._feasible.policy(np.array(min(within, key=lambda way: way[1])[2]))

    def _prices(self) -> tuple[list[dict[int, int]], list[dict[tuple[int, int], int]]]:
        """Return the price of counts alone and what two neighbours' together add to it; the first has the constant."""
        limits, structure = self._feasible.budget.limits, self._feasible.structure
        if len(limits) != 1 or limits[0].metric not in ("macs", "params"):
            raise ValueError(f"the optimum is known for one limit on MACs or parameters, but the budget is {limits}")

        def price(counts: dict[int, int]) -> int:
            removed = {structure.names[index]: count for index, count in counts.items()}
            return int(getattr(self._feasible.costs.cost(removed), limits[0].metric))

        constant = price({})
        groups = range(len(structure))
        every = [range(group.size + 1) for group in structure]
        alone = [
            {count: price({index: count}) - (constant if index else 0) for count in every[index]} for index in groups
        ]
        together = [
            {
                (before, count): price({index: before, index + 1: count})
                - price({index: before})
                - price({index + 1: count})
                + constant
                for before in every[index]
                for count in every[index + 1]
            }
            for index in groups[:-1]
        ]
        counts = {index: group.size // 2 for index, group in enumerate(structure)}
        summed = sum(alone[index][counts[index]] for index in groups)
        summed += sum(together[index][counts[index], counts[index + 1]] for index in groups[:-1])
        if summed != price(counts):
            raise ValueError("the optimum is known where the price is one of neighbours, but here others matter too")
        return alone, together

    def submit(self, policy: Policy, rival: Policy | None = None) -> Result:
        """Return what gives the candidate of a policy; there is nothing to save by a race.

        Raises:
            SearchOver: The evaluations are spent, or the same policies come again and again.
        """
        candidate = self(policy)
        return lambda: candidate

    def __call__(self, policy: Policy) -> Candidate:
        """Return the candidate of a policy.

        Raises:
            SearchOver: As `submit`.
        """
        self.calls += 1
        policy = self._feasible.structure.rounded(policy)
        if policy in self._known:
            self._repeats += 1
            if self._repeats > self._allowed_repeats:
                raise SearchOver(f"{self._repeats} policies in a row were evaluated before")
            return self._known[policy]
        if len(self.candidates) == self._evaluations:
            raise SearchOver(f"all {self._evaluations} evaluations are spent")
        self._repeats = 0
        removed = self._feasible.structure.removed(policy)
        accuracy = self.told(policy)
        candidate = Candidate(
            number=len(self.candidates),
            id=policy.id,
            arm="search",
            agent="",
            policy=policy,
            removed=removed,
            cost=self._feasible.costs.cost(removed),
            measurements=(Measurement("short", accuracy, self._noise, 1 - accuracy, self._noise),),
            seconds=0.0,
        )
        self.candidates.append(candidate)
        self._known[policy] = candidate
        return candidate


def _unbeaten(ways: list[_Way]) -> list[_Way]:
    """Return the ways that none beats in price and loss, by ascending price."""
    found: list[_Way] = []
    for way in sorted(ways):
        if not found or way[1] < found[-1][1]:
            found.append(way)
    return found


def synthetic_env(
    *,
    evaluations: int,
    objectives: Objectives = "one",
    seed: int = 0,
    widths: Sequence[int] = (8, 8, 16, 16),
    bounds: Mapping[str, tuple[float, float]] | None = None,
    interaction: float = 1.0,
    noise: float = 0.0,
) -> tuple[PruningEnv, SyntheticEvaluator]:
    """Return an environment over a chain of convolutions, at half its MACs, with its evaluator.

    Args:
        evaluations: How many different policies may be evaluated.
        objectives: The agent's; with "several" the space has a dimension for the share of the budget.
        seed: Of the evaluator's formula and errors.
        widths: Of the chain.
        bounds: Lowest and highest sparsity of single groups.
        interaction: As of `SyntheticEvaluator`.
        noise: Likewise.
    """
    feasible = chain(widths, bounds=bounds)
    evaluator = SyntheticEvaluator(feasible, evaluations=evaluations, seed=seed, interaction=interaction, noise=noise)
    space = PerGroup(feasible, spend=(1.0, 1.0) if objectives == "one" else (0.0, 1.0))
    layers = layer_facts(_chain_model(widths), torch.zeros(1, 3, 8, 8), feasible.structure)
    env = PruningEnv(
        feasible,
        space,
        evaluator.submit,
        value=lambda candidate: candidate.accuracy,
        evaluations=evaluations,
        layers=layers,
        predicted=evaluator.predicted(),
        measured=evaluator.measured(),
        scores=evaluator.scores(),
    )
    return env, evaluator


def compare_agents(
    agents: Mapping[str, Agent],
    *,
    evaluations: int,
    seeds: int = 5,
    problem: int = 0,
    widths: Sequence[int] = (8, 8, 16, 16),
    interaction: float = 1.0,
    noise: float = 0.0,
) -> tuple[Standings, dict[str, list[float]]]:
    """Compare agents as `autoprune.compare` does, on a synthetic problem, in seconds.

    Args:
        agents: By name; uniform and random are always among them.
        evaluations: Of each agent with each seed.
        seeds: How many.
        problem: Seed of the formula and of the errors: the same for all.
        widths: Of the chain of convolutions.
        interaction: As of `SyntheticEvaluator`.
        noise: Likewise.

    Returns:
        How they stand by what they measured; and agent → the regret of each seed's pick, without errors.
    """
    traces: dict[str, list[Trace]] = {}
    regrets: dict[str, list[float]] = {}
    macs, optimum = 0, 0.0
    contestants: dict[str, Agent] = {"uniform": UniformAgent(), RANDOM: RandomAgent(), **agents}
    for name, agent in contestants.items():
        traces[name], regrets[name] = [], []
        for seed in range(seeds):
            started = time.perf_counter()
            env, evaluator = synthetic_env(
                evaluations=evaluations,
                objectives=agent.objectives,
                seed=problem,
                widths=widths,
                interaction=interaction,
                noise=noise,
            )
            run_agent(agent, env, seed=derive(seed, "agent"))
            macs = macs or env.feasible.costs.dense.macs
            optimum = optimum or evaluator.accuracy(evaluator.optimum())
            found = evaluator.candidates
            seconds = time.perf_counter() - started
            traces[name].append(Trace(tuple(c.accuracy for c in found), tuple(float(c.macs) for c in found), seconds))
            best = max(found, key=lambda candidate: candidate.accuracy)
            regrets[name].append(optimum - evaluator.accuracy(best.policy))
    return standings(traces, evaluations, macs), regrets


def run_agent(agent: Agent, env: PruningEnv, *, seed: int) -> None:
    """Run an agent until it returns or `SearchOver` ends it."""
    try:
        agent.run(env, seed=seed)
    except SearchOver:
        return


@final
class SyntheticPipeline:
    """Gives each policy an outcome that depends on it alone, after a while; pickles.

    Args:
        seconds: How long an outcome takes.
    """

    device = torch.device("cpu")

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __call__(self, policy: Policy) -> Outcome:
        """Return the outcome.

        Raises:
            ValueError: The first sparsity is above 0.9.
        """
        time.sleep(self.seconds)
        first = next(iter(policy.values()))
        if first > 0.9:
            raise ValueError(f"{first} is too sparse")
        return Outcome(policy.id, (Measurement("short", 1 - first, 0.0, first, 0.0),), self.seconds)


class ExecutorContract:
    """What holds of every executor; a subclass gives the fixture `executor`, not started."""

    def test_each_policy_comes_back_once(self, executor: Executor) -> None:
        """In any order, with what the pipeline makes of it."""
        pipeline, policies = SyntheticPipeline(), [Policy({"a": number / 40}) for number in range(30)]
        executor.start(pipeline)
        under_way, outcomes = 0, []
        for policy in policies:
            if under_way == executor.at_once:
                outcomes.append(executor.finished())
                under_way -= 1
            executor.submit(policy)
            under_way += 1
        outcomes += [executor.finished() for _ in range(under_way)]
        executor.close()
        assert sorted(outcome.id for outcome in outcomes) == sorted(policy.id for policy in policies)
        expected = {policy.id: pipeline(policy) for policy in policies}
        assert all(outcome == expected[outcome.id] for outcome in outcomes)

    def test_what_the_pipeline_raises_is_raised(self, executor: Executor) -> None:
        """And others are still run."""
        executor.start(SyntheticPipeline())
        executor.submit(Policy({"a": 0.95}))
        raised = None
        try:
            executor.finished()
        except ValueError as error:
            raised = error
        assert raised is not None, "the error was swallowed"
        assert "0.95 is too sparse" in str(raised)
        executor.submit(Policy({"a": 0.5}))
        assert executor.finished().id == Policy({"a": 0.5}).id
        executor.close()

    def test_it_can_be_closed_at_any_time_and_started_again(self, executor: Executor) -> None:
        """What was under way is dropped."""
        executor.start(SyntheticPipeline())
        for number in range(executor.at_once):
            executor.submit(Policy({"a": number / 1000}))
        executor.close()
        executor.close()
        executor.start(SyntheticPipeline())
        executor.submit(Policy({"a": 0.5}))
        assert executor.finished().id == Policy({"a": 0.5}).id
        executor.close()


class AgentContract:
    """What holds of every agent; a subclass gives the fixture `agent`.

    Attributes:
        deterministic: Whether the agent draws nothing at random, so that the seed makes no difference.
        brief: Whether the agent has few policies to propose, and returns before the evaluations are spent.
    """

    deterministic: ClassVar[bool] = False
    brief: ClassVar[bool] = False

    def test_every_setting_has_a_default(self, agent: Agent) -> None:
        """The registry makes agents without arguments."""
        assert type(agent)().objectives == agent.objectives

    def test_objectives_are_known(self, agent: Agent) -> None:
        """The search picks the space by it."""
        assert agent.objectives in ("one", "several"), f"got {agent.objectives!r}"

    def test_policies_are_feasible(self, agent: Agent) -> None:
        """Each policy is within the budget and the bounds."""
        feasible = chain(_WIDTHS)
        for policy in _sequence(agent, _EVALUATIONS):
            removed = np.array([feasible.structure.removed(policy)[name] for name in feasible.structure.names])
            assert feasible.utilisation(removed) <= 1, f"over the budget: {policy}"
            assert np.all((removed >= feasible.lower) & (removed <= feasible.upper)), f"out of bounds: {policy}"

    def test_policies_are_distinct(self, agent: Agent) -> None:
        """Most evaluations bring something new."""
        self._check_distinct(_sequence(agent, _EVALUATIONS))

    def test_same_seed_gives_same_policies(self, agent: Agent) -> None:
        """A search is resumed by running its agent again."""
        assert _sequence(agent, _EVALUATIONS, seed=3) == _sequence(agent, _EVALUATIONS, seed=3)

    def test_same_seed_gives_same_policies_in_another_process(self, agent: Agent) -> None:
        """The same, where strings have other hashes."""
        code = (
            "import pickle, sys, torch; from autoprune.testing import _sequence; "
            f"torch.set_num_threads({torch.get_num_threads()}); "
            f"print(*(policy.id for policy in _sequence(pickle.load(sys.stdin.buffer), {_EVALUATIONS}, seed=3)))"
        )
        environment = {**os.environ, "PYTHONHASHSEED": "271828", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        run = subprocess.run(
            [sys.executable, "-c", code], input=pickle.dumps(agent), capture_output=True, env=environment, check=False
        )
        assert run.returncode == 0, run.stderr.decode()
        here = [policy.id for policy in _sequence(agent, _EVALUATIONS, seed=3)]
        assert run.stdout.decode().split() == here, "another process proposes other policies"

    def test_other_seed_gives_other_policies(self, agent: Agent) -> None:
        """Unless there is nothing to draw."""
        same = _sequence(agent, _EVALUATIONS, seed=3) == _sequence(agent, _EVALUATIONS, seed=4)
        assert same == self.deterministic, f"deterministic = {self.deterministic}, but seeds 3 and 4 say {same}"

    def test_global_generators_stay_as_they_are(self, agent: Agent) -> None:
        """The seed is the only source of randomness."""
        before = _generator_states()
        _sequence(agent, _EVALUATIONS)
        assert _generator_states() == before

    def test_evaluations_may_draw_from_global_generators(self, agent: Agent) -> None:
        """What an evaluation draws does not change what is proposed."""

        def drawing(candidate: Candidate) -> Candidate:
            torch.rand(candidate.number + 1)
            np.random.rand(candidate.number + 1)  # noqa: NPY002 - as another's code may
            random.random()
            return candidate

        assert _sequence(agent, _EVALUATIONS, change=drawing) == _sequence(agent, _EVALUATIONS)

    def test_failed_candidates_do_not_stop_it(self, agent: Agent) -> None:
        """A candidate without measurements is told like any other."""

        def failing(candidate: Candidate) -> Candidate:
            if candidate.number % 3:
                return candidate
            return dataclasses.replace(candidate, measurements=(), failure="the loss is not finite")

        self._check_distinct(_sequence(agent, _EVALUATIONS, change=failing))

    def test_several_may_be_under_way(self, agent: Agent) -> None:
        """With results that come later, the same seed gives the same policies too, most of them distinct."""
        policies = _sequence(agent, _EVALUATIONS, seed=3, at_once=4)
        assert policies == _sequence(agent, _EVALUATIONS, seed=3, at_once=4)
        self._check_distinct(policies)

    def test_few_evaluations_are_enough(self, agent: Agent) -> None:
        """However few there are to plan for, at least one is used."""
        assert not _sequence(agent, 0)
        for evaluations in (1, 2, 3, 5):
            assert _sequence(agent, evaluations)

    def test_one_group_is_enough(self, agent: Agent) -> None:
        """A network may have a single group."""
        assert _sequence(agent, 4, widths=(8,))

    def test_bounds_of_single_groups_hold(self, agent: Agent) -> None:
        """A group may be locked, or all of them."""
        for policy in _sequence(agent, 4, bounds={"conv2": (0.25, 0.25), "conv3": (0.25, 0.75)}):
            assert policy["conv2"] == 0.25, f"conv2 is locked: {policy}"
            assert 0.25 <= policy["conv3"] <= 0.75, f"out of bounds: {policy}"
        locked = dict.fromkeys(("conv1", "conv2"), (0.5, 0.5))
        assert set(_sequence(agent, 4, widths=(8, 8), bounds=locked)) == {Policy(dict.fromkeys(locked, 0.5))}

    def _check_distinct(self, policies: Sequence[Policy]) -> None:
        used = len(set(policies))
        if not self.brief:
            assert used > _EVALUATIONS / 2, f"only {used} of {_EVALUATIONS} evaluations used"
        assert used > len(policies) / 2, f"{len(policies)} policies, of which {used} differ"


_WIDTHS = (8, 8, 16, 16)
_EVALUATIONS = 16


class _KeptOnError(BaseException):
    """An agent went on after `SearchOver`; no handler of ordinary errors catches it."""


def _sequence(
    agent: Agent,
    evaluations: int,
    *,
    seed: int = 0,
    widths: Sequence[int] = _WIDTHS,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    at_once: int = 1,
    change: Callable[[Candidate], Candidate] = lambda candidate: candidate,
) -> list[Policy]:
    """Return every policy that an agent had evaluated, repetitions included.

    Raises:
        AssertionError: The agent went on after `SearchOver`.
    """
    synthetic, evaluator = synthetic_env(
        evaluations=evaluations, objectives=agent.objectives, widths=widths, bounds=bounds
    )
    policies: list[Policy] = []
    over = False

    def submit(policy: Policy, rival: Policy | None = None) -> Result:
        nonlocal over
        if over:
            raise _KeptOnError
        try:
            candidate = evaluator(policy)
        except SearchOver:
            over = True
            raise
        policies.append(policy)
        known: list[Candidate] = []

        def result() -> Candidate:
            if not known:
                known.append(change(candidate))
            return known[0]

        return result

    env = PruningEnv(
        synthetic.feasible,
        synthetic.space,
        submit,
        value=lambda candidate: candidate.accuracy,
        evaluations=evaluations,
        at_once=at_once,
        predicted=synthetic.predicted,
        measured=synthetic.measured,
        scores=synthetic.scores,
    )
    try:
        run_agent(agent, env, seed=seed)
    except _KeptOnError:
        raise AssertionError("the agent went on after SearchOver: let it pass") from None
    return policies


def _generator_states() -> list[str]:
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global one is what is watched
    return [torch.get_rng_state().numpy().tobytes().hex(), repr(numpy_state), repr(random.getstate())]


class MakeSpace(Protocol):
    """How a space is made: its class, or a function with the same arguments."""

    def __call__(self, feasible: FeasibleSet, *, spend: tuple[float, float]) -> SearchSpace:
        """Return a space."""
        ...


class SearchSpaceContract:
    """What holds of every search space; a subclass gives the fixture `make_space`, the space's class."""

    def test_dimensions_have_names(self, make_space: MakeSpace) -> None:
        """All different; "spend" is the last one where the share of the budget is free, and only there."""
        for space, spend in _spaces(make_space):
            names = space.dimensions
            assert len(set(names)) == len(names), f"got {names}"
            assert ("spend" in names[-1:]) == (spend[0] < spend[1]), f"with {spend=} got {names}"
            assert "spend" not in names[:-1], f"got {names}"

    def test_policies_are_feasible(self, make_space: MakeSpace) -> None:
        """Each point of the cube, corners included, is within the budget and the bounds, in whole elements."""
        for feasible in _feasible_sets():
            for spend in _SPENDS:
                space = make_space(feasible, spend=spend)
                for point in _points(space):
                    policy = space.decode(point)
                    removed = feasible.removed(policy)
                    assert feasible.policy(removed) == policy, f"out of bounds or not whole elements: {policy}"
                    assert feasible.utilisation(removed) <= 1, f"over the budget: {policy}"

    def test_whole_budget_is_filled(self, make_space: MakeSpace) -> None:
        """With `spend=(1, 1)`, leaving one element more in every group would cost too much."""
        for feasible in _feasible_sets():
            space = make_space(feasible, spend=(1.0, 1.0))
            for point in _points(space):
                removed = feasible.removed(space.decode(point))
                fewer = np.maximum(removed - 1, feasible.lower)
                cheapest = bool(np.all(removed == feasible.lower))
                assert cheapest or feasible.utilisation(fewer) > 1, f"budget left over at {point}"

    def test_encode_is_the_way_back(self, make_space: MakeSpace) -> None:
        """`decode(encode(p)) == p` for every policy that `decode` gives."""
        for space, _ in _spaces(make_space):
            for point in _points(space):
                policy = space.decode(point)
                assert space.decode(space.encode(policy)) == policy, f"lost on the way back: {policy}"

    def test_any_policy_has_a_point(self, make_space: MakeSpace) -> None:
        """Warm starts come from elsewhere: each has a point, whose policy is feasible."""
        for feasible in _feasible_sets():
            for spend in _SPENDS:
                space = make_space(feasible, spend=spend)
                for removed in (feasible.lower, feasible.upper, (feasible.lower + feasible.upper) // 2):
                    space.decode(space.encode(feasible.policy(removed)))

    def test_decode_is_pure(self, make_space: MakeSpace) -> None:
        """The same point always stands for the same policy."""
        for space, _ in _spaces(make_space):
            points = list(_points(space))
            forwards = [space.decode(point) for point in points]
            assert forwards == [space.decode(point) for point in reversed(points)][::-1]

    def test_other_points_are_refused(self, make_space: MakeSpace) -> None:
        """A point of the wrong length, or outside the cube, is an error and not silently clipped."""
        for space, _ in _spaces(make_space):
            length = len(space.dimensions)
            wrong = [[0.5] * (length + 1)]
            if length:
                wrong += [[value, *[0.5] * (length - 1)] for value in (-0.1, 1.1, math.nan)]
            for point in wrong:
                try:
                    space.decode(point)
                except ConfigError:
                    continue
                raise AssertionError(f"{space.dimensions} accepted {point}")


_SPENDS = ((1.0, 1.0), (0.0, 1.0), (0.25, 0.75))


def _feasible_sets() -> Iterator[FeasibleSet]:
    yield chain((8, 8, 16))
    yield chain((4, 12, 6), "macs<=70%,params<=40%")
    yield chain((5,), "macs<=100%")


def _spaces(make_space: MakeSpace) -> Iterator[tuple[SearchSpace, tuple[float, float]]]:
    for feasible in _feasible_sets():
        for spend in _SPENDS:
            yield make_space(feasible, spend=spend), spend


def _points(space: SearchSpace) -> Iterator[list[float]]:
    """Yield the corners of the unit cube, and points within."""
    length = len(space.dimensions)
    yield from map(list, itertools.product((0.0, 1.0), repeat=length))
    rng = np.random.default_rng(0)
    for _ in range(20):
        yield rng.random(length).tolist()
