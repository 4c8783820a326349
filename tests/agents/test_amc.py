import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.buffers import NStepReplayBuffer

from autoprune import search
from autoprune.agents import amc
from autoprune.agents.amc import AMCAgent, PPOAgent, SACAgent, TD3Agent, truncated_normal
from autoprune.agents.base import Agent
from autoprune.agents.random import RandomAgent
from autoprune.environment import Observation, PruningEnv
from autoprune.errors import ConfigError
from autoprune.evaluation import Candidate, Result
from autoprune.finetuning import Recipe, train
from autoprune.policy import Policy
from autoprune.task import Task
from autoprune.testing import AgentContract, SyntheticEvaluator, run_agent, synthetic_env
from autoprune.tracking import NullTracker

WIDTHS = (16, 32, 32, 64)


class TestAMCAgent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return AMCAgent(updates=1)


class TestTD3Agent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return TD3Agent(updates=1, order="reverse")


class TestSACAgent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return SACAgent(updates=1, order="random")


class TestPPOAgent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return PPOAgent(episodes=2, epochs=1)


# -- learning ---------------------------------------------------------------------------------------------------------


def searched(agent: Agent, seed: int) -> tuple[float, float]:
    """Return the best accuracy of a search, and the mean one of its last quarter."""
    env, evaluator = synthetic_env(evaluations=40, seed=seed, widths=WIDTHS)
    run_agent(agent, env, seed=seed)
    accuracies = [candidate.accuracy for candidate in evaluator.candidates]
    return max(accuracies), float(np.mean(accuracies[-10:]))


def test_beats_random_at_equal_evaluations() -> None:
    by_amc = np.array([searched(AMCAgent(), seed) for seed in range(3)])
    by_random = np.array([searched(RandomAgent(), seed) for seed in range(3)])
    best, late = np.mean(by_amc - by_random, axis=0)
    assert late > 0.03  # what it proposes once it has learnt
    assert best > -0.005  # which it does not pay for with its best


# -- what is replayed -------------------------------------------------------------------------------------------------


class Recorder(NStepReplayBuffer):
    """Keeps what was added and counts what was sampled."""

    made: "list[Recorder]" = []  # noqa: RUF012 - the agent makes the memory, so this is how the test finds it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replayed: Counter[int] = Counter()
        self.made.append(self)

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        self.replayed.update(batch_inds.tolist())
        return super()._get_samples(batch_inds, env)


class RecordingReplay(Recorder, amc._Replay):
    pass


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> tuple[PruningEnv, SyntheticEvaluator, Recorder]:
    """A finished search of 20 candidates, and its replay memory."""
    monkeypatch.setattr(amc, "_Replay", RecordingReplay)
    monkeypatch.setattr(Recorder, "made", [])
    env, evaluator = synthetic_env(evaluations=20)
    run_agent(AMCAgent(), env, seed=0)
    return env, evaluator, Recorder.made[0]


def test_the_first_transition_of_an_episode_is_replayed_as_often_as_any(
    memory: tuple[PruningEnv, SyntheticEvaluator, Recorder],
) -> None:
    env, _, replay = memory
    decisions = len(env.feasible.structure)
    by_place = Counter[int]()
    for index, times in replay.replayed.items():
        by_place[index % decisions] += times
    shares = np.array([by_place[place] for place in range(decisions)]) / sum(by_place.values())
    assert shares == pytest.approx(1 / decisions, abs=0.02)


def test_the_executed_action_is_what_is_replayed(memory: tuple[PruningEnv, SyntheticEvaluator, Recorder]) -> None:
    env, evaluator, replay = memory
    decisions = len(env.feasible.structure)
    seen = []
    for start in range(0, replay.pos - decisions + 1, decisions):  # the last episode was cut short
        env.reset()
        for index in range(start, start + decisions - 1):
            after, *_ = env.step(replay.actions[index, 0])
            assert after == pytest.approx(replay.next_observations[index, 0])
        removed = [*env._removed[:-1]]
        low, high = env.interval
        removed.append(round(low + (float(replay.actions[start + decisions - 1, 0, 0]) + 1) / 2 * (high - low)))
        seen.append(env.feasible.policy(np.array(removed)))
    evaluated = [candidate.policy for candidate in evaluator.candidates]
    assert list(dict.fromkeys(seen)) == evaluated


def test_observation_and_action_belong_to_the_same_group(
    memory: tuple[PruningEnv, SyntheticEvaluator, Recorder],
) -> None:
    env, _, replay = memory
    decisions = len(env.feasible.structure)
    place = Observation._fields.index("position")
    for index in range(replay.pos):
        assert replay.observations[index, 0, place] == pytest.approx(index % decisions / decisions)


