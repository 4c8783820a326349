"""What can be removed together: groups, the surgery that removes them, and the proof that it is exact.

A kind of element is one file (`channels.py`, `heads.py`, `blocks.py`, `weights.py`); each gives the same `Group`
record, so that spaces, agents and reports need no change for a new kind.
"""

from autoprune.structure.analysis import analyse
from autoprune.structure.groups import Attribute, Group, LockedGroup, Pattern, Slice, Structure, nearest
from autoprune.structure.masks import hold_zeros
from autoprune.structure.surgery import Cut, Kept, Removal, Weakest, add_gradients, carry_over, cut, plan, remove

__all__ = [
    "Attribute",
    "Cut",
    "Group",
    "Kept",
    "LockedGroup",
    "Pattern",
    "Removal",
    "Slice",
    "Structure",
    "Weakest",
    "add_gradients",
    "analyse",
    "carry_over",
    "cut",
    "hold_zeros",
    "nearest",
    "plan",
    "remove",
]
