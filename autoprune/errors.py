"""Every exception and warning of the package; what a caller would catch has one class.

::

    AutopruneError
    ├── ConfigError (ValueError)           something the caller wrote is wrong
    │   ├── UnknownNameError (LookupError) no model, data set, agent, ... of that name
    │   ├── PolicyError                    a sparsity outside [0, 1), an unknown group
    │   └── BudgetError                    a budget that can't be read
    │       └── InfeasibleBudgetError      a budget that no policy of this network meets
    ├── TaskError (ValueError)             the model or the data can't be worked with
    │   ├── SplitError                     empty, overlapping or unreadable data
    │   ├── WeightsError                   weights that don't fit the network
    │   └── TestSetError                   the test set was asked for by other than the finaliser, or twice
    ├── StructureError (RuntimeError)      the network's dependencies could not be found
    ├── DivergedError (FloatingPointError) a loss is not finite
    ├── ExecutorError (RuntimeError)       no worker can be had, or a process died
    ├── RunError (RuntimeError)            a run's folder can't be written, or holds something else
    └── SearchOver                         not an error: tells an agent that its evaluations are spent

    AutopruneWarning (UserWarning)
    ├── NoEffectWarning                    an operation that changed nothing
    ├── RecoveryWarning                    recovery itself costs the dense network accuracy
    ├── UncountedOperatorWarning           an operator the cost model does not know
    └── TrackingWarning                    the tracking server can't be used; the search goes on
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "AutopruneError",
    "AutopruneWarning",
    "BudgetError",
    "ConfigError",
    "DivergedError",
    "ExecutorError",
    "InfeasibleBudgetError",
    "NoEffectWarning",
    "PolicyError",
    "RecoveryWarning",
    "RunError",
    "SearchOver",
    "SplitError",
    "StructureError",
    "TaskError",
    "TestSetError",
    "TrackingWarning",
    "UncountedOperatorWarning",
    "UnknownNameError",
    "WeightsError",
]


class AutopruneError(Exception):
    """Base of everything raised on purpose; its message is one line that says the way out."""


class ConfigError(AutopruneError, ValueError):
    """Something the caller wrote is wrong."""


class UnknownNameError(ConfigError, LookupError):
    """No member of a family has the name asked for; the message names the nearest and lists all."""

    def __init__(self, family: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        super().__init__(f"no {family} '{name}'.{hint} Known: {', '.join(names) or 'none'}")


class PolicyError(ConfigError):
    """A sparsity outside [0, 1), or a group that the network does not have."""


class BudgetError(ConfigError):
    """A budget that can't be read."""


class InfeasibleBudgetError(BudgetError):
    """A budget that no policy of this network meets within its bounds."""


class TaskError(AutopruneError, ValueError):
    """The model or the data can't be worked with."""


class SplitError(TaskError):
    """Data that is empty, unreadable, or shared between splits."""


class WeightsError(TaskError):
    """Weights that don't fit the network."""


class TestSetError(TaskError):
    """The test set was asked for by other than the finaliser, or a second time."""

    __test__ = False  # keeps pytest from collecting it


class StructureError(AutopruneError, RuntimeError):
    """The network's dependencies could not be found."""


class DivergedError(AutopruneError, FloatingPointError):
    """A loss is not finite; a search records the candidate as failed and goes on."""


class ExecutorError(AutopruneError, RuntimeError):
    """No worker can be had to run evaluations, a process that ran a search died, or a task can't be sent to either."""


class RunError(AutopruneError, RuntimeError):
    """A run's folder can't be written, or holds something else than what is asked for."""


class SearchOver(AutopruneError):
    """Tells an agent that its evaluations or its time are spent; the search loop catches it."""


class AutopruneWarning(UserWarning):
    """Base of every warning."""


class NoEffectWarning(AutopruneWarning):
    """An operation that changed nothing."""


class RecoveryWarning(AutopruneWarning):
    """What candidates are recovered with costs the dense network itself accuracy."""


class UncountedOperatorWarning(AutopruneWarning):
    """The network uses an operator that the cost model does not know."""


class TrackingWarning(AutopruneWarning):
    """The tracking server can't be used; the search goes on without it."""
