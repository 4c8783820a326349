"""Evolution by level switches: what a group loses more, others get back, so that the cost stays what it is."""

import itertools
from collections.abc import Container, Iterator, Sequence
from typing import ClassVar, final

import numpy as np

from autoprune.agents.base import Objectives, in_turn, limited, spend_is_free
from autoprune.cost import FeasibleSet, Removed
from autoprune.environment import Proposed, PruningEnv
from autoprune.errors import ConfigError
from autoprune.policy import Policy

__all__ = ["EvolutionAgent", "neighbour", "switched"]

_SPREAD = 0.1  # standard deviation of a change of the budget's share, where it is free


@final
class EvolutionAgent:
    """Keeps the best policies and breeds the next from them, in the manner of EvoPress; see `Agent` for the contract.

    Sieberling et al. 2024, https://arxiv.org/abs/2410.14649, section 3: an elitist evolution without crossover, whose
    mutation is a level switch. A few groups go up a level, as many others down, so that the cost is kept; few are
    switched more often than many. Where it differs:

    * A level is any number of elements, and levels of different groups save differently, so others get back as much as
      the exact cost allows (see `switched`); EvoPress switches between layers of one size, in steps of one size.
    * EvoPress tests all offspring on few samples and ever fewer survivors on ever more. So does this agent where the
      search is a race, with `--race`: an offspring is measured on a tenth, a quarter, a half and all of the samples,
      and survives a look unless it is clearly worse than its parent there, however its siblings do. That is not the
      default, as it saves next to nothing (`benchmarks/throughput.md`): an offspring has to be recovered first, which
      EvoPress's need not, and what it loses against its parent is less than some of the samples tell. With `--promote`
      the best go on to longer and longer fine-tuning. Offspring are compared by their value, and of equal ones the one
      that was evaluated first survives.
    * The first generation is the warm starts; without any, the uniform policy, as in EvoPress.
    * A search has tens of evaluations where EvoPress has thousands: generations are small, and one begins with who has
      survived by then, without waiting for what is still under way.

    Without warm starts, on the synthetic problem of `autoprune.testing` with six groups, its best of 20 is random's
    (0.001 above, within the noise), and its best of 40 is 0.02 above (means over four problems and two seeds).

    Args:
        offspring: Policies of a generation.
        survivors: How many of the best are bred from; others only where these have nothing new to offer.
        step: Largest share of a group's range that one switch moves it.
        warm_start: Whether the first generation is what the analyzer suggests.

    Raises:
        ConfigError: A setting is not positive.
    """

    objectives: ClassVar[Objectives] = "one"

    def __init__(self, *, offspring: int = 4, survivors: int = 1, step: float = 0.3, warm_start: bool = True) -> None:
        for name, value in {"offspring": offspring, "survivors": survivors, "step": step}.items():
            if not value > 0:
                raise ConfigError(f"`{name} > 0` must hold, but got {name}={value}")
        self.offspring = offspring
        self.survivors = survivors
        self.step = step
        self.warm_start = warm_start

    def run(self, env: PruningEnv, *, seed: int) -> None:
        """Search until the evaluations are spent, or no switch of any policy leads to a new one."""
        rng = np.random.default_rng(seed)
        fitness: list[tuple[float, Removed]] = []  # in the order of evaluation
        seen: set[Policy] = set()

        def begun(removed: Removed, parent: Removed | None = None) -> tuple[Removed, Proposed]:
            policy = env.feasible.policy(removed)
            seen.add(policy)
            return removed, env.submit(policy, rival=None if parent is None else env.feasible.policy(parent))

        def child(parents: Sequence[Removed]) -> tuple[Removed, Removed] | None:
            """Return a policy that is new and which it comes from, the first of some if that has any."""
            found = ((neighbour(env, parent, rng, seen, step=self.step), parent) for parent in parents)
            return next(((new, parent) for new, parent in found if new is not None), None)

        def started() -> Iterator[tuple[Removed, Proposed]]:
            starts = [env.feasible.removed(policy) for policy in env.warm_starts] if self.warm_start else []
            for removed in starts or [env.feasible.uniform()]:
                if env.feasible.policy(removed) not in seen:
                    yield begun(removed)

        def bred() -> Iterator[tuple[Removed, Proposed]]:
            while True:
                ranked = [removed for _, removed in sorted(fitness, key=lambda one: -one[0])]
                parents = ranked[: self.survivors]
                for number in range(self.offspring):
                    first = number % len(parents)
                    found = child([*parents[first:], *parents[:first], *ranked[self.survivors :]])
                    if found is None:
                        return
                    yield begun(*found)

        for removed, candidate in in_turn(env, started()):
            fitness.append((env.value(candidate), removed))
        for removed, candidate in in_turn(env, bred()):
            fitness.append((env.value(candidate), removed))


