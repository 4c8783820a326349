"""What can be removed together: groups, the slicing that removes them, and the proof that it is exact.

A kind of element is one file (`channels.py`); each gives the same `Group` record, so that spaces, agents and reports
need no change for a new kind.
"""

import torch
from torch import nn

from autoprune.structure.groups import Group, LockedGroup, Slice, Structure
from autoprune.structure.proof import Proof
from autoprune.structure.surgery import Kept, kept_indices, remove, select

__all__ = ["Group", "Kept", "LockedGroup", "Slice", "Structure", "analyse", "kept_indices", "remove", "select"]


def analyse(model: nn.Module, example_input: torch.Tensor, *, seed: int = 0) -> Structure:
    """Find a network's groups and prove each one.

    Args:
        model: Any network; never changed.
        example_input: `(batch, ...)`, an input that the network runs on.
        seed: Randomness of the proof's inputs.

    Returns:
        Proven groups, and locked ones with the reason.

    Raises:
        StructureError: The network's dependencies can't be traced.
    """
    from autoprune.structure.channels import find_channels  # loads torch_pruning

    found, locked = find_channels(model, example_input)
    proof = Proof(model, example_input, torch.Generator().manual_seed(seed))
    proven = []
    for group in found:
        fault = proof.fault(group)
        if fault is None:
            proven.append(group)
        else:
            locked.append(LockedGroup(group.name, group.kind, group.size, group.layers, fault))
    return Structure(tuple(proven), tuple(locked))
