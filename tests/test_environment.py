import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from torch import nn

from autoprune.cost import Budget, CostModel, FeasibleSet
from autoprune.environment import LayerFacts, Observation, PruningEnv, layer_facts
from autoprune.errors import ConfigError, SearchOver
from autoprune.evaluation import Candidate, Result
from autoprune.policy import Policy
from autoprune.search_spaces.per_group import PerGroup
from autoprune.structure import Group, Structure
from autoprune.testing import SyntheticEvaluator, chain, synthetic_env

Check = Callable[..., None]

FEASIBLE = chain((6, 8, 12, 5))


def accuracy(candidate: Candidate) -> float:
    return candidate.accuracy


def make(**changes: Any) -> PruningEnv:
    arguments: dict[str, Any] = {
        "feasible": FEASIBLE,
        "space": PerGroup(FEASIBLE, spend=(1.0, 1.0)),
        "submit": SyntheticEvaluator(FEASIBLE, evaluations=1000).submit,
        "value": accuracy,
        "evaluations": 1000,
    }
    return PruningEnv(**arguments | changes)


def in_multiples(multiple: int) -> FeasibleSet:
    """Return the policies of three groups of which a multiple stays."""
    feasible = chain((8, 12, 16))
    groups = tuple(dataclasses.replace(group, multiple=multiple) for group in feasible.structure)
    return FeasibleSet.build(dataclasses.replace(feasible.structure, groups=groups), feasible.costs, feasible.budget)


def action(value: float) -> np.ndarray:
    return np.array([value], dtype=np.float32)


def walk(env: PruningEnv, values: list[float]) -> tuple[list[Observation], list[dict[str, Any]], float]:
    """Return all observations of an episode, all infos of its steps, and its reward."""
    observation, _ = env.reset()
    observations, infos, reward = [Observation(*observation.tolist())], [], 0.0
    for value in values:
        observation, reward, _, _, info = env.step(action(value))
        observations.append(Observation(*observation.tolist()))
        infos.append(info)
    return observations, infos, reward


# -- the checkers -----------------------------------------------------------------------------------------------------


def specified(widths: tuple[int, ...]) -> gymnasium.Env[Any, Any]:
    """Return an environment that `gymnasium.make` made, without which its checker leaves checks out."""
    feasible = chain(widths)
    arguments = {
        "feasible": feasible,
        "space": PerGroup(feasible, spend=(1.0, 1.0)),
        "submit": SyntheticEvaluator(feasible, evaluations=1000).submit,
        "value": accuracy,
        "evaluations": 1000,
    }
    return EnvSpec("Pruning-v0", entry_point="autoprune.environment:PruningEnv", kwargs=arguments).make().unwrapped


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("check", [gymnasium_check_env, sb3_check_env])
@pytest.mark.parametrize("widths", [(8,), (8, 8, 16, 16)])
def test_the_checkers_have_nothing_to_say(check: Check, widths: tuple[int, ...]) -> None:
    check(specified(widths), skip_render_check=False)


