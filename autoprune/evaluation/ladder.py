"""The ladder of fidelities: many candidates are measured cheaply, few of them again after more and more fine-tuning.

Successive halving (Jamieson & Talwalkar 2016, https://arxiv.org/abs/1502.07943) after the agent has finished, so that
what an agent learns from is all of one fidelity. Nothing here evaluates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from autoprune.evaluation.candidate import Candidate
from autoprune.pareto import sorted_by_layers

__all__ = ["FEWEST", "Rung", "best", "rungs"]

FEWEST: Final = 4
"""Candidates below which no rung is worth the time: measuring tells so few apart as they are."""


@dataclass(frozen=True, slots=True)
class Rung:
    """A fidelity above the first.

    Attributes:
        level: 1 for the lowest.
        steps: Gradient steps of fine-tuning.
        candidates: How many of the agent's are promoted to it, at most.
    """

    level: int
    steps: int
    candidates: int


def rungs(candidates: int, steps: int, promote: float) -> tuple[Rung, ...]:
    """Return the rungs that candidates climb: each has the share `promote` of them, for as much longer.

    So each takes about as long as the one below it. None, where all are fine-tuned as they are proposed.

    Args:
        candidates: On the ground.
        steps: Gradient steps of the first rung.
        promote: In (0, 0.5], or 1.
    """
    found: list[Rung] = []
    while steps > 0 and promote < 1 and (candidates := int(promote * candidates + 1e-9)) >= FEWEST:
        found.append(Rung(len(found) + 1, round(steps / promote ** len(found)), candidates))
    return tuple(found)


def best(
    candidates: Sequence[Candidate], number: int, value: Callable[[Candidate], float] | None = None
) -> list[Candidate]:
    """Return the candidates to promote, the best first.

    Args:
        candidates: Measured ones.
        number: How many.
        value: What is to be raised; None, where accuracy is traded for cost: then layer by layer of non-dominated ones
            (see `autoprune.pareto.sorted_by_layers`).
    """
    if value is None:
        return sorted_by_layers(candidates, {"accuracy": "max", "macs": "min"})[:number]
    return sorted(candidates, key=lambda candidate: (-value(candidate), candidate.macs, candidate.id))[:number]
