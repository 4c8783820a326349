"""Evaluations on the processes of a Ray cluster, of this machine or of many. The one file that imports ray.

A worker is an actor that holds the pipeline, which is put once into the object store. One that dies, with its machine
or alone, is replaced by another, wherever there is room, and its work is done again by whoever is free. Workers that
are up take another pipeline, so that each rung of a ladder need not start its own.
"""

import logging
import os
import signal
import socket
import threading
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import ray
import torch
from ray.cloudpickle import register_pickle_by_value
from ray.exceptions import RayError

from autoprune.errors import ConfigError, ExecutorError
from autoprune.evaluation.executor import Runs, Work
from autoprune.evaluation.pipeline import Outcome
from autoprune.processes import users_modules

__all__ = ["RayExecutor"]

_ATTEMPTS: Final = 5  # workers that a policy or a probe may cost before it has failed
_FAILED_STARTS: Final = 3  # in a row
_ANSWER: Final = 10.0  # seconds in which a worker that is alive says so, and a cluster that is there
_ROOM: Final = 2  # policies under way for every worker, so that none waits while results are taken in order


@dataclass(frozen=True, slots=True)
class _Run:
    worker: Any
    work: Work


@dataclass(frozen=True, slots=True)
class _Raised:
    """What a pipeline raised, and where."""

    error: Exception
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> "_Raised":
        """Keep an exception, or one that says the same where it can't be sent."""
        told = "".join(traceback.format_exception(error))
        try:
            same = ray.cloudpickle.loads(ray.cloudpickle.dumps(error))
        except Exception:  # as much as classes can object to
            same = None
        return cls(error if isinstance(same, Exception) else RuntimeError(f"{type(error).__name__}: {error}"), told)


