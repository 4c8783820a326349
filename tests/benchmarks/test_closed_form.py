"""The benchmark of recovery in closed form: its policies, what it measures at every rung, and its tables."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from autoprune.models import build
from autoprune.preparation import prepare
from autoprune.settings import SearchSettings
from autoprune.task import Task

RUNGS = (
    "sliced",
    "recalibrated",
    "cached",
    "cached_recalibrated",
    "reconstructed",
    "steps_20",
    "steps_50",
    "steps_200",
)


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("closed_form")


def row(number: int, **values: Any) -> dict[str, Any]:
    seconds = {name: 1.0 for name in (*RUNGS, "measuring")}
    accuracies = {name: 0.1 * number for name in (*RUNGS, "predicted", "predicted_1")}
    return {"id": str(number), "seconds": seconds, "spent": 1e-5, **accuracies, **values}


def test_policies_lie_at_their_budgets(script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(60, 3, 8, 8, generator=generator), torch.arange(60) % 10
    task = Task(build("resnet8", input_size=8), train=(images[:40], targets[:40]), val=(images[40:], targets[40:]))
    prepared = prepare(task, SearchSettings(budget="macs<=50%", calibration_images=40))
    drawn = list(script.policies(prepared, 5))
    costs = [prepared.costs.cost(prepared.structure.removed(policy)).macs for _, policy in drawn]
    shares = [macs / prepared.costs.dense.macs for macs in costs]
    assert [kind for kind, _ in drawn] == ["equal"] * 5 + ["mixed"] * 5
    assert all(0.45 < share <= 0.5 for share in shares[:5])
    assert max(shares[5:]) - min(shares[5:]) > 0.1
    assert [policy.id for _, policy in drawn] == [policy.id for _, policy in script.policies(prepared, 5)]


def test_the_table_has_means_and_deviations_over_seeds(script: ModuleType) -> None:
    rows = [row(n, seed=n, policy="uniform", criterion="l1", sliced=0.1 * n) for n in (1, 2, 3)]
    text = script.recovery_table(rows)
    assert "| uniform | l1 | 20.0 ± 10.0 |" in text


def test_the_ranking_compares_with_the_last_rung(script: ModuleType) -> None:
    rows = [row(n, sliced=-0.1 * n) for n in range(1, 9)]
    lines = {line.split("|")[1].strip(): line for line in script.rank_table(rows, "steps_200").splitlines()}
    assert "| 1.00 (1.00 to 1.00) |" in lines["recalibrated"]
    assert "| -1.00 (-1.00 to -1.00) |" in lines["sliced"]
    assert "1.0e-05" in lines["predicted loss, nothing evaluated"]
    assert "whole epochs from there" not in lines


def test_what_a_rung_would_pick_is_compared_with_the_best(script: ModuleType) -> None:
    last = torch.linspace(0.0, 0.9, 10).numpy()
    assert script.regret(last, last) == 0.0
    assert script.regret(-last, last) > script.regret(0 * last, last) > 0.2


def test_shared_weights_are_among_the_rungs(script: ModuleType) -> None:
    def found(number: int, steps: int) -> dict[str, Any]:
        values = {"recalibrated": 0.1 * number, "reconstructed": -0.1 * number}
        seconds = dict.fromkeys(values, 2.0)
        return {"steps": steps, "kind": "equal", "id": str(number), "seconds": seconds, **values}

    training = {"steps": 200, "kind": "equal", "id": "training", "seconds": 60.0}
    rows = [row(n, kind="equal") for n in range(1, 10)]
    shared = [training, *(found(n, steps) for n in range(1, 9) for steps in (200, 400))]
    merged = script.with_shared(rows, shared)
    assert [line["id"] for line in merged] == [str(n) for n in range(1, 9)]
    assert "shared_200_recalibrated" not in rows[0]
    lines = {line.split("|")[1].strip(): line for line in script.rank_table(merged, "steps_200").splitlines()}
    assert "| 1.00 (1.00 to 1.00) |" in lines["recalibrated, from 200 shared steps"]
    assert "| -1.00 (-1.00 to -1.00) |" in lines["reconstructed, from 400 shared steps"]
    assert "| 2.00 + 1.00 |" in lines["reconstructed, from 400 shared steps"]


def test_or_with_fine_tuning_for_whole_epochs(script: ModuleType) -> None:
    seconds = {name: 1.0 for name in (*RUNGS, "measuring", "long")}
    rows = [row(n, long=-0.1 * n, seconds=seconds) for n in range(1, 9)]
    lines = {line.split("|")[1].strip(): line for line in script.rank_table(rows, "long").splitlines()}
    assert "| -1.00 (-1.00 to -1.00) |" in lines["200 steps from there"]
    assert lines["whole epochs from there"].split("|")[2].strip() == ""
