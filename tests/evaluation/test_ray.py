"""Ray workers: what comes back is what comes of a policy here, and a worker that dies costs nothing but time."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from autoprune import cli
from autoprune.cost import Budget, CostModel, FeasibleSet
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
from autoprune.models import build, save_weights
from autoprune.policy import Policy
from autoprune.search_spaces.per_group import PerGroup
from autoprune.task import Task
from autoprune.testing import ExecutorContract, SyntheticPipeline, run_agent

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402 - it needs ray

from autoprune.evaluation.ray import RayExecutor  # noqa: E402 - it needs ray

pytestmark = pytest.mark.timeout(600)

CPUS = 4
DEAD_SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    """One for all tests, as it takes seconds to start, whose machine says that it has a GPU."""
    head = {"num_cpus": CPUS, "num_gpus": 1, "include_dashboard": False, "_system_config": DEAD_SOON}
    made = Cluster(initialize_head=True, head_node_args=head)
    executor = RayExecutor(3, address=made.address)
    executor._connect(1)
    yield made
    ray.shutdown()
    made.shutdown()


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
    again = tmp_path / "again"
    again.mkdir()
    executor.start(Deadly(again, {deadly.id: 1}))  # deaths of another pipeline do not count
    executor.submit(deadly)
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


def test_a_cluster_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any, **__: Any) -> None:
        raise Exception("The current node timed out during startup.")  # Ray's own way to say so

    monkeypatch.setattr("autoprune.evaluation.ray.ray.init", late)
    with pytest.raises(ExecutorError, match="there is no Ray cluster at this machine: The current node timed out"):
        RayExecutor(1)._connect(1)


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


def test_a_worker_has_as_many_threads_as_cores() -> None:
    executor = RayExecutor(1, cpus=3)
    executor.start(Threads())
    executor.submit(policies(1)[0])
    assert executor.finished().failure == "3"
    executor.close()


class Meeting:
    """Waits until so many processes are at work at once, and says whether they have met."""

    device = torch.device("cpu")

    def __init__(self, folder: Path, processes: int, seconds: float) -> None:
        folder.mkdir()
        self.folder, self.processes, self.seconds = folder, processes, seconds

    def __call__(self, policy: Policy) -> Outcome:
        (self.folder / str(os.getpid())).touch()
        until = time.monotonic() + self.seconds
        while len(list(self.folder.iterdir())) < self.processes:
            if time.monotonic() > until:
                return Outcome(policy.id, (), 0.0, "alone")
            time.sleep(0.02)
        return Outcome(policy.id, (), 0.0, "met")


@pytest.mark.parametrize(("gpus", "seconds", "said"), [(0.5, 60.0, "met"), (1.0, 0.1, "alone")])
def test_workers_share_a_gpu_if_it_is_enough_for_both(gpus: float, seconds: float, said: str, tmp_path: Path) -> None:
    executor = RayExecutor(2, gpus=gpus)
    executor.start(Meeting(tmp_path / "met", 2, seconds))
    for policy in policies(2):
        executor.submit(policy)
    assert [executor.finished().failure for _ in range(2)] == [said] * 2
    executor.close()


def test_workers_that_are_up_go_on_with_another_pipeline(executor: RayExecutor, tmp_path: Path) -> None:
    executor.start(Meeting(tmp_path / "met", 2, 60.0))
    for policy in policies(2):
        executor.submit(policy)
    assert {executor.finished().failure for _ in range(2)} == {"met"}
    executor.start(Slow())
    for policy in policies(2):  # the same ones
        executor.submit(policy)
    assert {executor.finished().failure for _ in range(2)} == {path.name for path in (tmp_path / "met").iterdir()}


class Counted(Pipeline):
    """Counts how often it is pickled here."""

    pickled: ClassVar[int] = 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        Counted.pickled += 1
        return super().__reduce_ex__(protocol)


def test_network_and_data_are_stored_once(
    executor: RayExecutor,
    task: Task,
    make_evaluator: Callable[..., Evaluator],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not for every candidate or worker, those that replace others included."""
    stored: list[Any] = []
    put = ray.put
    monkeypatch.setattr("autoprune.evaluation.ray.ray.put", lambda value: stored.append(value) or put(value))
    plain = make_evaluator(task)
    counted = Counted(plain.bench, plain.pipeline.recovery, plain.pipeline.seed)
    evaluator = Evaluator(counted, plain.costs, Ledger(), executor)
    chosen = [Policy({"conv1": number / 8}) for number in range(6)]
    evaluator.evaluate(chosen[0], arm="search", agent="tpe")
    executor._replace(executor._idle.pop())
    results = [evaluator.submit(policy, arm="search", agent="tpe") for policy in chosen[1:]]
    assert len({result().id for result in results}) == 5
    assert stored == [counted]
    assert Counted.pickled == 1


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


