"""Where evaluations run: the protocol, and the plain way, here and one after another. Nothing here records."""

from collections import deque
from typing import Any, Protocol, final

import torch

from autoprune.errors import ConfigError
from autoprune.evaluation.pipeline import Outcome

__all__ = ["Executor", "InProcess", "Runs", "Work"]


class Work(Protocol):
    """What a pipeline runs on: a policy, raced or not, or a probe; it must pickle where there are other processes."""

    @property
    def id(self) -> str:
        """Tells it from other work."""
        ...


class Runs(Protocol):
    """What executors need of a pipeline; it must pickle where they have other processes."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def __call__(self, work: Any, /) -> Outcome:
        """Return what comes of a policy or a probe, the same wherever it runs."""
        ...


class Executor(Protocol):
    """Runs a pipeline on policies; which of those under way is done first does not matter to a search.

    `autoprune.testing.ExecutorContract` checks an executor.

    Attributes:
        at_once: Policies that should be under way to keep it busy; it takes any number. A search depends on it: it is
            how many policies an agent proposes before it knows what became of the first.
    """

    @property
    def at_once(self) -> int:
        """See the class."""
        ...

    def start(self, pipeline: Runs) -> None:
        """Make ready to run a pipeline; called before anything is submitted, and again after `close`.

        Also called with another pipeline, on the same device, while nothing is under way: what is up may stay so.
        """
        ...

    def submit(self, work: Work) -> None:
        """Begin with a policy or a probe; none is submitted again while it is under way."""
        ...

    def finished(self) -> Outcome:
        """Wait until one of the policies under way is done, and return what came of it, once.

        What the pipeline raises is raised here. A worker that is lost is not an error: its work is done elsewhere.
        """
        ...

    def close(self) -> None:
        """Drop what is under way and let go of all resources; may be called at any time, and twice."""
        ...


@final
class InProcess:
    """Runs policies in this process, one after another; see `Executor`.

    Args:
        at_once: Policies that may be under way, all but one of which wait. More than 1 repeats here a search that had
            workers.

    Raises:
        ConfigError: `at_once` is below 1.
    """

    def __init__(self, at_once: int = 1) -> None:
        if at_once < 1:
            raise ConfigError(f"`at_once >= 1` must hold, but got at_once={at_once}")
        self.at_once = at_once
        self._pipeline: Runs | None = None
        self._waiting: deque[Work] = deque()

    def start(self, pipeline: Runs) -> None:
        """Take the pipeline."""
        self._pipeline = pipeline

    def submit(self, work: Work) -> None:
        """Put work in line."""
        self._waiting.append(work)

    def finished(self) -> Outcome:
        """Do the work that waits longest."""
        if self._pipeline is None:
            raise RuntimeError("the executor was not started")
        return self._pipeline(self._waiting.popleft())

    def close(self) -> None:
        """Forget what waits."""
        self._waiting.clear()
