"""Random scores: the control that any criterion must beat."""

from typing import final

import torch
from torch import nn

from autoprune.scoring.base import Evidence, Scores
from autoprune.seeds import derive
from autoprune.structure import Structure

__all__ = ["Random"]


@final
class Random:
    """Scores elements by chance, the same for one seed."""

    def score(self, model: nn.Module, structure: Structure, evidence: Evidence) -> Scores:
        """Return uniform numbers; only `evidence.seed` is used."""
        parameters = dict(model.named_parameters())
        return {
            group.name: torch.rand(
                (group.size,) if group.pattern is None else parameters[group.pattern.tensor].shape,
                generator=torch.Generator().manual_seed(derive(evidence.seed, "random score", group.name)),
            )
            for group in structure
        }
