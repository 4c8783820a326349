"""AMC"""

import random
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, final

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3 import DDPG
from stable_baselines3.common.buffers import NStepReplayBuffer

from autoprune.agents.base import Objectives
from autoprune.environment import PruningEnv


@contextmanager
def rng_guard():
    a = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    try:
        yield
    finally:
        random.setstate(a[0])
        np.random.set_state(a[1])
        torch.set_rng_state(a[2])


class Buf(NStepReplayBuffer):
    base = 0.0

    def sample(self, batch_size, env=None):
        b = super().sample(batch_size, env)
        ends = b.dones.bool()
        if self.use_base and ends.any():
            m = b.rewards[ends].mean().item()
            self.base = m if self.base == 0.0 else 0.5 * self.base + 0.5 * m
        return b._replace(rewards=b.rewards - b.dones * self.base)


class D(DDPG):
    actor_lr = 1e-4

    def _update_learning_rate(self, opts):
        for o, lr in zip(opts, (self.actor_lr, 1e-3)):
            for g in o.param_groups:
                g["lr"] = lr

    def train(self, gradient_steps, batch_size=64):
        super().train(int(gradient_steps * self.mult), batch_size)

    def _sample_action(self, learning_starts, action_noise=None, n_envs=1):
        env = self.env.envs[0].unwrapped
        ep = self._episode_num
        if ep < len(env.warm_starts):
            a = env.action_for(env.warm_starts[ep])[None]
        elif ep < self.warmup:
            a = np.random.uniform(-1, 1, (1, 1)).astype(np.float32)
        else:
            mu, _ = self.predict(self._last_obs, deterministic=True)
            sig = max(self.floor, self.sigma0 * self.decay ** (ep - self.warmup))
            d = statistics.NormalDist(float(mu[0, 0]), sig)
            lo, hi = d.cdf(-1), d.cdf(1)
            a = np.array([[d.inv_cdf(min(max(np.random.uniform(lo, hi), 1e-12), 1 - 1e-12))]], dtype=np.float32).clip(
                -1, 1
            )
        return a, a


class AMCAgent:
    objectives = "one"

    def __init__(
        self, mult=1.0, nstep=True, warmup=None, actor_lr=1e-4, base=True, floor=0.01, sigma0=1.0, tau=0.01, net=300
    ):
        self.__dict__.update(locals())

    def run(self, env, *, seed):
        L = len(env.feasible.structure)
        n = env.evaluations
        with rng_guard():
            kw = dict(n_steps=L if self.nstep else 1, gamma=1.0)
            m = D(
                "MlpPolicy",
                env,
                learning_rate=1e-3,
                buffer_size=100 * L,
                learning_starts=0,
                batch_size=64,
                tau=self.tau,
                gamma=1.0,
                train_freq=(1, "episode"),
                gradient_steps=-1,
                replay_buffer_class=Buf,
                replay_buffer_kwargs=kw,
                policy_kwargs=dict(net_arch=[self.net, self.net]),
                seed=seed,
                device="cpu",
            )
            m.replay_buffer.use_base = self.base
            m.warmup = self.warmup or max(1, round(n / 8))
            m.learning_starts = m.warmup * L
            m.mult = self.mult
            m.actor_lr = self.actor_lr
            m.floor = self.floor
            m.sigma0 = self.sigma0
            m.decay = 0.95 ** (800 / n)
            m.learn(10**9, log_interval=None)
