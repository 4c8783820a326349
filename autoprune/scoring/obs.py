"""Optimal Brain Surgeon over coupled groups: what a removal costs after all that is left has made up for it.

Hassibi & Stork 1993 for single weights; in blocks, Optimal Brain Compression (Frantar & Alistarh 2022,
https://arxiv.org/abs/2208.11580, section 4).
"""

from typing import final

import torch
from torch import nn

from autoprune.moments.readers import Readers
from autoprune.scoring.base import Evidence, Scores, sum_of_weights
from autoprune.structure import Group, Structure

__all__ = ["OBS"]


@final
class OBS:
    """Scores an element by when it goes, in the order that loses least.

    The loss is that of the outputs of every layer that reads the group, relative to their power and added up, after the
    weights that stay have been chosen anew by least squares. One after another the element goes that adds least; so two
    elements that say the same are not both thrown away, as they are by a score that looks at each alone. A layer that
    writes the group adds nothing: what it computes of a removed element nobody reads.

    A single weight is scored by `w² / (H⁻¹)_ii`, all outputs alike. Where no reader's inputs can be seen, and for
    blocks, it is the sum of absolute weights as in `autoprune.scoring.l1`.
    """

    def score(self, model: nn.Module, structure: Structure, evidence: Evidence) -> Scores:
        """Return places in the order of removal, from 1; of weights that are zeroed, losses."""
        readers = Readers(model, evidence.moments(model, structure))
        return {group.name: _score(model, group, readers) for group in structure}


def _score(model: nn.Module, group: Group, readers: Readers) -> torch.Tensor:
    if group.pattern is not None:
        saliency = readers.saliency(group.pattern.tensor, relative=False)
        return sum_of_weights(model, group, torch.abs) if saliency is None else saliency.float()
    order = None if group.block is not None else readers.order(group)
    if order is None:
        return sum_of_weights(model, group, torch.abs)
    places = torch.empty(group.size)
    places[order] = torch.arange(1, group.size + 1, dtype=places.dtype)
    return places
