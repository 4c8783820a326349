"""Batch-norm recalibration: the statistics of a sliced network measured anew, without touching a weight.

The cheapest recovery there is: slicing changes what every later batch-norm sees, and the dense network's averages are
wrong for it. The batches must be augmented as in training, since that is what the averages were made from.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from autoprune.inputs import evaluating

__all__ = ["recalibrate"]


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    running: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Replace the running statistics of every batch-norm, in place, by averages over the batches.

    Every sample weighs the same, however long its batch is: the means are those of all samples together, the variances
    the averages of those within the batches. All else stays in eval mode (dropout draws nothing). A network without
    batch-norm is left as it is.

    Args:
        model: The network; its mode is restored.
        batches: `(inputs, targets)`; batches of one sample are left out, since they have no variance.
        running: What the network runs under, as in `torch.autocast`.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        seen = 0
        for inputs, _ in batches:
            if len(inputs) > 1:
                seen += len(inputs)
                for norm in norms:
                    norm.momentum = len(inputs) / seen  # the newest batch's weight in torch's running average
                with running():
                    model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
