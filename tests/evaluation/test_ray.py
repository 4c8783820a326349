"""Ray workers: what comes back is what comes of a policy here, and a worker that dies costs nothing but time."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autoprune.environment import PruningEnv
from autoprune.errors import ConfigError, ExecutorError
from autoprune.evaluation import (
    Arm,
    Candidate,
    Evaluator,
    Executor,
    InProcess,
    Ledger,
    Outcome,
    Pipeline,
    Probe,
    Recovery,
)
from autoprune.policy import Policy
from autoprune.search_spaces.per_group import PerGroup
from autoprune.task import Task
from autoprune.testing import ExecutorContract, SyntheticPipeline, run_agent

ray = pytest.importorskip("ray")
from autoprune.evaluation.ray import RayExecutor  # noqa: E402 - it needs ray

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One for all tests: it takes seconds to start."""
    executor = RayExecutor(3)
    executor._connect(1)
    yield
    ray.shutdown()


@pytest.fixture
def executor() -> Iterator[RayExecutor]:
    made = RayExecutor(2)
    yield made
    made.close()


class TestRay(ExecutorContract):
    @pytest.fixture
    def executor(self) -> Iterator[Executor]:
        made = RayExecutor(2)
        yield made
        made.close()


class Deadly:
    """Kills its process at some policies: so often each, counted in files."""

    device = torch.device("cpu")

    def __init__(self, folder: Path, deaths: dict[str, int]) -> None:
        self.folder, self.deaths = folder, deaths

    def __call__(self, policy: Policy) -> Outcome:
        (self.folder / f"{policy.id}.{time.monotonic_ns()}").touch()
        if len(list(self.folder.glob(f"{policy.id}.*"))) <= self.deaths.get(policy.id, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        return SyntheticPipeline()(policy)


def policies(count: int) -> list[Policy]:
    return [Policy({"a": number / 100}) for number in range(count)]


def test_a_worker_that_dies_costs_its_policy_another_try(executor: RayExecutor, tmp_path: Path) -> None:
    chosen = policies(4)
    executor.start(Deadly(tmp_path, {chosen[1].id: 1, chosen[2].id: 2}))
    for policy in chosen:
        executor.submit(policy)
    outcomes = {outcome.id: outcome for outcome in (executor.finished() for _ in chosen)}
    assert outcomes == {policy.id: SyntheticPipeline()(policy) for policy in chosen}
    assert executor.lost == 3
    tries = [len(list(tmp_path.glob(f"{policy.id}.*"))) for policy in chosen]
    assert tries == [1, 2, 3, 1]


def test_a_policy_that_kills_every_worker_has_failed(executor: RayExecutor, tmp_path: Path) -> None:
    deadly, harmless = policies(2)
    executor.start(Deadly(tmp_path, {deadly.id: 100}))
    executor.submit(deadly)
    outcome = executor.finished()
    assert outcome.failure == "5 workers died of it: ActorDiedError"
    assert not outcome.measurements
    executor.submit(harmless)
    assert executor.finished().failure is None


def test_workers_are_replaced_while_nobody_looks(executor: RayExecutor) -> None:
    executor.start(Slow())
    for policy in policies(2):
        executor.submit(policy)
    pids = {executor.finished().failure for _ in range(2)}
    for pid in pids:
        os.kill(int(str(pid)), signal.SIGKILL)
    for policy in policies(4)[2:]:
        executor.submit(policy)
    assert not pids & {executor.finished().failure for _ in range(2)}
    assert executor.lost == len(pids)


def test_workers_that_die_while_idle_cost_no_policy_anything(executor: RayExecutor) -> None:
    executor.start(Slow())
    for policy in policies(2):
        executor.submit(policy)
    pids = {executor.finished().failure for _ in range(2)}
    while len(executor._idle) + len(executor._starting) < 2:
        time.sleep(0.01)
    for pid in pids:
        os.kill(int(str(pid)), signal.SIGKILL)
    time.sleep(0.5)
    executor.submit(policies(3)[2])
    assert executor.finished().failure not in pids
    assert not executor._attempts  # nobody died of it


class Awkward(Exception):
    """Can't be made from what pickle has of it."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Raising:
    """Raises what does not travel."""

    device = torch.device("cpu")

    def __call__(self, policy: Policy) -> Outcome:
        raise Awkward(1, 2)


def test_an_exception_that_cannot_be_sent_is_told_in_another(executor: RayExecutor) -> None:
    executor.start(Raising())
    executor.submit(policies(1)[0])
    with pytest.raises(RuntimeError, match="Awkward: 1 and 2") as raised:
        executor.finished()
    assert "raise Awkward(1, 2)" in "".join(raised.value.__notes__)
    assert executor.lost == 0


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_cluster_that_is_not_there_is_an_error_at_once(address: str) -> None:
    executor = RayExecutor(1, address=address)
    with pytest.raises(ExecutorError, match=f"there is no Ray cluster at {address}: "):
        executor._connect(1)


class Slow:
    """Says which process it runs in."""

    device = torch.device("cpu")

    def __call__(self, policy: Policy) -> Outcome:
        time.sleep(0.3)
        return Outcome(policy.id, (), 0.0, str(os.getpid()))


def test_the_threads_are_shared(executor: RayExecutor) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        executor.start(Threads())
    finally:
        torch.set_num_threads(before)
    executor.submit(policies(1)[0])
    assert executor.finished().failure == "1"


class Threads:
    """Says how many threads it has."""

    device = torch.device("cpu")

    def __call__(self, policy: Policy) -> Outcome:
        return Outcome(policy.id, (), 0.0, str(torch.get_num_threads()))


def test_a_pipeline_that_cannot_be_made_is_an_error(executor: RayExecutor) -> None:
    executor.start(Unmakeable())
    executor.submit(policies(1)[0])
    with pytest.raises((ExecutorError, RuntimeError), match="not here"):
        executor.finished()


def _raise() -> None:
    raise RuntimeError("not here")


class Unmakeable:
    """Can be sent, not received."""

    device = torch.device("cpu")

    def __call__(self, policy: Policy) -> Outcome:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _raise, ()


def test_workers_that_find_no_room_are_an_error() -> None:
    executor = RayExecutor(1, cpus=1000, patience=1.0)
    executor.start(SyntheticPipeline())
    executor.submit(policies(1)[0])
    with pytest.raises(
        ExecutorError, match="no worker came up within 1 s; does the cluster have machines with 1000 co"
    ):
        executor.finished()
    executor.close()


def test_useless_settings_are_refused() -> None:
    for settings in ({"workers": 0}, {"workers": 1, "cpus": 0}, {"workers": 1, "gpus": -1}):
        with pytest.raises(ConfigError, match="must hold, but got"):
            RayExecutor(**settings)  # type: ignore[arg-type]  # one is a number of another kind


def timeless(candidate: Candidate) -> dict[str, object]:
    return candidate.to_dict() | {"seconds": 0.0}


def test_candidates_are_those_of_one_process(
    executor: RayExecutor, task: Task, make_evaluator: Callable[..., Evaluator]
) -> None:
    plain = make_evaluator(task, Recovery(50, 3))
    workers = Evaluator(plain.pipeline, plain.costs, make_evaluator(task).ledger, executor)
    chosen = [Policy({"conv1": number / 8, "conv2": 0.25}) for number in range(6)]
    results = [workers.submit(policy, arm="search", agent="tpe") for policy in chosen]
    expected = [plain.evaluate(policy, arm="search", agent="tpe") for policy in chosen]
    assert [timeless(result()) for result in results] == [timeless(candidate) for candidate in expected]
    probe = Probe(Policy({"conv2": 0.5}))
    executor.submit(probe)
    there, here = executor.finished(), plain.pipeline(probe)
    assert replace(there, seconds=0.0) == replace(here, seconds=0.0)
    assert there.drop_se is not None
    workers.close()
    assert isinstance(workers.executor, InProcess)


class Slowly(Pipeline):
    """Takes long enough to be killed."""

    def __call__(self, policy: Policy) -> Outcome:
        time.sleep(1.0)
        return super().__call__(policy)


@pytest.mark.torture
def test_workers_killed_at_random_during_a_search_cost_it_nothing(
    task: Task, make_evaluator: Callable[..., Evaluator]
) -> None:
    """Nothing is lost and nothing counted twice: the ledger is that of one process."""
    from autoprune.agents.optuna import TPEAgent
    from autoprune.cost import Budget, FeasibleSet

    plain = make_evaluator(task, Recovery(200, 20))
    slowly = Slowly(plain.bench, plain.pipeline.recovery, plain.pipeline.seed)
    structure = plain.bench.structure
    feasible = FeasibleSet.build(structure, plain.costs, Budget.parse("macs<=60%"), {}, 0.9)

    def searched(executor: Executor) -> list[dict[str, object]]:
        evaluator = Evaluator(slowly, plain.costs, Ledger(), executor)
        arm = Arm(evaluator, "search", "tpe", 24)
        space = PerGroup(feasible, spend=(1.0, 1.0))
        env = PruningEnv(feasible, space, arm.submit, value=lambda c: c.accuracy, evaluations=24, at_once=4)
        run_agent(TPEAgent(), env, seed=0)
        arm.drain()
        evaluator.close()
        return [timeless(candidate) for candidate in evaluator.ledger]

    expected = searched(InProcess(at_once=4))
    executor = RayExecutor(2)
    over = threading.Event()
    killer = threading.Thread(target=_kill_workers, args=(over,))
    killer.start()
    try:
        assert searched(executor) == expected
    finally:
        over.set()
        killer.join()
    assert executor.lost > 0


def _kill_workers(over: threading.Event) -> None:
    """Kill a worker that is at work, every so often."""
    chance = random.Random(0)
    while not over.wait(chance.uniform(1.5, 4.0)):
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _is_worker(entry)]
        if pids:
            os.kill(chance.choice(pids), signal.SIGKILL)


def _is_worker(process: Path) -> bool:
    try:
        return (process / "cmdline").read_bytes().startswith(b"ray::_Worker.run")
    except OSError:
        return False
