"""One pass over a split: scores and losses sample by sample, so that two networks can be compared in pairs."""

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from autoprune.evaluation.candidate import Measurement
from autoprune.evaluation.precision import Precision
from autoprune.inputs import evaluating
from autoprune.threads import side_by_side

__all__ = ["Samples", "measure"]


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """What a network did on every sample of a split.

    Attributes:
        scores: `(n,)` float64, the task's metric, higher is better.
        losses: `(n,)` float64.
    """

    scores: torch.Tensor
    losses: torch.Tensor

    def __len__(self) -> int:
        return len(self.scores)

    def joined(self, others: "Samples") -> "Samples":
        """Return these samples and then others."""
        return Samples(torch.cat([self.scores, others.scores]), torch.cat([self.losses, others.losses]))

    def summary(self, fidelity: str, rival: "Samples | None" = None) -> Measurement:
        """Return means and standard errors.

        Args:
            fidelity: Of the network.
            rival: What another network did on these samples and more: the means are then its own and how far this
                network differs on the samples that both have, since what they are together easy or hard cancels.
        """
        if rival is None or len(rival) == len(self):
            accuracy, accuracy_se = float(self.scores.mean()), _error(self.scores)
            loss, loss_se = float(self.losses.mean()), _error(self.losses)
            return Measurement(fidelity, accuracy, accuracy_se, loss, loss_se)
        accuracy, accuracy_se = _beside(self.scores, rival.scores)
        loss, loss_se = _beside(self.losses, rival.losses)
        return Measurement(fidelity, accuracy, accuracy_se, loss, loss_se, samples=len(self))

    def drop_error(self, dense: "Samples") -> float:
        """Return the standard error of the mean score lost against another network on the same samples.

        Paired: what is hard for both cancels, so that it is smaller than the two errors suggest.
        """
        return _error(dense.scores - self.scores)


def _beside(some: torch.Tensor, all_of_other: torch.Tensor) -> tuple[float, float]:
    differences = some - all_of_other[: len(some)]
    error = math.hypot(_error(all_of_other), _error(differences))
    return float(all_of_other.mean() + differences.mean()), error


def _error(values: torch.Tensor) -> float:
    return float(values.std(correction=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def measure(
    model: nn.Module,
    batches: Iterable[tuple[Any, torch.Tensor]],
    metric: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    precision: Precision | None = None,
    twins: Sequence[nn.Module] = (),
) -> Samples:
    """Run a network over a split in eval mode; the mode of every module is restored.

    Args:
        model: The network.
        batches: `(inputs, targets)`; the last may be short, since samples are counted and not batches.
        metric: Per-sample score, `(outputs, targets) -> (n,)`.
        loss: Per-sample loss, `(outputs, targets) -> (n,)`.
        precision: What it runs in; as it is by default. Outputs are at least float32.
        twins: Networks that do the same; all take batches in turn, each in a thread of its own.
    """
    precision = precision or Precision()
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    ahead, one_at_a_time = enumerate(batches), threading.Lock()

    @torch.no_grad()
    def run(network: nn.Module) -> None:
        while True:
            with one_at_a_time:
                number, (inputs, targets) = next(ahead, (-1, (None, torch.empty(0))))
            if number < 0:
                return
            with precision.running(targets.device):
                outputs = network(inputs)
            outputs = outputs.float() if precision.dtype != "float32" else outputs
            with one_at_a_time:  # these are the user's, who may not have thought of threads
                found[number] = metric(outputs, targets).double(), loss(outputs, targets).double()

    networks = (model, *twins)
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(evaluating(network))
        side_by_side([partial(run, network) for network in networks])
    scores, losses = zip(*(found[number] for number in sorted(found)), strict=True)
    return Samples(torch.cat(scores).cpu(), torch.cat(losses).cpu())  # at the end: an accelerator is waited for once
