import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

import autoprune
from autoprune import cli, export, models, preparation
from autoprune.errors import ConfigError
from autoprune.tracking import NullTracker

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--candidates", "3", "--control", "1", "--finetune-steps", "2", "--calibration-images", "200"]
SEARCH = ["search", "--budget", "macs<=40%", "--sensitivity", "0.5", *QUICK]


def run(*arguments: str) -> int:
    """Run the command line in this process and return what it exits with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["autoprune", *arguments])
        patch.setattr("warnings.showwarning", None)  # the command sets its own
        with pytest.raises(SystemExit) as leaving:
            cli.main()
    return int(leaving.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def weights(folder: Path) -> Path:
    """A network for the digits, trained just enough to be above 0."""
    path = folder / "weights.safetensors"
    assert run("train", "--epochs", "2", "--out", str(path), "--quiet") == 0
    return path


@pytest.fixture(scope="module")
def finished(folder: Path, weights: Path) -> tuple[Path, dict[str, Any]]:
    """A search that is done, and the last line that it printed."""
    out = folder / "run"
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}", "DO_NOT_TRACK": "true"}
    command = [str(Path(sys.executable).parent / "autoprune"), *SEARCH, "--weights", str(weights), "--out", str(out)]
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=True, cwd=folder)
    return out, json.loads(done.stdout.splitlines()[-1])


def test_a_search_leaves_every_file_and_prints_one_object(finished: tuple[Path, dict[str, Any]]) -> None:
    out, printed = finished
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "sensitivity.json", "ledger.jsonl", "front.json", "report.html", "result.json"} <= names
    assert {"model.safetensors", "recipe.json", "program.pt2"} == {path.name for path in (out / "pruned").iterdir()}
    assert set(printed) == {"dense", "candidates", "front", "picked", "run"}
    assert set(printed["dense"]) == {"accuracy", "macs", "params"}
    assert set(printed["picked"]) == {"policy", "accuracy", "macs", "params", "fidelity"}
    assert printed["candidates"] == 3
    assert printed["picked"]["macs"] <= 0.4 * printed["dense"]["macs"]
    assert printed["run"] == str(out)


def test_the_saved_network_measures_what_was_recorded(
    finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, printed = finished
    assert run("evaluate", str(out / "pruned"), "--data", "digits", "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["accuracy"] == found["recorded"] == printed["picked"]["accuracy"]


def test_a_finished_search_is_not_searched_again(
    finished: tuple[Path, dict[str, Any]], weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, printed = finished
    before = (out / "ledger.jsonl").read_bytes()
    assert run(*SEARCH, "--weights", str(weights), "--out", str(out), "--json") == 0
    captured = capsys.readouterr()
    assert "holds this search's result already" in captured.err
    assert json.loads(captured.out.splitlines()[-1]) == printed
    assert (out / "ledger.jsonl").read_bytes() == before


def test_the_device_is_no_part_of_what_a_search_is(
    finished: tuple[Path, dict[str, Any]], weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, printed = finished
    assert "device" not in json.loads((out / "config.json").read_text())["source"]
    assert run(*SEARCH, "--weights", str(weights), "--out", str(out), "--device", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == printed


@pytest.mark.parametrize("command", ["search", "pick", "finalize", "evaluate", "sensitivity", "train"])
def test_a_device_that_is_not_there_is_one_line(
    command: str,
    finished: tuple[Path, dict[str, Any]],
    weights: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: None)
    new = ["--weights", str(weights), "--out", "out.safetensors"]
    out = str(finished[0])
    given = {"search": [*SEARCH[1:], *new], "sensitivity": new, "train": new, "evaluate": [f"{out}/pruned"]}
    assert run(command, *given.get(command, [out]), "--device", "cuda:1") == 2
    assert capsys.readouterr().err == "error: there is no device 'cuda:1' here; there are: cpu\n"


def test_another_search_in_the_same_folder_is_refused(
    finished: tuple[Path, dict[str, Any]], weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = finished
    assert run(*SEARCH, "--seed", "1", "--weights", str(weights), "--out", str(out)) == 2
    assert "its seed is 0, not 1" in capsys.readouterr().err


def test_pick_report_and_finalize(
    finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{out.parent / 'mlflow.db'}")  # where the search was logged
    assert run("pick", str(out), "--budget", "macs<=40%,params<=90%", "--json") == 0
    picked = json.loads(capsys.readouterr().out.splitlines()[-1])["picked"]
    recipe = json.loads((out / "pruned" / "recipe.json").read_text())
    assert recipe["measured"]["policy"] == picked["policy"]
    (out / "report.html").unlink()
    assert run("report", str(out)) == 0
    assert (out / "report.html").stat().st_size > 1_000_000  # plotly is inside
    capsys.readouterr()
    assert run("finalize", str(out), "--epochs", "1", "--json") == 0
    final = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert final["epochs"] == 1
    assert 0 < final["test"]["accuracy"] <= 1
    assert json.loads((out / "pruned" / "recipe.json").read_text())["measured"]["fidelity"] == "full"
    assert run("finalize", str(out), "--epochs", "1") == 2
    assert "the test set is read once" in capsys.readouterr().err


def test_agents_are_compared(
    folder: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("search", "result"):  # what takes the time at the end of each search
        monkeypatch.setattr(importlib.import_module(f"autoprune.{name}"), "render", lambda folder: folder.report)
    monkeypatch.setattr(export, "_save_program", lambda *_: None)
    out = folder / "compared"
    cold = "tpe:startup=2:warm_start=false"
    command = ["compare", "--agents", f"tpe,{cold}", "--seeds", "2", "--candidates", "2", "--control", "1"]
    command += ["--budget", "macs<=40%", "--sensitivity", "", "--calibration-images", "200", "--weights", str(weights)]
    assert run(*command, "--out", str(out), "--json") == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out.splitlines()[-1])
    assert set(printed) == {"evaluations", "seeds", "evaluated", "dense", "table", "differences", "words", "out"}
    assert {row["agent"] for row in printed["table"]} == {"tpe", cold, "uniform", "random"}
    assert re.search(rf"^{cold} +\d", captured.out, re.MULTILINE)
    assert printed["words"][0] in captured.out
    assert f"page: {out / 'compare.html'}" in captured.out
    assert (out / "compare.html").stat().st_size > 1_000_000  # plotly is inside
    (out / "compare.html").unlink()
    assert run("report", str(out)) == 0
    assert (out / "compare.html").exists()
    assert run("pick", str(out / "tpe" / "0"), "--budget", "macs<=40%") == 0  # each search stands by itself
    capsys.readouterr()
    assert run(*command, "--out", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == printed


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--agents", "tpee"], "Did you mean 'tpe'"),
        (
            ["--agents", "tpe,evolution:survivor=2:offspring=8"],
            "Did you mean 'survivors'? Known: offspring, step, surv",
        ),
        (["--seeds", "0"], "`seeds >= 1`"),
        (["--finalize", "0"], "finalize"),
        (["--parallel", "2", "--workers", "2"], "either searches run together, or candidates"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_one_line(
    more: list[str], said: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["compare", "--budget", "macs<=40%", "--weights", str(weights), "--out", str(tmp_path / "out")]
    assert run(*common, *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sensitivity_shards_merge_and_serve_a_search(
    folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["sensitivity", "--weights", str(weights), "--sparsities", "0.5", "--calibration-images", "200"]
    parts = [folder / f"part{i}.json" for i in (1, 2)]
    for index, part in enumerate(parts, 1):
        assert run(*common, "--shard", f"{index}/2", "--out", str(part)) == 0
    whole = folder / "whole.json"
    assert run("sensitivity", *(f"--merge={part}" for part in parts), "--out", str(whole)) == 0
    cells = {g["name"]: len(g["cells"]) for g in json.loads(whole.read_text())["groups"] if g["prunable"]}
    assert set(cells.values()) == {1}
    assert "its elements are the network's output" in capsys.readouterr().out


def test_sensitivity_goes_on_in_the_precision_of_its_file(folder: Path, weights: Path) -> None:
    common = ["sensitivity", "--weights", str(weights), "--calibration-images", "200", "--out", str(folder / "s.json")]
    assert run(*common, "--sparsities", "0.5", "--precision", "bfloat16") == 0
    assert run(*common, "--sparsities", "0.5,0.75") == 0
    report = json.loads((folder / "s.json").read_text())
    assert report["settings"]["precision"] == "bfloat16"
    assert {len(g["cells"]) for g in report["groups"] if g["prunable"]} == {2}
    assert run(*common, "--sparsities", "0.5", "--precision", "float32") == 2


def test_sensitivity_can_be_predicted_without_measuring(
    folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "predicted.json"
    assert run("sensitivity", "--analytic", "--weights", str(weights), "--out", str(out)) == 0
    groups = {g["name"]: g for g in json.loads(out.read_text())["groups"] if g["prunable"]}
    assert all(group["cells"] == [] for group in groups.values())
    for group in groups.values():
        counts, losses = zip(*group["predicted"], strict=True)
        assert (counts[0], counts[-1], losses[0]) == (0, group["size"], 0.0)
        assert list(losses) == sorted(losses)
    printed = capsys.readouterr().out
    assert "predicted share of the network's output" in printed
    assert f"{dict(groups['layer3.0.conv1']['predicted'])[32]:.1%}" in printed


def test_another_way_to_recover_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SEARCH, "--recover", "magically", "--out", str(folder / "x")) == 2
    assert "'magically'" in capsys.readouterr().err


def test_a_dry_run_prints_widths_and_evaluates_nothing(
    folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = folder / "bounds.toml"
    limits.write_text('[groups]\nconv1 = {lock = true}\n"layer3.*" = {min = 0.5}\n')
    out = folder / "dry"
    arguments = ["--weights", str(weights), "--bounds", str(limits), "--out", str(out), "--dry-run"]
    assert run(*SEARCH, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    widths = {line.split()[0]: line.split()[1:5] for line in lines if re.match(r"(conv|layer)", line)}
    assert widths["conv1"] == ["16", "16", "16", "16"]
    assert widths["layer3.0.conv1"][:3] == ["64", "6", "32"]
    assert not out.exists()


def test_shared_steps_are_taken_but_not_in_a_dry_run(
    folder: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(autoprune, "search", lambda task, **settings: seen.append(settings) or sys.exit(7))
    arguments = ["--weights", str(weights), "--out", str(folder / "shared"), "--shared-steps", "30"]
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "train_shared", None)
        assert run(*SEARCH, *arguments, "--dry-run") == 0
    assert run(*SEARCH, *arguments) == 7
    assert [settings["shared_steps"] for settings in seen] == [30]


def test_a_task_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = f"{ROOT / 'examples' / 'own_model.py'}:make_task"
    assert run("search", "--task", task, "--budget", "macs<=50%", "--out", str(folder / "own"), "--dry-run") == 0
    assert "inner" in capsys.readouterr().out
    assert run("search", "--task", task, "--data", "digits", "--budget", "macs<=50%", "--out", "x") == 2
    assert "leave out --data" in capsys.readouterr().err


@pytest.mark.parametrize(("protocol", "size"), [("accuracy", "macs"), ("accuracy-params", "params")])
def test_the_second_protocol_needs_no_budget_and_picks_by_its_reward(
    protocol: str,
    size: str,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searching = importlib.import_module("autoprune.search")
    monkeypatch.setattr(searching, "render", lambda folder: folder.report)
    monkeypatch.setattr(searching, "MLflowTracker", lambda **_: NullTracker())
    monkeypatch.setattr(export, "_save_program", lambda *_: None)
    common = ["search", "--agent", "amc", "--sensitivity", "", *QUICK, "--weights", str(weights)]
    assert run(*common, "--out", str(tmp_path / "run"), "--protocol", protocol) == 0
    text = {"macs": "MACs", "params": "parameters"}[size]
    assert f"picked: highest -error * log({text}), of " in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert sum(line["agent"] == "amc" for line in lines) > 1
    best = max(lines, key=lambda line: -(1 - line["measurements"][-1]["accuracy"]) * math.log(line[size]))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["picked"]["id"] == best["id"]


SEVERAL = """
import importlib, sys
from autoprune import cli, export
from autoprune.tracking import NullTracker

