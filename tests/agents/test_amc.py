import itertools
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.buffers import NStepReplayBuffer
from torch import nn

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
        return TD3Agent(updates=1, order="reverse", uniform_warmup=True, catch_up=False, scale_rewards=False)


class TestSACAgent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return SACAgent(updates=1, order="random")


class TestPPOAgent(AgentContract):
    @pytest.fixture
    def agent(self) -> Agent:
        return PPOAgent(episodes=2, epochs=1, order="random", shares=(1.0, 0.8))


# -- learning ---------------------------------------------------------------------------------------------------------


def searched(agent: Agent, problem: int, seed: int) -> tuple[float, float]:
    """Return the best accuracy of a search of 100 evaluations, and the mean one of its last quarter."""
    env, evaluator = synthetic_env(evaluations=100, seed=problem, widths=WIDTHS)
    run_agent(agent, env, seed=seed)
    accuracies = [candidate.accuracy for candidate in evaluator.candidates]
    return max(accuracies), float(np.mean(accuracies[-(len(accuracies) // 4) :]))


PROBLEMS = (2, 3, 4)


@pytest.fixture(scope="module")
def by_random() -> np.ndarray:
    """What random search may expect of each problem, `(problems, 2)`: the mean over five seeds."""
    return np.array([np.mean([searched(RandomAgent(), p, seed) for seed in range(5)], axis=0) for p in PROBLEMS])


@pytest.mark.parametrize(
    "make",
    [
        partial(AMCAgent, updates=1, hidden=(32, 32)),
        partial(TD3Agent, updates=1, hidden=(32, 32)),
        partial(SACAgent, updates=1, hidden=(32, 32)),
        PPOAgent,
    ],
)
def test_beats_random_at_equal_evaluations(make: Callable[..., AMCAgent | PPOAgent], by_random: np.ndarray) -> None:
    by_agent = np.array([searched(make(), problem, seed=problem) for problem in PROBLEMS])
    best, late = np.mean(by_agent - by_random, axis=0)
    assert best > 0
    assert late > 0.03 or isinstance(make(), SACAgent)  # what it proposes once it has learnt


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
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The replay memories that are made."""
    monkeypatch.setattr(amc, "_Replay", RecordingReplay)
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder.made


@pytest.fixture
def memory(replays: list[Recorder]) -> tuple[PruningEnv, SyntheticEvaluator, Recorder]:
    """A finished search of 20 candidates, and its replay memory."""
    env, evaluator = synthetic_env(evaluations=20)
    run_agent(AMCAgent(), env, seed=0)
    return env, evaluator, replays[0]


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


def test_what_is_replayed_is_what_was_executed(memory: tuple[PruningEnv, SyntheticEvaluator, Recorder]) -> None:
    env, evaluator, replay = memory
    quiet, decisions = env.without_evaluation(), len(env.feasible.structure)
    executed = []
    for start in range(0, replay.pos, decisions):
        observation, info = quiet.reset()
        for index in range(start, start + decisions):
            assert np.array_equal(replay.observations[index, 0], observation)
            observation, _, info = quiet.decide(replay.actions[index, 0])
            assert np.array_equal(replay.next_observations[index, 0], observation)
        executed.append(info["policy"])
    assert list(dict.fromkeys(executed)) == [candidate.policy for candidate in evaluator.candidates]


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


@pytest.mark.parametrize("pace", [0.5, 0.25])
@pytest.mark.parametrize(("scaled", "spread"), [(True, 0.2), (False, 1.0)])
def test_final_rewards_come_less_a_moving_average_and_by_their_spread(scaled: bool, spread: float, pace: float) -> None:
    env, _ = synthetic_env(evaluations=1, widths=(8, 8))
    spaces = env.observation_space, env.action_space
    replay = amc._Replay(10, *spaces, device="cpu", n_steps=2, gamma=1.0, baseline=pace, scaled=scaled)
    zeros, action = env.reset()[0] * 0, np.zeros(1, np.float32)
    with amc._LentGenerators(0).lent():
        for reward, done in ((0.0, False), (0.8, True)):
            replay.add(zeros, zeros, action, np.array([reward]), np.array([done]), [{}])
        assert replay.sample(8).rewards.numpy() == pytest.approx(0.0, abs=1e-6)  # 0.8 less 0.8, at both transitions
        replay.rewards[1] = 0.4
        baseline = 0.8 + pace * (0.4 - 0.8)
        assert replay.sample(8).rewards.numpy() == pytest.approx(0.4 - baseline, abs=1e-6)
        for reward, done in ((0.0, False), (0.8, True)):
            replay.add(zeros, zeros, action, np.array([reward]), np.array([done]), [{}])
        relative = replay.sample(64).rewards.numpy()
        assert relative.max() - relative.min() == pytest.approx(0.4 / spread, abs=1e-5)  # 0.8 less 0.4


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


def test_a_uniform_warm_up_draws_its_actions(replays: list[Recorder]) -> None:
    env, evaluator = synthetic_env(evaluations=12)
    env.warm_starts = (env.space.decode([0.1, 0.9, 0.5, 0.2]),)
    run_agent(AMCAgent(warmup=9, uniform_warmup=True, updates=1, hidden=(8,)), env, seed=5)
    drawn = np.random.default_rng(5).uniform(-1, 1, 8 * 4).astype(np.float32)  # 8 episodes of 4 decisions
    assert evaluator.candidates[0].policy == env.warm_starts[0]
    assert np.array_equal(replays[0].actions[4:36, 0, 0], drawn)
    used = [env.feasible.utilisation(env.feasible.removed(c.policy)) for c in evaluator.candidates[1:9]]
    assert min(used) < 0.7  # where points of the space fill the budget


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

    def submit(policy: Policy, rival: Policy | None = None) -> Result:
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


@pytest.mark.parametrize("at_once", [1, 2])
def test_ppo_learns_from_the_actions_that_were_executed(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number that it draws stands for an action of its own: none is cut off."""
    executed: list[float] = []
    learnt: list[np.ndarray] = []
    decide, train = PruningEnv.decide, amc.PPO.train

    def noted(env: PruningEnv, action: Any) -> Any:
        executed.append(float(action[0]))
        return decide(env, action)

    def noting(learner: Any) -> None:
        learnt.append(learner.rollout_buffer.actions.copy())  # (steps, lanes, 1), before they are shuffled
        train(learner)

    monkeypatch.setattr(PruningEnv, "decide", noted)
    monkeypatch.setattr(amc.PPO, "train", noting)
    env, evaluator = synthetic_env(evaluations=20)
    lanes = PruningEnv(
        env.feasible, env.space, evaluator.submit, value=lambda c: c.accuracy, evaluations=20, at_once=at_once
    )
    run_agent(PPOAgent(episodes=4, epochs=1), lanes, seed=0)
    drawn = np.concatenate([actions.reshape(-1) for actions in learnt])
    assert np.abs(drawn).max() > 1.5
    assert np.tanh(drawn) == pytest.approx(executed[: len(drawn)], abs=1e-6)


@pytest.fixture
def episodes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, list[str]]]:
    """All episodes, with the target that was seen and the groups in the order in which they were decided."""
    begun: list[tuple[float, list[str]]] = []
    under_way: dict[int, list[str]] = {}
    reset, decide = PruningEnv.reset, PruningEnv.decide

    def noted_reset(env: PruningEnv, **arguments: Any) -> Any:
        observation, info = reset(env, **arguments)
        groups = under_way[id(env)] = []
        begun.append((Observation(*observation.tolist()).target, groups))
        return observation, info

    def noted_decide(env: PruningEnv, action: Any) -> Any:
        observation, result, info = decide(env, action)
        under_way[id(env)].append(info["group"])
        return observation, result, info

    monkeypatch.setattr(PruningEnv, "reset", noted_reset)
    monkeypatch.setattr(PruningEnv, "decide", noted_decide)
    return begun


BY_GROUP = [
    partial(AMCAgent, warmup=3, updates=1, hidden=(8,)),
    partial(TD3Agent, warmup=3, updates=1, hidden=(8,)),
    partial(SACAgent, warmup=3, updates=1, hidden=(8,)),
    partial(PPOAgent, episodes=2, epochs=1),
]


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("make", BY_GROUP)
def test_groups_are_decided_in_the_order_that_was_asked_for(
    make: Callable[..., AMCAgent | PPOAgent], at_once: int, episodes: list[tuple[float, list[str]]]
) -> None:
    decided: dict[str, list[tuple[str, ...]]] = {}
    for order in ("forward", "reverse", "random", "random"):
        episodes.clear()
        env, _ = synthetic_env(evaluations=8)
        env.at_once = at_once
        run_agent(make(order=order), env, seed=0)
        found = [tuple(groups) for _, groups in episodes if len(groups) == 4]
        assert len(found) >= 8
        assert decided.setdefault(order, found) == found  # the seed's random orders too
    names = env.feasible.structure.names
    assert set(decided["forward"]) == {names}
    assert set(decided["reverse"]) == {names[::-1]}
    assert len(set(decided["random"])) > 3
    assert all(sorted(order) == sorted(names) for order in decided["random"])


@pytest.mark.parametrize("make", BY_GROUP)
def test_episodes_have_their_shares_of_the_budget_in_turn(
    make: Callable[..., AMCAgent | PPOAgent], episodes: list[tuple[float, list[str]]]
) -> None:
    env, _ = synthetic_env(evaluations=8)
    run_agent(make(shares=(1.0, 0.5, 0.0)), env, seed=0)
    targets = [target for target, groups in episodes if groups]
    dense = env.feasible.utilisation(np.zeros_like(env.feasible.lower))
    shares = [env.feasible.target(share) / dense for share in (1.0, 0.5, 0.0)]
    assert targets[:8] == pytest.approx((shares * 3)[:8])


@pytest.mark.parametrize("make", [partial(AMCAgent, updates=1, hidden=(64, 64)), partial(PPOAgent)])
def test_an_agent_that_saw_several_budgets_has_policies_for_them(make: Callable[..., AMCAgent | PPOAgent]) -> None:
    env, evaluator = synthetic_env(evaluations=30)
    agent = make(shares=(1.0, 0.5))
    with pytest.raises(ConfigError, match="has not learnt anything yet"):
        agent.policy_for()
    run_agent(agent, env, seed=0)
    calls, feasible = evaluator.calls, env.feasible
    shares = (1.0, 0.75, 0.5, 0.25, 0.0)
    used = [feasible.utilisation(feasible.removed(agent.policy_for(share))) for share in shares]
    targets = [feasible.target(share) for share in shares]
    assert evaluator.calls == calls  # nothing is measured
    assert all(use <= target + 1e-9 for use, target in zip(used, targets, strict=True))
    assert all(more > less for more, less in itertools.pairwise(used))
    assert np.subtract(targets, used).max() < 0.1
    assert agent.policy_for(0.5) == agent.policy_for(0.5, env)


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
    "settings",
    [
        *({"warmup": 0}, {"sigma": 0.0}, {"updates": 0}, {"actor_lr": -1.0}, {"critic_lr": 0.0}, {"decay": 0.0}),
        *({"gamma": 0.0}, {"gamma": 1.5}, {"tau": 2.0}, {"baseline": -0.1}),
    ],
)
def test_useless_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"(> 0|<= 1)` must hold"):
        AMCAgent(**settings)