def neighbour(
    env: PruningEnv,
    removed: Removed,
    rng: np.random.Generator,
    known: Container[Policy],
    *,
    step: float = 0.3,
    tries: int = 50,
) -> Removed | None:
    """Return counts a level switch away that stand for a policy not known yet, or None where no draw finds any.

    Where the share of the budget is free, it changes too.

    Args:
        env: What is searched.
        removed: `(groups,)`; it is left as it is.
        rng: Randomness.
        known: Policies.
        step: As of `switched`.
        tries: How many are drawn.
    """
    for _ in range(tries):
        feasible = env.feasible
        if spend_is_free(env):
            feasible = limited(env, _share(env, removed) + rng.normal(0, _SPREAD))
        found = switched(feasible, removed, rng, step=step)
        if env.feasible.policy(found) not in known:
            return found
    return None


def switched(feasible: FeasibleSet, removed: Removed, rng: np.random.Generator, *, step: float = 0.3) -> Removed:
    """Return the counts after a level switch: one to three groups lose more, and others get back what that allows.

    As in EvoPress the number of groups is the lower of two draws from 1 to 3. The groups that get elements back come in
    a random order, each as much as the budget allows; so at the end no element of any group could come back.

    Args:
        feasible: The budget and the bounds.
        removed: `(groups,)`; it is left as it is. If it costs too much, it is first moved to the budget.
        rng: Randomness.
        step: Largest share of its range that a group is moved.

    Returns:
        `(groups,)` allowed counts within bounds and budget; the same as before where there is nothing to switch.
    """
    counts = feasible.settled(removed.astype(np.float64))
    if feasible.utilisation(counts) > 1:
        counts = feasible.project(counts / feasible.sizes)
    raised: list[int] = []
    for _ in range(min(rng.integers(1, 4), rng.integers(1, 4))):
        able = [index for index in np.flatnonzero(counts < feasible.upper).tolist() if index not in raised]
        if not able:
            break
        index = able[rng.integers(len(able))]
        group = feasible.structure.groups[index]
        most = int(feasible.upper[index])
        wanted = counts[index] + max(group.multiple, rng.uniform(0, step) * (most - int(feasible.lower[index])))
        counts[index] = min(most, max(group.nearest(wanted), int(counts[index])))
        raised.append(index)
    others = [index for index in rng.permutation(len(counts)).tolist() if index not in raised]
    decided = np.zeros(len(counts), dtype=np.bool_)
    fewer = feasible.fewer(counts)
    for index in itertools.chain(others, raised):
        before = int(counts[index])
        if before <= feasible.lower[index]:
            continue
        counts[index] = fewer[index]
        if feasible.utilisation(counts) > 1:  # so for most, once some are back
            counts[index] = before
        else:
            fewest, _ = feasible.interval(counts, index, decided)
            counts[index] = min(before, fewest)
    return counts


def _share(env: PruningEnv, removed: Removed) -> float:
    """Return how much of the budget counts use: 0 is the smallest network that can be reached, 1 the whole budget."""
    smallest = env.feasible.utilisation(env.feasible.upper)
    return (env.feasible.utilisation(removed) - smallest) / max(1e-9, 1 - smallest)
