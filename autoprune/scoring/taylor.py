"""First-order Taylor: how the loss would change (Molchanov et al. 2017, https://arxiv.org/abs/1611.06440, eq. 5-7)."""

import copy
from collections.abc import Mapping
from typing import final

import torch
from torch import nn

from autoprune.scoring.base import Evidence, Scores, per_element
from autoprune.structure import Structure

__all__ = ["Taylor", "taylor_scores"]


@final
class Taylor:
    """Scores an element by the change of the loss that its removal causes, to first order.

    Removing an element means zeroing the weights that read it, so the change is the sum of gradient times weight over
    exactly those weights, `|Σ ∂L/∂w · w|`; the absolute value is taken a batch and averaged over batches. Molchanov et
    al. write it in activations, which is the same sum for one reader; for a coupled group it runs over all readers.
    """

    def score(self, model: nn.Module, structure: Structure, evidence: Evidence) -> Scores:
        """Return the expected changes of the loss, in its units."""
        return taylor_scores(model, structure, evidence)


def taylor_scores(model: nn.Module, structure: Structure, evidence: Evidence) -> Scores:
    """Return `(size,)` expected absolute changes of the mean loss, by group.

    One forward and backward pass a batch, with batch-norm in eval mode, on a copy of the network.
    """
    copied = copy.deepcopy(model).eval()
    parameters = dict(copied.named_parameters())
    read = sorted({part.tensor for group in structure for part in group.slices if part.role == "read"})
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    for name in read:
        parameters[name].requires_grad_(True)
    totals = {group.name: torch.zeros(group.size) for group in structure}
    if not read:
        return totals
    seen = 0
    for inputs, targets in evidence.batches:
        loss = evidence.loss(copied(inputs), targets).mean()
        gradients = torch.autograd.grad(loss, [parameters[name] for name in read])
        products = {name: (g * parameters[name]).detach() for name, g in zip(read, gradients, strict=True)}
        for name, change in _changes(structure, products).items():
            totals[name] += len(targets) * change.abs().cpu()
        seen += len(targets)
    return {name: total / max(1, seen) for name, total in totals.items()}


def _changes(structure: Structure, products: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `(size,)` sums of gradient times weight over the weights that read each element."""
    return {
        group.name: torch.stack(
            [per_element(products[part.tensor], part) for part in group.slices if part.role == "read"]
        ).sum(0)
        for group in structure
    }