@pytest.mark.parametrize("check", [gymnasium_check_env, sb3_check_env])
def test_the_checkers_can_fail(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    env, _ = synthetic_env(evaluations=100)
    monkeypatch.setattr(env, "_observation", lambda: np.full(len(Observation._fields), 2.0, dtype=np.float32))
    warnings.simplefilter("ignore")
    with pytest.raises(AssertionError):
        check(env)


# -- the budget -------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4))
def test_the_budget_can_be_met_at_every_step(values: list[float]) -> None:
    env = make()
    env.reset()
    decided = FEASIBLE.upper.copy()
    for index, value in enumerate(values):
        _, _, terminated, _, info = env.step(action(value))
        decided[index] = info["removed"]
        assert FEASIBLE.utilisation(decided) <= 1  # when all to come lose the most they may
        assert FEASIBLE.lower[index] <= decided[index] <= FEASIBLE.upper[index]
    assert terminated
    assert info["candidate"].policy == FEASIBLE.policy(decided)


def test_a_cheaper_policy_than_the_budget_asks_for_is_allowed() -> None:
    _, infos, _ = walk(make(), [1.0, 1.0, 1.0, 1.0])
    assert infos[-1]["candidate"].policy == FEASIBLE.policy(FEASIBLE.upper)


@given(st.integers(0, 3), st.floats(-1, 1, width=32), st.floats(-1, 1, width=32))
def test_an_action_is_a_fraction_of_what_is_feasible(index: int, before: float, value: float) -> None:
    env = make()
    env.reset()
    for _ in range(index):
        env.step(action(before))
    low, high = env.interval
    _, _, _, _, info = env.step(action(value))
    assert info["removed"] == round(low + (float(np.float32(value)) + 1) / 2 * (high - low))
    assert info["saturated"] == (low == high)


@given(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3))
def test_a_group_in_multiples_loses_the_nearest_number_it_allows(values: list[float]) -> None:
    env = make(feasible=in_multiples(4))
    env.reset()
    for value in values:
        low, high = env.interval
        wanted = low + (float(np.float32(value)) + 1) / 2 * (high - low)
        removed = env.decide(action(value))[2]["removed"]
        assert removed in range(low, high + 1, 4)
        assert abs(removed - wanted) == min(abs(number - wanted) for number in range(low, high + 1, 4))


@pytest.mark.parametrize(("value", "removed"), [(-0.6, 0), (-0.4, 4), (0.4, 4), (0.6, 8)])
def test_numbers_in_multiples(value: float, removed: int) -> None:
    env = make(feasible=in_multiples(4))
    env.reset()
    env.decide(action(1.0))
    assert env.interval == (0, 8)
    assert env.decide(action(value))[2]["removed"] == removed  # nearest to 1.6, 2.4, 5.6 and 6.4


@given(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4))
def test_actions_that_come_to_the_same_number_are_the_same(values: list[float]) -> None:
    drawn, exact = make(), make()
    assert np.array_equal(drawn.reset()[0], exact.reset()[0])
    for name, value in zip(FEASIBLE.structure.names, values, strict=True):
        observation, reward, over, _, info = drawn.step(action(value))
        executed = exact.action_for(Policy({name: info["removed"] / FEASIBLE.structure[name].size}))
        again, same_reward, same_over, _, same_info = exact.step(executed)
        assert np.array_equal(observation, again)
        assert (reward, over, info["removed"]) == (same_reward, same_over, same_info["removed"])


def test_both_ends_of_the_interval_are_reached() -> None:
    for value, end in ((-1.0, 0), (1.0, 1)):
        env = make()
        env.reset()
        interval = env.interval
        assert env.step(action(value))[4]["removed"] == interval[end]


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_the_action_for_a_policy_leads_to_it(point: list[float]) -> None:
    env = make()
    policy = env.space.decode(point)
    env.reset()
    for _ in range(4):
        _, _, _, _, info = env.step(env.action_for(policy))
    assert info["candidate"].policy == policy


def test_the_action_for_a_policy_over_the_budget_is_the_nearest() -> None:
    env = make()
    env.reset()
    dense = Policy(dict.fromkeys(FEASIBLE.structure.names, 0.0))
    for _ in range(4):
        low, _ = env.interval
        _, _, _, _, info = env.step(env.action_for(dense))
        assert info["removed"] == low


@pytest.mark.parametrize("wrong", [[1.5], [-1.1], [float("nan")], [0.0, 0.0], []])
def test_an_action_outside_the_space_is_refused(wrong: list[float]) -> None:
    env = make()
    env.reset()
    with pytest.raises(ConfigError, match=r"one number in \[-1, 1\]"):
        env.step(np.array(wrong, dtype=np.float32))


# -- observations -----------------------------------------------------------------------------------------------------


def test_the_docstring_tabulates_every_feature_in_its_place() -> None:
    rows = [line.split("|")[1:3] for line in (PruningEnv.__doc__ or "").splitlines() if line.strip().startswith("| ")]
    tabulated = [(int(index), name.strip()) for index, name in rows[1:]]
    assert tabulated == list(enumerate(Observation._fields))
    assert f"({len(Observation._fields)},)" in (PruningEnv.__doc__ or "")