# -- its numbers ------------------------------------------------------------------------------------------------------


class Watched(NamedTuple):
    """What an agent did: sigmas of exploration, one a decision, and gradient steps with their batches."""

    sigmas: list[float]
    trained: list[tuple[int, int]]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    seen, train = Watched([], []), amc._DDPG.train

    def draw(mean: float, sigma: float, rng: np.random.Generator) -> Any:
        seen.sigmas.append(sigma)
        return truncated_normal(mean, sigma, rng)

    def note(learner: Any, steps: int, batch: int) -> None:
        seen.trained.append((steps, batch))
        train(learner, steps, batch)

    monkeypatch.setattr(amc, "truncated_normal", draw)
    monkeypatch.setattr(amc._DDPG, "train", note)
    return seen


def numbers(learner: Any) -> dict[str, Any]:
    """Return what a learner works with."""
    replay, nets = learner.replay_buffer, {"actor": learner.actor, "critic": learner.critic}
    widths = {
        name: [layer.out_features for layer in net.modules() if isinstance(layer, nn.Linear)]
        for name, net in nets.items()
    }
    rates = {f"{name}_lr": net.optimizer.param_groups[0]["lr"] for name, net in nets.items()}
    own = {"gamma": learner.gamma, "tau": learner.tau, "batch": learner.batch_size}
    kept = {"buffer": replay.buffer_size, "steps": replay.n_steps, "undiscounted": replay.gamma == 1}
    return own | kept | widths | rates


