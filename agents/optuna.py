"""Agents on Optuna's samplers, through ask and tell: by name, or on any sampler of yours.

The one file that imports optuna. Each coordinate of the search space is a float parameter; what is told of a trial is
what came of the very point that was asked. A candidate that failed is told as failed; with TPE, so is what comes again.

Without a storage a study lives in memory, and a search is what its seed says. With one, several searches may share a
study and learn from each other's trials; then what is proposed depends on who was faster, and the seed alone does not
repeat it. Such a search can still be killed anywhere: its trials are marked with its name, and when it goes on they are
its first proposals, answered from the ledger where that has them.
"""

import contextlib
import copy
import functools
import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol, Self, final

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from autoprune.agents.base import Objectives, in_turn
from autoprune.agents.evolution import neighbour
from autoprune.environment import Proposed, PruningEnv
from autoprune.errors import ConfigError, SearchOver
from autoprune.evaluation import Candidate
from autoprune.pareto import sorted_by_layers
from autoprune.policy import Policy
from autoprune.seeds import derive

__all__ = [
    "CMAESAgent",
    "GPAgent",
    "MultiObjectiveTPEAgent",
    "NSGA2Agent",
    "NSGA3Agent",
    "OptunaAgent",
    "QMCAgent",
    "SamplerFactory",
    "TPEAgent",
    "UnivariateTPEAgent",
]

_TRIES, _PAUSE = 10, 0.3  # to open a storage whose tables, or whose study, another process is just making; seconds
_RUN, _POLICY, _WARM, _AGAIN, _SPACE = "run", "policy", "warm start", "again", "space"  # of trials, the last of a study
_UNIT = FloatDistribution(0.0, 1.0)
_SWITCHES = 10  # tried from a policy that came again
_MOST, _BEST, _NEWEST = 1000, 100, 400  # trials that an estimator goes by; what it keeps when there are so many


class SamplerFactory(Protocol):
    """Makes a sampler from a seed: a sampler's class, a `functools.partial` of it, or a function."""

    def __call__(self, *, seed: int) -> BaseSampler:
        """Return a new sampler."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the study is kept. An object, as a URL may hold a password and an agent's plain settings are written down.

    Raises:
        ConfigError: A storage without a study's name, or a name without a storage.
    """

    storage: str | BaseStorage | None = field(repr=False)
    study: str | None

    def __deepcopy__(self, memo: object) -> Self:
        return self  # copies of an agent work on one study

    def __post_init__(self) -> None:
        if (self.storage is None) != (self.study is None):
            raise ConfigError(
                "a study that is kept has a `storage` and a name, `study`, but only one of them is given; "
                "for example --storage sqlite:///trials.db --study resnet20"
            )


