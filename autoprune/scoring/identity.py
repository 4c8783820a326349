"""Function norm of blocks: how far each is from the identity (Lin et al. 2020, https://arxiv.org/abs/2010.01791)."""

import copy
from typing import Any, final

import torch
from torch import nn

from autoprune.scoring.base import Evidence, Scores, sum_of_weights
from autoprune.structure import Structure

__all__ = ["Identity", "function_norms"]


@final
class Identity:
    """Scores a block by the norm of what it adds to its input, and all else as L1 does.

    Lin et al. drop the residual modules whose function norm is below a threshold (see
    `autoprune.scoring.allocation.blocks_below` for the policy that does), with spectrally normalised weights, so that a
    module can't look important by scale alone. They train with both; here both are taken from the trained network.
    """

    def score(self, model: nn.Module, structure: Structure, evidence: Evidence) -> Scores:
        """Return the norms, `(1,)` for every block."""
        norms = function_norms(model, structure, evidence)
        return {
            group.name: norms[group.name] if group.name in norms else sum_of_weights(model, group, torch.abs)
            for group in structure
        }


def function_norms(model: nn.Module, structure: Structure, evidence: Evidence, *, spectral: bool = True) -> Scores:
    """Return the mean over samples of `‖f(x)‖ / ‖x‖` for every block `x + f(x)`, by group, `(1,)`.

    Args:
        model: The dense network; a copy runs.
        structure: Its groups; those that are no blocks are left out.
        evidence: Batches.
        spectral: Whether linear layers within blocks are divided by their largest singular value first. Convolutions
            are not: batch-norm takes their scale away anyhow.
    """
    copied = copy.deepcopy(model).eval()
    blocks = {group.name: copied.get_submodule(group.block) for group in structure if group.block is not None}
    totals = {name: torch.zeros(1, dtype=torch.float64) for name in blocks}
    for name, block in blocks.items():
        if spectral:
            _normalise(block)
        block.register_forward_hook(_adder(totals[name]))
    seen = 0
    with torch.no_grad():
        for inputs, _ in evidence.batches if blocks else ():
            copied(inputs)
            seen += len(inputs)
    return {name: (total / max(1, seen)).float() for name, total in totals.items()}


def _adder(total: torch.Tensor) -> Any:
    def hook(block: nn.Module, args: Any, output: torch.Tensor) -> None:
        source = args[0].flatten(1).double()
        added = output.flatten(1).double() - source
        total.add_((added.norm(dim=1) / source.norm(dim=1).clamp_min(1e-12)).sum().cpu())

    return hook


def _normalise(block: nn.Module) -> None:
    """Divide the weights of linear layers by their largest singular value, in place."""
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight.div_(
                    torch.linalg.matrix_norm(module.weight.double(), 2).clamp_min(1e-12).to(module.weight)
                )
            elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
                for part in module.in_proj_weight.chunk(3):
                    part.div_(torch.linalg.matrix_norm(part.double(), 2).clamp_min(1e-12).to(part))