def test_the_observation_is_of_the_group_that_is_decided_next() -> None:
    observations, infos, _ = walk(make(), [0.0, 0.0, 0.0, 0.0])
    assert [o.position for o in observations] == [0, 0.25, 0.5, 0.75, 1.0]
    assert [o.size for o in observations[:4]] == pytest.approx([6 / 12, 8 / 12, 1.0, 5 / 12])
    assert [info["group"] for info in infos] == list(FEASIBLE.structure.names)
    assert make().reset()[1] == {"group": "conv1"}


def test_slots_mean_the_same_at_reset_and_at_step() -> None:
    # Groups that are alike, of which nothing is removed: only what stands for the place in the network may differ.
    feasible = chain((8, 8, 8, 8), "macs<=1000%")
    env = make(feasible=feasible, space=PerGroup(feasible, spend=(1.0, 1.0)))
    observations, _, _ = walk(env, [-1.0, -1.0])
    first, second, third = observations
    assert second.rest > third.rest > 0  # less to come can remove less, in the same unit from reset on
    assert first.reduced == second.reduced == third.reduced == 0
    constant = set(Observation._fields) - {"position", "rest", "cost"}
    assert {name: getattr(second, name) for name in constant} == {name: getattr(third, name) for name in constant}
    assert {name: getattr(first, name) for name in constant} == {name: getattr(second, name) for name in constant}


def test_the_observation_at_reset() -> None:
    # Of 4 and 6 channels 3 and 5 may go. Multiply-adds on 8x8 pixels, of the whole network and of the smallest:
    first, second, last = 64 * 9 * 3 * 4, 64 * 9 * 4 * 6, 6 * 10
    whole, smallest = first + second + last, 64 * 9 * 3 * 1 + 64 * 9 * 1 * 1 + 1 * 10
    feasible = chain((4, 6), "macs<=40%")
    observation, info = make(feasible=feasible).reset()
    at_reset = {
        "position": 0,
        "size": 4 / 6,
        "cost": (first + second) / whole,
        "target": 0.4,
        "fewest": 1
        / 4,  # with 1 of conv2's left: 64 * 9 * (3 * 3 + 3 * 1) + 10 is below 40 %, and 4 in place of 3 are not
        "most": 3 / 4,
        "reduced": 0,
        "rest": 1 - smallest / whole,
        "last": 0,
    }
    seen = Observation(*observation.tolist())._asdict()
    assert seen == pytest.approx(dict.fromkeys(Observation._fields, 0) | at_reset, abs=1e-6)
    assert info == {"group": "conv1"}
    observations, _, _ = walk(make(feasible=feasible), [-1.0])
    assert observations[1].cost == pytest.approx((second + last) / whole)


@pytest.mark.parametrize(("budget", "metric"), [("macs<=50%", "macs"), ("params<=50%", "params")])
def test_reduced_rest_and_last_are_shares_of_the_cost(budget: str, metric: str) -> None:
    feasible = chain((6, 8, 12, 5), budget, bounds={"conv2": (0.25, 0.75)})
    observations, infos, _ = walk(make(feasible=feasible), [1.0, -1.0, 1.0, 0.0])

    def saved(removed: np.ndarray) -> float:
        cost, dense = (getattr(costs, metric) for costs in (feasible.costs.cost(removed), feasible.costs.dense))
        return float(1 - cost / dense)

    removed = feasible.lower.copy()  # conv2 loses 2 in any case
    for decided, seen in enumerate(observations):  # at reset none is
        if decided:
            removed[decided - 1] = infos[decided - 1]["removed"]
        left = removed.copy()
        left[decided:] = feasible.upper[decided:]
        assert seen.reduced == pytest.approx(saved(removed), abs=1e-6)
        assert seen.reduced + seen.rest == pytest.approx(saved(left), abs=1e-6)
        last = infos[decided - 1]["removed"] / feasible.sizes[decided - 1] if decided else 0
        assert seen.last == pytest.approx(last, abs=1e-6)
    assert observations[0].reduced > 0


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_cost_is_the_share_of_the_multiply_adds_from_reset_on(order: str) -> None:
    groups, seen, _ = episode(make(), 0.0, order=order)
    shares = [FEASIBLE.costs.macs_share(group) for group in groups]
    assert [o.cost for o in seen] == pytest.approx(shares)
    assert len(set(shares)) == 4


