"""AMC: a DDPG agent that walks through the network and decides group by group (He et al. 2018).

The paper is https://arxiv.org/abs/1802.03494. Networks, replay memory and gradient steps are Stable-Baselines3's DDPG,
which only this file imports; the walk is here, as in `AMCAgent.run`. As in the paper: two hidden layers of 300, a
replay memory of 100 episodes, batches of 64, no discount, a reward at the end of the episode only, less a moving
average (0.5) of itself, exploration from a truncated normal around the actor's action, training at the end of episodes.

Where it differs, because a search has tens of episodes where the paper has 800, or because of faults in published code:

* An action is a fraction of what is feasible, so that what is replayed is what was executed (see `PruningEnv`).
* The published code writes the final reward to every transition and bootstraps too, so that a decision's advantage
  grows with the number of decisions after it. Here each transition has its own reward, and the return is taken to the
  end of the episode without bootstrapping; `AMCAgent(bootstrap_after=1)` is the paper's one-step target.
* Every transition is replayed, the first of an episode as often as any.
* Warm-up episodes follow the warm starts and then random points of the search space, which fill the budget, where
  uniform actions leave most of it unused. The warm-up is a third of the evaluations (paper: an eighth of the episodes).
* The actor learns at 1e-3 (paper: 1e-4), four times a decision, and first makes up for the decisions of the warm-up.
* Rewards are divided by their standard deviation: accuracies that lie close together would drown in the critic's noise.
* Exploration shrinks to a fiftieth over the whole search (paper: 0.95 an episode), but not below half an element, where
  it would change nothing; it doubles while the agent repeats policies that are known already.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, final

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3 import DDPG
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from autoprune.agents.base import Objectives, in_turn
from autoprune.environment import PruningEnv
from autoprune.errors import ConfigError
from autoprune.evaluation import Result
from autoprune.policy import Policy

__all__ = ["AMCAgent", "truncated_normal"]

Array = npt.NDArray[np.float32]
Walked = list[tuple[Array, Array, Array]]
"""An episode: what was observed, the action, and what was observed then, of every decision."""

_HIDDEN = [300, 300]
_EPISODES_KEPT = 100
_BATCH = 64
_TAU = 0.01  # how fast target networks follow
_LAST_SIGMA = 0.02  # exploration at the end, relative to its start


@final
class AMCAgent:
    """The agent of AMC, fitted to few evaluations; see the module for where it differs, and `Agent` for the contract.

    Args:
        warmup: Episodes before the actor decides, warm starts among them. None: a third of the evaluations.
        sigma: Standard deviation of the first exploration, as a fraction of what is feasible.
        updates: Gradient steps a decision.
        actor_lr: Learning rate of the actor.
        critic_lr: Learning rate of the critic.
        bootstrap_after: Decisions until the critic's own estimate stands in for the return. None: never.

    Raises:
        ConfigError: A setting is not positive.
    """

    objectives: ClassVar[Objectives] = "one"

    def __init__(
        self,
        *,
        warmup: int | None = None,
        sigma: float = 0.5,
        updates: int = 4,
        actor_lr: float = 1e-3,
        critic_lr: float = 1e-3,
        bootstrap_after: int | None = None,
    ) -> None:
        settings = {
            "warmup": warmup,
            "sigma": sigma,
            "updates": updates,
            "actor_lr": actor_lr,
            "critic_lr": critic_lr,
            "bootstrap_after": bootstrap_after,
        }
        for name, value in settings.items():
            if value is not None and not value > 0:
                raise ConfigError(f"`{name} > 0` must hold, but got {name}={value}")
        self.warmup = warmup
        self.sigma = sigma
        self.updates = updates
        self.actor_lr = actor_lr
        self.critic_lr = critic_lr
        self.bootstrap_after = bootstrap_after

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""
        rng = np.random.default_rng(seed)
        generators = _LentGenerators(seed)
        with generators.lent():
            learner = self._learner(env)
        warmup = self.warmup if self.warmup is not None else max(1, env.evaluations // 3)
        plans = list(env.warm_starts)
        while len(plans) < warmup:
            plans.append(env.space.decode(rng.random(len(env.space.dimensions)).tolist()))
        known: set[str] = set()

        def follow(plan: Policy) -> tuple[Walked, Result]:
            return _walk(env, lambda _: env.action_for(plan))

        for walked, candidate in in_turn(env, map(follow, plans)):
            learner.remember(walked, env.value(candidate))
            known.add(candidate.id)
        with generators.lent():
            learner.train(self.updates * len(plans) * len(env.feasible.structure), _BATCH)

        shrink = _LAST_SIGMA ** (1 / max(1, env.evaluations - len(plans)))
        sigma, repeated = 2 * self.sigma, 1.0  # the actions' range is 2

        def explore(observation: Array) -> Array:
            preferred, _ = learner.predict(observation, deterministic=True)
            low, high = env.interval
            half_an_element = 1 / max(1, high - low)
            return truncated_normal(float(preferred[0]), max(sigma, half_an_element) * repeated, rng)

        def explored() -> Iterator[tuple[Walked, Result]]:
            nonlocal sigma
            while True:
                yield _walk(env, explore)
                sigma *= shrink

        for walked, candidate in in_turn(env, explored()):
            learner.remember(walked, env.value(candidate))
            repeated = repeated * 2 if candidate.id in known else 1.0
            known.add(candidate.id)
            with generators.lent():
                learner.train(self.updates * len(env.feasible.structure), _BATCH)

    def _learner(self, env: PruningEnv) -> "_Learner":
        decisions = len(env.feasible.structure)
        learner = _Learner(
            "MlpPolicy",
            env,
            buffer_size=_EPISODES_KEPT * decisions,
            batch_size=_BATCH,
            tau=_TAU,
            gamma=1.0,
            replay_buffer_class=_Replay,
            replay_buffer_kwargs={"n_steps": min(self.bootstrap_after or decisions, decisions), "gamma": 1.0},
            policy_kwargs={"net_arch": _HIDDEN},
            device="cpu",
        )
        learner.rates = (self.actor_lr, self.critic_lr)
        learner.set_logger(Logger(folder=None, output_formats=[]))
        return learner


def _walk(env: PruningEnv, act: Callable[[Array], Array]) -> tuple[Walked, Result]:
    """Decide all groups, and return what was seen and done, and what waits for the candidate."""
    walked: Walked = []
    observation, _ = env.reset()
    result: Result | None = None
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


class _Learner(DDPG):
    """DDPG with a learning rate each for actor and critic, that is told what happened rather than asked to act."""

    rates: tuple[float, float]

    def remember(self, walked: Walked, reward: float) -> None:
        """Put an episode into the replay memory, its reward at its end; the actions are those that were executed."""
        memory = self.replay_buffer
        if memory is None:
            raise RuntimeError("the learner was set up without a replay memory")
        for number, (observation, action, after) in enumerate(walked, 1):
            last = number == len(walked)
            memory.add(observation, after, action, np.array([reward if last else 0.0]), np.array([last]), [{}])

    def _update_learning_rate(self, optimizers: list[torch.optim.Optimizer] | torch.optim.Optimizer) -> None:
        for optimizer, rate in zip((self.actor.optimizer, self.critic.optimizer), self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate


class _Replay(NStepReplayBuffer):
    """Replay memory whose final rewards come relative to those seen: less AMC's moving average, by their spread."""

    _baseline: float | None = None

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        """Draw a batch; the baseline follows half-way to its mean final reward."""
        batch = super().sample(batch_size, env)
        final = batch.dones > 0
        if final.any():
            mean = float(batch.rewards[final].mean())
            self._baseline = mean if self._baseline is None else (self._baseline + mean) / 2
        kept = self.rewards[: self.size()][self.dones[: self.size()] > 0]
        spread = (float(kept.std()) if len(kept) > 1 else 0.0) or 1.0
        return batch._replace(rewards=(batch.rewards - batch.dones * (self._baseline or 0.0)) / spread)


class _LentGenerators:
    """The global generators of numpy and torch, lent to Stable-Baselines3, which has no others to draw from.

    In between they have the state that everyone else left them in, so neither side's numbers depend on the other's.
    The borrower has one thread: networks this small are many times slower on several, which wait for each other.
    """

    def __init__(self, seed: int) -> None:
        self._numpy: Any = np.random.MT19937(seed).state
        self._torch = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Put the borrower's state in place, and the owner's back."""
        numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - it is lent
        threads = torch.get_num_threads()
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            self._numpy, self._torch = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
            np.random.set_state(numpy_state)  # noqa: NPY002
            torch.set_rng_state(torch_state)
            torch.set_num_threads(threads)
