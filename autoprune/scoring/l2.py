"""L2 magnitude: the Euclidean norm of the weights (the alternative in Li et al. 2017, section 4.4)."""

from typing import final

import torch
from torch import nn

from autoprune.scoring.base import Evidence, Scores, sum_of_weights
from autoprune.structure import Structure

__all__ = ["L2"]


@final
class L2:
    """Scores an element by the Euclidean norm of all weights that the coupled group holds of it."""

    def score(self, model: nn.Module, structure: Structure, evidence: Evidence) -> Scores:
        """Return the norms; `evidence` is not used."""
        return {group.name: sum_of_weights(model, group, torch.square).sqrt() for group in structure}