def test_the_reward_stands_at_the_last_transition_only(
    memory: tuple[PruningEnv, SyntheticEvaluator, Recorder],
) -> None:
    env, evaluator, replay = memory
    decisions = len(env.feasible.structure)
    accuracies = {np.float32(candidate.accuracy) for candidate in evaluator.candidates}
    for index in range(replay.pos):
        last = index % decisions == decisions - 1
        assert replay.dones[index, 0] == last
        assert (replay.rewards[index, 0] in accuracies) if last else (replay.rewards[index, 0] == 0)


def test_final_rewards_come_less_a_moving_average_and_by_their_spread() -> None:
    env, _ = synthetic_env(evaluations=1, widths=(8, 8))
    replay = amc._Replay(10, env.observation_space, env.action_space, device="cpu", n_steps=2, gamma=1.0)
    zeros, action = env.reset()[0] * 0, np.zeros(1, np.float32)
    with amc._LentGenerators(0).lent():
        for reward, done in ((0.0, False), (0.8, True)):
            replay.add(zeros, zeros, action, np.array([reward]), np.array([done]), [{}])
        assert replay.sample(8).rewards.numpy() == pytest.approx(0.0, abs=1e-6)  # 0.8 less 0.8, at both transitions
        replay.rewards[1] = 0.4
        assert replay.sample(8).rewards.numpy() == pytest.approx(-0.2, abs=1e-6)  # the baseline is (0.8 + 0.4) / 2
        for reward, done in ((0.0, False), (0.8, True)):
            replay.add(zeros, zeros, action, np.array([reward]), np.array([done]), [{}])
        relative = replay.sample(64).rewards.numpy()
        assert relative.max() - relative.min() == pytest.approx(2.0, abs=1e-5)  # 0.8 less 0.4, by a spread of 0.2


# -- how it searches --------------------------------------------------------------------------------------------------


def test_warm_starts_come_first_and_as_they_are() -> None:
    env, evaluator = synthetic_env(evaluations=6)
    starts = [env.space.decode([0.1, 0.9, 0.5, 0.2]), env.space.decode([0.9, 0.1, 0.5, 0.2])]
    warm = PruningEnv(
        env.feasible, env.space, evaluator.submit, value=lambda c: c.accuracy, evaluations=6, warm_starts=starts
    )
    run_agent(AMCAgent(), warm, seed=0)
    assert [candidate.policy for candidate in evaluator.candidates[:2]] == starts


@pytest.mark.parametrize("make", [AMCAgent, PPOAgent])
def test_without_warm_starts_none_is_tried_first(make: Callable[..., AMCAgent | PPOAgent]) -> None:
    env, evaluator = synthetic_env(evaluations=4)
    env.warm_starts = (env.space.decode([0.1, 0.9, 0.5, 0.2]),)
    run_agent(make(warm_start=False), env, seed=0)
    assert env.warm_starts[0] not in [candidate.policy for candidate in evaluator.candidates]


def test_the_warm_up_fills_the_budget() -> None:
    env, evaluator = synthetic_env(evaluations=12)
    run_agent(AMCAgent(warmup=12), env, seed=0)
    used = [env.feasible.utilisation(env.feasible.removed(c.policy)) for c in evaluator.candidates]
    assert min(used) > 0.9


def test_actor_and_critic_learn_at_their_own_rates() -> None:
    env, _ = synthetic_env(evaluations=1)
    with amc._LentGenerators(0).lent():
        learner = AMCAgent(actor_lr=3e-4, critic_lr=2e-3)._learner(env)
        learner.remember([(env.reset()[0], np.zeros(1, np.float32), env.reset()[0])], 1.0)
        learner.train(1, 4)
    assert learner.actor.optimizer.param_groups[0]["lr"] == 3e-4
    assert learner.critic.optimizer.param_groups[0]["lr"] == 2e-3


def test_ppo_runs_as_many_episodes_side_by_side_as_may_be_under_way() -> None:
    env, evaluator = synthetic_env(evaluations=12)
    env.at_once = 3
    under_way: list[str] = []
    most = 0

    def submit(policy: Policy) -> Result:
        nonlocal most
        result = evaluator.submit(policy)
        under_way.append(policy.id)
        most = max(most, len(under_way))

        def taken() -> Candidate:
            under_way.remove(policy.id)
            return result()

        return taken

    env._submit = submit
    run_agent(PPOAgent(episodes=3, epochs=1), env, seed=0)
    assert most == 3
    assert len(evaluator.candidates) == 12


