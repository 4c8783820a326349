"""The ledger: on disk before it is used, whole after a crash, and never quietly wrong."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoprune.cost import Cost
from autoprune.errors import RunError
from autoprune.evaluation import Candidate, Ledger, Measurement
from autoprune.policy import Policy


def candidate(number: int, *, failure: str | None = None) -> Candidate:
    policy = Policy({"conv1": number / 7, "conv2": 1 / 3})
    measurements = (
        Measurement("recalibrated", 0.1 + number / 30, 0.01, 1 / 3, 0.02),
        Measurement("short", *[1 / 7] * 4),
    )
    return Candidate(
        number=number,
        id=policy.id,
        arm="search",
        agent="tpe",
        policy=policy,
        removed={"conv1": number, "conv2": 3},
        cost=Cost(100 + number, 10, 40),
        measurements=() if failure else measurements,
        seconds=0.25,
        failure=failure,
    )


def test_the_file_holds_the_line_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    assert not path.exists()
    for number in range(3):
        ledger.append(candidate(number))
        lines = path.read_text().splitlines()
        assert len(lines) == len(synced) == number + 1
        assert json.loads(lines[-1]) == json.loads(json.dumps(candidate(number).to_dict()))


def test_nothing_is_known_that_is_not_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    ledger = Ledger(tmp_path / "ledger.jsonl")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        ledger.append(candidate(0))
    assert len(ledger) == 0
    assert ledger.get(candidate(0).id) is None


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(range(6)), unique=True), st.booleans())
def test_it_reads_what_it_wrote(tmp_path: Path, numbers: list[int], failed: bool) -> None:
    path = tmp_path / "ledger.jsonl"
    path.unlink(missing_ok=True)
    ledger = Ledger(path)
    for number in numbers:
        ledger.append(candidate(number, failure="the loss is nan" if failed and number % 2 else None))
    again = Ledger(path)
    assert list(again) == list(ledger)
    assert [c.number for c in again] == sorted(numbers)
    for number in numbers:
        assert again.get(candidate(number).id) == ledger.get(candidate(number).id)


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, left: int) -> None:
    """A process killed in the middle of a write; -1 leaves the line without its newline."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append(candidate(0))
    whole = path.read_bytes()
    ledger.append(candidate(1))
    line = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + line[:left])
    again = Ledger(path)
    assert [c.number for c in again] == [0]
    assert path.read_bytes() == whole + line[:left]  # not by who reads: it may be half written by another process
    again.append(candidate(2))
    assert path.read_bytes().startswith(whole + b'{"number": 2')
    again.append(candidate(3))
    assert [c.number for c in Ledger(path)] == [0, 2, 3]


def test_a_line_torn_inside_a_letter_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).append(candidate(0))
    with path.open("ab") as file:
        file.write('{"agent": "\N{GREEK SMALL LETTER TAU}'.encode()[:-1])
    assert len(Ledger(path)) == 1


@pytest.mark.parametrize("broken", ["{", "[]", '{"number": 1}', '"text"', "\N{EM DASH}", ""])
def test_a_broken_line_in_the_middle_is_refused_by_its_number(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for number in range(3):
        ledger.append(candidate(number))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], broken, lines[2], ""]), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"^line 2 of .*ledger\.jsonl can't be read \(.*; move the file away") as error:
        Ledger(path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_one_policy_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append(candidate(0))
    with pytest.raises(ValueError, match="in the ledger already"):
        ledger.append(candidate(0))
    assert len(path.read_text().splitlines()) == 1


def test_a_file_that_two_processes_wrote_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first, second = Ledger(path), Ledger(path)
    first.append(candidate(0))
    second.append(candidate(0))
    with pytest.raises(RunError, match=rf"^line 2 of .* repeats policy {candidate(0).id}"):
        Ledger(path)


def test_without_a_path_it_stays_in_memory(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.append(candidate(0))
    assert ledger.get(candidate(0).id) == candidate(0)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- candidates


def test_a_line_has_the_fields_that_the_format_names() -> None:
    line: dict[str, Any] = candidate(3).to_dict()
    assert list(line) == [
        *("number", "id", "arm", "agent", "policy", "removed", "macs", "params", "bytes"),
        *("activations", "nonzero_params", "nonzero_macs"),
        *("measurements", "seconds", "failure", "rival"),
    ]
    assert list(line["measurements"][0]) == [
        *("fidelity", "accuracy", "accuracy_se", "loss", "loss_se", "steps", "samples")
    ]


def test_the_last_measurement_counts() -> None:
    one = candidate(3)
    assert (one.accuracy, one.accuracy_se, one.loss, one.fidelity) == (1 / 7, 1 / 7, 1 / 7, "short")
    assert one.at("recalibrated") == one.measurements[0]
    assert one.at("full") is None
    assert (one.macs, one.params) == (103, 10)


def test_a_failed_candidate_has_no_numbers() -> None:
    failed = candidate(3, failure="the loss is nan")
    assert failed.fidelity == "none"
    assert str((failed.accuracy, failed.accuracy_se, failed.loss)) == "(nan, nan, nan)"
    assert dataclasses.replace(failed, failure=None, measurements=candidate(3).measurements) == candidate(3)
