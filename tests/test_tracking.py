"""Logging to MLflow: a real SQLite store, read back; stores that refuse, never answer, or fail midway."""

import contextlib
import io
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import autoprune.tracking
from autoprune.cost import Cost
from autoprune.errors import AutopruneError, TrackingWarning
from autoprune.evaluation.candidate import Candidate, Measurement
from autoprune.policy import Policy
from autoprune.tracking import MLflowTracker, NullTracker, Tracker

RECALIBRATED = Measurement("recalibrated", accuracy=0.5, accuracy_se=0.05, loss=2.0, loss_se=0.1)
SHORT = Measurement("short", accuracy=0.75, accuracy_se=0.04, loss=math.nan, loss_se=0.1)
ODD_GROUPS = ["layer1.0.conv#1", "layer1.0.conv'1", "a/../b", "conv:1", "x" * 300, "x" * 299 + "y"]


def made(number: int, sparsities: Mapping[str, float] | None = None, failure: str | None = None) -> Candidate:
    policy = Policy(sparsities or {"conv1": number / 100, "conv2": 0.5})
    return Candidate(
        number=number,
        id=policy.id,
        arm="search",
        agent="tpe",
        policy=policy,
        removed=dict.fromkeys(policy, 1),
        cost=Cost(1000, 100, 400),
        measurements=() if failure else (RECALIBRATED, SHORT),
        seconds=1.5,
        failure=failure,
    )


PLAIN = made(1)
WIDE = made(2, dict.fromkeys(ODD_GROUPS, 1 / 3) | {f"group{index}": 0.25 for index in range(244)})
FAILED = made(3, failure="its loss is nan")


