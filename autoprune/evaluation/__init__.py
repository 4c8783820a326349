"""What a policy is worth: slicing, recovery and measurement of candidates, cached and recorded."""

from autoprune.evaluation.candidate import RUNGS, Candidate, Measurement
from autoprune.evaluation.evaluator import TIME_LIMIT, Arm, Evaluator, Recovery, Workbench
from autoprune.evaluation.ledger import Ledger
from autoprune.evaluation.measure import Samples, measure

__all__ = [
    "RUNGS",
    "TIME_LIMIT",
    "Arm",
    "Candidate",
    "Evaluator",
    "Ledger",
    "Measurement",
    "Recovery",
    "Samples",
    "Workbench",
    "measure",
]
