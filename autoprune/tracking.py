"""Logging a search to MLflow, from a thread of its own; the ledger, which holds everything in any case, is elsewhere.

The only file that imports mlflow. One parent run a search, one nested run a candidate. A tracking server that can't be
reached costs a `TrackingWarning` and nothing else. Resuming goes by the parent run's id and the candidates' `policy_id`
tags.
"""

import copy
import logging
import math
import os
import queue
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, TrackingWarning
from autoprune.evaluation.candidate import Candidate

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.models import Model

__all__ = ["MLflowTracker", "NullTracker", "Tracker"]

# MLflow refuses more, in one batch or in one name; values are cut to what servers since 1.0 take.
PARAMS_A_BATCH = 100
NAME_LENGTH = 250
PARAM_LENGTH = 500
TAG_LENGTH = 5000

PARENT_TAG = "mlflow.parentRunId"

# Set while a search runs, unless the user has set them: by default MLflow asks a dead server for a quarter of an hour,
# draws progress bars, prints links, and sends usage statistics to its makers.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}

CHATTY_MODULES = r"(mlflow|sqlalchemy|alembic|pydantic|opentelemetry|google|git|requests|urllib3)(\.|$)"
"""Modules whose Python warnings say nothing to the user of a search."""


class Tracker(Protocol):
    """Where a search is logged.

    `start` is called once, first; then `candidate` any number of times; then `finish` once, also when the search failed
    or was stopped. All three from one thread.
    """

    @property
    def run_id(self) -> str | None:
        """What a resumed search hands over to go on with the same record; None while it is not known."""
        ...

    @property
    def location(self) -> str:
        """Where the record is, in words for the user."""
        ...

    def start(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open the record of the search with its settings; returns at once."""
        ...

    def candidate(self, candidate: Candidate) -> None:
        """Log one candidate; returns at once."""
        ...

    def finish(
        self,
        *,
        metrics: Mapping[str, float],
        artifacts: Sequence[Path],
        model: nn.Module | None = None,
        example_input: Tensor | None = None,
        status: str = "FINISHED",
    ) -> None:
        """Log the outcome and close the record; waits until all is logged, but not forever.

        Args:
            metrics: Of the search as a whole; what is not finite is left out.
            artifacts: Files and folders.
            model: The final network; logged if `example_input` is given too.
            example_input: `(batch, ...)`, the network's input.
            status: "FINISHED", "FAILED" or "KILLED".
        """
        ...


class NullTracker:
    """Logs nothing."""

    run_id: str | None = None
    location = "nowhere"

    def start(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def candidate(self, candidate: Candidate) -> None:
        """Do nothing."""

    def finish(
        self,
        *,
        metrics: Mapping[str, float],
        artifacts: Sequence[Path],
        model: nn.Module | None = None,
        example_input: Tensor | None = None,
        status: str = "FINISHED",
    ) -> None:
        """Do nothing."""


class MLflowTracker:
    """Logs to MLflow's store: `MLFLOW_TRACKING_URI`, by default `sqlite:///mlflow.db` in the working directory.

    MLflow is imported, the store opened and every call made in a background thread; only the final network is exported
    in the caller's. When a call fails, the caller's next one gives a `TrackingWarning`, and nothing more is logged.
    From `start` to `finish` some `MLFLOW_*` variables are set, where the user has not, so that no call waits for long.

    Args:
        experiment: Name of the MLflow experiment; created where there is none.
        run_name: Name of the parent run.
        parent_run_id: Goes on with this run: of its candidates none is logged twice. Where the store does not have it,
            a new run is started, with a `TrackingWarning`.
        timeout: The seconds that `finish` waits for the store.
    """

    def __init__(
        self, *, experiment: str, run_name: str, parent_run_id: str | None = None, timeout: float = 60.0
    ) -> None:
        self._experiment = experiment
        self._run_name = run_name
        self._parent_run_id = parent_run_id
        self._timeout = timeout
        self._jobs: queue.SimpleQueue[Callable[[_Runs], None] | None] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._off = False
        self._runs: _Runs | None = None
        self._worker: threading.Thread | None = None
        self._started = threading.Event()
        self._done = threading.Event()
        self._borrowed = ExitStack()

    @property
    def run_id(self) -> str | None:
        """The parent run's id: the one given, until the store has answered."""
        return self._parent_run_id if self._runs is None else self._runs.run_id

    @property
    def location(self) -> str:
        """The tracking URI, without any password in it, and the parent run's id."""
        if self._runs is None:
            return "MLflow (not connected)"
        return f"MLflow at {_without_password(self._runs.uri)}, experiment {self._experiment}, run {self._runs.run_id}"

    def start(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Begin to import MLflow and to open the store; returns at once.

        Args:
            params: Settings of the search.
            tags: Tags of the parent run.
        """
        self._borrowed.enter_context(_bounded_environment())
        self._borrowed.enter_context(_without_chatty_warnings())
        arguments = (dict(params), dict(tags))
        self._worker = threading.Thread(target=self._work, args=arguments, name="autoprune-mlflow", daemon=True)
        self._worker.start()

    def candidate(self, candidate: Candidate) -> None:
        """Queue a candidate; one whose policy is logged at that fidelity already is passed over.

        Raises:
            AutopruneError: `start` was not called.
        """
        self._report()
        if not self._off:
            now = time.time()
            self._jobs.put(lambda runs: runs.log_candidate(candidate, now))

    def wait_started(self, timeout: float) -> str | None:
        """Wait until the parent run exists, at most `timeout` seconds; return its id, or None if it does not."""
        self._started.wait(timeout)
        return None if self._runs is None else self._runs.run_id

    def finish(
        self,
        *,
        metrics: Mapping[str, float],
        artifacts: Sequence[Path],
        model: nn.Module | None = None,
        example_input: Tensor | None = None,
        status: str = "FINISHED",
    ) -> None:
        """Log the outcome and end the parent run; waits for the store at most the tracker's `timeout`.

        The network is logged in evaluation mode, on the CPU, as MLflow's flavor "pytorch": a `torch.export` program
        with a free batch size, that needs no class to load; pickled, where it can't be exported. The one given is not
        changed.

        Args:
            metrics: Of the search as a whole; what is not finite is left out.
            artifacts: Files and folders.
            model: The final network; logged, as "model", if `example_input` is given too.
            example_input: `(batch, ...)`, the network's input.
            status: "FINISHED", "FAILED" or "KILLED".

        Raises:
            AutopruneError: `start` was not called.
        """
        self._report()
        metrics, artifacts = dict(metrics), list(artifacts)
        try:
            with tempfile.TemporaryDirectory(prefix="autoprune-", ignore_cleanup_errors=True) as folder:
                begun = time.monotonic()
                connected = self.wait_started(self._timeout) is not None
                left = self._timeout - (time.monotonic() - begun)
                saved = None
                if connected and not self._off and model is not None and example_input is not None:
                    saved = self._save_network(model, example_input, Path(folder))
                self._jobs.put(lambda runs: runs.finish(metrics, artifacts, saved, status))
                self._jobs.put(None)
                if not self._done.wait(max(left, 0.0)):
                    self._fail(f"not everything was logged after {self._timeout:g} s")
        finally:
            self._off = True
            self._borrowed.close()
        self._report()

    def _save_network(self, model: nn.Module, example_input: Tensor, folder: Path) -> "tuple[Model, Path] | None":
        try:
            with _quiet_thread():
                return _save_network(model, example_input, folder)
        except Exception as error:
            self._messages.put(f"the network was not logged to MLflow: {_one_line(error)}")
            return None

    def _work(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Make every MLflow call, one after another; runs in the background thread and never raises."""
        try:
            with _quiet_thread():
                client = _connect()
                if self._off:  # finish() has given up on an import or a store that takes too long
                    return
                self._runs = _Runs(client, self._experiment, self._parent_run_id, self._run_name, params, tags)
                if self._parent_run_id not in (None, self._runs.run_id):
                    self._messages.put(
                        f"MLflow at {_without_password(self._runs.uri)} has no run {self._parent_run_id}: "
                        f"the search is logged to the new run {self._runs.run_id}"
                    )
                self._started.set()
                while (job := self._jobs.get()) is not None and not self._off:
                    job(self._runs)
        except Exception as error:
            self._fail(_one_line(error))
        finally:
            self._started.set()
            self._done.set()

    def _fail(self, reason: str) -> None:
        if not self._off:
            self._off = True
            self._messages.put(
                f"logging to MLflow stopped: {reason}; the search's own files are complete, "
                "and to log the next one set MLFLOW_TRACKING_URI to a store that works"
            )

    def _report(self) -> None:
        """Give the background thread's messages as warnings of the public method's caller."""
        if self._worker is None:
            raise AutopruneError("a tracker logs after start() only, but start() was not called")
        with suppress(queue.Empty):
            while True:
                warnings.warn(self._messages.get_nowait(), TrackingWarning, stacklevel=3)


class _Runs:
    """The parent run and its nested runs, through blocking calls; opened from parameters and tags, or found again."""

    def __init__(
        self,
        client: "MlflowClient",
        experiment: str,
        parent_run_id: str | None,
        run_name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
    ) -> None:
        self._client = client
        self.uri = client.tracking_uri
        self._logged: set[tuple[str, ...]] = set()  # policy, fidelity and steps
        self._unfinished: dict[tuple[str, ...], str] = {}
        run = None if parent_run_id is None else self._find(parent_run_id)
        if run is None:
            run = client.create_run(self._experiment_id(experiment), tags=_tags(tags), run_name=run_name)
        else:
            client.update_run(run.info.run_id, status="RUNNING")
        self.run_id: str = run.info.run_id
        self._experiment_of_run: str = run.info.experiment_id
        known = run.data.params
        self._log(self.run_id, {name: text for name, text in _params(params).items() if name not in known}, {})
        if parent_run_id is not None:
            self._find_children()

    def _find(self, run_id: str) -> "Run | None":
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if (found := self._client.get_experiment_by_name(name)) is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:  # another process was faster
            if (found := self._client.get_experiment_by_name(name)) is None:
                raise
            return str(found.experiment_id)

    def _find_children(self) -> None:
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self._experiment_of_run],
                f"tags.`{PARENT_TAG}` = '{self.run_id}'",
                max_results=1000,
                page_token=token,
            )
            for run in page:
                key = tuple(run.data.tags.get(tag, "") for tag in ("policy_id", "fidelity", "steps"))
                if run.info.end_time is None:  # the process was killed within the run
                    self._unfinished[key] = run.info.run_id
                else:
                    self._logged.add(key)
            token = page.token
            if not token:
                return

    def log_candidate(self, candidate: Candidate, at: float) -> None:
        """Log a candidate as a nested run that ended at a Unix time."""
        key = (candidate.id, candidate.fidelity, str(candidate.steps))
        if key in self._logged:
            return
        run_id = self._unfinished.get(key)
        if run_id is None:
            run = self._client.create_run(
                self._experiment_of_run,
                start_time=round((at - candidate.seconds) * 1000),
                tags=_candidate_tags(candidate) | {PARENT_TAG: self.run_id},
                run_name=f"candidate {candidate.number}",
            )
            run_id = run.info.run_id
        self._log(run_id, _params(candidate.policy, prefix="sparsity."), _candidate_metrics(candidate), at)
        status = "FINISHED" if candidate.failure is None else "FAILED"
        self._client.set_terminated(run_id, status, end_time=round(at * 1000))
        self._logged.add(key)

    def finish(
        self,
        metrics: Mapping[str, float],
        artifacts: Sequence[Path],
        network: "tuple[Model, Path] | None",
        status: str,
    ) -> None:
        """Log what concerns the whole search, and end the parent run, also when that fails."""
        try:
            self._log(self.run_id, {}, metrics)
            for path in artifacts:
                self._client.log_artifact(self.run_id, str(path))
            if network is not None:
                self._log_network(*network)
        finally:
            self._client.set_terminated(self.run_id, status)

    def _log_network(self, network: "Model", folder: Path) -> None:
        """Do what `mlflow.pytorch.log_model` does, but not by the global settings of store and experiment."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        logged = self._client.create_logged_model(
            self._experiment_of_run, name="model", source_run_id=self.run_id, model_type="pruned"
        )
        self._client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step=0)])
        network.artifact_path = logged.artifact_location
        network.model_id = network.model_uuid = logged.model_id
        network.run_id = self.run_id
        network.save(str(folder / "MLmodel"))
        self._client.log_model_artifacts(logged.model_id, str(folder))
        self._client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)

    def _log(
        self, run_id: str, params: Mapping[str, str], metrics: Mapping[str, float], at: float | None = None
    ) -> None:
        from mlflow.entities import Metric, Param

        stamp = round((time.time() if at is None else at) * 1000)
        values = [Metric(name, value, stamp, 0) for name, value in _finite(metrics).items()]
        texts = [Param(name, text) for name, text in params.items()]
        self._client.log_batch(run_id, metrics=values, params=texts[:PARAMS_A_BATCH])
        for start in range(PARAMS_A_BATCH, len(texts), PARAMS_A_BATCH):
            self._client.log_batch(run_id, params=texts[start : start + PARAMS_A_BATCH])


def _connect() -> "MlflowClient":
    """Open the store that the environment names."""
    import mlflow

    return mlflow.MlflowClient(mlflow.get_tracking_uri())


def _save_network(model: nn.Module, example_input: Tensor, folder: Path) -> "tuple[Model, Path]":
    """Write a network as an MLflow model into a new folder; return its description and the folder."""
    import mlflow.pytorch
    from mlflow.models import Model, infer_signature

    network = copy.deepcopy(model).cpu().eval()
    example = example_input.detach().cpu()
    example = torch.cat([example, example])[:2]  # the exporter takes a batch of one for a constant
    with torch.no_grad():
        output = network(example)
    signature = infer_signature(example.numpy(), output.numpy() if isinstance(output, Tensor) else None)

    def save(name: str, serialization_format: str) -> "tuple[Model, Path]":
        description, path = Model(), folder / name
        mlflow.pytorch.save_model(
            network,
            str(path),
            mlflow_model=description,
            signature=signature,
            input_example=example.numpy(),
            pip_requirements=mlflow.pytorch.get_default_pip_requirements(),
            serialization_format=serialization_format,
        )
        return description, path

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            saved = save("exported", "pt2")
            loaded = mlflow.pytorch.load_model(str(saved[1]))
            with torch.no_grad():
                for batch in (example[:1], torch.cat([example, example[:1]])):
                    torch.testing.assert_close(loaded(batch), network(batch))
        except Exception:  # the exporter refuses in many ways, and may fix the batch size
            return save("pickled", "pickle")
    return saved


def _params(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Return MLflow parameters: names that it takes and that differ, numbers to nine digits, long texts cut."""
    texts = [f"{v:.9g}" if isinstance(v, float) else str(v)[:PARAM_LENGTH] for v in values.values()]
    return dict(zip(_distinct_names([prefix + name for name in values]), texts, strict=True))


