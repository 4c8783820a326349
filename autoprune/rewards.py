"""What an agent with one objective is to raise: one pure function each, of what was measured of a candidate.

AMC (He et al. 2018, https://arxiv.org/abs/1802.03494, section 3.4) has two protocols. Resource-constrained: the budget
is met by construction, and the reward is the accuracy. Accuracy-guaranteed: no budget; the reward, -error * log(cost),
lets little go where it costs accuracy and much where it doesn't.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from autoprune.evaluation import Candidate

__all__ = ["PROTOCOLS", "WEIGHED", "Reward", "accuracy", "error_log_macs", "error_log_params", "within_drop"]

Reward = Callable[[Candidate], float]


def accuracy(candidate: Candidate) -> float:
    """Return the accuracy (AMC, equation 4)."""
    return candidate.accuracy


def error_log_macs(candidate: Candidate) -> float:
    """Return -error * log(MACs) (AMC, equation 5); for an accuracy in [0, 1]."""
    return -(1 - candidate.accuracy) * math.log(max(2, candidate.macs))


def error_log_params(candidate: Candidate) -> float:
    """Return -error * log(parameters) (AMC, equation 6); for an accuracy in [0, 1]."""
    return -(1 - candidate.accuracy) * math.log(max(2, candidate.params))


def within_drop(wanted: float, dense_macs: int) -> Reward:
    """Return the reward where some loss of accuracy is tolerated.

    How far the accuracy falls below what is wanted, as a negative number; once it does not, the share of the
    multiply-adds saved.

    Args:
        wanted: The lowest accuracy that is tolerated.
        dense_macs: Multiply-adds of the dense network.
    """

    def reward(candidate: Candidate) -> float:
        missing = wanted - candidate.accuracy
        return -missing if missing > 1e-9 else 1.0 - candidate.macs / dense_macs

    return reward


PROTOCOLS: Final[Mapping[str, Reward]] = MappingProxyType(
    {"resource": accuracy, "accuracy": error_log_macs, "accuracy-params": error_log_params}
)
"""AMC's protocols by name; the second for multiply-adds and for parameters."""

WEIGHED: Final[Mapping[str, str]] = MappingProxyType(
    {"accuracy": "-error * log(MACs)", "accuracy-params": "-error * log(parameters)"}
)
"""The protocols whose reward weighs accuracy against cost, so that it is picked by too, and that reward in words."""
