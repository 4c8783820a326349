import inspect
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autoprune.agents.base import Agent, Objectives
from autoprune.agents.optuna import NSGA2Agent, TPEAgent
from autoprune.agents.random import RandomAgent
from autoprune.cost import Budget, CostModel, FeasibleSet
from autoprune.environment import PruningEnv
from autoprune.errors import SearchOver
from autoprune.policy import Policy
from autoprune.search_spaces.per_group import PerGroup
from autoprune.structure import analyse
from autoprune.testing import (
    AgentContract,
    SearchSpaceContract,
    SyntheticEvaluator,
    TinyNet,
    TinyResNet,
    chain,
    compare_agents,
    synthetic_env,
)

# -- tiny networks ----------------------------------------------------------------------------------------------------


def test_tiny_net_has_two_groups() -> None:
    structure = analyse(TinyNet(), torch.zeros(1, 1, 8, 8))
    assert [(group.name, group.size) for group in structure] == [("conv1", 8), ("conv2", 8)]
    assert [locked.name for locked in structure.locked] == ["fc"]  # the network's output


def test_tiny_resnet_has_a_residual_group() -> None:
    structure = analyse(TinyResNet(), torch.zeros(1, 1, 8, 8))
    assert [(group.name, group.layers) for group in structure] == [("stem", ("stem", "conv2")), ("conv1", ("conv1",))]
    assert [locked.name for locked in structure.locked] == ["fc"]


def test_a_chain_is_what_tracing_it_would_give() -> None:
    from autoprune.testing import _chain_model

    traced = analyse(_chain_model((4, 6)), torch.zeros(1, 3, 8, 8))
    made = chain((4, 6)).structure
    assert traced.names == made.names
    for group in made:
        by_name = {(s.tensor, s.dim, s.role): s.positions for s in traced[group.name].slices}
        assert set(by_name) == {(s.tensor, s.dim, s.role) for s in group.slices}
        assert all(torch.equal(by_name[s.tensor, s.dim, s.role], s.positions) for s in group.slices)


# -- the synthetic evaluator ------------------------------------------------------------------------------------------


def test_accuracy_follows_the_formula() -> None:
    feasible = chain((10, 10))
    evaluator = SyntheticEvaluator(feasible, evaluations=1)
    evaluator.weights, evaluator.powers, evaluator.interactions = (
        np.array([0.5, 0.3]),
        np.array([1, 2]),
        np.array([0.2]),
    )
    assert evaluator.accuracy(Policy({"conv1": 0.5, "conv2": 0.6})) == pytest.approx(1 - 0.25 - 0.108 - 0.06)


@given(st.integers(0, 50), st.lists(st.floats(0, 0.99), min_size=3, max_size=3), st.integers(0, 2))
def test_removing_more_never_helps(seed: int, sparsities: list[float], index: int) -> None:
    evaluator = SyntheticEvaluator(chain((4, 4, 4)), evaluations=1, seed=seed)
    less = dict(zip(("conv1", "conv2", "conv3"), sparsities, strict=True))
    more = dict(less)
    more[f"conv{index + 1}"] = min(0.99, more[f"conv{index + 1}"] + 0.1)
    assert 0 <= evaluator.accuracy(Policy(more)) <= evaluator.accuracy(Policy(less)) <= 1


def test_the_optimum_is_not_beaten() -> None:
    feasible = chain((6, 5))
    evaluator = SyntheticEvaluator(feasible, evaluations=200)
    optimum = evaluator.optimum()
    assert feasible.utilisation(feasible.removed(optimum)) <= 1
    rng = np.random.default_rng(0)
    space = PerGroup(feasible, spend=(0.0, 1.0))
    tried = [evaluator.accuracy(space.decode(rng.random(3).tolist())) for _ in range(100)]
    assert max(tried) <= evaluator.accuracy(optimum)