def _tags(values: Mapping[str, object]) -> dict[str, str]:
    return {_name(name): str(value)[:TAG_LENGTH] for name, value in values.items()}


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {_name(name): float(value) for name, value in metrics.items() if math.isfinite(value)}


def _name(text: str) -> str:
    """Return a name that MLflow takes on every platform: word characters, dots, dashes and spaces."""
    return re.sub(r"[^\w.\- ]", "_", text)[: NAME_LENGTH - 10]


def _distinct_names(texts: Sequence[str]) -> list[str]:
    """Return names that MLflow takes, those that would become equal told apart by underscores."""
    names: dict[str, None] = {}
    for text in texts:
        name = _name(text)
        while name in names:
            name += "_"
        names[name] = None
    return list(names)


def _candidate_metrics(candidate: Candidate) -> dict[str, float]:
    metrics: dict[str, float] = dict(candidate.cost.to_dict())
    metrics |= {"accuracy": candidate.accuracy, "loss": candidate.loss, "seconds": candidate.seconds}
    for rung in candidate.measurements:
        metrics |= {
            f"{rung.fidelity}.accuracy": rung.accuracy,
            f"{rung.fidelity}.accuracy_se": rung.accuracy_se,
            f"{rung.fidelity}.loss": rung.loss,
            f"{rung.fidelity}.loss_se": rung.loss_se,
        }
    return metrics


