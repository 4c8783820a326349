"""What a policy costs: exact formulas and the count that checks them, measured time, budgets and what meets them."""

from autoprune.cost.budget import METRICS, Budget, Limit
from autoprune.cost.count import Cost, Count, count
from autoprune.cost.feasible import FeasibleSet
from autoprune.cost.formula import Call, CostModel, Removed
from autoprune.cost.latency import Latency, compare, measure_latency
from autoprune.cost.latency_table import LatencyErrors, LatencyTable, check
from autoprune.cost.sparse import SparseSpeed, compare_sparse, sparse_execution

__all__ = [
    "METRICS",
    "Budget",
    "Call",
    "Cost",
    "CostModel",
    "Count",
    "FeasibleSet",
    "Latency",
    "LatencyErrors",
    "LatencyTable",
    "Limit",
    "Removed",
    "SparseSpeed",
    "check",
    "compare",
    "compare_sparse",
    "count",
    "measure_latency",
    "sparse_execution",
]
