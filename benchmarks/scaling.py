"""How the time of a search's own work grows: with groups, with candidates, and with workers.

    python benchmarks/scaling.py groups
    python benchmarks/scaling.py candidates [--most 100000]
    python benchmarks/scaling.py workers [--ray 1 2]

`groups`: chains of convolutions. Seconds to find and prove the groups, to price them, and, a policy, to decode a point
of the search space, to price it, to solve for it from losses that add up, to slice it; and memory at its peak.

`candidates`: candidates of a formula instead of a network, in a ledger on disk. Milliseconds a candidate in the first
and in the last tenth of a search: of the evaluator and its ledger alone (random policies), and with agents that learn;
and by how much the process's memory grew.

`workers`: evaluations that sleep, for random times around a median, on threads and on Ray. Seconds until all workers
are up, and how busy they are from then on: the sum of all evaluations' times over what the workers had, for an agent
that draws and for two that learn.
"""

import argparse
import functools
import queue
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autoprune.cost import Budget, CostModel, FeasibleSet
from autoprune.environment import PruningEnv
from autoprune.evaluation import Arm, Evaluator, Executor, Ledger, Measurement, Outcome, Runs, Work
from autoprune.policy import Policy
from autoprune.registry import resolve
from autoprune.search_spaces.per_group import PerGroup
from autoprune.seeds import derive
from autoprune.separable import allocate
from autoprune.structure import analyse, plan
from autoprune.structure import cut as cut_network
from autoprune.testing import chain, run_agent

# -- groups -----------------------------------------------------------------------------------------------------------


def groups(options: argparse.Namespace) -> None:
    """Print what networks of more and more groups take."""
    of_groups(2)  # imports what is imported when it is first needed
    columns = ["groups", "finding and proving", "pricing", "decoding", "one price", "separable solution", "slicing"]
    print(f"| {' | '.join(columns)} | peak memory |")
    print(f"|{'---|' * 8}")
    for number in options.groups:
        seconds = of_groups(number)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"| {number} | {' | '.join(map(readable, seconds))} | {memory:.1f} GB |", flush=True)


def of_groups(number: int) -> list[float]:
    """Return the seconds that a chain of so many groups takes."""
    layers: list[nn.Module] = []
    for index in range(number + 1):
        layers += [nn.Conv2d(3 if index == 0 else 8, 8, 3, padding=1), nn.ReLU()]
    model, example = nn.Sequential(*layers).eval(), torch.zeros(1, 3, 8, 8)
    found, structure = timed(lambda: analyse(model, example))
    priced, costs = timed(lambda: CostModel(model, example, structure))
    feasible = FeasibleSet.build(structure, costs, Budget.parse("macs<=50%"), {}, 0.9)
    space = PerGroup(feasible, spend=(1.0, 1.0))
    rng = np.random.default_rng(0)
    points = [rng.random(len(space.dimensions)).tolist() for _ in range(5)]
    decoded = [timed(functools.partial(space.decode, point)) for point in points]
    removed = [structure.removed(policy) for _, policy in decoded]
    one = [timed(functools.partial(costs.cost, counts))[0] for counts in removed]
    sliced = [timed(functools.partial(smaller, model, structure, counts))[0] for counts in removed]
    weights = rng.random(number).tolist()
    solved, _ = timed(lambda: allocate(feasible, [functools.partial(convex, weight) for weight in weights]))
    decoding = statistics.median(seconds for seconds, _ in decoded)
    return [found, priced, decoding, statistics.median(one), solved, statistics.median(sliced)]


def convex(weight: float, removed: float) -> float:
    """Return what a group loses, to begin with little."""
    return weight * (removed / 8) ** 2


def smaller(model: nn.Module, structure: Any, counts: dict[str, int]) -> nn.Module:
    """Return the network without the first elements of each group, so many."""
    return cut_network(model, plan(model, structure, {name: list(range(count)) for name, count in counts.items()}))


# -- candidates -------------------------------------------------------------------------------------------------------


class Formula:
    """A pipeline whose accuracies come from a formula, after seconds that are log-normal and depend on the policy."""

    device = torch.device("cpu")

    def __init__(self, feasible: FeasibleSet, median: float = 0.0, spread: float = 0.0) -> None:
        self.structure = feasible.structure
        self.bench = self  # what the evaluator rounds policies with
        self.median, self.spread = median, spread

    def __call__(self, policy: Policy) -> Outcome:
        """Return what comes of a policy."""
        rng = np.random.default_rng(derive(0, "seconds", policy.id))
        seconds = float(self.median * rng.lognormal(0.0, self.spread))
        time.sleep(seconds)
        accuracy = 1 - float(np.mean([value**2 for value in policy.values()]))
        return Outcome(policy.id, (Measurement("short", accuracy, 0.01, 1 - accuracy, 0.01),), seconds)


