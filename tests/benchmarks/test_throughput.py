"""The throughput benchmark compares equal work: its masked network is the smaller one, and what it prints is right."""

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from autoprune.models import build
from autoprune.policy import Policy
from autoprune.structure import cut
from autoprune.task import Task


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("throughput")


@pytest.fixture(scope="module")
def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(90, 3, 8, 8, generator=generator), torch.arange(90) % 10
    model = build("resnet8", in_channels=3, input_size=8)
    return Task(model, train=(images[:60], targets[:60]), val=(images[60:], targets[60:]))


@pytest.fixture(scope="module")
def ours(script: ModuleType, task: Task) -> Any:
    return script.Ours(task, 40, "recalibrated", 0.5, "*.conv1")


def test_the_masked_network_computes_what_the_smaller_one_does(script: ModuleType, task: Task, ours: Any) -> None:
    masked = script.Masked(task, 40, ours)
    model, smaller = masked.pruned(), cut(task.model, ours.bench.change(ours.removed)).eval()
    inputs = next(iter(task.val_batches(8)))[0]
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), smaller(inputs), rtol=0, atol=1e-5)
    masked.train(model, 2)
    with torch.no_grad():
        assert all((p[masked.masks[name] == 0] == 0).all() for name, p in model.named_parameters())


def test_all_ways_give_an_accuracy_and_a_time(script: ModuleType, task: Task, ours: Any) -> None:
    ways = {"ours, recalibrated": ours, "by hand": script.Masked(task, 40, ours)}
    found = script.compare(ways, 1, 2)
    for row in found.values():
        assert 0 <= row["accuracy"] <= 1
        assert 0 < row["low"] <= row["median"] <= row["high"]


def test_only_the_groups_that_are_named_lose_channels(ours: Any) -> None:
    assert {name for name, count in ours.removed.items() if count} == set(ours.names)
    assert all(name.endswith(".conv1") for name in ours.names)


def test_the_framework_s_time_has_a_line_on_disk_and_no_pass_of_the_network(
    ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(ours.bench, "recover", None)  # would fail
    monkeypatch.setattr(os, "fsync", synced.append)
    ledger = tmp_path / "ledger.jsonl"
    assert ours.overhead(ledger, 3) > 0
    assert [json.loads(line)["arm"] for line in ledger.read_text().splitlines()] == ["search"] * 3
    assert len(synced) == 3


def test_an_agent_s_own_time_leaves_out_the_answers(
    script: ModuleType, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Policy] = []
    real = script.SyntheticEvaluator.submit

    def slow(self: Any, policy: Policy) -> Any:
        asked.append(policy)
        time.sleep(0.2)
        return real(self, policy)

    monkeypatch.setattr(script.SyntheticEvaluator, "submit", slow)
    found = script.proposing(ours, ["random", "tpe"], 6)
    assert list(found) == ["random", "tpe"]
    assert len({policy.id for policy in asked}) >= 6
    assert 0 < found["random"] < 0.2


def test_cells_are_counted(script: ModuleType, ours: Any) -> None:
    class Nothing:
        """Takes no time."""

        def sliced(self, ratios: dict[str, float]) -> None:
            assert list(ratios.values()) == [0.5]

        recalibrated = accuracy = staticmethod(lambda model: 0.0)

    found = script.sensitivity(ours, Nothing(), (0.25, 0.5))
    assert found["cells"] == 2 * len(ours.names)
    assert 0 < found["executed"] <= 1


def test_a_race_is_timed_beside_the_whole(script: ModuleType, ours: Any) -> None:
    found = script.raced(ours, 5)
    assert found["policies"] == 5
    assert 0 < found["samples"] <= 1
    assert (found["stopped"] == 0) == (found["samples"] == 1)
    assert 0 <= found["error"] < 1


def test_what_measuring_is_spent_on_adds_up(script: ModuleType, ours: Any) -> None:
    found = script.spent(ours)
    assert len(found) == 6
    assert 0.3 < sum(found.values()) <= 1
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_the_compiler_is_timed_on_a_batch_as_it_is_measured(
    script: ModuleType, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda model: given.append(model) or model)
    found = script.compiled(ours, repeats=2)
    assert found["samples"] == 30
    assert min(found.values()) > 0
    (model,) = given
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())  # they are folded


def test_fastnas_scores_a_layer_at_a_time(script: ModuleType, task: Task) -> None:
    pytest.importorskip("modelopt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = script.fastnas(task, 40, 0.5)
    assert found["cells"] >= 3  # it finds the layers itself
    assert 0 < found["median"] <= found["seconds"]


def test_fastnas_is_left_out_with_a_reason(script: ModuleType, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    assert "can't be imported" in script.fastnas(task, 40, 0.5)["skipped"]


def test_by_hand_takes_statistics_anew(script: ModuleType, task: Task) -> None:
    hand = script.ByHand(task, 40, 0.5, "*.conv1")
    model = hand.recalibrated(task.fresh_model())
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert not model.training
    assert all(norm.momentum == 0.1 and norm.running_mean.abs().max() > 0 for norm in norms)


def test_the_table_has_the_ratios(script: ModuleType) -> None:
    def row(seconds: float) -> dict[str, float]:
        return {"median": seconds, "low": seconds, "high": seconds, "accuracy": 0.5}

    text = script.table(
        {
            "candidates": {0: {"ours": row(2.0), "by hand": row(5.0), "masked": row(8.0)}},
            "sensitivity": {"cells": 3, "ours": 2.0, "by_hand": 9.0, "executed": 0.25},
            "fastnas": {"version": "0.47.0", "cells": 2, "seconds": 8.0, "median": 4.0},
            "spent": {"aten::conv": 0.6, "aten::add": 0.1},
            "race": {"policies": 9, "stopped": 4, "samples": 0.6, "times": 1.25, "tau": 0.9, "error": 0.013},
            "overhead": 0.003,
            "agents": {"tpe": 0.0123, "random": 0.0004},
            "share": 0.42,
            "compiled": {"samples": 50, "as it is": 0.0204, "compiled": 0.0151, "compiling": 41.26},
        }
    )
    assert "| ours | 0 | 2.00 (2.00 to 2.00) | 30 | 2.5 | 4.0 |" in text
    assert re.search(r"4\.5 times as fast; 25% of the multiply-adds ran", text)
    assert "ModelOpt 0.47.0 scores single layers in 4.00 s each: 6.0 times as long as our cells, 1.3 as by hand" in text
    assert "3.0 ms a candidate; agents: tpe 12.3 ms, random 0.4 ms. Share" in text
    assert "on one thread: conv 60%, add 10%." in text
    assert "over 9 random policies: 4 were stopped, 60% of the samples were measured, 1.25 times as fast" in text
    assert "A batch of 50 takes 20.4 ms, compiled 15.1 ms, and compiling 41.3 s." in text