searching = importlib.import_module("autoprune.search")
searching.render, searching.MLflowTracker = lambda folder: folder.report, lambda **_: NullTracker()
export._save_program = lambda *_: None
command = ["autoprune", *sys.argv[1:]]
for agent in ("surrogate", "tpe", "amc"):
    sys.argv = [*command, "--agent", agent, "--out", agent]
    try:
        cli.main()
    except SystemExit as leaving:
        assert not leaving.code
"""


def test_in_a_fresh_process_with_another_hash_seed_it_is_the_same_search(weights: Path, tmp_path: Path) -> None:
    """Three searches in each process, without what takes the time besides: report, program and MLflow's store."""

    def left(hash_seed: str) -> dict[str, Any]:
        out = tmp_path / hash_seed
        out.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", SEVERAL, *SEARCH, "--weights", str(weights)]
        subprocess.run(command, env=environment, capture_output=True, check=True, cwd=out)
        found: dict[str, Any] = {}
        for agent in ("surrogate", "tpe", "amc"):
            lines = [
                json.loads(line) | {"seconds": 0} for line in (out / agent / "ledger.jsonl").read_text().splitlines()
            ]
            assert {line["agent"] for line in lines} == {"uniform", "random", agent}
            picked = json.loads((out / agent / "result.json").read_text())["picked"]
            found[agent] = (lines, picked, (out / agent / "sensitivity.json").read_bytes())
        return found

    assert left("1") == left("2")