def candidates(options: argparse.Namespace) -> None:
    """Print what a candidate takes, early and late in searches that grow longer."""
    feasible = chain([16] * 9)
    print(
        "| agent | candidates | ms a candidate, first tenth | last tenth | whole | reading the ledger | more memory |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in options.agents or ("random", "surrogate", "tpe", "nsga2"):
        agent, most = resolve("agent", name)(), options.most if name == "random" else options.most_learning
        number = 100
        while number <= most:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "ledger.jsonl"
                stamps, grown = search(feasible, Formula(feasible), agent, number, file)
                reading, _ = timed(lambda file=file: Ledger(file))
            tenth = number // 10
            times = [stamps[tenth] - stamps[0], stamps[-1] - stamps[-1 - tenth]]
            each = " | ".join(f"{1000 * seconds / tenth:.2f}" for seconds in times)
            whole = stamps[-1] - stamps[0]
            told = [name, f"{number:,}", each, f"{whole:.1f} s", readable(reading), f"{grown:.0f} MB"]
            print(f"| {' | '.join(told)} |", flush=True)
            number *= 10


def search(
    feasible: FeasibleSet, pipeline: Formula, agent: Any, number: int, file: Path | None, executor: Any = None
) -> tuple[list[float], float]:
    """Run an agent, and return when each candidate was done, and by how many MB memory had grown in the end."""
    before = resident()
    evaluator = Evaluator(pipeline, feasible.costs, Ledger(file), executor)  # type: ignore[arg-type]  # as good as one
    stamps = [time.perf_counter()]
    evaluator.watch = lambda _: stamps.append(time.perf_counter())
    arm = Arm(evaluator, "search", "agent", number)
    several = agent.objectives == "several"
    env = PruningEnv(
        feasible,
        PerGroup(feasible, spend=(0.0, 1.0) if several else (1.0, 1.0)),
        arm.submit,
        value=lambda candidate: candidate.accuracy,
        evaluations=number,
        at_once=evaluator.executor.at_once,
    )
    run_agent(agent, env, seed=0)
    arm.drain()
    evaluator.leave()
    return stamps, resident() - before


# -- workers ----------------------------------------------------------------------------------------------------------


class Threads:
    """Runs policies on threads, which sleep for most of the time."""

    def __init__(self, workers: int) -> None:
        self.at_once = 2 * workers
        self.todo: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.threads = [threading.Thread(target=self._work) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    def start(self, pipeline: Runs) -> None:
        """Take the pipeline."""
        self.pipeline = pipeline

    def _work(self) -> None:
        while (work := self.todo.get()) is not None:
            self.done.put(self.pipeline(work))

    def submit(self, work: Work) -> None:
        """Put work in line."""
        self.todo.put(work)

    def finished(self) -> Outcome:
        """Wait for one."""
        return self.done.get()

    def close(self) -> None:
        """Stop the threads."""
        for _ in self.threads:
            self.todo.put(None)
        for thread in self.threads:
            thread.join()


class Timed:
    """Adds up how long evaluations took on an executor."""

    def __init__(self, executor: Executor) -> None:
        self.at_once = executor.at_once
        self.start, self.submit, self.close = executor.start, executor.submit, executor.close
        self.executor = executor
        self.busy = 0.0

    def finished(self) -> Outcome:
        """Wait for one."""
        outcome = self.executor.finished()
        self.busy += outcome.seconds
        return outcome


class Meeting:
    """A pipeline that is done with a policy when so many are under way, each on a worker of its own."""

    device = torch.device("cpu")

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder, self.workers = folder, workers

    def __call__(self, policy: Policy) -> Outcome:
        """Wait for the others."""
        (self.folder / policy.id).touch()
        while len(list(self.folder.iterdir())) < self.workers:
            time.sleep(0.1)
        return Outcome(policy.id, (), 0.0)


def meet(executor: Executor, number: int) -> None:
    """Wait until all workers are up."""
    with tempfile.TemporaryDirectory() as folder:
        executor.start(Meeting(Path(folder), number))
        for index in range(number):
            executor.submit(Policy({"conv1": index / number}))
        for _ in range(number):
            executor.finished()


def on_ray(number: int) -> Executor:
    """Return Ray workers on this machine, as if it had a core for each."""
    from autoprune.evaluation.ray import RayExecutor

    return RayExecutor(number, cpus=1)


def workers(options: argparse.Namespace) -> None:
    """Print how busy workers are."""
    feasible = chain([16] * 9)
    pipeline = Formula(feasible, options.seconds, options.spread)
    kinds: tuple[tuple[str, Callable[[int], Executor], list[int]], ...] = (
        ("threads", Threads, options.workers),
        ("Ray", on_ray, options.ray),
    )
    print("| workers | | all up after | agent | candidates | busy |\n|---|---|---|---|---|---|")
    for kind, make, numbers in kinds:
        for number in numbers:
            executor = make(number)
            try:
                up, _ = timed(functools.partial(meet, executor, number))
                for name in options.agents or ("random", "surrogate", "tpe"):
                    agent = resolve("agent", name)()
                    watched, count = Timed(executor), options.each * number
                    took, _ = timed(functools.partial(search, feasible, pipeline, agent, count, None, watched))
                    share = watched.busy / (number * took)
                    told = [number, kind, readable(up), name, count, f"{share:.0%}"]
                    print(f"| {' | '.join(map(str, told))} |", flush=True)
            finally:
                executor.close()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def resident() -> float:
    """Return the process's memory now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def readable(seconds: float) -> str:
    """Return seconds in a suitable unit."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("groups", "candidates", "workers"))
    parser.add_argument("--groups", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--most", type=int, default=10_000, help="candidates of the random agent")
    parser.add_argument("--most-learning", type=int, default=1000, help="candidates of the others")
    parser.add_argument("--agents", nargs="+", help="of `candidates` and `workers`")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 8, 64], help="threads")
    parser.add_argument("--ray", type=int, nargs="*", default=[1, 2], help="Ray workers, of some 0.4 GB each")
    parser.add_argument("--each", type=int, default=20, help="evaluations of a worker")
    parser.add_argument("--seconds", type=float, default=2.0, help="median of an evaluation")
    parser.add_argument("--spread", type=float, default=0.3, help="standard deviation of its logarithm")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    chosen = _options()
    {"groups": groups, "candidates": candidates, "workers": workers}[chosen.part](chosen)
