"""One pass over a split: scores and losses sample by sample, so that two networks can be compared in pairs."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from autoprune.evaluation.candidate import Measurement
from autoprune.evaluation.precision import Precision
from autoprune.inputs import evaluating

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

    def summary(self, fidelity: str) -> Measurement:
        """Return means and standard errors."""
        return Measurement(
            fidelity, float(self.scores.mean()), _error(self.scores), float(self.losses.mean()), _error(self.losses)
        )

    def drop_error(self, dense: "Samples") -> float:
        """Return the standard error of the mean score lost against another network on the same samples.

        Paired: what is hard for both cancels, so that it is smaller than the two errors suggest.
        """
        return _error(dense.scores - self.scores)


def _error(values: torch.Tensor) -> float:
    return float(values.std(correction=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    metric: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    precision: Precision | None = None,
) -> Samples:
    """Run a network over a split in eval mode; the mode of every module is restored.

    Args:
        model: The network.
        batches: `(inputs, targets)`; the last may be short, since samples are counted and not batches.
        metric: Per-sample score, `(outputs, targets) -> (n,)`.
        loss: Per-sample loss, `(outputs, targets) -> (n,)`.
        precision: What it runs in; as it is by default. Outputs are at least float32.
    """
    precision = precision or Precision()
    scores, losses = [], []
    with evaluating(model):
        for inputs, targets in batches:
            with precision.running(inputs.device):
                outputs = model(inputs)
            outputs = outputs.float() if precision.dtype != "float32" else outputs
            scores.append(metric(outputs, targets).cpu().double())
            losses.append(loss(outputs, targets).cpu().double())
    return Samples(torch.cat(scores), torch.cat(losses))
