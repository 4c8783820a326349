"""Agents on Optuna's samplers, through ask and tell: TPE for one objective, NSGA-II for several.

The one file that imports optuna. Each coordinate of the search space is a float parameter; what is told of a trial is
what came of the very point that was asked, and a candidate that failed is told as failed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal, final

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import TrialState

from autoprune.agents.base import Objectives, in_turn
from autoprune.environment import PruningEnv
from autoprune.errors import ConfigError
from autoprune.evaluation import Candidate, Result

__all__ = ["NSGA2Agent", "TPEAgent"]


@final
class TPEAgent:
    """Tree-structured Parzen estimator over all coordinates jointly; see `Agent` for the contract.

    Bergstra et al. 2011, multivariate as in Falkner et al. 2018 (BOHB, https://arxiv.org/abs/1807.01774).

    Args:
        startup: Random points, warm starts among them, before the estimator takes over. None: a quarter of the
            evaluations, at most 10.

    Raises:
        ConfigError: `startup` is below 1.
    """

    objectives: ClassVar[Objectives] = "one"

    def __init__(self, *, startup: int | None = None) -> None:
        if startup is not None and startup < 1:
            raise ConfigError(f"`startup >= 1` must hold, but got startup={startup}")
        self.startup = startup

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""
        startup = self.startup if self.startup is not None else max(1, min(10, env.evaluations // 4))
        lie = env.at_once > 1  # trials under way count as bad, so that no two try the same
        sampler = TPESampler(seed=seed, multivariate=True, n_startup_trials=startup, constant_liar=lie)
        _optimise(env, sampler, ["maximize"], lambda candidate: [env.value(candidate)])


@final
class NSGA2Agent:
    """NSGA-II (Deb et al. 2002): raises accuracy and lowers MACs and parameters, none before another.

    See `Agent` for the contract.

    Args:
        population: Candidates of a generation. None: a sixth of the evaluations, at least 4, at most Optuna's own 50.

    Raises:
        ConfigError: `population` is below 2.
    """

    objectives: ClassVar[Objectives] = "several"

    def __init__(self, *, population: int | None = None) -> None:
        if population is not None and population < 2:
            raise ConfigError(f"`population >= 2` must hold, but got population={population}")
        self.population = population

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""
        population = self.population if self.population is not None else max(4, min(50, env.evaluations // 6))
        sampler = NSGAIISampler(seed=seed, population_size=population)
        _optimise(env, sampler, ["maximize", "minimize", "minimize"], env.objectives)


def _optimise(
    env: PruningEnv,
    sampler: BaseSampler,
    directions: Sequence[Literal["maximize", "minimize"]],
    values: Callable[[Candidate], Sequence[float]],
) -> None:
    """Ask, evaluate and tell until `SearchOver`; the warm starts are asked first."""
    dimensions: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in env.space.dimensions}
    with _quiet():
        study = optuna.create_study(sampler=sampler, directions=directions)
        for policy in env.warm_starts:
            study.enqueue_trial(dict(zip(dimensions, env.space.encode(policy), strict=True)))

        def asked() -> Iterator[tuple[optuna.Trial, Result]]:
            while True:
                trial = study.ask(dimensions)
                yield trial, env.submit(env.space.decode([trial.params[name] for name in dimensions]))

        for trial, candidate in in_turn(env, asked()):
            if candidate.failure is None:
                study.tell(trial, list(values(candidate)))
            else:
                study.tell(trial, state=TrialState.FAIL)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from writing a line a trial; its verbosity is global, so it is put back."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
