"""The scaling benchmark on tiny numbers: its tables have the rows that were asked for, and busy shares are right."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from autoprune.agents.random import RandomAgent
from autoprune.evaluation import InProcess, Outcome
from autoprune.policy import Policy
from autoprune.testing import chain

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("scaling")


def rows(text: str) -> list[list[str]]:
    """Return the cells below a table's head."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert len({len(line) for line in lines}) == 1
    return lines[2:]


def test_groups(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.groups(script._options(["groups", "--groups", "2", "3"]))
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found] == ["2", "3"]
    assert all(cell.endswith(("ms", " s")) for row in found for cell in row[1:-1])


def test_candidates(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.candidates(script._options(["candidates", "--agents", "random", "--most", "100"]))
    ((agent, number, first, last, whole, _, memory),) = rows(capsys.readouterr().out)
    assert (agent, number) == ("random", "100")
    assert float(whole.removesuffix(" s")) > 0
    assert all(float(cell) > 0 for cell in (first, last))
    assert memory.endswith(" MB")


def test_a_search_stamps_every_candidate_and_sleeps_as_the_policy_says(script: ModuleType) -> None:
    feasible = chain([16, 16, 16])
    pipeline = script.Formula(feasible, 0.001, 0.3)
    stamps, _ = script.search(feasible, pipeline, RandomAgent(), 5, None, InProcess(at_once=2))
    assert len(stamps) == 1 + 5
    assert stamps == sorted(stamps)
    times = [pipeline(Policy({"conv1": share})).seconds for share in (0.25, 0.5, 0.25)]
    assert times[0] == times[2] != times[1]
    assert all(0.0001 < seconds < 0.01 for seconds in times)


def shares(found: list[list[str]]) -> list[int]:
    return [int(row[-1].removesuffix("%")) for row in found]


def test_busy_is_a_share_of_what_all_workers_had(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--each", "3", "--seconds", "0.1"]
    script.workers(script._options(["workers", "--workers", "1", "4", "--ray", *few]))
    found = rows(capsys.readouterr().out)
    expected = [(str(n), "threads", agent, str(3 * n)) for n in (1, 4) for agent in ("random", "surrogate", "tpe")]
    assert [(row[0], row[1], row[3], row[4]) for row in found] == expected
    assert all(5 <= share <= 100 for share in shares(found))


def test_ray_workers_are_rows_of_their_own() -> None:
    pytest.importorskip("ray")
    options = ["workers", "--workers", "--ray", "2", "--each", "1", "--seconds", "0.1"]
    command = [sys.executable, str(FOLDER / "scaling.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = rows(done.stdout)
    assert [(row[0], row[1], row[3], row[4]) for row in found] == [
        ("2", "Ray", agent, "2") for agent in ("random", "surrogate", "tpe")
    ]
    assert all(0 <= share <= 100 for share in shares(found))


def test_all_workers_meet(script: ModuleType) -> None:
    """All workers are up when `meet` returns: each had a policy while the others had theirs."""
    most, at_work, lock = 0, 0, threading.Lock()

    class Watching(script.Meeting):  # type: ignore[misc, name-defined]
        def __call__(self, policy: Policy) -> Outcome:
            nonlocal most, at_work
            with lock:
                at_work += 1
                most = max(most, at_work)
            outcome: Outcome = super().__call__(policy)
            with lock:
                at_work -= 1
            return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "Meeting", Watching)
        executor = script.Threads(3)
        script.meet(executor, 3)
        executor.close()
    assert most == 3