@final
class OptunaAgent:
    """An agent on any of Optuna's samplers, or on one of yours; see `Agent` for the contract.

    ::

        OptunaAgent(functools.partial(CmaEsSampler, popsize=8))
        OptunaAgent(TPESampler(seed=3, n_ei_candidates=64))

    Args:
        sampler: What makes a sampler, called with `seed=`: the search's seed, split (and before with 0, to tell it from
            others). Or a sampler: each search starts from a copy of it as it was handed in, and the search's seed makes
            no difference. It must have been made with a seed of its own, or the search could not be repeated; with a
            `storage` it is seeded anew, from the operating system.
        objectives: "one" or "several": what the sampler is told of a candidate (see `Agent`).
        warm_start: Whether the policies that the analyzer suggests are tried first.
        storage: Where the study is kept: a URL of SQLAlchemy's (sqlite, PostgreSQL, MySQL; its driver must be
            installed), or a storage of Optuna's. None: in memory. With one, the seed alone no longer repeats a search,
            as what is proposed depends on what is there, but killed, it goes on: it evaluates nothing twice, and each
            of its candidates is a trial. Searches may share a study; they must have the same task, fidelity, budget,
            bounds and search space, of which the last three are checked. Each learns from the trials of all, but its
            ledger holds its own candidates only.
        study: The study's name in the storage; part of what a search is.

    Raises:
        ConfigError: `sampler` is neither, or has no seed or can't be copied; `storage` without `study`.

    Attributes:
        ignores_seed: Whether every search proposes the same, whatever its seed, as the sampler has its own.
    """

    def __init__(
        self,
        sampler: SamplerFactory | BaseSampler = TPESampler,
        *,
        objectives: Objectives = "one",
        warm_start: bool = True,
        storage: str | BaseStorage | None = None,
        study: str | None = None,
    ) -> None:
        if objectives not in ("one", "several"):
            raise ConfigError(f'`objectives` must be "one" or "several", but got {objectives!r}')
        if not isinstance(sampler, BaseSampler) and not callable(sampler):
            raise ConfigError(f"`sampler` must be an Optuna sampler or make one from a seed, but got {sampler!r}")
        self._place = _Place(storage, study)
        self.sampler = sampler
        self.ignores_seed = isinstance(sampler, BaseSampler) and storage is None
        self.described = self._description()  # a plain setting, so that another sampler is another search
        self.objectives: Objectives = objectives
        self.warm_start, self.study = warm_start, study

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""
        _optimise(self, env, seed, self._made)

    def _description(self) -> str:
        with _experimental():
            made = self._new(0)
            if not isinstance(made, BaseSampler):
                raise ConfigError(f"`sampler` must make an Optuna sampler, but it made {made!r}")
            return _described(made, _first(lambda: self._new(0)) if self._place.storage is None else None)

    def _new(self, seed: int) -> BaseSampler:
        return _copied(self.sampler) if isinstance(self.sampler, BaseSampler) else self.sampler(seed=seed)

    def _made(self, seed: int) -> BaseSampler:
        sampler = self._new(seed)
        if isinstance(self.sampler, BaseSampler) and not self.ignores_seed:
            sampler.reseed_rng()  # or searches that share a study would all begin with the same points
        return sampler


@dataclass(kw_only=True, eq=False)
class _Named:
    """The settings that all agents by name have, with the defaults and the meaning that they have in `OptunaAgent`."""

    warm_start: bool = True
    storage: InitVar[str | BaseStorage | None] = None
    study: str | None = None

    def __post_init__(self, storage: str | BaseStorage | None) -> None:
        self._place = _Place(storage, self.study)


@dataclass(kw_only=True, eq=False)
class _Modelling(_Named):
    """Agents that model what they know, after some random points (see `TPEAgent`)."""

    startup: int | None = None

    def __post_init__(self, storage: str | BaseStorage | None) -> None:
        super().__post_init__(storage)
        _require(1, startup=self.startup)


@dataclass(kw_only=True, eq=False)
class _Breeding(_Named):
    """Agents of generations (see `NSGA2Agent`)."""

    population: int | None = None

    def __post_init__(self, storage: str | BaseStorage | None) -> None:
        super().__post_init__(storage)
        _require(2, population=self.population)


@final
@dataclass(kw_only=True, eq=False)
class TPEAgent(_Modelling):
    """Tree-structured Parzen estimator over all coordinates jointly; see `Agent` for the contract.

    Bergstra et al. 2011, multivariate as in Falkner et al. 2018 (BOHB, https://arxiv.org/abs/1807.01774). The longer
    it searches, the more of its points stand for policies that were tried. Such a point is told as failed, so that
    copies of the best do not crowd the estimator, and a policy one level switch from it (see `EvolutionAgent`) is
    tried next; where none is new, a random point. Without a storage it goes by a thousand trials at most: when there
    are as many, the best hundred and the newest are kept, so that its time does not grow with their number.

    Args:
        startup: Random points, warm starts among them, before the estimator takes over. None: a quarter of the
            evaluations, at most 10.
        warm_start, storage, study: As in `OptunaAgent`.

    Raises:
        ConfigError: `startup` is below 1, or `storage` without `study`.
    """

    objectives: ClassVar[Objectives] = "one"

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""
        _optimise(
            self, env, seed, _tpe(env, self.startup, self._place, multivariate=True), switching=True, forgetting=True
        )


