"""An executor like others that evaluates nothing twice."""

from typing import Any

import pytest

from autoprune.cost import Cost
from autoprune.errors import ConfigError
from autoprune.evaluation import Candidate, InProcess, Ledger, Measurement, Once, Outcome, Raced, Work, outcomes
from autoprune.policy import Policy
from autoprune.testing import ExecutorContract, SyntheticPipeline

HALF, QUARTER = Policy({"a": 0.5}), Policy({"a": 0.25})


class Counting:
    """Notes what it is told."""

    at_once = 2

    def __init__(self) -> None:
        self.told: list[str] = []
        self._inner = InProcess()

    def start(self, pipeline: Any) -> None:
        self.told.append("start")
        self._inner.start(pipeline)

    def submit(self, work: Work) -> None:
        self.told.append("submit")
        self._inner.submit(work)

    def finished(self) -> Outcome:
        return self._inner.finished()

    def close(self) -> None:
        self.told.append("close")
        self._inner.close()


class TestOnce(ExecutorContract):
    @pytest.fixture
    def executor(self) -> Once:
        return Once(InProcess())


class TestOnceWithSeveral(ExecutorContract):
    @pytest.fixture
    def executor(self) -> Once:
        return Once(InProcess(), at_once=4)


def test_what_is_known_is_not_evaluated() -> None:
    known = Outcome(HALF.id, (Measurement("short", 0.9, 0.0, 0.1, 0.0),), 5.0)
    counting = Counting()
    once = Once(counting, [known])
    once.start(SyntheticPipeline())
    once.submit(HALF)
    assert once.finished() is known
    assert counting.told == []  # nor is a worker started
    once.submit(QUARTER)
    found = once.finished()
    once.submit(QUARTER)
    assert once.finished() is found
    assert counting.told == ["start", "submit"]


def test_what_a_ledger_holds_is_known_of_a_policy_and_its_rival() -> None:
    ledger, cost, found = Ledger(), Cost(100, 10, 40), (Measurement("reconstructed", 0.9, 0.0, 0.1, 0.0),)
    given: dict[str, Any] = {"arm": "search", "agent": "a", "removed": {"a": 1}, "cost": cost, "seconds": 1.0}
    ledger.append(Candidate(0, HALF.id, policy=HALF, measurements=found, **given))
    ledger.append(Candidate(1, QUARTER.id, policy=QUARTER, measurements=(), failure="nan", rival=HALF.id, **given))
    alone, raced = outcomes([ledger])
    assert alone == Outcome(HALF.id, found, 1.0)
    assert raced == Outcome(Raced(QUARTER, HALF).id, (), 1.0, "nan")


def test_searches_one_after_another_share_the_workers() -> None:
    counting = Counting()
    once = Once(counting)
    for policy in (HALF, QUARTER):
        once.start(SyntheticPipeline())
        once.submit(policy)
        once.finished()
        once.close()
    assert counting.told == ["start", "submit", "submit"]
    once.stop()
    assert counting.told[-1] == "close"


def test_what_is_under_way_is_dropped_with_the_workers() -> None:
    counting = Counting()
    once = Once(counting)
    once.start(SyntheticPipeline())
    once.submit(HALF)
    once.close()
    assert counting.told == ["start", "submit", "close"]
    once.submit(QUARTER)
    assert once.finished().id == QUARTER.id


def test_it_takes_as_many_at_once_as_the_executor_or_as_it_is_told() -> None:
    assert Once(InProcess(at_once=3)).at_once == 3
    assert Once(InProcess(at_once=3), at_once=5).at_once == 5
    with pytest.raises(ConfigError, match="at_once=0"):
        Once(InProcess(), at_once=0)


def test_without_a_pipeline_there_is_nothing_to_run() -> None:
    with pytest.raises(RuntimeError, match="not started"):
        Once(InProcess()).submit(HALF)