def test_fewest_and_most_are_the_interval() -> None:
    env = make()
    env.reset()
    for value in (-1.0, 0.3, 1.0):
        low, high = env.interval
        size = env.feasible.sizes[env._next]
        seen = Observation(*env._observation().tolist())
        assert (seen.fewest, seen.most) == pytest.approx((low / size, high / size))
        env.step(action(value))


def test_the_budget_is_the_target() -> None:
    assert walk(make(), [])[0][0].target == pytest.approx(0.5)
    loose = chain((6, 8, 12, 5), "macs<=1000%")
    assert walk(make(feasible=loose), [])[0][0].target == 1.0


def test_the_observation_that_ends_an_episode() -> None:
    observations, infos, _ = walk(make(), [0.0] * 4)
    last = observations[-1]._asdict()
    kept = {"position": 1.0, "target": 0.5, "reduced": last["reduced"], "last": infos[-1]["removed"] / 5}
    assert last == pytest.approx(dict.fromkeys(Observation._fields, 0.0) | kept)
    assert last["reduced"] >= 0.5 - 1e-6


def test_facts_and_slopes_reach_the_observation() -> None:
    layers = {
        "conv1": LayerFacts(6, 3, 8, 8, 1, 3),
        "conv2": LayerFacts(8, 6, 4, 8, 2, 3),
        "conv3": LayerFacts(12, 8, 1, 1, 0, 0),
    }
    observations, _, _ = walk(make(layers=layers, slopes={"conv1": 0.1, "conv2": 0.4, "conv3": -0.2}), [0.0] * 3)
    first, second, third, unknown = observations
    assert (first.outputs, first.inputs, first.height, first.width) == pytest.approx((6 / 12, 3 / 8, 1.0, 1.0))
    assert (second.height, second.stride, second.kernel, second.kind) == (0.5, 1.0, 1.0, 0.0)
    assert (third.kind, third.kernel, third.slope) == (1.0, 0.0, 0.0)
    assert (first.slope, second.slope) == pytest.approx((0.25, 1.0))
    assert (unknown.kind, unknown.outputs, unknown.slope) == (0.0, 0.0, 0.0)


@given(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4))
def test_every_feature_is_a_share(values: list[float]) -> None:
    env = make()
    observation, _ = env.reset()
    assert env.observation_space.contains(observation)
    for value in values:
        observation, *_ = env.step(action(value))
        assert env.observation_space.contains(observation)


# -- rewards and ends -------------------------------------------------------------------------------------------------


def test_the_reward_is_the_value_at_the_end_and_nothing_before() -> None:
    env = make(value=lambda candidate: candidate.accuracy - 7)
    env.reset()
    rewards = [env.step(action(0.0))[1:3] for _ in range(4)]
    assert rewards[:3] == [(0.0, False)] * 3
    assert rewards[3][1] is True
    assert -7 <= rewards[3][0] <= -6


@pytest.mark.parametrize("worst", [0.0, -1.0])
def test_a_failed_candidate_gives_the_worst_reward(worst: float) -> None:
    evaluator = SyntheticEvaluator(FEASIBLE, evaluations=10)

    def failing(policy: Policy, rival: Policy | None = None) -> Result:
        return lambda: dataclasses.replace(evaluator(policy), measurements=(), failure="the loss is not finite")

    env = make(submit=failing, worst=worst)
    _, infos, reward = walk(env, [0.0] * 4)
    assert reward == worst
    assert infos[-1]["candidate"].failure == "the loss is not finite"
    assert np.isnan(env.objectives(infos[-1]["candidate"])[0])