@final
class RayExecutor:
    """Runs policies on Ray workers; see `Executor`.

    Args:
        workers: How many.
        address: Of a running cluster, as in `ray.init`: "auto", or HOST:PORT. Without it, one is started on this
            machine, and stopped afterwards. Machines of a cluster need autoprune installed.
        cpus: Cores of a worker, and threads that torch has there. None: an equal share of this machine's where the
            cluster is started here, else 1.
        gpus: Of a worker; may be a fraction. None: 1 if the network is on a GPU, else 0.
        patience: Seconds to wait for a first worker.

    Attributes:
        at_once: Twice as many policies as workers.
        lost: Workers that died so far.

    Raises:
        ConfigError: A number is not positive.
    """

    def __init__(
        self,
        workers: int,
        *,
        address: str | None = None,
        cpus: int | None = None,
        gpus: float | None = None,
        patience: float = 600.0,
    ) -> None:
        for name, value, least in (("workers", workers, 1), ("cpus", cpus, 1), ("gpus", gpus, 0)):
            if value is not None and value < least:
                raise ConfigError(f"`{name} >= {least}` must hold, but got {name}={value}")
        self.workers = workers
        self.at_once = _ROOM * workers
        self.lost = 0
        self._address, self._cpus, self._gpus, self._patience = address, cpus, gpus, patience
        self._owns_cluster = False
        self._pipeline: Any = None
        self._options: dict[str, Any] = {}
        self._threads = 1
        self._starting: dict[Any, Any] = {}  # what tells that a worker is up → the worker
        self._failed_starts = 0
        self._idle: list[Any] = []
        self._running: dict[Any, _Run] = {}
        self._waiting: deque[Work] = deque()
        self._attempts = Counter[str]()

    def start(self, pipeline: Runs) -> None:
        """Connect to the cluster, or start one, and begin to start workers; those that are up take the pipeline.

        Raises:
            ExecutorError: There is no cluster at the address, or the task can't be sent.
        """
        threads = self._cpus or (1 if self._address else max(1, torch.get_num_threads() // self.workers))
        if not ray.is_initialized():
            self._connect(threads)
        on_gpu = pipeline.device.type == "cuda"
        self._threads = threads
        self._options = {"num_cpus": threads, "num_gpus": float(on_gpu) if self._gpus is None else self._gpus}
        for module in users_modules():
            register_pickle_by_value(module)
        try:
            self._pipeline = ray.put(pipeline)
        except TypeError as error:
            raise ExecutorError(f"the task can't be sent to workers: {str(error).splitlines()[0]}") from error
        self._attempts.clear()  # another pipeline's policies may be the same
        for _ in range(self.workers - len(self._idle) - len(self._starting)):
            self._launch()

    def submit(self, work: Work) -> None:
        """Hand work to a worker, or put it in line."""
        self._waiting.append(work)
        self._dispatch()

    def finished(self) -> Outcome:
        """Wait for one of the policies under way.

        Raises:
            ExecutorError: No worker comes up.
        """
        while True:
            self._dispatch()
            if not self._running and not self._starting:
                raise RuntimeError("nothing is under way")
            wait_for = None if self._running else self._patience
            ready, _ = ray.wait([*self._running, *self._starting], num_returns=1, timeout=wait_for)
            if not ready:
                raise ExecutorError(
                    f"no worker came up within {self._patience:.0f} s; does the cluster have machines with "
                    f"{self._options['num_cpus']} cores and {self._options['num_gpus']:g} GPUs free?"
                )
            if ready[0] in self._starting:
                self._welcome(ready[0])
            elif (outcome := self._take(ready[0])) is not None:
                return outcome

    def close(self) -> None:
        """Stop the workers, and the cluster if it was started here."""
        if ray.is_initialized():
            for worker in [*self._idle, *self._starting.values(), *(run.worker for run in self._running.values())]:
                ray.kill(worker)
            if self._owns_cluster:
                ray.shutdown()
        self._owns_cluster = False
        self._pipeline = None
        self._failed_starts = 0
        for kept in (self._idle, self._starting, self._running, self._waiting, self._attempts):
            kept.clear()

    # -- workers --------------------------------------------------------------------------------------------------

    def _connect(self, threads: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a search tells nobody of itself
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        local: dict[str, Any] = {}
        if not self._address:
            local = {"num_cpus": self.workers * threads, "include_dashboard": False}
        try:
            if self._address and self._address != "auto":
                host, _, port = self._address.rpartition(":")
                socket.create_connection((host.rpartition("/")[2], int(port)), _ANSWER).close()  # ray waits for minutes
            with _signals_kept(), chdir(os.sep):  # workers would import what lies in the working directory
                ray.init(self._address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
        except Exception as error:  # a bare one of Ray's, too, where a busy machine takes too long to start it
            said = str(error).splitlines()[0]
            raise ExecutorError(f"there is no Ray cluster at {self._address or 'this machine'}: {said}") from error
        self._owns_cluster = True

    def _launch(self) -> None:
        worker = _ACTOR.options(**self._options).remote([self._pipeline], self._threads, str(Path.cwd()))
        self._starting[worker.ready.remote()] = worker

    def _welcome(self, ready: Any) -> None:
        """Take in a worker that is up, or start another for one that failed to come up."""
        worker = self._starting.pop(ready)
        try:
            ray.get(ready)
        except RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= _FAILED_STARTS:
                raise ExecutorError(f"{self._failed_starts} workers in a row failed to start: {error}") from error
            self._launch()
            return
        self._failed_starts = 0
        self._idle.append(worker)

    def _dispatch(self) -> None:
        while self._waiting and self._idle:
            worker = self._idle.pop()
            if self._lives(worker):  # else its death would count against the work
                work = self._waiting.popleft()
                self._running[worker.run.remote([self._pipeline], work)] = _Run(worker, work)
            else:
                self._replace(worker)

    def _lives(self, worker: Any) -> bool:
        try:
            ray.get(worker.ready.remote(), timeout=_ANSWER)
        except RayError:
            return False
        return True

    def _replace(self, worker: Any) -> None:
        self.lost += 1
        ray.kill(worker)
        self._launch()

    def _take(self, ready: Any) -> Outcome | None:
        """Return what a worker made of its work; None where it died and the work is in line again."""
        run = self._running.pop(ready)
        try:
            outcome: Outcome | _Raised = ray.get(ready)
        except RayError as error:
            self._replace(run.worker)
            self._attempts[run.work.id] += 1
            if self._attempts[run.work.id] < _ATTEMPTS:
                self._waiting.appendleft(run.work)
                return None
            return Outcome(run.work.id, (), 0.0, f"{_ATTEMPTS} workers died of it: {type(error).__name__}")
        self._idle.append(run.worker)
        if isinstance(outcome, _Raised):
            outcome.error.add_note(outcome.traceback)
            raise outcome.error
        return outcome


class _Worker:
    """Holds a pipeline in a process of its own; `stored` is its reference, in a list, where Ray leaves it as it is."""

    def __init__(self, stored: Sequence[Any], threads: int, folder: str) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)  # the search's, which paths may be relative to
        torch.set_num_threads(threads)
        self._hold(stored)

    def _hold(self, stored: Sequence[Any]) -> None:
        self._pipeline: Any = None  # so that no two need room
        self._pipeline = ray.get(stored[0])
        self._stored = stored

    def ready(self) -> None:
        """Return when the pipeline is there."""

    def run(self, stored: Sequence[Any], work: Work) -> "Outcome | _Raised":
        """Run the pipeline; what it raises is returned, since not every exception survives being raised elsewhere."""
        if stored != self._stored:
            self._hold(stored)
        try:
            outcome: Outcome = self._pipeline(work)
        except Exception as error:  # it is raised where the search is
            return _Raised.of(error)
        return outcome


_ACTOR: Final[Any] = ray.remote(max_restarts=0, max_task_retries=0)(_Worker)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put the handler of SIGTERM back, which `ray.init` replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