@pytest.mark.timeout(180)
def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(folder: Path, weights: Path) -> None:
    out = folder / "stopped"
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}", "DO_NOT_TRACK": "true"}
    command = [str(Path(sys.executable).parent / "autoprune"), *SEARCH, "--weights", str(weights), "--out", str(out)]
    options: dict[str, Any] = {"env": environment, "cwd": folder, "text": True}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, **options)
    ledger = out / "ledger.jsonl"
    deadline = time.monotonic() + 100
    while not (ledger.exists() and ledger.read_text().count("\n")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    before = ledger.read_text().splitlines()
    assert not (out / "result.json").exists()
    done = subprocess.run(command, capture_output=True, check=True, **options)
    assert f"going on with {out}" in done.stderr
    after = ledger.read_text().splitlines()
    assert after[: len(before)] == before
    ids = [json.loads(line)["id"] for line in after]
    assert len(ids) == len(set(ids))


WRONG = {
    "agent": (["--agent", "tpee"], "Did you mean 'tpe'?"),
    "criterion": (["--criterion", "l3"], "Did you mean"),
    "space": (["--space", "groups"], "Did you mean 'group'?"),
    "model": (["--model", "resnet-20"], "Did you mean 'resnet20'?"),
    "data": (["--data", "cifar11", "--model", "resnet20"], "Did you mean 'cifar10'?"),
    "data root": (["--data", "cifar10", "--model", "resnet20"], "--data-root"),
    "missing data": (["--data", "mnist", "--model", "lenet-5", "--data-root", "nowhere"], "--download"),
    "no weights": (["--data", "cifar10", "--model", "resnet20", "--data-root", "nowhere"], "--download"),
    "missing weights": (["--weights", "nowhere.pt"], "there is no weights file"),
    "budget": (["--budget", "macs<50"], "macs<=50%"),
    "budget metric": (["--budget", "mac<=50%"], "Did you mean 'macs'?"),
    "impossible budget": (["--budget", "macs<=0.1%"], "raise the budget"),
    "sparsity of 1": (["--max-sparsity", "1.0"], "`0 < max_sparsity < 1` must hold"),
    "measured sparsity": (["--sensitivity", "0.5,1.0"], "`0 < sparsity < 1` must hold"),
    "empty split": (["--val-fraction", "0.0001"], "val"),
    "task": (["--task", "nothing.py:make"], "nothing.py"),
    "bounds": (["--bounds", "nothing.toml"], "nothing.toml"),
    "no aim": (["--max-drop", "1.5"], "0.01 is one point"),
    "setting of another agent": (
        ["--agent", "random:warm_start=false"],
        "no setting of the agent random 'warm_start'",
    ),
    "value of a setting": (
        ["--agent", "tpe:warm_start=no"],
        "settings of the agent tpe: startup, storage, study, warm_",
    ),
    "setting that can't be read": (["--agent", "tpe:warm_start"], "written as in evolution:survivors=2:offspring=8"),
    "storage alone": (["--agent", "tpe", "--storage", "sqlite:///trials.db"], "--study"),
    "storage of another agent": (["--storage", "sqlite:///trials.db"], "no setting of the agent surrogate 'storage'"),
}


def test_an_optuna_agents_options_are_its_settings(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def noted(task: object, **settings: object) -> None:
        asked.update(settings)
        raise ConfigError("that is enough")

    monkeypatch.setattr(autoprune, "search", noted)
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    options = ["--agent", "tpe:warm_start=false", "--storage", url, "--study", "mine", "--weights", str(weights)]
    run("search", "--budget", "macs<=50%", *options, *QUICK, "--out", str(tmp_path / "out"))
    assert asked["agent"] == "tpe:warm_start=false"
    assert asked["agent_settings"] == {"storage": url, "study": "mine"}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line_with_the_way_out(
    case: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, hint = WRONG[case]
    base = [] if "--budget" in arguments else ["--budget", "macs<=50%"]
    known = {"--weights", "--data", "--model", "--task"} & set(arguments)
    base += [] if known else ["--weights", str(weights)]
    assert run("search", *base, *arguments, *QUICK, "--out", str(tmp_path / "out")) == 2
    errors = capsys.readouterr().err
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert hint in last
    assert "Traceback" not in errors


def test_weights_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.save_weights(models.build("lenet-5", in_channels=1, input_size=8), tmp_path / "other.safetensors")
    assert run("search", "--budget", "macs<=50%", "--weights", "other.safetensors", "--out", "out") == 2
    assert re.search(r"error: .*conv1", capsys.readouterr().err)


def test_an_accuracy_of_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = models.build("lenet-300-100", in_channels=1, input_size=8)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))  # no class is ever the largest
    models.save_weights(model, tmp_path / "nan.safetensors")
    arguments = ["--model", "lenet-300-100", "--weights", "nan.safetensors", "--out", "out"]
    assert run("search", "--budget", "macs<=50%", *arguments) == 2
    assert "error: " in capsys.readouterr().err


def test_a_model_that_fails_on_its_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "task.py").write_text(
        "import torch, autoprune as ap\n"
        "def make():\n"
        "    data = (torch.randn(20, 3, 8, 8), torch.zeros(20, dtype=torch.int64))\n"
        "    return ap.Task(torch.nn.Linear(7, 2), train=data)\n"
    )
    assert run("search", "--task", "task.py:make", "--budget", "macs<=50%", "--out", "out") == 2
    errors = capsys.readouterr().err
    assert "error: " in errors
    assert len(errors.strip().splitlines()) == 1


def test_an_unwritable_folder(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(*SEARCH, "--weights", str(weights), "--out", str(tmp_path / "file" / "run")) == 2
    assert "name another folder with --out" in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("pick", "finalize", "report"):
        assert run(command, str(tmp_path)) == 2
        assert "error: " in capsys.readouterr().err


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]  # the app has several commands
    assert set(commands) == {"search", "compare", "sensitivity", "pick", "finalize", "report", "evaluate", "train"}
    for name in commands:
        assert run(name, "--help") == 0
        assert f"autoprune {name}" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == autoprune.__version__