@pytest.mark.parametrize("interaction", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("budget", ["macs<=50%", "macs<=10%", "params<=40%"])
def test_the_optimum_is_that_of_trying_all(budget: str, interaction: float) -> None:
    feasible = chain((5, 4, 6), budget)
    evaluator = SyntheticEvaluator(feasible, evaluations=1, seed=4, interaction=interaction)
    ranges = [range(low, high + 1) for low, high in zip(feasible.lower, feasible.upper, strict=True)]
    every = [np.array(counts) for counts in itertools.product(*ranges)]
    within = [feasible.policy(counts) for counts in every if feasible.utilisation(counts) <= 1]
    assert evaluator.regret(max(within, key=evaluator.accuracy)) == pytest.approx(0, abs=1e-12)
    assert evaluator.optimum() in within


def test_the_optimum_of_a_wide_network_is_known_in_no_time() -> None:
    feasible = chain((16, 16, 32, 32, 32))
    evaluator = SyntheticEvaluator(feasible, evaluations=1)
    separable = evaluator.predicted().allocate(feasible)
    assert 0 < evaluator.regret(separable) < 0.1


class Concatenates(nn.Module):
    """What is removed from the first convolution has a price with the third's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.conv3, self.fc = nn.Conv2d(8, 4, 3, padding=1), nn.Linear(4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = self.conv1(images).relu()
        both = torch.cat([first, self.conv2(first).relu()], 1)
        return self.fc(self.conv3(both).relu().mean((2, 3)))  # type: ignore[no-any-return]


def test_an_optimum_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="one limit on MACs or parameters"):
        SyntheticEvaluator(chain((4, 4), "macs<=50%,params<=50%"), evaluations=1).optimum()
    model, images = Concatenates(), torch.zeros(1, 3, 8, 8)
    structure = analyse(model, images)
    feasible = FeasibleSet.build(structure, CostModel(model, images, structure), Budget.parse("macs<=50%"))
    assert len(structure) == 3
    with pytest.raises(ValueError, match="one of neighbours"):
        SyntheticEvaluator(feasible, evaluations=1).optimum()


def test_without_interaction_losses_add_up_and_with_a_strong_one_they_do_not() -> None:
    def gap(interaction: float) -> float:
        evaluator = SyntheticEvaluator(chain((8, 8)), evaluations=1, interaction=interaction)
        alone = [evaluator.accuracy(Policy({"conv1": a, "conv2": b})) for a, b in ((0.5, 0.0), (0.0, 0.5))]
        return sum(1 - one for one in alone) - (1 - evaluator.accuracy(Policy({"conv1": 0.5, "conv2": 0.5})))

    assert gap(0.0) == pytest.approx(0)
    assert gap(10.0) < 3 * gap(1.0) < 0


def test_an_error_belongs_to_its_policy() -> None:
    feasible = chain((8, 8, 8))
    policies = [feasible.policy(np.array([a, b, 3])) for a in range(8) for b in range(8)]

    def errors(**options: Any) -> np.ndarray[Any, Any]:
        evaluator = SyntheticEvaluator(feasible, evaluations=100, noise=0.02, **options)
        return np.array([evaluator(policy).accuracy - evaluator.accuracy(policy) for policy in reversed(policies)])

    assert np.array_equal(errors(seed=1), errors(seed=1))
    assert not np.array_equal(errors(seed=1), errors(seed=2))
    assert 0.015 < errors(seed=1).std() < 0.025
    assert SyntheticEvaluator(feasible, evaluations=1, noise=5.0).told(policies[0]) in (0.0, 1.0)


def test_agents_are_compared_in_seconds() -> None:
    agents = {"tpe": TPEAgent(), "nsga2": NSGA2Agent()}
    found, regrets = compare_agents(agents, evaluations=30, seeds=3)
    again, _ = compare_agents(agents, evaluations=30, seeds=3)
    assert [(row.agent, row.accuracies, row.hypervolumes) for row in found.table] == [
        (row.agent, row.accuracies, row.hypervolumes) for row in again.table
    ]
    assert {row.agent for row in found.table} == {"tpe", "nsga2", "random", "uniform"}
    means = {agent: np.mean(several) for agent, several in regrets.items()}
    assert all(regret >= 0 for several in regrets.values() for regret in several)
    assert means["tpe"] < means["random"] < means["uniform"]
    assert any(word.startswith("uniform picks") and "less than random" in word for word in found.words)


def test_repetitions_are_free_until_they_are_too_many() -> None:
    feasible = chain((8, 8))
    evaluator = SyntheticEvaluator(feasible, evaluations=1, repeats=3)
    policy = feasible.policy(feasible.upper)
    first = evaluator(policy)
    assert [evaluator(policy) for _ in range(3)] == [first] * 3
    with pytest.raises(SearchOver, match="evaluated before"):
        evaluator(policy)
    assert (evaluator.calls, len(evaluator.candidates)) == (5, 1)


def test_evaluations_are_counted() -> None:
    feasible = chain((8, 8))
    evaluator = SyntheticEvaluator(feasible, evaluations=1)
    candidate = evaluator(feasible.policy(feasible.upper))
    assert candidate.cost == feasible.smallest
    with pytest.raises(SearchOver, match="all 1 evaluations"):
        evaluator(Policy({"conv1": 0.5, "conv2": 0.5}))


# -- the agents' contract catches -------------------------------------------------------------------------------------


def fails(contract: type, test: str, subject: Any) -> str:
    """Return what a contract's test says of a subject; it must fail."""
    with pytest.raises(AssertionError) as caught:
        getattr(contract(), test)(subject)
    return str(caught.value)


class Drawing:
    """An agent that is random search but for where its points come from."""

    objectives: ClassVar[Objectives] = "one"

    def points(self, env: PruningEnv, seed: int) -> Callable[[], Sequence[float]]:
        rng = np.random.default_rng(seed)
        return lambda: rng.random(len(env.space.dimensions)).tolist()

    def run(self, env: PruningEnv, *, seed: int) -> None:
        draw = self.points(env, seed)
        while True:
            env.evaluate(env.space.decode(draw()))


class IgnoresSeed(Drawing):
    def points(self, env: PruningEnv, seed: int) -> Callable[[], Sequence[float]]:
        return super().points(env, 0)


class IsRandom(Drawing):
    def points(self, env: PruningEnv, seed: int) -> Callable[[], Sequence[float]]:
        rng = np.random.default_rng()
        return lambda: rng.random(len(env.space.dimensions)).tolist()


class UsesGlobalNumpy(Drawing):
    def points(self, env: PruningEnv, seed: int) -> Callable[[], Sequence[float]]:
        np.random.seed(seed)  # noqa: NPY002 - the fault
        return lambda: np.random.rand(len(env.space.dimensions)).tolist()  # noqa: NPY002 - the fault


class UsesGlobalTorch(Drawing):
    def points(self, env: PruningEnv, seed: int) -> Callable[[], Sequence[float]]:
        torch.manual_seed(seed)
        return lambda: torch.rand(len(env.space.dimensions)).tolist()


class RepeatsItself(Drawing):
    # What a generator that is made anew for each draw does.
    def points(self, env: PruningEnv, seed: int) -> Callable[[], Sequence[float]]:
        return lambda: super(RepeatsItself, self).points(env, seed)()


class Remembers(Drawing):
    """Goes on where an earlier search stopped."""

    def __init__(self) -> None:
        self.runs = 0

    def points(self, env: PruningEnv, seed: int) -> Callable[[], Sequence[float]]:
        self.runs += 1
        return super().points(env, seed + 1000 * self.runs)


class IgnoresTheBudget(Drawing):
    def run(self, env: PruningEnv, *, seed: int) -> None:
        draw = self.points(env, seed)
        names = env.feasible.structure.names
        while True:
            env.evaluate(env.feasible.structure.rounded(Policy(dict(zip(names, draw(), strict=True)))))


class Swallows(Drawing):
    def run(self, env: PruningEnv, *, seed: int) -> None:
        draw = self.points(env, seed)
        while True:
            try:
                env.evaluate(env.space.decode(draw()))
            except Exception:  # the fault
                continue


class StopsAtFailures(Drawing):
    def run(self, env: PruningEnv, *, seed: int) -> None:
        draw = self.points(env, seed)
        while env.evaluate(env.space.decode(draw())).failure is None:
            pass


class NeedsASetting(Drawing):
    def __init__(self, step: float) -> None:
        self.step = step


class WantsSomething(Drawing):
    objectives: ClassVar[Objectives] = "both"  # type: ignore[assignment]  # the fault


class NeedsManyEvaluations(Drawing):
    def run(self, env: PruningEnv, *, seed: int) -> None:
        if env.evaluations >= 10:
            super().run(env, seed=seed)


class NeedsTwoGroups(Drawing):
    def run(self, env: PruningEnv, *, seed: int) -> None:
        if len(env.feasible.structure) >= 2:
            super().run(env, seed=seed)


class TakesTheFastest(Drawing):
    """Proposes what nobody could repeat when several are under way."""

    def points(self, env: PruningEnv, seed: int) -> Callable[[], Sequence[float]]:
        return (IsRandom() if env.at_once > 1 else super()).points(env, seed)


class WaitsForNews(Drawing):
    """Proposes the same until a result is there."""

    def run(self, env: PruningEnv, *, seed: int) -> None:
        draw = self.points(env, seed)
        while True:
            point = draw()
            for result in [env.submit(env.space.decode(point)) for _ in range(env.at_once)]:
                result()


@pytest.mark.parametrize(
    ("test", "agent"),
    [
        ("test_several_may_be_under_way", TakesTheFastest()),
        ("test_several_may_be_under_way", WaitsForNews()),
        ("test_objectives_are_known", WantsSomething()),
        ("test_policies_are_feasible", IgnoresTheBudget()),
        ("test_bounds_of_single_groups_hold", IgnoresTheBudget()),
        ("test_policies_are_distinct", RepeatsItself()),
        ("test_same_seed_gives_same_policies", IsRandom()),
        ("test_same_seed_gives_same_policies", Remembers()),
        ("test_same_seed_gives_same_policies", Swallows()),
        ("test_other_seed_gives_other_policies", IgnoresSeed()),
        ("test_global_generators_stay_as_they_are", UsesGlobalNumpy()),
        ("test_global_generators_stay_as_they_are", UsesGlobalTorch()),
        ("test_evaluations_may_draw_from_global_generators", UsesGlobalNumpy()),
        ("test_evaluations_may_draw_from_global_generators", UsesGlobalTorch()),
        ("test_failed_candidates_do_not_stop_it", StopsAtFailures()),
        ("test_few_evaluations_are_enough", NeedsManyEvaluations()),
        ("test_one_group_is_enough", NeedsTwoGroups()),
    ],
)
def test_agent_contract_catches(test: str, agent: Agent) -> None:
    fails(AgentContract, test, agent)


def test_agent_contract_catches_a_setting_without_default() -> None:
    with pytest.raises(TypeError, match="step"):
        AgentContract().test_every_setting_has_a_default(NeedsASetting(step=1.0))


def test_agent_contract_says_what_is_wrong_with_an_agent_that_goes_on() -> None:
    assert "went on after SearchOver" in fails(AgentContract, "test_policies_are_distinct", Swallows())


def test_agent_contract_catches_dependence_on_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hashing_agent.py").write_text(
        "from autoprune.agents.random import RandomAgent\n"
        "class HashingAgent:\n"
        "    objectives = 'one'\n"
        "    def run(self, env, *, seed):\n"
        "        RandomAgent().run(env, seed=seed + hash('conv1') % 1000)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    agent = __import__("hashing_agent").HashingAgent()
    test = AgentContract().test_same_seed_gives_same_policies_in_another_process
    with pytest.raises(AssertionError, match="another process proposes other policies"):
        test(agent)
    del sys.modules["hashing_agent"]


def test_every_test_of_the_agents_contract_is_known_to_fail() -> None:
    here = inspect.getsource(sys.modules[__name__])
    names = [name for name in vars(AgentContract) if name.startswith("test_")]
    assert [name for name in names if here.count(name) == 0] == []


class FewIdeas(Drawing):
    """Returns after three policies."""

    def run(self, env: PruningEnv, *, seed: int) -> None:
        draw = self.points(env, seed)
        for _ in range(3):
            env.evaluate(env.space.decode(draw()))


class Brief(AgentContract):
    brief = True


@pytest.mark.parametrize(
    "test", ["test_policies_are_distinct", "test_failed_candidates_do_not_stop_it", "test_several_may_be_under_way"]
)
def test_an_agent_may_say_that_it_returns_early(test: str) -> None:
    assert "only 3 of 16 evaluations used" in fails(AgentContract, test, FewIdeas())
    getattr(Brief(), test)(FewIdeas())
    if test != "test_failed_candidates_do_not_stop_it":
        assert "differ" in fails(Brief, test, RepeatsItself())


def test_a_good_agent_passes() -> None:
    contract = AgentContract()
    for name in ("test_policies_are_feasible", "test_same_seed_gives_same_policies", "test_policies_are_distinct"):
        getattr(contract, name)(RandomAgent())


# -- the spaces' contract catches -------------------------------------------------------------------------------------


class Around:
    """A space that is per-group but for what a subclass breaks."""

    def __init__(self, feasible: FeasibleSet, *, spend: tuple[float, float]) -> None:
        self.feasible = feasible
        self.spend = spend
        self.inner = PerGroup(feasible, spend=spend)
        self.dimensions: tuple[str, ...] = self.inner.dimensions

    def decode(self, point: Sequence[float]) -> Policy:
        return self.inner.decode(point)

    def encode(self, policy: Policy) -> list[float]:
        return self.inner.encode(policy)


class ForgetsSpend(Around):
    def __init__(self, feasible: FeasibleSet, *, spend: tuple[float, float]) -> None:
        super().__init__(feasible, spend=(1.0, 1.0))


class SameNames(Around):
    def __init__(self, feasible: FeasibleSet, *, spend: tuple[float, float]) -> None:
        super().__init__(feasible, spend=spend)
        self.dimensions = ("group",) * len(self.inner.dimensions)


class OverBudget(Around):
    def decode(self, point: Sequence[float]) -> Policy:
        self.inner.decode(point)
        return self.feasible.policy(self.feasible.lower)


class NotRounded(Around):
    def decode(self, point: Sequence[float]) -> Policy:
        return Policy({name: max(0.0, value - 1e-3) for name, value in self.inner.decode(point).items()})


class LeavesBudget(Around):
    def decode(self, point: Sequence[float]) -> Policy:
        self.inner.decode(point)
        return self.feasible.policy(self.feasible.upper)


class EncodesPlainly(Around):
    # The obvious inverse, which the projection moves away from.
    def encode(self, policy: Policy) -> list[float]:
        wide = np.maximum(self.feasible.upper - self.feasible.lower, 1)
        point = (self.feasible.removed(policy) - self.feasible.lower) / wide
        return [*point.tolist(), *([0.5] if len(self.dimensions) > len(point) else [])]


class EncodesOutside(Around):
    def encode(self, policy: Policy) -> list[float]:
        return [value + 1e-6 for value in self.inner.encode(policy)]


class Clips(Around):
    def decode(self, point: Sequence[float]) -> Policy:
        finite = np.nan_to_num(np.array(point[: len(self.dimensions)]))
        return self.inner.decode(np.clip(finite, 0, 1).tolist())


class Drifts(Around):
    def __init__(self, feasible: FeasibleSet, *, spend: tuple[float, float]) -> None:
        super().__init__(feasible, spend=spend)
        self.calls = 0

    def decode(self, point: Sequence[float]) -> Policy:
        self.calls += 1
        return self.inner.decode([value * 0.9**self.calls for value in point])


@pytest.mark.parametrize(
    ("test", "make_space"),
    [
        ("test_dimensions_have_names", ForgetsSpend),
        ("test_dimensions_have_names", SameNames),
        ("test_policies_are_feasible", OverBudget),
        ("test_policies_are_feasible", NotRounded),
        ("test_whole_budget_is_filled", LeavesBudget),
        ("test_encode_is_the_way_back", EncodesPlainly),
        ("test_decode_is_pure", Drifts),
        ("test_other_points_are_refused", Clips),
    ],
)
def test_space_contract_catches(test: str, make_space: type[Around]) -> None:
    fails(SearchSpaceContract, test, make_space)


def test_space_contract_catches_a_point_outside_the_cube() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        SearchSpaceContract().test_any_policy_has_a_point(EncodesOutside)


def test_every_test_of_the_spaces_contract_is_known_to_fail() -> None:
    here = inspect.getsource(sys.modules[__name__])
    names = [name for name in vars(SearchSpaceContract) if name.startswith("test_")]
    assert [name for name in names if here.count(name) == 0] == []


@pytest.mark.usefixtures("global_rng_untouched")
def test_synthetic_env_leaves_the_generators_alone() -> None:
    synthetic_env(evaluations=1)
