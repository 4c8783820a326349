"""Executors: whatever is done first, each policy comes back once, and a search does not depend on it."""

import random
import time
from collections.abc import Callable

import pytest

from autoprune.errors import ConfigError, SearchOver
from autoprune.evaluation import Arm, Candidate, Evaluator, Executor, InProcess, Outcome, Recovery, Runs
from autoprune.policy import Policy
from autoprune.task import Task
from autoprune.testing import ExecutorContract, SyntheticPipeline

Make = Callable[..., Evaluator]


class Shuffled:
    """Has several under way and finishes any of them."""

    def __init__(self, at_once: int, seed: int) -> None:
        self.at_once = at_once
        self.most = 0
        self._random = random.Random(seed)
        self._under_way: list[Policy] = []

    def start(self, pipeline: Runs) -> None:
        self._pipeline = pipeline

    def submit(self, policy: Policy) -> None:
        self._under_way.append(policy)
        self.most = max(self.most, len(self._under_way))

    def finished(self) -> Outcome:
        return self._pipeline(self._under_way.pop(self._random.randrange(len(self._under_way))))

    def close(self) -> None:
        self._under_way.clear()


class TestInProcess(ExecutorContract):
    @pytest.fixture
    def executor(self) -> Executor:
        return InProcess()

    def test_it_runs_in_line(self, executor: Executor) -> None:
        executor.start(SyntheticPipeline())
        policies = [Policy({"a": number / 10}) for number in (3, 1, 2)]
        for policy in policies:
            executor.submit(policy)
        assert [executor.finished().id for _ in policies] == [policy.id for policy in policies]

    def test_it_is_started_first(self) -> None:
        with pytest.raises(RuntimeError, match="was not started"):
            InProcess().finished()

    def test_at_once_is_positive(self) -> None:
        with pytest.raises(ConfigError, match=r"`at_once >= 1` must hold, but got at_once=0"):
            InProcess(at_once=0)


class TestShuffled(ExecutorContract):
    @pytest.fixture
    def executor(self) -> Executor:
        return Shuffled(5, 0)


class Forgetful(Shuffled):
    """Returns the same policy again and again."""

    def finished(self) -> Outcome:
        return self._pipeline(self._under_way[0])


class Swallowing(Shuffled):
    """Makes a failure of what the pipeline raises."""

    def finished(self) -> Outcome:
        policy = self._under_way.pop()
        try:
            return self._pipeline(policy)
        except ValueError as error:
            return Outcome(policy.id, (), 0.0, str(error))


class Lasting(Shuffled):
    """Still has what was dropped."""

    def close(self) -> None:
        self._under_way.reverse()

    def finished(self) -> Outcome:
        return self._pipeline(self._under_way.pop(0))


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (Forgetful, ExecutorContract.test_each_policy_comes_back_once),
        (Swallowing, ExecutorContract.test_what_the_pipeline_raises_is_raised),
        (Lasting, ExecutorContract.test_it_can_be_closed_at_any_time_and_started_again),
    ],
)
def test_the_contract_finds_broken_executors(
    broken: type[Shuffled], test: Callable[[ExecutorContract, Executor], None]
) -> None:
    with pytest.raises(AssertionError):
        test(ExecutorContract(), broken(3, 0))


# ------------------------------------------------------------------------------------------------------ the evaluator


def policies(count: int) -> list[Policy]:
    return [Policy({"conv1": number / 8, "conv2": second / 8}) for number in range(8) for second in (0, 1)][:count]


def timeless(candidate: Candidate) -> dict[str, object]:
    return candidate.to_dict() | {"seconds": 0.0}


@pytest.fixture
def make(task: Task, make_evaluator: Make) -> Callable[[Executor | None], Evaluator]:
    def made(executor: Executor | None) -> Evaluator:
        plain = make_evaluator(task, Recovery(50, 0))
        return Evaluator(plain.pipeline, plain.costs, plain.ledger, executor)

    return made


def test_what_is_done_first_makes_no_difference(make: Callable[[Executor | None], Evaluator]) -> None:
    plain = make(None)
    for policy in policies(10):
        plain.evaluate(policy, arm="search", agent="tpe")
    for seed in range(3):
        executor = Shuffled(4, seed)
        evaluator = make(executor)
        results = [evaluator.submit(policy, arm="search", agent="tpe") for policy in policies(10)]
        assert [timeless(result()) for result in results] == [timeless(c) for c in plain.ledger]
        assert [timeless(c) for c in evaluator.ledger] == [timeless(c) for c in plain.ledger]
        assert executor.most == 4


def test_a_policy_under_way_is_not_begun_again(make: Callable[[Executor | None], Evaluator]) -> None:
    evaluator = make(InProcess(at_once=4))
    first, second = (evaluator.submit(policies(1)[0], arm=arm, agent="a") for arm in ("search", "random"))
    assert second() is first()
    assert len(evaluator.ledger) == 1


def test_a_candidate_is_on_disk_and_watched_before_its_result_is_taken(
    make: Callable[[Executor | None], Evaluator],
) -> None:
    evaluator = make(InProcess(at_once=2))
    watched: list[int] = []
    evaluator.watch = lambda candidate: watched.append(candidate.number)
    for policy in policies(5):
        evaluator.submit(policy, arm="search", agent="a")
    assert watched == [0, 1, 2]  # two are under way, and nobody took anything
    assert [c.number for c in evaluator.ledger] == watched
    evaluator.evaluate(policies(1)[0], arm="search", agent="a")
    assert watched == [0, 1, 2]  # known before
    evaluator.close()
    assert len(evaluator.ledger) == 3


