"""One executor for searches that differ in their agents alone: what one had evaluated, the others are told."""

from collections import deque
from collections.abc import Iterable
from typing import final

from autoprune.errors import ConfigError
from autoprune.evaluation.executor import Executor, Runs, Work
from autoprune.evaluation.ledger import Ledger
from autoprune.evaluation.pipeline import Outcome, work_id

__all__ = ["Once", "outcomes"]


@final
class Once:
    """Runs each policy once, in a race once against each rival, on another executor; see `Executor`.

    The pipelines that it is started with must give the same outcomes, as those of one task, seed and fidelity do: the
    first one goes on running until `stop`, so that workers need not be started for every search.

    Args:
        executor: Where policies run.
        known: Outcomes that are there already.
        at_once: Policies that may be under way; by default as many as the executor has.

    Attributes:
        known: Work id → outcome.

    Raises:
        ConfigError: `at_once` is below 1.
    """

    def __init__(self, executor: Executor, known: Iterable[Outcome] = (), at_once: int | None = None) -> None:
        self.at_once = executor.at_once if at_once is None else at_once
        if self.at_once < 1:
            raise ConfigError(f"`at_once >= 1` must hold, but got at_once={self.at_once}")
        self.known = {outcome.id: outcome for outcome in known}
        self._executor = executor
        self._pipeline: Runs | None = None
        self._running = False
        self._ready: deque[Outcome] = deque()
        self._under_way = 0

    def start(self, pipeline: Runs) -> None:
        """Take the pipeline; it is started when there is something to evaluate."""
        self._pipeline = pipeline

    def submit(self, work: Work) -> None:
        """Answer from what is known, or hand it on."""
        if work.id in self.known:
            self._ready.append(self.known[work.id])
            return
        if not self._running:
            if self._pipeline is None:
                raise RuntimeError("the executor was not started")
            self._executor.start(self._pipeline)
            self._running = True
        self._under_way += 1
        self._executor.submit(work)

    def finished(self) -> Outcome:
        """Return what is known, then what is done next."""
        if self._ready:
            return self._ready.popleft()
        self._under_way -= 1
        outcome = self._executor.finished()
        self.known[outcome.id] = outcome
        return outcome

    def close(self) -> None:
        """Drop what is under way; workers that have nothing to do are kept for the next search."""
        self._ready.clear()
        if self._under_way > 0:
            self.stop()

    def stop(self) -> None:
        """Let go of the executor; may be called at any time."""
        self._executor.close()
        self._running = False
        self._under_way = 0


def outcomes(ledgers: Iterable[Ledger]) -> list[Outcome]:
    """Return what came of the candidates that ledgers hold, for others to be told."""
    return [Outcome(work_id(c.id, c.rival), c.measurements, c.seconds, c.failure) for ledger in ledgers for c in ledger]
