"""Which elements matter least: one file a criterion, all over the whole coupled group, higher scores meaning keep."""

from autoprune.scoring.base import Criterion, Evidence, Orders, Scores, ascending, removal_orders, removals

__all__ = ["Criterion", "Evidence", "Orders", "Scores", "ascending", "removal_orders", "removals"]