def test_what_was_found_in_the_ledger_is_watched_once(make: Callable[[Executor | None], Evaluator]) -> None:
    evaluator = make(None)
    evaluator.evaluate(policies(1)[0], arm="search", agent="a")
    again = Evaluator(evaluator.pipeline, evaluator.costs, evaluator.ledger)
    watched: list[int] = []
    again.watch = lambda candidate: watched.append(candidate.number)
    for _ in range(2):
        again.evaluate(policies(1)[0], arm="search", agent="a")
    assert watched == [0]


def test_what_was_lost_is_numbered_as_before(make: Callable[[Executor | None], Evaluator]) -> None:
    """Killed with the second of four not done: the replay gives it its number."""
    whole = make(None)
    for policy in policies(4):
        whole.evaluate(policy, arm="search", agent="a")
    partly = make(None)
    for number in (0, 2, 3):
        partly.ledger.append(list(whole.ledger)[number])
    for policy in policies(4):
        partly.evaluate(policy, arm="search", agent="a")
    assert [timeless(c) for c in partly.ledger] == [timeless(c) for c in whole.ledger]


def test_a_closed_evaluator_goes_on_in_this_process(make: Callable[[Executor | None], Evaluator]) -> None:
    evaluator = make(Shuffled(4, 0))
    evaluator.submit(policies(1)[0], arm="search", agent="a")
    evaluator.close()
    assert isinstance(evaluator.executor, InProcess)
    assert evaluator.evaluate(policies(1)[0], arm="search", agent="a").number == 1  # number 0 was dropped


def test_an_executor_is_left_to_another_evaluator_when_nothing_is_under_way(
    make: Callable[[Executor | None], Evaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = Shuffled(4, 0)
    monkeypatch.setattr(executor, "close", lambda: pytest.fail("it was closed"))
    evaluator = make(executor)
    result = evaluator.submit(policies(1)[0], arm="search", agent="a")
    with pytest.raises(RuntimeError, match="evaluations are under way"):
        evaluator.leave()
    result()
    evaluator.leave()
    assert isinstance(evaluator.executor, InProcess)
    assert evaluator.evaluate(policies(2)[1], arm="search", agent="a").number == 1


class Interrupted(Shuffled):
    """Is interrupted once."""

    interrupted = False

    def finished(self) -> Outcome:
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        return super().finished()


def test_what_was_interrupted_can_be_evaluated_again(make: Callable[[Executor | None], Evaluator]) -> None:
    evaluator = make(Interrupted(2, 0))
    dropped = evaluator.submit(policies(2)[1], arm="search", agent="a")
    with pytest.raises(KeyboardInterrupt):
        evaluator.evaluate(policies(1)[0], arm="search", agent="a")
    assert len(evaluator.ledger) == 0
    assert evaluator.evaluate(policies(1)[0], arm="search", agent="a").failure is None
    with pytest.raises(RuntimeError, match="this evaluation was dropped"):
        dropped()


class TestArm:
    def test_room_is_made_before_the_clock_is_read(
        self, make: Callable[[Executor | None], Evaluator], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An agent that takes no results begins nothing after the deadline either."""
        now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: now)
        evaluator = make(None)
        begun: list[float] = []

        def measuring(candidate: Candidate) -> None:
            nonlocal now
            begun.append(now)
            now += 10.0

        evaluator.watch = measuring
        arm = Arm(evaluator, "random", "random", 8, deadline=25.0)
        with pytest.raises(SearchOver, match="time limit"):
            list(map(arm.submit, policies(8)))
        arm.drain()
        assert begun == [0.0, 10.0, 20.0]

    def test_it_counts_what_was_begun(self, make: Callable[[Executor | None], Evaluator]) -> None:
        evaluator = make(InProcess(at_once=8))
        arm = Arm(evaluator, "search", "tpe", 3)
        for policy in policies(3):
            arm.submit(policy)
        with pytest.raises(SearchOver, match="all evaluations are spent"):
            arm.submit(policies(4)[3])
        assert not arm.candidates
        arm.drain()
        assert [c.policy["conv1"] for c in arm.candidates.values()] == [0.0, 0.0, 0.125]
        assert len(evaluator.ledger) == 3

    def test_a_policy_under_way_is_a_repetition(self, make: Callable[[Executor | None], Evaluator]) -> None:
        arm = Arm(make(InProcess(at_once=8)), "search", "tpe", 3)
        results = [arm.submit(policies(1)[0]) for _ in range(5)]
        assert len({result().id for result in results}) == 1
        assert len(arm.candidates) == 1

    def test_what_is_under_way_at_the_deadline_is_finished(self, make: Callable[[Executor | None], Evaluator]) -> None:
        arm = Arm(make(InProcess(at_once=8)), "search", "tpe", 3, deadline=time.monotonic() + 0.2)
        arm.submit(policies(1)[0])
        time.sleep(0.25)
        with pytest.raises(SearchOver, match="time limit"):
            arm.submit(policies(2)[1])
        arm.drain()
        assert len(arm.candidates) == 1
