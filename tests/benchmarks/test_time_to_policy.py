"""The time to a policy: a loop by hand that meets its budget and goes on where it stopped, and the table's verdict."""

import json
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from autoprune.models import build
from autoprune.preparation import prepare
from autoprune.settings import SearchSettings
from autoprune.task import Task


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    load_script("throughput")  # which it imports
    return load_script("time_to_policy")


def tiny(network: str = "resnet8") -> Task:
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(120, 3, 8, 8, generator=generator), torch.arange(120) % 10
    splits = {"train": slice(0, 60), "val": slice(60, 90), "test": slice(90, 120)}
    return Task(
        build(network, in_channels=3, input_size=8),
        **{role: (images[part], targets[part]) for role, part in splits.items()},
    )


def options(script: ModuleType, folder: Path, *arguments: str) -> Namespace:
    few = "--calibration 40 --trials 3 --checkpoints 2 3 --ours analytic:1 --seeds 2 --steps 2 --threads 1"
    found: Namespace = script._options([*few.split(), "--out", str(folder / "rows.jsonl"), *arguments])
    return found


@pytest.fixture
def loop(script: ModuleType) -> Any:
    pytest.importorskip("torch_pruning")
    return script.Loop(tiny(), 40, "*.conv1", 0.5)


def test_drawn_ratios_just_meet_the_budget(loop: Any) -> None:
    for ratios in ((0.5, 0.5, 0.5), (0.9, 0.05, 0.4), (0.01, 0.02, 0.9)):
        removed = loop.fitted(dict(zip(loop.sizes, ratios, strict=True)))
        macs = loop.macs(loop.sliced(loop.shares(removed)))
        assert macs == loop.dense - sum(loop.each[name] * number for name, number in removed.items())
        assert loop.limit - max(loop.each.values()) < macs <= loop.limit


def test_so_many_channels_go(loop: Any) -> None:
    wanted = dict(zip(loop.sizes, (0, 1, 7), strict=True))
    smaller = loop.candidate(wanted)
    assert not smaller.training
    assert {name: size - smaller.get_submodule(name).out_channels for name, size in loop.sizes.items()} == wanted


def test_a_budget_out_of_reach_is_refused(loop: Any) -> None:
    loop.limit = 1
    with pytest.raises(ValueError, match="are the least"):
        loop.fitted(dict.fromkeys(loop.sizes, 0.5))


def test_all_is_measured_once_and_shown(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    given = options(script, tmp_path)
    rows = script.Rows(given.out)
    script.measured(tiny(), given, rows)
    text = script.table(rows, given.checkpoints)
    assert [row["way"] for row in rows.of("search")] == ["analytic:1"]
    assert len(rows.of("trial")) == 3
    assert all(row["macs"] <= 0.5 * rows.of("dense")[0]["macs"] for row in rows.of("trial") + rows.of("search"))
    assert "| by hand, 2 trials |" in text
    assert "| by hand, 3 trials |" in text
    assert text.count("- analytic:1 (") == 2

    lines = given.out.read_text().splitlines()
    script.measured(tiny(), given, script.Rows(given.out))
    assert given.out.read_text().splitlines() == lines

    cut = [line for line in lines if json.loads(line).get("number") != 2 and '"tuned"' not in line]
    given.out.write_text("".join(f"{line}\n" for line in cut))
    again = script.Rows(given.out)
    script.measured(tiny(), given, again)
    untimed = [{key: row[key] for key in ("ratios", "removed", "accuracy")} for row in again.of("trial")]
    assert untimed == [{key: row[key] for key in ("ratios", "removed", "accuracy")} for row in rows.of("trial")]
    assert again.of("tuned") == rows.of("tuned")


def test_fastnas_leaves_a_policy_and_its_weights(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    pytest.importorskip("modelopt")
    loop = script.Loop(tiny("resnet20"), 40, "*.conv1", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = script.fastnas(loop, 40, 0.7, tmp_path / "weights.pt")
    assert row["macs"] <= 0.7 * loop.dense
    prepared = prepare(loop.task, SearchSettings(budget="macs<=70%", calibration_images=40, precision="float32"))
    tuning = script.Tuning(prepared, loop, 2, 0.01, tmp_path / "weights.pt")
    model = tuning.start(row["removed"], "as FastNAS leaves it").eval()
    assert loop.macs(model) == row["macs"]
    assert loop.accuracy(model) == row["accuracy"]


def test_another_measurement_is_not_gone_on_with(script: ModuleType, tmp_path: Path) -> None:
    given = options(script, tmp_path)
    rows = script.Rows(given.out)
    rows.claim({"steps": 2, "lr": 0.01})
    rows.claim({"steps": 2, "lr": 0.01})
    with pytest.raises(SystemExit, match="begun with steps 2, not 3"):
        script.Rows(given.out).claim({"steps": 3, "lr": 0.01})


def rows_of(script: ModuleType, file: Path, after: dict[str, float]) -> Any:
    """Return two trials of 10 s, of which the second is the better, and a search of 5 s."""
    rows = script.Rows(file)
    rows.add("settings", steps=200)
    rows.add("setup", seconds=1.0)
    rows.add("search", way="tpe:40", seconds=5.0, removed={"a": 3}, macs=50, accuracy=0.9)
    for number in (0, 1):
        found = {"removed": {"a": number + 1, "b": 0}, "macs": 50, "accuracy": 0.5 + 0.1 * number}
        rows.add("trial", number=number, ratios={}, seconds=10.0, **found)
    rows.add("dense", macs=100, test=0.95)
    rows.add("untuned", removed={"a": 3}, start="reconstructed", test=0.87)
    rows.add("tuned", removed={"a": 3}, start="reconstructed", seed=0, test=0.88)
    rows.add("tuned", removed={"a": 3}, start="reconstructed", seed=1, test=0.90)
    for number in (0, 1):
        for start in ("recalibrated", "reconstructed"):
            rows.add("tuned", removed={"a": number + 1}, start=start, seed=0, test=after[start] + 0.01 * number)
    return rows


def test_the_table_says_when_the_loop_gets_there(script: ModuleType, tmp_path: Path) -> None:
    rows = rows_of(script, tmp_path / "rows.jsonl", {"recalibrated": 0.80, "reconstructed": 0.885})
    text = script.table(rows, [1, 2, 4])
    assert (
        "| tpe:40 | 5 | 50 (50.0%) | 90.00% | 87.00% | 89.00% (88.00% to 90.00%) | 89.00% (88.00% to 90.00%) |" in text
    )
    assert "| by hand, 2 trials | 21 | 50 (50.0%) | 60.00% |  | 81.00% | 89.50% |" in text
    assert "4 trials" not in text  # not made yet
    assert "from its own weights: not reached by hand, 2 trials (21 s, 4.2 times as long)." in text
    assert "from weights recovered alike: reached by hand, 2 trials (21 s, 4.2 times as long)." in text


def test_what_is_not_fine_tuned_yet_is_left_open(script: ModuleType, tmp_path: Path) -> None:
    rows = rows_of(script, tmp_path / "rows.jsonl", {"recalibrated": 0.80, "reconstructed": 0.885})
    rows.rows = [row for row in rows.rows if row["piece"] not in ("tuned", "dense")]
    text = script.table(rows, [1])
    assert "| by hand, 1 trials | 11 | 50 | 50.00% |  |  |  |" in text
    assert "reached" not in text