class Network(nn.Module):
    """A convolution, a normalisation and a linear layer; 10 outputs."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.bn, self.linear = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(torch.relu(self.bn(self.conv(x))).mean(dim=(2, 3)))
        return out


class Untraceable(Network):
    """Branches on its data, which the exporter refuses."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class ExportsWrongly(Network):
    """Can be exported, but the program computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2.0 if torch.compiler.is_exporting() else 1.0)


class Unsavable(Untraceable):
    """Can be neither exported nor pickled."""

    def __getstate__(self) -> Any:
        raise TypeError("no pickle of me")

    def __deepcopy__(self, memo: Any) -> Any:
        return Unsavable()


@dataclass(frozen=True)
class Logged:
    """A store with one search in it, and what was seen while it was written."""

    uri: str
    run_id: str
    location: str
    stderr: str
    environment: tuple[dict[str, str], dict[str, str]]
    filters: list[Any]
    network: Network
    client: Any

    @property
    def children(self) -> dict[str, Any]:
        """The nested runs by name."""
        return {run.info.run_name: run for run in self.runs_under(self.run_id)}

    def runs_under(self, run_id: str) -> list[Any]:
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        return list(self.client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{run_id}'"))


def ignores_chatter(filters: Iterable[Any]) -> bool:
    return any(getattr(module, "pattern", "") == autoprune.tracking.CHATTY_MODULES for _, _, _, module, _ in filters)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    folder = tmp_path_factory.mktemp("store")
    (folder / "figures").mkdir()
    (folder / "figures" / "front.txt").write_text("front")
    (folder / "report.html").write_text("<p>report")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        before = dict(os.environ)
        tracker = MLflowTracker(experiment="digits", run_name="tpe, seed 0")
        tracker.start({"agent": "tpe", "budget": None, "long": "x" * 9000}, {"task": "digits"})
        assert ignores_chatter(warnings.filters)
        for candidate in (PLAIN, WIDE, FAILED, PLAIN):
            tracker.candidate(candidate)
        network = Network().train()
        tracker.finish(
            metrics={"hypervolume": 0.25, "gap": math.nan},
            artifacts=[folder / "report.html", folder / "figures"],
            model=network,
            example_input=torch.ones(1, 1, 8, 8),
        )
        after = dict(os.environ)

        import mlflow

        assert tracker.run_id is not None
        yield Logged(
            uri,
            tracker.run_id,
            tracker.location,
            stderr.getvalue(),
            (before, after),
            list(warnings.filters),
            network,
            mlflow.MlflowClient(uri),
        )


class TestStore:
    def test_the_parent_run_holds_the_search(self, logged: Logged) -> None:
        run = logged.client.get_run(logged.run_id)
        assert (run.info.run_name, run.info.status) == ("tpe, seed 0", "FINISHED")
        assert logged.client.get_experiment(run.info.experiment_id).name == "digits"
        assert run.data.params == {"agent": "tpe", "budget": "None", "long": "x" * 500}
        assert run.data.metrics == {"hypervolume": 0.25}
        assert run.data.tags["task"] == "digits"

    def test_each_candidate_is_one_nested_run(self, logged: Logged) -> None:
        assert sorted(logged.children) == ["candidate 1", "candidate 2", "candidate 3"]

    def test_a_candidate_s_run_holds_what_was_measured(self, logged: Logged) -> None:
        run = logged.children["candidate 1"]
        assert run.info.status == "FINISHED"
        assert run.info.end_time - run.info.start_time == 1500
        assert run.data.params == {"sparsity.conv1": "0.01", "sparsity.conv2": "0.5"}
        assert run.data.metrics == {
            "accuracy": 0.75,
            "macs": 1000,
            "params": 100,
            "bytes": 400,
            "activations": 0,
            "nonzero_params": 100,
            "nonzero_macs": 1000,
            "seconds": 1.5,
            "recalibrated.accuracy": 0.5,
            "recalibrated.accuracy_se": 0.05,
            "recalibrated.loss": 2.0,
            "recalibrated.loss_se": 0.1,
            "short.accuracy": 0.75,
            "short.accuracy_se": 0.04,
            "short.loss_se": 0.1,
        }
        own = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")}
        assert own == {"agent": "tpe", "arm": "search", "fidelity": "short", "policy_id": PLAIN.id, "steps": "0"}

    def test_odd_and_many_group_names_are_all_there(self, logged: Logged) -> None:
        params = logged.children["candidate 2"].data.params
        assert len(params) == 250
        assert params["sparsity.layer1.0.conv_1"] == params["sparsity.layer1.0.conv_1_"] == "0.333333333"
        assert params["sparsity.group243"] == "0.25"

    def test_a_failed_candidate_says_why(self, logged: Logged) -> None:
        run = logged.children["candidate 3"]
        assert run.info.status == "FAILED"
        assert run.data.tags["failure"] == "its loss is nan"
        assert run.data.tags["fidelity"] == "none"
        costs = {
            "macs": 1000,
            "params": 100,
            "bytes": 400,
            "activations": 0,
            "nonzero_params": 100,
            "nonzero_macs": 1000,
        }
        assert run.data.metrics == costs | {"seconds": 1.5}

    def test_files_and_folders_are_artifacts(self, logged: Logged) -> None:
        assert {file.path for file in logged.client.list_artifacts(logged.run_id)} == {"report.html", "figures"}
        assert [file.path for file in logged.client.list_artifacts(logged.run_id, "figures")] == ["figures/front.txt"]

    def test_the_terminal_stays_quiet(self, logged: Logged) -> None:
        assert logged.stderr == ""

    def test_the_process_is_left_as_it_was(self, logged: Logged) -> None:
        import mlflow

        before, after = logged.environment
        after.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch.export's
        before.pop("TORCHINDUCTOR_CACHE_DIR", None)
        assert after == before
        assert not ignores_chatter(logged.filters)
        assert mlflow.active_run() is None
        assert mlflow.get_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] != logged.uri
        last = [] if logging.lastResort is None else [logging.lastResort]
        for handler in [*logging.getLogger("mlflow").handlers, *last]:
            assert not any(isinstance(entry, autoprune.tracking._ErrorsOnly) for entry in handler.filters)

    def test_the_location_names_store_and_run(self, logged: Logged) -> None:
        assert logged.location == f"MLflow at {logged.uri}, experiment digits, run {logged.run_id}"


class TestModel:
    @pytest.mark.parametrize("address", ["runs:/{run}/model", "models:/{model}"])
    def test_the_logged_network_gives_equal_outputs_for_any_batch(
        self, logged: Logged, monkeypatch: pytest.MonkeyPatch, address: str
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", logged.uri)
        monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        import mlflow

        [output] = logged.client.get_run(logged.run_id).outputs.model_outputs
        uri = address.format(run=logged.run_id, model=output.model_id)
        loaded = mlflow.pytorch.load_model(uri)
        assert not isinstance(loaded, Network)  # it needs no class of ours
        dense = Network().eval()
        for batch in (1, 2, 5):
            x = torch.linspace(-1, 1, batch * 64).reshape(batch, 1, 8, 8)
            torch.testing.assert_close(loaded(x), dense(x))
            served = mlflow.pyfunc.load_model(uri).predict(x.numpy())
            torch.testing.assert_close(torch.from_numpy(served), dense(x).detach())

    def test_it_has_a_signature_and_belongs_to_the_search_s_experiment(self, logged: Logged) -> None:
        from mlflow.models import Model

        run = logged.client.get_run(logged.run_id)
        model = logged.client.get_logged_model(run.outputs.model_outputs[0].model_id)
        assert (model.name, model.status, model.experiment_id) == ("model", "READY", run.info.experiment_id)
        description = Model.load(model.artifact_location)
        assert [spec.shape for spec in description.signature.inputs] == [(-1, 1, 8, 8)]
        assert [spec.shape for spec in description.signature.outputs] == [(-1, 10)]
        assert (description.run_id, description.model_id) == (logged.run_id, model.model_id)
        requirements = (Path(model.artifact_location) / "requirements.txt").read_text()
        assert "torch==" in requirements

    def test_the_network_given_is_not_changed(self, logged: Logged) -> None:
        assert logged.network.training
        assert all(torch.equal(a, b) for a, b in zip(logged.network.parameters(), Network().parameters(), strict=True))

    @pytest.mark.parametrize("build", [Untraceable, ExportsWrongly])
    def test_a_network_that_exports_badly_is_pickled(self, build: type[Network], tmp_path: Path) -> None:
        import mlflow

        _, folder = autoprune.tracking._save_network(build(), torch.ones(2, 1, 8, 8), tmp_path)
        loaded = mlflow.pytorch.load_model(str(folder))
        assert isinstance(loaded, build)
        x = -torch.ones(3, 1, 8, 8)
        torch.testing.assert_close(loaded(x), build().eval()(x))

    def test_one_that_can_t_be_saved_costs_a_warning_only(
        self, logged: Logged, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", logged.uri)
        tracker = MLflowTracker(experiment="digits", run_name="unsavable")
        tracker.start({}, {})
        with pytest.warns(TrackingWarning, match="the network was not logged to MLflow: TypeError: no pickle of me"):
            tracker.finish(metrics={"a": 1.0}, artifacts=[], model=Unsavable(), example_input=torch.ones(1, 1, 8, 8))
        run = logged.client.get_run(tracker.run_id)
        assert (run.info.status, run.data.metrics) == ("FINISHED", {"a": 1.0})


class TestResume:
    def test_what_is_logged_is_not_logged_again(self, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", logged.uri)
        first = MLflowTracker(experiment="digits", run_name="stopped")
        first.start({"agent": "tpe"}, {})
        first.candidate(PLAIN)
        first.finish(metrics={}, artifacts=[], status="KILLED")
        assert logged.client.get_run(first.run_id).info.status == "KILLED"
        half_logged = made(9)
        experiment = logged.client.get_run(first.run_id).info.experiment_id
        tags = {"mlflow.parentRunId": first.run_id, "policy_id": half_logged.id, "fidelity": "short", "steps": "0"}
        half = logged.client.create_run(experiment, tags=tags, run_name="candidate 9").info.run_id

        second = MLflowTracker(experiment="digits", run_name="resumed", parent_run_id=first.run_id)
        second.start({"agent": "tpe", "new": 1}, {})
        assert second.wait_started(60) == first.run_id
        assert logged.client.get_run(first.run_id).info.status == "RUNNING"
        for candidate in (PLAIN, FAILED, half_logged):
            second.candidate(candidate)
        second.finish(metrics={}, artifacts=[])
        runs = logged.runs_under(str(first.run_id))
        assert sorted(run.info.run_name for run in runs) == ["candidate 1", "candidate 3", "candidate 9"]
        [completed] = [run for run in runs if run.info.run_id == half]
        assert (completed.info.status, completed.data.metrics["accuracy"]) == ("FINISHED", 0.75)
        parent = logged.client.get_run(first.run_id)
        assert (parent.info.status, parent.data.params) == ("FINISHED", {"agent": "tpe", "new": "1"})

    @pytest.mark.parametrize("deleted", [False, True])
    def test_a_run_that_the_store_lost_is_replaced(
        self, logged: Logged, monkeypatch: pytest.MonkeyPatch, deleted: bool
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", logged.uri)
        lost = "0" * 32
        if deleted:
            lost = logged.client.create_run("0").info.run_id
            logged.client.delete_run(lost)
        tracker = MLflowTracker(experiment="digits", run_name="again", parent_run_id=lost)
        assert tracker.run_id == lost
        tracker.start({}, {})
        tracker.wait_started(60)
        with pytest.warns(TrackingWarning, match=f"has no run {lost}: the search is logged to the new run"):
            tracker.candidate(PLAIN)
        tracker.finish(metrics={}, artifacts=[])
        assert tracker.run_id not in (lost, None)
        assert len(logged.runs_under(str(tracker.run_id))) == 1


class FakeClient:
    """Answers what a tracker asks of an empty store; `hook` runs before every call and may block or raise."""

    tracking_uri = "https://user:secret@example.org"

    def __init__(self, hook: Callable[[str], None]) -> None:
        self.hook = hook
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.hook(name)
            self.calls.append(name)
            info = SimpleNamespace(run_id=f"run{self.calls.count('create_run')}", experiment_id="1")
            return SimpleNamespace(info=info, data=SimpleNamespace(params={}), experiment_id="1")

        return call


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[MLflowTracker, FakeClient]]:
    """Start a tracker on a fake client with a hook."""

    def connect(hook: Callable[[str], None], timeout: float = 30.0) -> tuple[MLflowTracker, FakeClient]:
        client = FakeClient(hook)
        monkeypatch.setattr(autoprune.tracking, "_connect", lambda: client)
        tracker = MLflowTracker(experiment="e", run_name="r", timeout=timeout)
        tracker.start({}, {})
        return tracker, client

    return connect


def finish(tracker: Tracker) -> None:
    tracker.finish(metrics={}, artifacts=[])


class TestTrouble:
    def test_candidate_does_not_wait_for_the_store(self, connected: Any) -> None:
        answer = threading.Event()
        tracker, client = connected(lambda name: answer.wait(30) and None)
        for number in range(50):
            tracker.candidate(made(number))  # would wait for the event, and fail below
        assert client.calls == []
        answer.set()
        finish(tracker)
        assert client.calls.count("create_run") == 51
        assert client.calls.count("set_terminated") == 51

    def test_finish_waits_no_longer_than_the_timeout(self, connected: Any) -> None:
        answer = threading.Event()
        tracker, client = connected(lambda name: answer.wait(30) and None, timeout=0.2)
        tracker.candidate(PLAIN)
        with pytest.warns(TrackingWarning, match=r"not everything was logged after 0\.2 s"):
            finish(tracker)
        assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
        answer.set()
        assert tracker._worker is not None
        tracker._worker.join(30)
        assert client.calls.count("create_run") == 1  # the parent's, which was under way; nothing is logged after

    def test_a_failure_midway_gives_one_warning_and_ends_the_logging(self, connected: Any) -> None:
        def fail_at_terminating(name: str) -> None:
            if name == "set_terminated":
                raise ConnectionError("lost https://user:secret@example.org\nbye")

        tracker, client = connected(fail_at_terminating)
        tracker.candidate(PLAIN)
        tracker._done.wait(30)
        pattern = r"^logging to MLflow stopped: ConnectionError: lost https://\*\*\*@example.org bye; the search's own"
        with pytest.warns(TrackingWarning, match=pattern) as caught:
            tracker.candidate(FAILED)
        assert caught[0].filename == __file__
        tracker.candidate(WIDE)
        finish(tracker)  # a second warning would be an error here
        assert len(caught) == 1
        assert client.calls.count("create_run") == 2
        assert tracker.location == "MLflow at https://***@example.org, experiment e, run run1"

    def test_a_failure_in_finish_is_told_by_it(self, connected: Any) -> None:
        def fail_at_artifacts(name: str) -> None:
            if name == "log_artifact":
                raise OSError("disk full")

        tracker, client = connected(fail_at_artifacts)
        with pytest.warns(TrackingWarning, match="OSError: disk full"):
            tracker.finish(metrics={}, artifacts=[Path("report.html")])
        assert client.calls[-1] == "set_terminated"  # the run is not left open

    def test_a_store_that_refuses(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        tracker = MLflowTracker(experiment="e", run_name="r")
        tracker.start({}, {})
        assert tracker.wait_started(60) is None
        assert tracker.location == "MLflow (not connected)"
        with pytest.warns(TrackingWarning, match="127.0.0.1"):
            tracker.candidate(PLAIN)
        finish(tracker)
        assert capfd.readouterr() == ("", "")

    def test_a_store_that_never_answers(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        import mlflow  # noqa: F401 - so that it is the store that takes the time

        with socket.create_server(("127.0.0.1", 0)) as hole:  # connections are accepted by the system, and that is all
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{hole.getsockname()[1]}")
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
            tracker = MLflowTracker(experiment="e", run_name="r", timeout=0.5)
            tracker.start({}, {})
            tracker.candidate(PLAIN)
            with pytest.warns(TrackingWarning, match="not everything was logged after 0.5 s"):
                finish(tracker)
            assert tracker._worker is not None
            tracker._worker.join(30)  # MLflow's own patience ends too
            assert not tracker._worker.is_alive()
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("uri", ["nonsense://x", "sqlite:///{}/mlflow.db"])
    def test_an_unusable_uri(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(tmp_path / "file"))
        tracker = MLflowTracker(experiment="e", run_name="r")
        tracker.start({}, {})
        with pytest.warns(TrackingWarning, match="logging to MLflow stopped"):
            finish(tracker)

    def test_nothing_is_logged_before_start(self) -> None:
        tracker = MLflowTracker(experiment="e", run_name="r")
        with pytest.raises(AutopruneError, match=r"start\(\) was not called"):
            tracker.candidate(PLAIN)
        with pytest.raises(AutopruneError, match=r"start\(\) was not called"):
            finish(tracker)


class TestSurroundings:
    def test_the_user_s_settings_stay_and_ours_go(self, connected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
        tracker, _ = connected(lambda name: None)
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "7"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
        finish(tracker)
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "7"
        assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ

    def test_no_global_generator_is_used(
        self, logged: Logged, monkeypatch: pytest.MonkeyPatch, global_rng_untouched: None
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", logged.uri)
        tracker = MLflowTracker(experiment="digits", run_name="random")
        tracker.start({}, {})
        tracker.candidate(PLAIN)
        tracker.finish(metrics={}, artifacts=[], model=Network(), example_input=torch.ones(1, 1, 8, 8))

    def test_only_this_thread_s_chatter_is_dropped(self) -> None:
        quiet = autoprune.tracking._ErrorsOnly()

        def passes(level: int) -> bool:
            return quiet.filter(logging.LogRecord("mlflow", level, "", 0, "text", None, None))

        elsewhere: list[bool] = []
        thread = threading.Thread(target=lambda: elsewhere.append(passes(logging.INFO)))
        thread.start()
        thread.join()
        assert (passes(logging.WARNING), passes(logging.ERROR), elsewhere) == (False, True, [True])

    def test_importing_the_module_does_not_import_mlflow(self) -> None:
        code = "import sys, autoprune.tracking; print('mlflow' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"False\n"

    def test_the_null_tracker_is_a_tracker(self) -> None:
        tracker: Tracker = NullTracker()
        tracker.start({}, {})
        tracker.candidate(PLAIN)
        finish(tracker)
        assert (tracker.run_id, tracker.location) == (None, "nowhere")


@given(st.lists(st.text("ab/.#' :é", max_size=8), unique=True, max_size=20))
def test_names_stay_distinct_and_mlflow_takes_them(texts: list[str]) -> None:
    from mlflow.utils.validation import _validate_param

    names = list(autoprune.tracking._params(dict.fromkeys(texts, 0.5), prefix="sparsity."))
    assert len(set(names)) == len(texts)
    for name in names:
        _validate_param(name, "0.5")  # type: ignore[no-untyped-call]


def test_a_measured_candidate_s_infinite_loss_is_left_out() -> None:
    candidate = replace(PLAIN, measurements=(replace(SHORT, loss=math.inf),))
    metrics = autoprune.tracking._finite(autoprune.tracking._candidate_metrics(candidate))
    assert "loss" not in metrics
    assert metrics["short.accuracy"] == 0.75
