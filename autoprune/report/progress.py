"""How a search progressed: the best so far after each candidate, by what it was asked for. Plain numbers only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autoprune.pareto import dominates, front, hypervolume
from autoprune.report.data import Row, Run

__all__ = ["Progress", "progress"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How good the best candidate so far was, and the same measure of the control arms.

    Attributes:
        title: What is measured, for the axis.
        rising: Whether more is better.
        own: The value of each single candidate, None where it has none (a candidate outside the allowed drop).
        best: The best so far after 1, 2, … candidates; None before the first one that counts.
        uniform: That of the uniform arm; None where there is none.
        random: The best of the random arm.
    """

    title: str
    rising: bool
    own: Sequence[float | None]
    best: Sequence[float | None]
    uniform: float | None
    random: float | None


def progress(run: Run) -> Progress:
    """Return the course of the search, measured by what it was asked for.

    With a largest drop: the fewest MACs within it. With a budget: the best accuracy (each candidate meets the budget by
    construction). With neither: the hypervolume of the front.
    """
    drop, dense = run.search.get("max_drop"), run.dense_as_searched
    if drop is not None and {"accuracy", "macs"} <= dense.keys():
        floor, cost = dense["accuracy"] - drop - 1e-9, dense["macs"]
        return _running(
            run,
            f"MACs relative to dense, within a drop of {100 * drop:g} points",
            lambda row: 100 * row.macs / cost if row.accuracy >= floor else None,
            rising=False,
        )
    if run.search.get("budget") is None and {"macs", "params"} <= dense.keys():
        return _hypervolumes(run)
    return _running(run, "validation accuracy", lambda row: 100 * row.accuracy, rising=True)


def _running(run: Run, title: str, value: Callable[[Row], float | None], *, rising: bool) -> Progress:
    best_of = max if rising else min
    own = [value(row) for row in run.arm("search")]
    best: list[float | None] = []
    for number in own:
        seen = [known for known in (*best[-1:], number) if known is not None]
        best.append(best_of(seen, default=None))

    def of_arm(name: str) -> float | None:
        return best_of((known for row in run.arm(name) if (known := value(row)) is not None), default=None)

    return Progress(title, rising, own, best, of_arm("uniform"), of_arm("random"))


def _hypervolumes(run: Run) -> Progress:
    reference = {"accuracy": 0.0, "macs": run.dense["macs"], "params": run.dense["params"]}
    members: list[Row] = []
    best: list[float | None] = []
    for row in run.arm("search"):
        if not any(dominates(member, row) for member in members):
            members = front([*members, row])
        best.append(hypervolume(members, reference))

    def of_arm(name: str) -> float | None:
        return hypervolume(run.arm(name), reference) if run.arm(name) else None

    return Progress("hypervolume of the front", True, [None] * len(best), best, of_arm("uniform"), of_arm("random"))