def test_who_proposes_names_a_rival_or_none() -> None:
    evaluator = SyntheticEvaluator(FEASIBLE, evaluations=10)
    rivals: list[Policy | None] = []

    def submit(policy: Policy, rival: Policy | None = None) -> Result:
        rivals.append(rival)
        return evaluator.submit(policy)

    env = make(submit=submit)
    first, second = FEASIBLE.policy(FEASIBLE.upper), FEASIBLE.policy(FEASIBLE.uniform())
    env.evaluate(first)
    env.submit(second, rival=first)
    walk(env, [0.0] * 4)
    assert rivals == [None, first, None]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_the_worst(value: float) -> None:
    env = make(value=lambda _: value, worst=-2.0)
    assert walk(env, [0.0] * 4)[2] == -2.0


def test_objectives_are_accuracy_and_costs_relative_to_the_dense_network() -> None:
    env = make()
    candidate = env.evaluate(FEASIBLE.policy(FEASIBLE.upper))
    dense = FEASIBLE.costs.dense
    assert env.objectives(candidate) == (
        candidate.accuracy,
        candidate.macs / dense.macs,
        candidate.params / dense.params,
    )


def test_search_over_passes_through_the_last_step() -> None:
    env = make(submit=SyntheticEvaluator(FEASIBLE, evaluations=0).submit)
    env.reset()
    for _ in range(3):
        env.step(action(0.0))
    with pytest.raises(SearchOver):
        env.step(action(0.0))


def test_a_step_after_the_end_needs_a_reset() -> None:
    env = make()
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(action(0.0))
    walk(env, [0.0] * 4)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(action(0.0))
    env.reset()
    env.step(action(0.0))


def test_an_episode_knows_nothing_of_the_one_before() -> None:
    env = make()
    first = walk(env, [0.3, -0.2, 0.9, 0.1])
    walk(env, [1.0, 1.0])  # left in the middle
    again = walk(env, [0.3, -0.2, 0.9, 0.1])
    assert first == again


def test_nothing_to_decide_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1))
    empty = Structure(())
    costs = CostModel(model, torch.zeros(1, 1, 2, 2), empty)
    feasible = FeasibleSet.build(empty, costs, Budget())
    with pytest.raises(ConfigError, match="nothing to search"):
        make(feasible=feasible)


# -- layer facts ------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """One layer of each kind; the last one never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 4, (5, 3), stride=2, padding=(2, 1))
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.line = nn.Conv1d(6, 7, 3, padding=1)
        self.fc = nn.Linear(7, 9)
        self.idle = nn.Linear(9, 9)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = self.up(self.wide(images))
        scores: torch.Tensor = self.fc(self.line(out.flatten(2)).mean(2))
        return scores


def test_layer_facts_of_every_kind_of_layer() -> None:
    model = Mixed().train()
    names = ("wide", "up", "line", "fc", "idle")
    structure = Structure(tuple(Group(f"of {name}", "channels", 4, (), (name,), ()) for name in names))
    facts = layer_facts(model, torch.zeros(2, 3, 8, 12), structure)
    assert facts == {
        "of wide": LayerFacts(4, 3, 4, 6, 2, 5),
        "of up": LayerFacts(6, 4, 8, 12, 2, 2),
        "of line": LayerFacts(7, 6, 1, 96, 1, 3),
        "of fc": LayerFacts(9, 7, 1, 1, 0, 0),
    }
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


# -- how an episode goes ----------------------------------------------------------------------------------------------


def episode(env: PruningEnv, value: float, **options: Any) -> tuple[list[str], list[Observation], Policy]:
    """Return the groups in the order in which they are decided, what is seen before each, and the policy."""
    observation, info = env.reset(options=options)
    groups, seen = [info["group"]], []
    while "policy" not in info:
        seen.append(Observation(*observation.tolist()))
        observation, _, info = env.decide(action(value))
        groups.append(info["group"])
    return groups[1:], seen, info["policy"]


