"""What a policy costs: exact formulas, the count that checks them, budgets, and the policies that meet them."""

from autoprune.cost.budget import METRICS, Budget, Limit
from autoprune.cost.count import Cost, Count, count
from autoprune.cost.feasible import FeasibleSet
from autoprune.cost.formula import CostModel, Removed

__all__ = ["METRICS", "Budget", "Cost", "CostModel", "Count", "FeasibleSet", "Limit", "Removed", "count"]
