"""Whole layers: residual and transformer blocks that the identity can take the place of.

A block is a module that returns its input plus something: leaving out what it adds leaves the input. Each is a group
of its own, with one element, so that a policy says for every block whether it stays (sparsity 0) or goes (1). A module
that runs several times is one block, which goes everywhere.
"""

from typing import Any

from torch import nn

from autoprune.structure.groups import Group
from autoprune.structure.seen import Trace

__all__ = ["Skipped", "find_blocks"]


class Skipped(nn.Identity):
    """What stands in the place of a block that went: it hands its first argument on and overlooks the others."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first argument."""
        return (*args, *kwargs.values())[0]


def find_blocks(traced: Trace) -> list[Group]:
    """Return a group for every block of a trace, in the order of execution, not yet proven."""
    in_order = sorted(traced.blocks, key=lambda block: block.start)
    modules = dict.fromkeys(block.module for block in in_order)
    return [Group(module, "blocks", 1, (), (module,), (), least=0, block=module) for module in modules]