@final
@dataclass(kw_only=True, eq=False)
class UnivariateTPEAgent(_Modelling):
    """Tree-structured Parzen estimators, one for each coordinate by itself (Bergstra et al. 2011).

    What comes again, and what is long ago, is treated as by `TPEAgent`. See `Agent` for the contract.

    Args:
        startup: As in `TPEAgent`.
        warm_start, storage, study: As in `OptunaAgent`.

    Raises:
        ConfigError: `startup` is below 1, or `storage` without `study`.
    """

    objectives: ClassVar[Objectives] = "one"

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""
        _optimise(
            self, env, seed, _tpe(env, self.startup, self._place, multivariate=False), switching=True, forgetting=True
        )


@final
@dataclass(kw_only=True, eq=False)
class MultiObjectiveTPEAgent(_Modelling):
    """Parzen estimators of what lies on the front, one for each coordinate: MOTPE, Ozaki et al. 2022.

    https://doi.org/10.1613/jair.1.13188. Raises accuracy and lowers MACs and parameters, none before another. See
    `Agent` for the contract.

    Args:
        startup: As in `TPEAgent`.
        warm_start, storage, study: As in `OptunaAgent`.

    Raises:
        ConfigError: `startup` is below 1, or `storage` without `study`.
    """

    objectives: ClassVar[Objectives] = "several"

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""
        _optimise(self, env, seed, _tpe(env, self.startup, self._place, multivariate=False), forgetting=True)


@final
@dataclass(kw_only=True, eq=False)
class GPAgent(_Modelling):
    """Bayesian optimisation on a Gaussian process with a Matérn 5/2 kernel, by log expected improvement.

    Ament et al. 2023 (https://arxiv.org/abs/2310.20708). A proposal takes tenths of a second after tens of candidates,
    and seconds after hundreds. See `Agent` for the contract.

    Args:
        startup: As in `TPEAgent`.
        warm_start, storage, study: As in `OptunaAgent`.

    Raises:
        ConfigError: `startup` is below 1, or `storage` without `study`.
    """

    objectives: ClassVar[Objectives] = "one"

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""

        def make(seed: int) -> BaseSampler:
            startup = _startup(env, self.startup)
            return GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)

        _optimise(self, env, seed, make)


