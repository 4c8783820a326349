"""AutoML pruning policy search for PyTorch: how much to remove from each layer, found, proven and handed back."""

from autoprune._version import __version__
from autoprune.compare import Comparison, compare
from autoprune.evaluation import Candidate
from autoprune.export import load
from autoprune.finaliser import PrunedNetwork
from autoprune.policy import Policy
from autoprune.result import SearchResult, open_run
from autoprune.search import search
from autoprune.settings import SearchSettings
from autoprune.task import Task

__all__ = [
    "Candidate",
    "Comparison",
    "Policy",
    "PrunedNetwork",
    "SearchResult",
    "SearchSettings",
    "Task",
    "__version__",
    "compare",
    "load",
    "open_run",
    "search",
]
