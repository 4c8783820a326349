"""Batch-norm recalibration: the statistics of a sliced network measured anew, without touching a weight.

The cheapest recovery there is: slicing changes what every later batch-norm sees, and the dense network's averages are
wrong for it. The batches must be augmented as in training, since that is what the averages were made from.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from autoprune.inputs import evaluating
from autoprune.structure.copying import twin
from autoprune.threads import side_by_side

__all__ = ["recalibrate"]


def recalibrate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    running: Callable[[], AbstractContextManager[Any]] = nullcontext,
    threads: int = 1,
) -> None:
    """Replace the running statistics of every batch-norm, in place, by averages over the batches.

    Every sample weighs the same, however long its batch is: the means are those of all samples together, the variances
    the averages of those within the batches. All else stays in eval mode (dropout draws nothing). A network without
    batch-norm is left as it is.

    Args:
        model: The network; its mode is restored.
        batches: `(inputs, targets)`; batches of one sample are left out, since they have no variance.
        running: What the network runs under, as in `torch.autocast`.
        threads: Batches that run side by side, each in a thread of its own.
    """
    norms = _norms(model)
    if not norms:
        return
    several = [inputs for inputs, _ in batches if len(inputs) > 1] if threads > 1 else []
    shares: list[Iterable[torch.Tensor]] = [several[start::threads] for start in range(min(threads, len(several)))]
    shares = shares or [(inputs for inputs, _ in batches if len(inputs) > 1)]
    networks = [model, *(twin(model) for _ in shares[1:])]
    for norm in (norm for network in networks[1:] for norm in _norms(network)):
        norm.running_mean, norm.running_var = norm.running_mean.clone(), norm.running_var.clone()
        norm.num_batches_tracked = norm.num_batches_tracked.clone()
    seen = side_by_side([partial(_average, *pair, running) for pair in zip(networks, shares, strict=True)])
    with torch.no_grad():
        for same in zip(*map(_norms, networks), strict=True):
            for name in ("running_mean", "running_var") if len(same) > 1 else ():
                parts = [number / sum(seen) * getattr(norm, name) for norm, number in zip(same, seen, strict=True)]
                getattr(same[0], name).copy_(torch.stack(parts).sum(0))
            for norm in same[1:]:
                same[0].num_batches_tracked += norm.num_batches_tracked


@torch.no_grad()
def _average(model: nn.Module, inputs: Iterable[torch.Tensor], running: Callable[[], Any]) -> int:
    """Make the statistics of a network's batch-norms those of the inputs, and return how many samples these are."""
    norms = _norms(model)
    momenta = [norm.momentum for norm in norms]
    seen = 0
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        for batch in inputs:
            seen += len(batch)
            for norm in norms:
                norm.momentum = len(batch) / seen  # the newest batch's weight in torch's running average
            with running():
                model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return seen


def _norms(model: nn.Module) -> Sequence[Any]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