def _candidate_tags(candidate: Candidate) -> dict[str, str]:
    tags = {
        "agent": candidate.agent,
        "arm": candidate.arm,
        "fidelity": candidate.fidelity,
        "policy_id": candidate.id,
        "steps": str(candidate.steps),
    }
    return _tags(tags if candidate.failure is None else tags | {"failure": candidate.failure})


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//***@", text)


def _one_line(error: Exception) -> str:
    """Return an error's kind and the beginning of its text, without any password in it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return _without_password(text if len(text) <= 300 else text[:299] + "…")


@contextmanager
def _bounded_environment() -> Iterator[None]:
    """Set the variables of `ENVIRONMENT` that the user has not set."""
    ours = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in ours.items():
            if os.environ.get(name) == value:
                del os.environ[name]


@contextmanager
def _without_chatty_warnings() -> Iterator[None]:
    """Ignore Python warnings that arise in MLflow and what it calls.

    In the background thread they could not be caught, and would be errors where the caller has made warnings errors.
    """
    warnings.filterwarnings("ignore", module=CHATTY_MODULES)
    entry = warnings.filters[0]
    try:
        yield
    finally:
        with suppress(ValueError):
            warnings.filters.remove(entry)  # type: ignore[attr-defined]  # typeshed has it immutable


class _ErrorsOnly(logging.Filter):
    """Lets pass the log records of other threads, and of this one only errors."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record passes."""
        return record.thread != self._thread or record.levelno >= logging.ERROR


@contextmanager
def _quiet_thread() -> Iterator[None]:
    """Import MLflow, and keep what it logs in this thread off the terminal, except errors."""
    import mlflow  # noqa: F401 - sets up its loggers' handlers

    quiet = _ErrorsOnly()
    handlers: list[Any] = [*logging.getLogger("mlflow").handlers, logging.lastResort]
    for handler in handlers:
        handler.addFilter(quiet)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(quiet)
