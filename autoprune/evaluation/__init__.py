"""What a policy is worth: slicing, recovery and measurement of candidates, cached and recorded."""

from autoprune.evaluation.candidate import RUNGS, Candidate, Measurement
from autoprune.evaluation.evaluator import TIME_LIMIT, Arm, Evaluator, Recovery, Workbench
from autoprune.evaluation.ledger import Ledger
from autoprune.evaluation.measure import Samples, measure
from autoprune.evaluation.precision import AGREEMENT, PRECISIONS, Choice, Precision, chosen

__all__ = [
    "AGREEMENT",
    "PRECISIONS",
    "RUNGS",
    "TIME_LIMIT",
    "Arm",
    "Candidate",
    "Choice",
    "Evaluator",
    "Ledger",
    "Measurement",
    "Precision",
    "Recovery",
    "Samples",
    "Workbench",
    "chosen",
    "measure",
]