def searched(
    pipeline: Pipeline,
    costs: CostModel,
    executor: Executor,
    file: Path,
    evaluations: int,
    watch: Callable[[Candidate], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Search with TPE, four policies under way, and return the lines of the ledger, by number, without times."""
    from autoprune.agents.optuna import TPEAgent

    feasible = FeasibleSet.build(pipeline.bench.structure, costs, Budget.parse("macs<=60%"), {}, 0.9)
    evaluator = Evaluator(pipeline, costs, Ledger(file), executor)
    evaluator.watch = watch
    arm = Arm(evaluator, "search", "tpe", evaluations)
    space = PerGroup(feasible, spend=(0.25, 1.0))
    env = PruningEnv(feasible, space, arm.submit, value=lambda c: c.accuracy, evaluations=evaluations, at_once=4)
    run_agent(TPEAgent(), env, seed=0)
    arm.drain()
    evaluator.close()
    return lines_of(file)


def lines_of(ledger: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) | {"seconds": 0.0} for line in ledger.read_text().splitlines()]
    return sorted(lines, key=lambda line: int(line["number"]))


class KilledOnce(Pipeline):
    """Kills the process that has done the third policy or a later one, before it can say so; once."""

    folder: Path

    def __call__(self, policy: Policy) -> Outcome:
        outcome = super().__call__(policy)
        (self.folder / f"{policy.id}.{os.getpid()}").touch()
        if len(list(self.folder.iterdir())) >= 3:
            with suppress(FileExistsError):
                (self.folder / "killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return outcome


def test_a_worker_killed_during_a_search_costs_it_nothing(
    executor: RayExecutor, task: Task, make_evaluator: Callable[..., Evaluator], tmp_path: Path
) -> None:
    """Nothing is lost and nothing counted twice: the ledger is that of one process."""
    plain = make_evaluator(task)
    killed = KilledOnce(plain.bench, plain.pipeline.recovery, plain.pipeline.seed)
    killed.folder = tmp_path / "done"
    killed.folder.mkdir()
    expected = searched(plain.pipeline, plain.costs, InProcess(at_once=4), tmp_path / "here", 8)
    assert searched(killed, plain.costs, executor, tmp_path / "there", 8) == expected
    assert executor.lost == 1
    assert [line["number"] for line in expected] == list(range(8))
    assert len(list(killed.folder.glob("*.*"))) == 8 + 1  # one was done twice


class Slowly(Pipeline):
    """Takes long enough to be killed."""

    seconds = 1.0

    def __call__(self, policy: Policy) -> Outcome:
        time.sleep(self.seconds)
        return super().__call__(policy)


def test_a_machine_that_dies_during_a_search_costs_it_nothing(
    cluster: Cluster, task: Task, make_evaluator: Callable[..., Evaluator], tmp_path: Path
) -> None:
    """Its worker finds no room elsewhere; the search goes on with the other one."""
    plain = make_evaluator(task)
    slowly = Slowly(plain.bench, plain.pipeline.recovery, plain.pipeline.seed)
    slowly.seconds = 0.3
    expected = searched(plain.pipeline, plain.costs, InProcess(at_once=4), tmp_path / "here", 10)
    machine = cluster.add_node(num_cpus=CPUS - 1)
    executor = RayExecutor(2, cpus=CPUS - 1)

    def remove(_: Candidate) -> None:
        executor._dispatch()  # so that both are at work, if there is enough
        if len(executor._running) == 2 and machine in cluster.worker_nodes:
            cluster.remove_node(machine, allow_graceful=False)

    try:
        executor.start(Meeting(tmp_path / "met", 2, 60.0))
        for policy in policies(2):
            executor.submit(policy)
        assert [executor.finished().failure for _ in range(2)] == ["met"] * 2
        assert searched(slowly, plain.costs, executor, tmp_path / "there", 10, remove) == expected
    finally:
        executor.close()
    assert machine not in cluster.worker_nodes
    assert executor.lost == 1
    assert [line["number"] for line in expected] == list(range(10))


@pytest.mark.torture
def test_workers_killed_at_random_during_a_search_cost_it_nothing(
    task: Task, make_evaluator: Callable[..., Evaluator], tmp_path: Path
) -> None:
    """Nothing is lost and nothing counted twice: the ledger is that of one process."""
    plain = make_evaluator(task, Recovery(200, 20))
    slowly = Slowly(plain.bench, plain.pipeline.recovery, plain.pipeline.seed)
    expected = searched(plain.pipeline, plain.costs, InProcess(at_once=4), tmp_path / "here", 24)
    executor = RayExecutor(2)
    over = threading.Event()
    killer = threading.Thread(target=_kill_workers, args=(over,))
    killer.start()
    try:
        assert searched(slowly, plain.costs, executor, tmp_path / "there", 24) == expected
    finally:
        over.set()
        killer.join()
    assert executor.lost > 0


OWN_CLUSTER = """
import json

import ray
import torch

from autoprune.evaluation import Outcome
from autoprune.evaluation.ray import RayExecutor
from autoprune.policy import Policy


class Threads:
    device = torch.device("cpu")

    def __call__(self, policy):
        return Outcome(policy.id, (), 0.0, str(torch.get_num_threads()))


executor = RayExecutor(1, cpus=2)
executor.start(Threads())
executor.submit(Policy({"a": 0.5}))
told = [executor.finished().failure, ray.cluster_resources()["CPU"]]
executor.close()
print(json.dumps([*told, ray.is_initialized()]))
"""


def test_without_an_address_a_cluster_is_started_and_stopped(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", OWN_CLUSTER], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == ["2", 2.0, False]


SEARCH = (
    "search --budget macs<=40% --agent tpe --candidates 8 --control 1 --sensitivity 0.5 --finetune-steps 2 "
    "--promote 0.5 --calibration-images 200 --precision float32 --quiet --out run"
)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A search in the current folder's `run`, of a network for the digits that nobody has trained."""
    weights = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_weights(build("resnet8", in_channels=1, input_size=8), weights)
    return [*SEARCH.split(), "--weights", str(weights)]


@pytest.fixture(scope="module")
def expected(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What the search's ledgers hold that has four policies under way in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path('mlflow.db').absolute()}")
        patch.setattr(sys, "argv", ["autoprune", *command])
        patch.setattr("warnings.showwarning", None)  # the command sets its own
        patch.setattr(cli, "_executor", lambda *_: InProcess(at_once=4))
        with pytest.raises(SystemExit, match="0"):
            cli.main()
        return ledgers(Path("run"))


def ledgers(run: Path) -> list[list[dict[str, Any]]]:
    return [lines_of(run / name) for name in ("ledger.jsonl", "finalists.jsonl")]


def watched(command: list[str], *more: str, look: Callable[[], None] = lambda: None) -> set[str]:
    """Run the command line in another process and the current folder, and return the ids of the workers there."""
    workers: set[str] = set()
    with Path("said").open("w") as said:
        program = str(Path(sys.executable).parent / "autoprune")
        with subprocess.Popen([program, *command, *more], stdout=said, stderr=said) as process:
            while process.poll() is None:
                workers |= {entry.name for entry in processes() if _works_in(entry, Path.cwd())}
                look()
                time.sleep(0.1)
    assert process.returncode == 0, Path("said").read_text()
    return workers


def test_the_command_line_has_workers_of_its_own(
    command: list[str], expected: list[list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both rungs have the same two, and no process is left."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("AUTOPRUNE_TEST_MARK", mark)
    workers = watched(command, "--workers", "2")
    assert ledgers(tmp_path / "run") == expected
    assert len(workers) == 2
    until = time.monotonic() + 20
    while left := [entry for entry in processes() if mark.encode() in _read(entry / "environ")]:
        assert time.monotonic() < until, [_read(entry / "cmdline") for entry in left]
        time.sleep(0.1)


def test_the_command_line_finds_workers_on_a_cluster(
    cluster: Cluster, command: list[str], expected: list[list[dict[str, Any]]], tmp_path: Path
) -> None:
    """It takes as many cores as it is told, gives them back, and leaves the cluster running."""
    free: set[float] = set()

    def look() -> None:
        free.add(ray.available_resources().get("CPU", 0.0))

    workers = watched(command, "--workers", "2", "--worker-cpus", "2", "--ray-address", cluster.address, look=look)
    assert ledgers(tmp_path / "run") == expected
    assert len(workers) == 2
    assert min(free) == CPUS - 4
    until = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0.0) < CPUS:
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("option", [["--worker-cpus", "2"], ["--worker-gpus", "0.5"]])
def test_settings_of_workers_that_there_are_none_of_are_refused(
    option: list[str], command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["autoprune", *command, *option])
    monkeypatch.setattr("warnings.showwarning", None)  # the command sets its own
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "are a worker's; add --workers or --ray-address" in capsys.readouterr().err


def processes() -> list[Path]:
    return [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # it is over
        return b""


def _works_in(process: Path, folder: Path) -> bool:
    if not _read(process / "cmdline").startswith(b"ray::_Worker"):
        return False
    try:
        return (process / "cwd").readlink() == folder.resolve()
    except OSError:
        return False


def _kill_workers(over: threading.Event) -> None:
    """Kill a worker that is at work, every so often."""
    chance = random.Random(0)
    while not over.wait(chance.uniform(1.5, 4.0)):
        at_work = [e for e in processes() if _read(e / "cmdline").startswith(b"ray::_Worker.run")]
        if at_work:
            os.kill(int(chance.choice(at_work).name), signal.SIGKILL)
