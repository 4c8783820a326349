"""L1 magnitude: the sum of absolute weights (Li et al. 2017, Pruning Filters for Efficient ConvNets, section 3.1)."""

from typing import final

import torch
from torch import nn

from autoprune.scoring.base import Evidence, Scores, sum_of_weights
from autoprune.structure import Structure

__all__ = ["L1"]


@final
class L1:
    """Scores an element by the sum of the absolute weights of its filters, over all layers of the coupled group.

    Li et al. score one layer's filters, `s_j = Σ |F_ij|`; where filters can only go together, and with the columns that
    read them, the sum runs over all of these weights.
    """

    def score(self, model: nn.Module, structure: Structure, evidence: Evidence) -> Scores:
        """Return the sums; `evidence` is not used."""
        return {group.name: sum_of_weights(model, group, torch.abs) for group in structure}