@final
@dataclass(kw_only=True, eq=False)
class CMAESAgent(_Named):
    """Covariance matrix adaptation (Hansen 2016, https://arxiv.org/abs/1604.00772).

    Begins in the middle of the space; with warm starts, around the one that measures best, by Nomura et al. 2021
    (https://doi.org/10.1609/aaai.v35i10.17109). With one dimension, where there is nothing to adapt, points are random.
    Not for few candidates without warm starts: on the synthetic problem of `autoprune.testing` with six groups its best
    is 0.007 below random's after 20, and 0.009 above after 40 (means over four problems and two seeds). See `Agent` for
    the contract.

    Args:
        population: Candidates of a generation. None: a tenth of the evaluations, at least 4, at most the 4 + 3 ln n
            that Hansen gives for n dimensions.
        warm_start, storage, study: As in `OptunaAgent`.

    Raises:
        ConfigError: `population` is below 3, `storage` without `study`, or cmaes is not installed.
    """

    objectives: ClassVar[Objectives] = "one"
    population: int | None = None

    def __post_init__(self, storage: str | BaseStorage | None) -> None:
        super().__post_init__(storage)
        _require(3, population=self.population)
        if importlib.util.find_spec("cmaes") is None:
            raise ConfigError(
                'the agent cmaes needs the package cmaes; install with: pip install "autoprune[samplers]"'
            )

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""
        usual = 4 + int(3 * math.log(max(1, len(env.space.dimensions))))
        population = self.population or max(4, min(usual, env.evaluations // 10))

        def make(seed: int, best: FrozenTrial | None = None) -> BaseSampler:
            with _experimental():
                return CmaEsSampler(
                    seed=seed,
                    popsize=population,
                    source_trials=None if best is None else [best] * 10,  # of which it takes the best tenth
                    warn_independent_sampling=False,
                )

        _optimise(self, env, seed, make, around=make if len(env.space.dimensions) > 1 else None)


@final
@dataclass(kw_only=True, eq=False)
class QMCAgent(_Named):
    """A scrambled Sobol sequence: covers the space more evenly than random points, and learns nothing.

    A control: on the synthetic problem of `autoprune.testing` its best of 50 is random's (0.001 above, over six seeds).
    Searches that share a study take their points from one sequence. Optuna calls it experimental. See `Agent` for the
    contract.

    Args:
        warm_start, storage, study: As in `OptunaAgent`.

    Raises:
        ConfigError: `storage` without `study`.
    """

    objectives: ClassVar[Objectives] = "one"

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""

        def make(seed: int) -> BaseSampler:
            sequence = seed if self.study is None else derive(0, self.study)
            with _experimental():
                return QMCSampler(
                    seed=sequence,
                    scramble=True,
                    independent_sampler=RandomSampler(seed=seed),  # of the first point
                    warn_independent_sampling=False,
                )

        _optimise(self, env, seed, make)


@final
@dataclass(kw_only=True, eq=False)
class NSGA2Agent(_Breeding):
    """NSGA-II (Deb et al. 2002): raises accuracy and lowers MACs and parameters, none before another.

    For hundreds of candidates: on the synthetic problem of `autoprune.testing` with six groups, means over five seeds,
    the volume that its candidates dominate is 0.02 below that of random ones after 50, and 0.02 above after 150, where
    `MultiObjectiveTPEAgent` is 0.04 and 0.05 above. See `Agent` for the contract.

    Args:
        population: Candidates of a generation. None: a sixth of the evaluations, at least 4, at most Optuna's own 50.
        warm_start, storage, study: As in `OptunaAgent`.

    Raises:
        ConfigError: `population` is below 2, or `storage` without `study`.
    """

    objectives: ClassVar[Objectives] = "several"

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""

        def make(seed: int) -> BaseSampler:
            return NSGAIISampler(seed=seed, population_size=_population(env, self.population))

        _optimise(self, env, seed, make)


@final
@dataclass(kw_only=True, eq=False)
class NSGA3Agent(_Breeding):
    """NSGA-III (Deb & Jain 2014): as `NSGA2Agent`, but spreads its front by reference points in place of crowding.

    What is said there of few candidates holds here too; Optuna calls it experimental. See `Agent` for the contract.

    Args:
        population: As in `NSGA2Agent`.
        warm_start, storage, study: As in `OptunaAgent`.

    Raises:
        ConfigError: `population` is below 2, or `storage` without `study`.
    """

    objectives: ClassVar[Objectives] = "several"

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent."""

        def make(seed: int) -> BaseSampler:
            with _experimental():
                return NSGAIIISampler(seed=seed, population_size=_population(env, self.population))

        _optimise(self, env, seed, make)


# -- samplers ---------------------------------------------------------------------------------------------------------


def _require(least: int, **setting: int | None) -> None:
    """Refuse a setting that is given and too low."""
    for name, value in setting.items():
        if value is not None and value < least:
            raise ConfigError(f"`{name} >= {least}` must hold, but got {name}={value}")


def _startup(env: PruningEnv, startup: int | None) -> int:
    return startup if startup is not None else max(1, min(10, env.evaluations // 4))


def _population(env: PruningEnv, population: int | None) -> int:
    return population if population is not None else max(4, min(50, env.evaluations // 6))


@contextlib.contextmanager
def _experimental() -> Iterator[None]:
    """Make a sampler without the warning that Optuna may change it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def _tpe(env: PruningEnv, startup: int | None, place: _Place, *, multivariate: bool) -> "_Make":
    lie = env.at_once > 1 or place.storage is not None  # trials under way count as bad, so that no two try the same

    def make(seed: int) -> BaseSampler:
        trials = _startup(env, startup)
        return TPESampler(seed=seed, multivariate=multivariate, n_startup_trials=trials, constant_liar=lie)

    return make


def _described(sampler: BaseSampler, first: float | None) -> str:
    """Return the sampler's name, those of its settings that are plain values, and what tells its seed.

    Args:
        sampler: As handed in.
        first: The first point that it proposes; None where that is not what it goes by.
    """

    def told(value: object) -> str | None:
        if isinstance(value, str | int | float | bool | None):
            return repr(value)
        if isinstance(value, BaseSampler):
            return _described(value, None)
        if isinstance(value, list | tuple):
            return f"[{', '.join(filter(None, map(told, value)))}]"
        if isinstance(value, Mapping):
            return f"{{{', '.join(f'{k}: {told(v)}' for k, v in value.items())}}}"
        return None

    settings = {name: told(value) for name, value in sorted(vars(sampler).items())}
    plain = [f"{name.lstrip('_')}={value}" for name, value in settings.items() if value is not None]
    seeded = [] if first is None else [f"first={first!r}"]
    return f"{type(sampler).__module__}.{type(sampler).__qualname__}({', '.join([*plain, *seeded])})"


def _copied(sampler: BaseSampler) -> BaseSampler:
    try:
        return copy.deepcopy(sampler)
    except Exception as error:
        raise ConfigError(
            f"a search starts from a copy of its sampler, but {type(sampler).__name__} can't be copied; hand in a "
            "function that makes it from a seed"
        ) from error


def _first(new: Callable[[], BaseSampler]) -> float | None:
    """Return the first point that a sampler proposes; None where it can't be tried on a parameter of ours.

    Args:
        new: Makes the sampler, each time as it was handed in.

    Raises:
        ConfigError: One that is made again proposes another point: it has no seed.
    """
    samplers = [new() for _ in range(2)]
    with _quiet():
        try:
            points = [optuna.create_study(sampler=one).ask().suggest_float("x", 0.0, 1.0) for one in samplers]
        except Exception:  # one that knows its parameters, as a grid does, can't be tried on another
            return None
    if points[0] != points[1]:
        name = type(samplers[0]).__name__
        raise ConfigError(
            f"this {name} has no seed, and its search could not be repeated; make it with one, {name}(seed=0), or hand "
            f"in the class to have it seeded by the search: OptunaAgent({name})"
        )
    return points[0]


# -- studies ----------------------------------------------------------------------------------------------------------

_Make = Callable[[int], BaseSampler]
_MakeAround = Callable[[int, FrozenTrial], BaseSampler]


class _Agent(Protocol):
    """What all agents here have."""

    warm_start: bool
    study: str | None
    _place: _Place

    @property
    def objectives(self) -> Objectives:
        """As in `Agent`."""
        ...


def _optimise(
    agent: _Agent,
    env: PruningEnv,
    seed: int,
    make: _Make,
    around: _MakeAround | None = None,
    *,
    switching: bool = False,
    forgetting: bool = False,
) -> None:
    """Ask, evaluate and tell until `SearchOver`; the warm starts are asked first.

    Args:
        agent: Whose settings count.
        env: What to search.
        seed: The sampler's.
        make: Makes the sampler.
        around: Makes it again, to begin around the best warm start, once these are measured.
        switching: Whether a policy near to one that comes again is tried instead.
        forgetting: Whether the sampler goes by a thousand trials at most, where the study is the search's own.
    """
    with _quiet():
        where = agent._place.storage
        if where is not None:
            with contextlib.ExitStack() as stack:
                _share(agent, _opened(agent, where, env, stack), env, seed, make, around, switching=switching)
            return
        study = optuna.create_study(sampler=make(seed), directions=_directions(agent))
        rng = _switches(seed, switching)
        trials = _Trials(env, study, agent.objectives, None if around is None else functools.partial(around, seed), rng)
        if agent.warm_start:
            trials.enqueue_warm_starts()
        for trial, candidate in in_turn(env, trials.proposed()):
            trials.tell(trial, candidate)
            if forgetting:
                trials.forget(functools.partial(make, derive(seed, "after", candidate.id)))


def _share(
    agent: _Agent,
    opened: tuple[optuna.Study, bool],
    env: PruningEnv,
    seed: int,
    make: _Make,
    around: _MakeAround | None,
    *,
    switching: bool,
) -> None:
    """Do the same on a study that others may work on, and that may hold trials of this very search.

    No trial is left open, whatever ends the search but the death of its process; then the search takes it up again.
    """
    study, new = opened
    there = study.get_trials(deepcopy=False)
    own = [trial for trial in there if trial.user_attrs.get(_RUN) == env.name]
    seed = derive(seed, env.name, len(there))  # a search that goes on would draw its first points again
    study.sampler = make(seed)
    rng = _switches(seed, switching)
    trials = _Trials(env, study, agent.objectives, None if around is None else functools.partial(around, seed), rng)
    if agent.warm_start and (new or own):  # one search brings them, or several would try the same
        trials.enqueue_warm_starts(but_known=True)
    over: list[SearchOver] = []

    def begun() -> Iterator[tuple[optuna.Trial | Policy | None, Proposed]]:
        try:
            yield from trials.taken_up(own)
            yield from trials.marked()
        except SearchOver as error:  # what is under way is still to be told
            over.append(error)

    for trial, candidate in in_turn(env, begun()):
        if isinstance(trial, optuna.Trial):
            try:
                trials.describe(trial, candidate)
                trials.tell(trial, candidate)
            except UpdateFinishedTrialError:  # SQLite can give one waiting trial to two who ask at once
                trials.add_told(trial, candidate)
        elif trial is not None:
            trials.add(trial, candidate)
    if over:
        raise over[0]


def _switches(seed: int, switching: bool) -> np.random.Generator | None:
    return np.random.default_rng(derive(seed, "switches")) if switching else None


class _Point(NamedTuple):
    """A trial with several values."""

    id: str
    accuracy: float
    macs: float
    params: float
    trial: FrozenTrial


@final
class _Trials:
    """One search's trials in a study.

    Args:
        env: What to search.
        study: Where trials are kept.
        objectives: What is told.
        around: Makes a sampler from the best warm start, if the sampler is to learn of it so.
        rng: Of the switches from policies that come again, or None where these are told as any other.
    """

    def __init__(
        self,
        env: PruningEnv,
        study: optuna.Study,
        objectives: Objectives,
        around: Callable[[FrozenTrial], BaseSampler] | None,
        rng: np.random.Generator | None = None,
    ) -> None:
        self._env, self._study = env, study
        self._rng = rng
        self._repeated: set[optuna.Trial] = set()
        self._numbers: dict[optuna.Trial, int] = {}  # in the study as it is now, of trials that are not told
        self._several = objectives == "several"
        self._around = around
        self._warm: list[tuple[dict[str, float], Proposed]] = []
        self._seen: set[Policy] = set()

    def enqueue_warm_starts(self, *, but_known: bool = False) -> None:
        """Have the warm starts asked first, or those that the study does not hold yet."""
        for policy in self._env.warm_starts:
            self._study.enqueue_trial(self._params(policy), user_attrs={_WARM: True}, skip_if_exists=but_known)

    def proposed(self) -> Iterator[tuple[optuna.Trial, Proposed]]:
        """Ask for trial after trial and begin to evaluate it."""
        while True:
            trial = self._study.ask()
            self._numbers[trial] = trial.number
            yield trial, self._submit(trial)

    def marked(self) -> Iterator[tuple[optuna.Trial, Proposed]]:
        """Do so with the search's name on each trial, as long as there are evaluations for it."""
        while len(self._seen) < self._env.evaluations:
            trial = self._study.ask()
            try:
                trial.set_user_attr(_RUN, self._env.name)  # before it is anything that could be lost
                result = self._submit(trial)
            except UpdateFinishedTrialError:  # who was given it too has told it already
                continue
            except SearchOver:  # another search, or this one when it goes on, may try the warm start
                if _WARM in trial.user_attrs:
                    self._study.enqueue_trial(trial.params, user_attrs={_WARM: True})
                self._study.tell(trial, state=TrialState.FAIL)
                raise
            yield trial, result

    def taken_up(self, own: Sequence[FrozenTrial]) -> Iterator[tuple[optuna.Trial | Policy | None, Proposed]]:
        """Propose again what this search proposed before its process died.

        Yields:
            The trial, where it was not told; the policy, where the study has no trial of it (it is another study than
            before); None, where there is nothing to be told. And what waits for the candidate, which the ledger has
            but for those that were under way.
        """
        for frozen in own:
            if frozen.state == TrialState.RUNNING:
                trial = optuna.Trial(self._study, frozen._trial_id)
                yield trial, self._submit(trial)
            elif _POLICY in frozen.user_attrs:
                policy = self.policy_of(frozen.params)
                self._seen.add(policy)
                yield None, self._env.submit(policy)
        for policy in self._env.known:
            if policy not in self._seen:
                self._seen.add(policy)
                yield policy, self._env.submit(policy)

    def policy_of(self, params: dict[str, float]) -> Policy:
        """Return what a trial with these parameters tried."""
        return self._env.space.decode([params[name] for name in self._env.space.dimensions])

    def tell(self, trial: optuna.Trial, candidate: Candidate) -> None:
        """Tell the study what came of a trial."""
        number = self._numbers.pop(trial, trial.number)
        if candidate.failure is None and trial not in self._repeated:
            self._study.tell(number, self._values(candidate))
        else:
            self._study.tell(number, state=TrialState.FAIL)
        self._repeated.discard(trial)

    def forget(self, make: Callable[[], BaseSampler]) -> None:
        """Go on with a study of the best trials and the newest, once there are so many that sampling takes long.

        TPE takes no more than 25 for good however many there are, so that only what is worse than these is described
        by fewer. Without this, a search's time would grow with the square of its candidates.

        Args:
            make: Makes the new study's sampler; one sampler serves one study.
        """
        done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(done) < _MOST:
            return
        kept = {trial.number for trial in (*self._ranked(done)[:_BEST], *done[-_NEWEST:])}
        ahead = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
        trials = [*(trial for trial in done if trial.number in kept), *ahead]
        renumbered = {trial.number: number for number, trial in enumerate(trials)}
        self._study = optuna.create_study(sampler=make(), directions=self._study.directions)
        self._study.add_trials(trials)
        self._numbers = {trial: renumbered[number] for trial, number in self._numbers.items()}

    def _ranked(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return trials, the best first; of several objectives, one front after another."""
        if not self._several:
            return sorted(trials, key=lambda trial: trial.values, reverse=True)
        points = []
        for trial in trials:
            accuracy, macs, params = trial.values
            points.append(_Point(str(trial.number), accuracy, macs, params, trial))
        return [point.trial for point in sorted_by_layers(points)]

    def describe(self, trial: optuna.Trial, candidate: Candidate) -> None:
        """Note on a trial what its values do not say, and once more whose it is.

        Raises:
            UpdateFinishedTrialError: Another search was given the trial too, and has told it.
        """
        for name, value in {_RUN: self._env.name, **self._attributes(candidate)}.items():
            trial.set_user_attr(name, value)

    def add_told(self, trial: optuna.Trial, candidate: Candidate) -> None:
        """Add a trial beside one that another search was given too, and has told, unless it was nothing new here."""
        if trial not in self._repeated:
            self.add(self.policy_of(trial.params), candidate)

    def add(self, policy: Policy, candidate: Candidate) -> None:
        """Add a trial that has been told elsewhere."""
        done = candidate.failure is None
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE if done else TrialState.FAIL,
                params=self._params(policy),
                distributions={name: _UNIT for name in self._env.space.dimensions},
                values=self._values(candidate) if done else None,
                user_attrs={_RUN: self._env.name, **self._attributes(candidate)},
            )
        )

    def _submit(self, trial: optuna.Trial) -> Proposed:
        """Begin to evaluate the point of a trial."""
        if self._around is not None and _WARM not in trial.user_attrs:
            self._begin_around_the_best()
        params = {name: trial.suggest_float(name, _UNIT.low, _UNIT.high) for name in self._env.space.dimensions}
        policy = self.policy_of(params)
        result = self._env.submit(policy)
        if policy in self._seen and self._rng is not None:
            self._switch(trial, policy, self._rng)
        self._seen.add(policy)
        if _WARM in trial.user_attrs:
            self._warm.append((params, result))
        return result

    def _switch(self, trial: optuna.Trial, policy: Policy, rng: np.random.Generator) -> None:
        """Have a policy near to one that comes again asked next, once; where all near it are known, a random point."""
        self._repeated.add(trial)
        if _AGAIN in trial.user_attrs:  # it was under way when the process died
            return
        trial.set_user_attr(_AGAIN, True)
        removed = self._env.feasible.removed(policy)
        found = neighbour(self._env, removed, rng, self._seen, tries=_SWITCHES)
        drawn = dict(zip(self._env.space.dimensions, rng.random(len(self._env.space.dimensions)).tolist(), strict=True))
        self._study.enqueue_trial(drawn if found is None else self._params(self._env.feasible.policy(found)))

    def _begin_around_the_best(self) -> None:
        """Wait for the warm starts, and give the study a sampler that has learnt of the best."""
        around, self._around = self._around, None
        measured = [(params, result()) for params, result in self._warm]
        measured = [(params, candidate) for params, candidate in measured if candidate.failure is None]
        if around is not None and measured:
            params, candidate = max(measured, key=lambda warm: self._env.value(warm[1]))
            distributions: dict[str, BaseDistribution] = {name: _UNIT for name in params}
            values = self._values(candidate)
            self._study.sampler = around(
                optuna.trial.create_trial(params=params, distributions=distributions, values=values)
            )

    def _params(self, policy: Policy) -> dict[str, float]:
        return dict(zip(self._env.space.dimensions, self._env.space.encode(policy), strict=True))

    def _values(self, candidate: Candidate) -> list[float]:
        return list(self._env.objectives(candidate)) if self._several else [self._env.value(candidate)]

    def _attributes(self, candidate: Candidate) -> dict[str, str | int | float]:
        found: dict[str, str | int | float] = {_POLICY: candidate.id, "number": candidate.number}
        found |= {"macs": candidate.macs, "params": candidate.params}
        if candidate.failure is not None:
            return found | {"failure": candidate.failure}
        return found | {"accuracy": candidate.accuracy, "fidelity": candidate.fidelity}


def _directions(agent: _Agent) -> list[Literal["maximize", "minimize"]]:
    return ["maximize"] if agent.objectives == "one" else ["maximize", "minimize", "minimize"]


def _opened(
    agent: _Agent, where: str | BaseStorage, env: PruningEnv, stack: contextlib.ExitStack
) -> tuple[optuna.Study, bool]:
    """Return the study that an agent shares, and whether nobody has worked on it; the stack closes what is opened.

    Raises:
        ConfigError: The storage can't be used, or the study is of another search space.
    """
    feasible = env.feasible
    space = {
        "objectives": agent.objectives,
        "dimensions": list(env.space.dimensions),
        "budget": str(feasible.budget),
        "bounds": [[int(low), int(high)] for low, high in zip(feasible.lower, feasible.upper, strict=True)],
    }
    directions = _directions(agent)
    study, new = _created(where, agent.study, directions, stack)
    if not new and len(study.directions) != len(directions):
        raise ConfigError(f"study '{agent.study}' has {len(study.directions)} values a trial, not {len(directions)}")
    for _ in range(0 if new else _TRIES):  # who made it is about to say what it is of
        if _SPACE in study.user_attrs:
            break
        time.sleep(_PAUSE)
    there = study.user_attrs.get(_SPACE)
    if there is None:  # just made, here or by hand
        study.set_user_attr(_SPACE, space)
        return study, True
    for key, value in space.items():
        if there.get(key) != value:
            raise ConfigError(
                f"study '{agent.study}' is of another search: its {key} are {there.get(key)}, not {value}; name "
                "another study, or start from the same settings and one sensitivity report"
            )
    return study, False


def _created(
    where: str | BaseStorage,
    name: str | None,
    directions: list[Literal["maximize", "minimize"]],
    stack: contextlib.ExitStack,
) -> tuple[optuna.Study, bool]:
    """Return a study, and whether it was not there; waits for others that are making the tables or the study."""
    tries = 0
    while True:
        try:
            storage = where
            if isinstance(where, str):
                storage = RDBStorage(where)
                stack.callback(_close, storage)
            try:
                return optuna.create_study(storage=storage, study_name=name, directions=directions), True
            except DuplicatedStudyError:
                return optuna.load_study(storage=storage, study_name=name), False
        except ImportError as error:
            raise ConfigError(
                "the database's driver is not installed; PostgreSQL's is, with: pip install "
                '"autoprune[postgresql]"; of another database, install what its URL names'
            ) from error
        except Exception as error:  # of the driver's own
            tries += 1
            if tries == _TRIES:
                raise ConfigError(f"the study's storage can't be used: {str(error).splitlines()[0]}") from error
            time.sleep(_PAUSE)


def _close(storage: RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from writing a line a trial, and what it would rather have installed; put its verbosity back."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