SHARED = {"gamma": 1.0, "tau": 0.01, "batch": 64, "buffer": 400, "undiscounted": True}
NETWORKS = {"actor": [300, 300, 1], "critic": [300, 300, 1]}


def test_the_numbers_of_the_published_agent(watched: Watched) -> None:
    env, evaluator = synthetic_env(evaluations=8)  # of 4 groups
    agent = AMCAgent.published(warmup=2)
    run_agent(agent, env, seed=0)
    assert len(evaluator.candidates) == 8
    assert numbers(agent.learner) == SHARED | NETWORKS | {"steps": 1, "actor_lr": 1e-4, "critic_lr": 1e-3}
    assert watched.sigmas[:12] == pytest.approx([1.0] * 4 + [0.95] * 4 + [0.95**2] * 4)  # half of the actions' range
    assert watched.trained == [(4, 64)] * (len(watched.sigmas) // 4 - 1)  # none in the warm-up; the last was too many


def test_the_numbers_of_the_agent_for_few_evaluations(watched: Watched) -> None:
    env, _ = synthetic_env(evaluations=12)
    agent = AMCAgent()
    run_agent(agent, env, seed=0)
    assert numbers(agent.learner) == SHARED | NETWORKS | {"steps": 4, "actor_lr": 1e-3, "critic_lr": 1e-3}
    shrinks = 0.02 ** (1 / 8)  # 4 of 12 are warm-up
    assert watched.sigmas[:8] == pytest.approx([1.0] * 4 + [shrinks] * 4)
    assert watched.trained[:2] == [(4 * 4 * 4, 64), (4 * 4, 64)]  # four a decision, the warm-up's first


def test_the_discount_is_the_learner_s_and_the_memory_s() -> None:
    env, _ = synthetic_env(evaluations=2)
    agent = AMCAgent(warmup=1, gamma=0.9, hidden=(8,))
    run_agent(agent, env, seed=0)
    assert agent.learner.gamma == agent.learner.replay_buffer.gamma == 0.9


def test_the_published_agent_scales_with_its_episodes() -> None:
    whole, small = AMCAgent.published(), AMCAgent.published(episodes=60)
    assert (whole.warmup, whole.decay, whole.warm_start) == (100, 0.95, False)
    assert (small.warmup, small.decay) == (8, pytest.approx(0.95 ** (700 / 52)))
    assert (whole.episodes_kept, small.episodes_kept) == (100, 8)
    assert isinstance(TD3Agent.published(episodes=60), TD3Agent)
    with pytest.raises(ConfigError, match=r"`episodes >= 2` must hold, but got episodes=1"):
        AMCAgent.published(episodes=1)


def test_exploration_stays_at_half_an_element(watched: Watched) -> None:
    for keep_exploring, least in ((True, 1 / 14), (False, 1e-6)):  # of 16 channels up to 14 may go
        watched.sigmas.clear()
        env, _ = synthetic_env(evaluations=6)
        agent = AMCAgent(warmup=1, sigma=1e-9, updates=1, hidden=(8,), keep_exploring=keep_exploring)
        run_agent(agent, env, seed=0)
        assert min(watched.sigmas) == pytest.approx(least)


@pytest.mark.parametrize(
    ("keep_exploring", "sigmas"), [(True, [1.0, 2.0, 4.0, 8.0, 8.0]), (False, [1.0, 0.5, 0.25, 0.125, 0.0625])]
)
def test_repeats_widen_exploration_up_to_uniform_and_end_a_search(
    watched: Watched, keep_exploring: bool, sigmas: list[float]
) -> None:
    env, evaluator = synthetic_env(evaluations=2, widths=(8,), bounds={"conv1": (0.5, 0.5)})  # one policy
    agent = AMCAgent(warmup=1, decay=0.5, updates=1, hidden=(8,), keep_exploring=keep_exploring)
    run_agent(agent, env, seed=0)
    assert len(evaluator.candidates) == 1
    assert watched.sigmas[:5] == sigmas
    assert watched.sigmas[-1] == (8.0 if keep_exploring else 1e-6)
    assert len(watched.sigmas) == 51  # the evaluator allows 50 repeats


# -- randomness -------------------------------------------------------------------------------------------------------


@given(st.floats(-1, 1), st.floats(1e-6, 1e3), st.integers(0, 1000))
def test_exploration_stays_in_the_action_space(mean: float, sigma: float, seed: int) -> None:
    action = truncated_normal(mean, sigma, np.random.default_rng(seed))
    assert action.shape == (1,)
    assert -1 <= action[0] <= 1


def test_the_widest_exploration_is_all_but_uniform() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([truncated_normal(1.0, amc._WIDEST, rng)[0] for _ in range(2000)])
    assert drawn.mean() == pytest.approx(0, abs=0.05)
    assert drawn.std() == pytest.approx(1 / 3**0.5, abs=0.02)


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