def test_an_agent_that_saw_several_budgets_has_policies_for_them() -> None:
    env, evaluator = synthetic_env(evaluations=30)
    agent = AMCAgent(shares=(1.0, 0.5), updates=1)
    with pytest.raises(ConfigError, match="has not learnt anything yet"):
        agent.policy_for(env)
    run_agent(agent, env, seed=0)
    calls = evaluator.calls
    feasible = env.feasible
    used = {share: feasible.utilisation(feasible.removed(agent.policy_for(env, share))) for share in (1.0, 0.5, 0.2)}
    assert evaluator.calls == calls  # nothing is measured
    assert all(used[share] <= feasible.target(share) + 1e-9 for share in used)
    halved = [
        c for c in evaluator.candidates if feasible.utilisation(feasible.removed(c.policy)) <= feasible.target(0.5)
    ]
    assert len(halved) >= 10
    assert agent.policy_for(env, 0.5) == agent.policy_for(env, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "sideways"}, "`order` must be one of forward, reverse, random"),
        ({"shares": ()}, "`0 <= share <= 1` must hold"),
        ({"shares": (0.5, 1.5)}, "`0 <= share <= 1` must hold"),
    ],
)
def test_orders_and_shares_that_do_not_exist_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AMCAgent(**settings)


@pytest.mark.parametrize("settings", [{"episodes": 1}, {"epochs": 0}, {"lr": 0.0}])
def test_ppo_refuses_useless_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must hold"):
        PPOAgent(**settings)


@pytest.mark.parametrize(
    "settings", [{"warmup": 0}, {"sigma": 0.0}, {"updates": 0}, {"actor_lr": -1.0}, {"critic_lr": 0.0}, {"decay": 0.0}]
)
def test_useless_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="> 0` must hold"):
        AMCAgent(**settings)


def test_the_papers_settings_run() -> None:
    env, evaluator = synthetic_env(evaluations=8)
    agent = AMCAgent.published(warmup=2)
    run_agent(agent, env, seed=0)
    assert len(evaluator.candidates) == 8
    assert (agent.actor_lr, agent.critic_lr, agent.decay, agent.hidden) == (1e-4, 1e-3, 0.95, (300, 300))
    assert (AMCAgent.published().warmup, AMCAgent.published().warm_start) == (100, False)


# -- randomness -------------------------------------------------------------------------------------------------------


@given(st.floats(-1, 1), st.floats(1e-6, 1e3), st.integers(0, 1000))
def test_exploration_stays_in_the_action_space(mean: float, sigma: float, seed: int) -> None:
    action = truncated_normal(mean, sigma, np.random.default_rng(seed))
    assert action.shape == (1,)
    assert -1 <= action[0] <= 1


def test_exploration_is_cut_not_clipped() -> None:
    # Clipping would put a third of the draws on the bound itself.
    rng = np.random.default_rng(0)
    drawn = np.array([truncated_normal(0.8, 0.5, rng)[0] for _ in range(2000)])
    assert np.mean(drawn == 1.0) == 0.0
    assert drawn.mean() == pytest.approx(0.8 - 0.5 * 0.5617, abs=0.03)  # of the cut normal: mean + sigma * -0.5617


def test_lent_generators_go_on_where_they_stopped() -> None:
    whole, parts = amc._LentGenerators(5), amc._LentGenerators(5)
    with whole.lent():
        expected = [torch.rand(2).tolist(), np.random.rand(2).tolist()]  # noqa: NPY002 - it is the global one
    with parts.lent():
        first = torch.rand(1).item(), np.random.rand()  # noqa: NPY002
    torch.rand(3)
    with parts.lent():
        second = torch.rand(1).item(), np.random.rand()  # noqa: NPY002
    assert expected == [[first[0], second[0]], [first[1], second[1]]]


def test_generators_come_back_when_the_borrower_fails() -> None:
    threads = torch.get_num_threads()
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002
    borrower = amc._LentGenerators(0).lent()
    borrower.__enter__()
    torch.rand(1)
    np.random.rand()  # noqa: NPY002
    assert torch.get_num_threads() == 1
    assert not torch.equal(torch.get_rng_state(), before[0])
    assert not borrower.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == threads
    assert (repr(np.random.get_state()), random.getstate()) == before[1:]  # noqa: NPY002


def test_beats_random_on_the_digits_once_it_has_learnt(tmp_path: Path) -> None:
    untrained = Task.named("resnet8", "digits")
    model = untrained.fresh_model()
    recipe = Recipe(lr=0.1, batch_size=64)
    train(model, untrained.train_batches(64, seed=0), 160, recipe=recipe, loss=untrained.loss, seed=0)
    result = search(
        Task.named("resnet8", "digits", model=model),
        budget="macs<=30%",
        agent="amc",
        candidates=40,
        control=16,
        finetune_steps=0,
        tracker=NullTracker(),
        out=tmp_path / "run",
    )
    accuracies = {arm: [c.accuracy for c in result.candidates if c.arm == arm] for arm in ("search", "random")}
    assert np.mean(accuracies["search"][-13:]) > np.mean(accuracies["random"]) + 0.015
    assert max(accuracies["search"]) > max(accuracies["random"]) - 0.01
