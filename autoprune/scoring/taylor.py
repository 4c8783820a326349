"""First-order Taylor: how the loss would change (Molchanov et al. 2017, https://arxiv.org/abs/1611.06440, eq. 5-7)."""

import copy
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import nn

from autoprune.scoring.base import Evidence, Scores, per_element
from autoprune.structure import Group, Structure

__all__ = ["Taylor", "taylor_scores"]


@final
class Taylor:
    """Scores an element by the change of the loss that its removal causes, to first order.

    Removing an element means zeroing the weights that read it, so the change is the sum of gradient times weight over
    exactly those weights, `|Σ ∂L/∂w · w|`; the absolute value is taken a batch and averaged over batches. Molchanov et
    al. write it in activations, which is the same sum for one reader; for a coupled group it runs over all readers. Of
    a single weight it is `|∂L/∂w · w|`, and of a block `|Σ ∂L/∂y · (y − x)|` over its output y and input x.
    """

    def score(self, model: nn.Module, structure: Structure, evidence: Evidence) -> Scores:
        """Return the expected changes of the loss, in its units."""
        return taylor_scores(model, structure, evidence)


def taylor_scores(model: nn.Module, structure: Structure, evidence: Evidence) -> Scores:
    """Return expected absolute changes of the mean loss, by group, `(size,)` or in the shape of the zeroed weight.

    One forward and backward pass a batch, with batch-norm in eval mode, on a copy of the network.
    """
    copied = copy.deepcopy(model).eval()
    parameters = dict(copied.named_parameters())
    needed = sorted({tensor for group in structure for tensor in _needed(group)})
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    for name in needed:
        parameters[name].requires_grad_(True)
    passed = {group.block: _Passed(copied.get_submodule(group.block)) for group in structure if group.block is not None}
    totals = {group.name: _zeros(group, parameters) for group in structure}
    if not needed and not passed:
        return totals
    seen = 0
    for inputs, targets in evidence.batches:
        loss = evidence.loss(copied(inputs), targets).mean()
        values = [*(parameters[name] for name in needed), *(block.output for block in passed.values())]
        gradients = torch.autograd.grad(loss, values)
        products = {name: (g * parameters[name]).detach() for name, g in zip(needed, gradients, strict=False)}
        for block, gradient in zip(passed.values(), gradients[len(needed) :], strict=True):
            block.change = (gradient * block.added).sum().reshape(1)
        for group in structure:
            totals[group.name] += len(targets) * _change(group, products, passed).abs().cpu()
        seen += len(targets)
    return {name: total / max(1, seen) for name, total in totals.items()}


def _needed(group: Group) -> list[str]:
    if group.pattern is not None:
        return [group.pattern.tensor]
    return [part.tensor for part in group.slices if part.role == "read"]


def _zeros(group: Group, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.zeros(group.size if group.pattern is None else parameters[group.pattern.tensor].shape)


def _change(group: Group, products: Mapping[str, torch.Tensor], passed: Mapping[str, "_Passed"]) -> torch.Tensor:
    """Return the sums of gradient times weight over the weights that read each element, or what stands for them."""
    if group.pattern is not None:
        return products[group.pattern.tensor]
    if group.block is not None:
        return passed[group.block].change
    read = [per_element(products[part.tensor], part) for part in group.slices if part.role == "read"]
    return torch.stack(read).sum(0) if read else torch.zeros(group.size)


class _Passed:
    """What the last forward pass sent through a block."""

    def __init__(self, block: nn.Module) -> None:
        self.output = torch.empty(0)
        self.added = torch.empty(0)
        self.change = torch.zeros(1)
        self._source = torch.empty(0)
        block.register_forward_pre_hook(self._enter)
        block.register_forward_hook(self._leave)

    def _enter(self, block: nn.Module, args: Any) -> None:
        self._source = args[0].detach().clone()  # the block may add to it in place

    def _leave(self, block: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        self.added = output.detach() - self._source
        self.output = output if output.requires_grad else output.detach().requires_grad_()
        return self.output.clone()  # what follows may change it in place
