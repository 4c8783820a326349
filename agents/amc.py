"""AMC: a DDPG agent that walks through the network and decides group by group (He et al. 2018).

The paper is https://arxiv.org/abs/1802.03494. Networks, replay memory and gradient steps are Stable-Baselines3's DDPG,
which only this file imports; the walk is here, as in `AMCAgent.run`. As in the paper: two hidden layers of 300, a
replay memory of 100 episodes, batches of 64, no discount, a reward at the end of the episode only, less a moving
average (0.5) of itself, exploration from a truncated normal around the actor's action, training at the end of episodes.

Where it differs because a search has tens of episodes where the paper has 800; `AMCAgent.published()` has the paper's
settings of all of these:

* Warm-up episodes follow the warm starts and then random points of the search space, which fill the budget, where
  uniform actions leave most of it unused. The warm-up is a third of the evaluations (paper: an eighth of the episodes).
* The actor learns at 1e-3 (paper: 1e-4), four times a decision, and first makes up for the decisions of the warm-up.
* Rewards are divided by their standard deviation: accuracies that lie close together would drown in the critic's noise.
* Returns are taken to the end of the episode, without bootstrapping.
* Exploration shrinks to a fiftieth over the whole search (paper: 0.95 an episode), but not below half an element, where
  it would change nothing; it doubles while the agent repeats policies that are known already.

Where it always differs, because of faults in published code, or because the environment does:

* An action is a fraction of what is feasible, so that nothing is clipped behind the agent's back; a step is a group of
  coupled layers, and what is observed is more (see `PruningEnv`). Actions that round to the same number of elements
  have the same observations and the same reward, so that what is replayed, the action as it was drawn, was executed.
* The published code writes the final reward to every transition and bootstraps too, so that a decision's advantage
  grows with the number of decisions after it. Here each transition has its own reward.
* Every transition is replayed, the first of an episode as often as any.
* A policy that comes again is an episode, but neither measured again nor counted as an evaluation. What evaluates ends
  a search in which nothing new comes for long.
* What a group may lose at most, and how candidates recover, are matters of the search: `autoprune.search` narrows the
  groups' bounds to what it measured to be bearable, unless its setting `sensitivity` is empty.

TD3, SAC and PPO act in the same environment: `TD3Agent` and `SACAgent` walk and learn as above with another learner,
`PPOAgent` learns on-policy. All need evaluations: without warm starts none is reliably ahead of random search with 40
of them, on networks of four groups and the synthetic problems of `autoprune.testing`; with 100 all are ahead on
average. With more groups they need more.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self, final

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecEnv

from autoprune.agents.base import Objectives, in_turn
from autoprune.environment import ORDERS, Proposed, PruningEnv
from autoprune.errors import ConfigError
from autoprune.policy import Policy

__all__ = ["AMCAgent", "PPOAgent", "SACAgent", "TD3Agent", "truncated_normal"]

Array = npt.NDArray[np.float32]
Walked = list[tuple[Array, Array, Array]]
"""An episode: what was observed, the action, and what was observed then, of every decision."""

_LAST_SIGMA = 0.02  # exploration at the end, relative to its start
_NARROWEST, _WIDEST = 1e-6, 8.0  # exploration, in actions: all but none, and all but uniform
_FAR = 1e6  # what Stable-Baselines3 takes for a whole line, since it wants bounds
_FOREVER = 1 << 62  # steps: the evaluations end a search, not these


class _GroupByGroup:
    """What the agents have in common: in which order groups are decided, and for which shares of the budget."""

    objectives: ClassVar[Objectives] = "one"
    learner: BaseAlgorithm
    _trained_in: PruningEnv

    def __init__(self, order: str, shares: Sequence[float]) -> None:
        if order not in ORDERS:
            raise ConfigError(f"`order` must be one of {', '.join(ORDERS)}, but got {order!r}")
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise ConfigError(f"`0 <= share <= 1` must hold for all of `shares`, but got {list(shares)}")
        self.order = order
        self.shares = tuple(shares)

    def policy_for(self, share: float = 1.0, env: PruningEnv | None = None) -> Policy:
        """Return what the trained actor decides for a share of an environment's budget; nothing is measured.

        Args:
            share: From 0, the smallest network that can be reached, to 1, the whole budget.
            env: One of another budget of the same network. None: the search's, in which it was trained.

        Raises:
            ConfigError: The agent was not trained.
        """
        if not hasattr(self, "learner"):
            raise ConfigError("the agent has not learnt anything yet; run it first")
        learner, info = self.learner, dict[str, Any]()
        quiet = (env or self._trained_in).without_evaluation()
        observation, _ = quiet.reset(
            options={"order": "reverse" if self.order == "reverse" else "forward", "share": share}
        )
        while "policy" not in info:
            action, _ = learner.predict(observation, deterministic=True)
            observation, _, info = quiet.decide(self._executed(action))
        policy: Policy = info["policy"]
        return policy

    def _executed(self, action: Array) -> Array:
        """Return what is executed where the learner says `action`."""
        return action

    def _options(self, episode: int) -> dict[str, Any]:
        """Return how an episode goes; the first is number 0."""
        return {"order": self.order, "share": self.shares[episode % len(self.shares)]}


class AMCAgent(_GroupByGroup):
    """The agent of AMC, fitted to few evaluations; see the module for where it differs, and `Agent` for the contract.

    Args:
        warmup: Episodes before the actor decides, warm starts among them. None: a third of the evaluations.
        sigma: Standard deviation of the first exploration, as a fraction of what is feasible.
        decay: Factor by which exploration shrinks with every episode. None: to a fiftieth over the search.
        updates: Gradient steps a decision.
        actor_lr: Learning rate of the actor.
        critic_lr: Learning rate of the critic.
        bootstrap_after: Decisions until the critic's own estimate stands in for the return. None: never.
        hidden: Units of the hidden layers.
        tau: How fast target networks follow, in (0, 1].
        gamma: Discount of a decision's return, in (0, 1].
        baseline: How far the moving average that is taken off rewards goes to those of each batch, in [0, 1].
        batch: Transitions of a gradient step.
        episodes_kept: In the replay memory.
        order: In which groups are decided: "forward", "reverse" or "random".
        shares: Shares of the budget that episodes get in turn, from 0, the smallest network, to 1. With several, the
            agent has learnt policies for all budgets in between, see `policy_for`.
        warm_start: Whether what the analyzer suggests is tried, and learnt from, first.
        uniform_warmup: Whether the rest of the warm-up draws its actions uniformly, rather than follow random points of
            the search space, which fill the budget.
        catch_up: Whether the learner makes up for the decisions of the warm-up when it ends.
        scale_rewards: Whether rewards are divided by their standard deviation.
        keep_exploring: Whether exploration stays at half an element or more, and doubles with every policy in a row
            that is known already. If not, a settled agent repeats itself, until the evaluator ends the search.

    Attributes:
        learner: The trained learner of Stable-Baselines3, once the search has begun.

    Raises:
        ConfigError: A setting is out of range.
    """

    learner: "_Learner"

    def __init__(
        self,
        *,
        warmup: int | None = None,
        sigma: float = 0.5,
        decay: float | None = None,
        updates: int = 4,
        actor_lr: float = 1e-3,
        critic_lr: float = 1e-3,
        bootstrap_after: int | None = None,
        hidden: Sequence[int] = (300, 300),
        tau: float = 0.01,
        gamma: float = 1.0,
        baseline: float = 0.5,
        batch: int = 64,
        episodes_kept: int = 100,
        order: str = "forward",
        shares: Sequence[float] = (1.0,),
        warm_start: bool = True,
        uniform_warmup: bool = False,
        catch_up: bool = True,
        scale_rewards: bool = True,
        keep_exploring: bool = True,
    ) -> None:
        super().__init__(order, shares)
        positive = {
            "warmup": warmup,
            "sigma": sigma,
            "decay": decay,
            "updates": updates,
            "actor_lr": actor_lr,
            "critic_lr": critic_lr,
            "bootstrap_after": bootstrap_after,
            "tau": tau,
            "gamma": gamma,
            "batch": batch,
            "episodes_kept": episodes_kept,
        }
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ConfigError(f"`{name} > 0` must hold, but got {name}={value}")
        for name, value in {"tau": tau, "gamma": gamma, "baseline": baseline}.items():
            if not 0 <= value <= 1:
                raise ConfigError(f"`0 <= {name} <= 1` must hold, but got {name}={value}")
        self.warmup = warmup
        self.sigma = sigma
        self.decay = decay
        self.updates = updates
        self.actor_lr = actor_lr
        self.critic_lr = critic_lr
        self.bootstrap_after = bootstrap_after
        self.hidden = tuple(hidden)
        self.tau = tau
        self.gamma = gamma
        self.baseline = baseline
        self.batch = batch
        self.episodes_kept = episodes_kept
        self.warm_start = warm_start
        self.uniform_warmup = uniform_warmup
        self.catch_up = catch_up
        self.scale_rewards = scale_rewards
        self.keep_exploring = keep_exploring

    @classmethod
    def published(cls, episodes: int = 800, **changes: Any) -> Self:
        """Return the agent with the paper's settings; the module says what differs all the same.

        The paper has 800 episodes, of which the first 100 are warm-up and the last 100 are kept, and 0.95 as decay.
        With fewer, as large a share of them is, and exploration shrinks as far by the end.

        Args:
            episodes: How many the search is to have: its evaluations. With an eighth of these there is warm-up alone.
            changes: Other settings, as of the class.

        Raises:
            ConfigError: There are fewer than 2 episodes, or a setting is out of range.
        """
        if episodes < 2:
            raise ConfigError(f"`episodes >= 2` must hold, but got episodes={episodes}")
        warmup = max(1, round(episodes / 8))
        settings: dict[str, Any] = {
            "warmup": warmup,
            "episodes_kept": warmup,
            "decay": 0.95 ** (700 / (episodes - warmup)),
            "updates": 1,
            "actor_lr": 1e-4,
            "bootstrap_after": 1,
            "warm_start": False,
            "uniform_warmup": True,
            "catch_up": False,
            "scale_rewards": False,
            "keep_exploring": False,
        }
        return cls(**settings | changes)

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""
        rng = np.random.default_rng(seed)
        generators = _LentGenerators(seed)
        self._trained_in = env
        with generators.lent():
            learner = self.learner = self._learner(env)
        warmup = self.warmup if self.warmup is not None else max(1, env.evaluations // 3)
        dimensions = len(env.space.dimensions)
        plans: list[Policy | None] = [*env.warm_starts] if self.warm_start else []
        suggested = len(plans)
        while len(plans) < warmup:
            plans.append(None if self.uniform_warmup else env.space.decode(rng.random(dimensions).tolist()))
        known: set[str] = set()
        env.reset(seed=seed)

        def follow(numbered: tuple[int, Policy | None]) -> tuple[Walked, Proposed]:
            number, plan = numbered
            options = self._options(number) | ({"share": 1.0} if number < suggested else {})
            if plan is None:
                return _walk(env, lambda _: rng.uniform(-1, 1, 1).astype(np.float32), options)
            return _walk(env, lambda _: env.action_for(plan), options)

        for walked, candidate in in_turn(env, map(follow, enumerate(plans))):
            learner.remember(walked, env.value(candidate))
            known.add(candidate.id)
        if self.catch_up:
            with generators.lent():
                learner.train(self.updates * len(plans) * len(env.feasible.structure), self.batch)

        shrink = self.decay or _LAST_SIGMA ** (1 / max(1, env.evaluations - len(plans)))
        sigma, repeated = 2 * self.sigma, 1.0  # the actions' range is 2

        def explore(observation: Array) -> Array:
            low, high = env.interval
            least = 1 / max(1, high - low) if self.keep_exploring else _NARROWEST  # half an element
            with generators.lent():
                preferred = self._preferred(learner, observation)
            return truncated_normal(preferred, min(_WIDEST, max(sigma, least) * repeated), rng)

        def explored() -> Iterator[tuple[Walked, Proposed]]:
            nonlocal sigma
            episode = len(plans)
            while True:
                yield _walk(env, explore, self._options(episode))
                sigma *= shrink
                episode += 1

        for walked, candidate in in_turn(env, explored()):
            learner.remember(walked, env.value(candidate))
            repeated = repeated * 2 if self.keep_exploring and candidate.id in known else 1.0
            known.add(candidate.id)
            with generators.lent():
                learner.train(self.updates * len(env.feasible.structure), self.batch)

    def _preferred(self, learner: "_Learner", observation: Array) -> float:
        """Return the action around which is explored."""
        action, _ = learner.predict(observation, deterministic=True)
        return float(action[0])

    def _learner(self, env: PruningEnv) -> "_Learner":
        learner = _DDPG("MlpPolicy", env, **self._of_learner(env))
        learner.begin((self.actor_lr, self.critic_lr))
        return learner

    def _of_learner(self, env: PruningEnv) -> dict[str, Any]:
        decisions = len(env.feasible.structure)
        return {
            "buffer_size": self.episodes_kept * decisions,
            "batch_size": self.batch,
            "tau": self.tau,
            "gamma": self.gamma,
            "replay_buffer_class": _Replay,
            "replay_buffer_kwargs": {
                "n_steps": min(self.bootstrap_after or decisions, decisions),
                "gamma": self.gamma,
                "baseline": self.baseline,
                "scaled": self.scale_rewards,
            },
            "policy_kwargs": {"net_arch": list(self.hidden)},
            "device": "cpu",
        }


@final
class TD3Agent(AMCAgent):
    """AMC's walk with TD3 as learner (Fujimoto et al. 2018, https://arxiv.org/abs/1802.09477), for DDPG.

    Two critics, of which the lower counts, target actions with noise, and an actor that learns at every other step.
    Settings are those of `AMCAgent`. Without warm starts, tens of evaluations leave it level with random search or
    behind.
    """

    def _learner(self, env: PruningEnv) -> "_Learner":
        learner = _TD3("MlpPolicy", env, **self._of_learner(env))
        learner.begin((self.actor_lr, self.critic_lr))
        return learner


@final
class SACAgent(AMCAgent):
    """AMC's walk with soft actor-critic as learner (Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905), for DDPG.

    Its policy is random by itself, so that exploration is around actions that it draws. Settings are those of
    `AMCAgent`. Without warm starts, tens of evaluations leave it level with random search or behind; after a hundred
    its best is ahead, and what it proposes is on average still below random points of the search space.
    """

    def _preferred(self, learner: "_Learner", observation: Array) -> float:
        action, _ = learner.predict(observation, deterministic=False)
        return float(action[0])

    def _learner(self, env: PruningEnv) -> "_Learner":
        learner = _SAC("MlpPolicy", env, **self._of_learner(env))
        learner.begin((self.actor_lr, self.critic_lr))
        return learner


@final
class PPOAgent(_GroupByGroup):
    """Proximal policy optimisation (Schulman et al. 2017, https://arxiv.org/abs/1707.06347) in AMC's environment.

    On-policy: it learns from its own episodes only, some at a time, so that warm starts are evaluated and not learnt
    from. As many episodes as may be under way run side by side. What its normal distribution draws is squashed by a
    hyperbolic tangent, where Stable-Baselines3 would cut it off and learn from what was not executed. Without warm
    starts, tens of evaluations leave it level with random search or behind. See `Agent` for the contract.

    Args:
        episodes: Between two updates, at least 2.
        epochs: Passes over them.
        lr: Learning rate.
        hidden: Units of the hidden layers.
        order: As of `AMCAgent`.
        shares: Likewise.
        warm_start: Whether what the analyzer suggests is evaluated first.

    Attributes:
        learner: The learner of Stable-Baselines3, once the search has begun.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        *,
        episodes: int = 5,
        epochs: int = 10,
        lr: float = 1e-3,
        hidden: Sequence[int] = (64, 64),
        order: str = "forward",
        shares: Sequence[float] = (1.0,),
        warm_start: bool = True,
    ) -> None:
        super().__init__(order, shares)
        for name, value, least in (("episodes", episodes, 2), ("epochs", epochs, 1)):
            if value < least:
                raise ConfigError(f"`{name} >= {least}` must hold, but got {name}={value}")
        if not lr > 0:
            raise ConfigError(f"`lr > 0` must hold, but got lr={lr}")
        self.episodes = episodes
        self.epochs = epochs
        self.lr = lr
        self.hidden = tuple(hidden)
        self.warm_start = warm_start

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""
        warm = env.warm_starts if self.warm_start else ()
        for _ in in_turn(env, ((None, env.submit(policy)) for policy in warm)):
            pass
        self._trained_in = env
        generators = _LentGenerators(seed)
        env.reset(seed=seed)
        lanes = _Lanes(env, generators, self._options)
        decisions = len(env.feasible.structure)
        each = -(-self.episodes // lanes.num_envs)
        with generators.lent():
            learner = self.learner = PPO(
                "MlpPolicy",
                lanes,
                learning_rate=self.lr,
                n_steps=decisions * each,
                batch_size=decisions * each * lanes.num_envs,
                n_epochs=self.epochs,
                gamma=1.0,
                gae_lambda=1.0,
                policy_kwargs={"net_arch": list(self.hidden)},
                device="cpu",
            )
            learner.set_logger(Logger(folder=None, output_formats=[]))
            learner.learn(_FOREVER)

    def _executed(self, action: Array) -> Array:
        return _squashed(action)


def _walk(env: PruningEnv, act: Callable[[Array], Array], options: Mapping[str, Any]) -> tuple[Walked, Proposed]:
    """Decide all groups, and return what was seen and done, and what waits for the candidate."""
    walked: Walked = []
    observation, _ = env.reset(options=dict(options))
    result: Proposed | None = None
    while result is None:
        action = act(observation)
        after, result, _ = env.decide(action)
        walked.append((observation, action, after))
        observation = after
    return walked, result


def truncated_normal(mean: float, sigma: float, rng: np.random.Generator) -> Array:
    """Draw an action, `(1,)`, from a normal distribution cut off at -1 and 1.

    Args:
        mean: Where the uncut distribution is centred; in [-1, 1].
        sigma: Its standard deviation.
        rng: Randomness.
    """
    normal = statistics.NormalDist(mean, sigma)
    quantile = rng.uniform(normal.cdf(-1.0), normal.cdf(1.0))
    drawn = normal.inv_cdf(min(max(quantile, 1e-12), 1 - 1e-12))
    return np.array([min(1.0, max(-1.0, drawn))], dtype=np.float32)


def _squashed(drawn: Array) -> Array:
    """Return the action in [-1, 1] that stands for a number on the whole line; each number has its own."""
    squashed: Array = np.tanh(drawn)
    return squashed


class _Learner(OffPolicyAlgorithm):
    """What Stable-Baselines3's learners are given: they are told what happened rather than asked to act."""

    _rates: tuple[float, float]

    def begin(self, rates: tuple[float, float]) -> None:
        """Set the learning rates of actor and critic."""
        self._rates = rates
        self.set_logger(Logger(folder=None, output_formats=[]))

    def remember(self, walked: Walked, reward: float) -> None:
        """Put an episode into the replay memory, its reward at its end; the actions are those that were executed."""
        memory = self.replay_buffer
        if memory is None:
            raise RuntimeError("the learner was set up without a replay memory")
        for number, (observation, action, after) in enumerate(walked, 1):
            last = number == len(walked)
            memory.add(observation, after, action, np.array([reward if last else 0.0]), np.array([last]), [{}])

    def _update_learning_rate(self, optimizers: list[torch.optim.Optimizer] | torch.optim.Optimizer) -> None:
        own: Any = self
        for optimizer, rate in zip((own.actor.optimizer, own.critic.optimizer), self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate


class _DDPG(_Learner, DDPG):
    pass


class _TD3(_Learner, TD3):
    pass


class _SAC(_Learner, SAC):
    pass


class _Replay(NStepReplayBuffer):
    """Replay memory whose final rewards come relative to those seen: less AMC's moving average, by their spread.

    The latter only where they are `scaled`.
    """

    def __init__(self, *args: Any, baseline: float, scaled: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pace, self._scaled = baseline, scaled
        self._baseline: float | None = None

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        """Draw a batch; the baseline goes some of the way to its mean final reward."""
        batch = super().sample(batch_size, env)
        final = batch.dones > 0
        if final.any():
            mean = float(batch.rewards[final].mean())
            self._baseline = mean if self._baseline is None else self._baseline + self._pace * (mean - self._baseline)
        kept = self.rewards[: self.size()][self.dones[: self.size()] > 0]
        spread = (float(kept.std()) if self._scaled and len(kept) > 1 else 0.0) or 1.0
        return batch._replace(rewards=(batch.rewards - batch.dones * (self._baseline or 0.0)) / spread)


class _LentGenerators:
    """The global generators of numpy and torch, lent to Stable-Baselines3, which has no others to draw from.

    In between they have the state that everyone else left them in, so neither side's numbers depend on the other's.
    The borrower has one thread: networks this small are many times slower on several, which wait for each other.
    """

    def __init__(self, seed: int) -> None:
        self._away: tuple[Any, torch.Tensor, int] = (
            np.random.MT19937(seed).state,
            torch.Generator().manual_seed(seed).get_state(),
            1,
        )

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Put the borrower's state in place, and the owner's back; inside another, the other way round."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        here = np.random.get_state(), torch.get_rng_state(), torch.get_num_threads()  # noqa: NPY002 - it is lent
        numpy_state, torch_state, threads = self._away
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        torch.set_num_threads(threads)
        self._away = here


class _Lanes(VecEnv):
    """Environments side by side, in step: their candidates are under way together.

    They are evaluated with the owner's generators and threads. `options` says of every episode how it goes. Actions are
    numbers on the whole line, which are squashed.
    """

    def __init__(self, env: PruningEnv, generators: _LentGenerators, options: Callable[[int], dict[str, Any]]) -> None:
        self._lanes = [env.beside() for _ in range(env.at_once)]  # which the other base asks about
        line = spaces.Box(-_FAR, _FAR, (1,), np.float32)
        super().__init__(env.at_once, env.observation_space, line)
        self._generators = generators
        self._episodes = map(options, itertools.count())
        self._actions: Array = np.zeros((env.at_once, 1), dtype=np.float32)

    def reset(self) -> Array:
        """Begin an episode in each."""
        return np.stack([self._begin(lane) for lane in self._lanes])

    def step_async(self, actions: Array) -> None:
        """Take the actions, `(lanes, 1)`."""
        self._actions = _squashed(actions)

    def step_wait(self) -> tuple[Array, Array, npt.NDArray[np.bool_], list[dict[str, Any]]]:
        """Decide a group in each; at the last, wait for all candidates."""
        seen, results, infos = [], list[Proposed | None](), list[dict[str, Any]]()
        with self._generators.lent():  # back to the owner
            for lane, action in zip(self._lanes, self._actions, strict=True):
                observation, result, _ = lane.decide(action)
                infos.append({} if result is None else {"terminal_observation": observation})
                seen.append(observation if result is None else self._begin(lane))
                results.append(result)
            values = [
                0.0 if result is None else lane.value(result())
                for lane, result in zip(self._lanes, results, strict=True)
            ]
        dones = np.array([result is not None for result in results])
        return np.stack(seen), np.array(values, dtype=np.float32), dones, infos

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of each."""
        return [getattr(lane, attr_name) for lane in self._chosen(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of each."""
        for lane in self._chosen(indices):
            setattr(lane, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method of each."""
        return [getattr(lane, method_name)(*args, **kwargs) for lane in self._chosen(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Say that none is."""
        return [False for _ in self._chosen(indices)]

    def _begin(self, lane: PruningEnv) -> Array:
        observation, _ = lane.reset(options=next(self._episodes))
        return observation

    def _chosen(self, indices: Any) -> list[PruningEnv]:
        return [self._lanes[index] for index in self._get_indices(indices)]
