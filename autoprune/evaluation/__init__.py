"""What a policy is worth: slicing, recovery and measurement of candidates, cached and recorded."""

from autoprune.evaluation.candidate import RUNGS, Candidate, Measurement
from autoprune.evaluation.evaluator import TIME_LIMIT, Arm, Evaluator, Result
from autoprune.evaluation.executor import Executor, InProcess, Runs, Work
from autoprune.evaluation.ledger import Ledger
from autoprune.evaluation.measure import Samples, measure
from autoprune.evaluation.once import Once, outcomes
from autoprune.evaluation.pipeline import Outcome, Pipeline, Probe, Raced, Recovery
from autoprune.evaluation.precision import AGREEMENT, PRECISIONS, Choice, Precision, chosen
from autoprune.evaluation.workbench import Workbench

__all__ = [
    "AGREEMENT",
    "PRECISIONS",
    "RUNGS",
    "TIME_LIMIT",
    "Arm",
    "Candidate",
    "Choice",
    "Evaluator",
    "Executor",
    "InProcess",
    "Ledger",
    "Measurement",
    "Once",
    "Outcome",
    "Pipeline",
    "Precision",
    "Probe",
    "Raced",
    "Recovery",
    "Result",
    "Runs",
    "Samples",
    "Work",
    "Workbench",
    "chosen",
    "measure",
    "outcomes",
]
