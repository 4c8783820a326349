"""`Candidate`: a policy with what was measured of it, a record that goes to JSON and back. Nothing here measures."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from autoprune.cost import Cost
from autoprune.policy import Policy

__all__ = ["ARMS", "FIDELITIES", "RUNGS", "Candidate", "Measurement"]

FIDELITIES = ("recalibrated", "reconstructed", "short", "full")
"""How far weights were recovered before they were measured, least first."""

RUNGS = FIDELITIES[:2]
"""Ways to recover without a gradient."""

ARMS = ("search", "uniform", "random")
"""Why a candidate was evaluated: proposed by the agent, or as one of the two controls."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one pass over the validation set gave.

    Attributes:
        fidelity: One of `FIDELITIES`.
        accuracy: Mean of the task's metric over the samples, higher is better.
        accuracy_se: Its standard error.
        loss: Mean loss.
        loss_se: Its standard error.
        steps: Gradient steps before it.
        samples: On which it was stopped, clearly worse than a rival (see `autoprune.evaluation.race`); the accuracy and
            loss are then estimates. None: all.
    """

    fidelity: str
    accuracy: float
    accuracy_se: float
    loss: float
    loss_se: float
    steps: int = 0
    samples: int | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy with what was measured of it, at a stated fidelity.

    Attributes:
        number: Position in the order of proposal.
        id: The policy's id.
        arm: One of `ARMS`.
        agent: Name of the agent that proposed it.
        policy: Sparsities, exactly those of the counts removed.
        removed: Elements removed from every group.
        cost: Exact cost.
        measurements: One a rung, least recovered first; the last is what counts.
        seconds: Time that the evaluation took.
        failure: Why it failed, or None.
        rival: Id of the policy that it was raced against (see `autoprune.evaluation.race`), or None.
    """

    number: int
    id: str
    arm: str
    agent: str
    policy: Policy
    removed: Mapping[str, int]
    cost: Cost
    measurements: tuple[Measurement, ...]
    seconds: float
    failure: str | None = None
    rival: str | None = None

    @property
    def accuracy(self) -> float:
        """Accuracy at the highest fidelity reached; NaN if it failed."""
        return math.nan if self.failure is not None else self.measurements[-1].accuracy

    @property
    def accuracy_se(self) -> float:
        """Standard error of `accuracy`; NaN if it failed."""
        return math.nan if self.failure is not None else self.measurements[-1].accuracy_se

    @property
    def loss(self) -> float:
        """Loss at the highest fidelity reached; NaN if it failed."""
        return math.nan if self.failure is not None else self.measurements[-1].loss

    @property
    def fidelity(self) -> str:
        """The highest fidelity reached; "none" if nothing was measured."""
        return self.measurements[-1].fidelity if self.measurements else "none"

    @property
    def steps(self) -> int:
        """Gradient steps before the last measurement."""
        return self.measurements[-1].steps if self.measurements else 0

    @property
    def stopped(self) -> bool:
        """Whether a race ended before all samples were measured, so that the accuracy is an estimate."""
        return bool(self.measurements) and self.measurements[-1].samples is not None

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.cost.macs

    @property
    def params(self) -> int:
        """Parameters."""
        return self.cost.params

    def at(self, fidelity: str) -> Measurement | None:
        """Return what was measured at a fidelity, if it was."""
        return next((m for m in self.measurements if m.fidelity == fidelity), None)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary, as one line of the ledger holds it."""
        return {
            "number": self.number,
            "id": self.id,
            "arm": self.arm,
            "agent": self.agent,
            "policy": dict(self.policy),
            "removed": dict(self.removed),
            **self.cost.to_dict(),
            "measurements": [asdict(m) for m in self.measurements],
            "seconds": self.seconds,
            "failure": self.failure,
            "rival": self.rival,
        }

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        return cls(
            number=line["number"],
            id=line["id"],
            arm=line["arm"],
            agent=line["agent"],
            policy=Policy(line["policy"]),
            removed=dict(line["removed"]),
            cost=Cost.from_dict(line),
            measurements=tuple(Measurement(**m) for m in line["measurements"]),
            seconds=line["seconds"],
            failure=line["failure"],
            rival=line.get("rival"),
        )