def test_groups_are_decided_forward_in_reverse_or_at_random() -> None:
    env, names = make(), list(FEASIBLE.structure.names)
    assert episode(env, 0.0)[0] == names
    backwards, seen, policy = episode(env, 1.0, order="reverse")
    assert backwards == names[::-1]
    assert [o.position for o in seen] == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert seen[0].last == 0
    assert [o.last for o in seen[1:]] == pytest.approx([policy[name] for name in names[:0:-1]])
    assert episode(env, 0.0)[0] == names[::-1]  # it stays
    env.reset(seed=3, options={"order": "random"})
    drawn = [tuple(episode(env, 0.0)[0]) for _ in range(20)]
    assert len(set(drawn)) > 5
    assert all(sorted(order) == sorted(names) for order in drawn)
    env.reset(seed=3)
    assert [tuple(episode(env, 0.0)[0]) for _ in range(20)] == drawn


@given(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4), st.sampled_from(["forward", "reverse", "random"]))
def test_the_budget_is_met_in_any_order(values: list[float], order: str) -> None:
    env = make()
    env.reset(seed=0, options={"order": order})
    for value in values:
        _, result, info = env.decide(action(value))
    assert result is not None
    assert FEASIBLE.utilisation(FEASIBLE.removed(info["policy"])) <= 1


@pytest.mark.parametrize("share", [1.0, 0.6, 0.2, 0.0])
def test_an_episode_may_have_a_part_of_the_budget(share: float) -> None:
    env = make()
    _, seen, policy = episode(env, -1.0, share=share)  # as little as may go
    used, target = FEASIBLE.utilisation(FEASIBLE.removed(policy)), FEASIBLE.target(share)
    assert used <= target + 1e-12
    assert used >= target - 0.2
    dense = FEASIBLE.utilisation(np.zeros_like(FEASIBLE.lower))
    assert all(o.target == pytest.approx(target / dense) for o in seen)


@pytest.mark.parametrize("wrong", [{"order": "sideways"}, {"share": 1.5}, {"shares": 0.5}])
def test_options_that_do_not_exist_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="`order` is one of forward, reverse, random and `0 <= share <= 1`"):
        make().reset(options=wrong)


def test_the_share_of_decisions_without_a_choice() -> None:
    feasible = chain((8, 8), bounds={"conv1": (0.5, 0.5)})
    env = make(feasible=feasible)
    assert env.saturated is None
    env.reset()
    assert env.interval == (4, 4)
    env.step(action(0.0))
    assert env.saturated == 1.0
    # 64 * 9 * (3 * 4 + 4 * 7) + 70 is within half of 64 * 9 * (3 * 8 + 8 * 8) + 80, and 8 in place of 7 are not.
    assert env.interval == (1, 7)
    env.step(action(0.0))
    assert env.saturated == 1 / 2
    lane, quiet = env.beside(), env.without_evaluation()
    episode(quiet, 0.0)
    assert (quiet.saturated, env.saturated) == (1 / 2, 1 / 2)
    lane.reset()
    lane.step(action(0.0))
    assert env.saturated == lane.saturated == 2 / 3
    assert quiet.saturated == 1 / 2


def test_trying_out_measures_nothing_and_leaves_the_episode() -> None:
    evaluator = SyntheticEvaluator(FEASIBLE, evaluations=5)
    env = make(submit=evaluator.submit)
    env.reset()
    env.step(action(0.3))
    before = env.interval
    quiet = env.without_evaluation()
    _, _, policy = episode(quiet, 0.5)
    assert evaluator.calls == 0
    assert env.interval == before
    result = None
    quiet.reset()
    for _ in FEASIBLE.structure:
        _, result, info = quiet.decide(action(0.5))
    assert info["policy"] == policy
    assert result is not None
    with pytest.raises(SearchOver, match="measures nothing"):
        result()


def test_a_latency_table_gives_each_group_its_share() -> None:
    class Table:
        def predict(self, removed: np.ndarray) -> float:
            return float(10 - removed[1])

    feasible = chain((6, 8, 12, 5))
    feasible.costs.latency = Table()  # type: ignore[assignment]
    env = make(feasible=feasible, space=PerGroup(feasible, spend=(1.0, 1.0)))
    _, seen, _ = episode(env, 0.0)
    assert [o.latency for o in seen] == pytest.approx([0, feasible.upper[1] / 10, 0, 0])
    assert [o.latency for o in episode(make(), 0.0)[1]] == [0, 0, 0, 0]
