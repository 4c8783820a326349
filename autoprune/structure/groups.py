"""The records of what can be removed: `Slice`, `Group`, `LockedGroup`, `Structure`. How they are found is elsewhere."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from autoprune.errors import PolicyError
from autoprune.policy import Policy

__all__ = ["Group", "LockedGroup", "Role", "Slice", "Structure"]

Role = Literal["written", "read"]


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Where a group's elements lie in one tensor.

    Attributes:
        tensor: The tensor's name, as in `named_parameters` or `named_buffers`.
        dim: The dimension that shrinks.
        positions: `(size, k)` int64; row `e` holds the k indices along `dim` that belong to element `e` (k is 1 but
            behind a flatten, where a channel is as many features as it has pixels).
        role: "written" where the element is produced or passed on (filters, batch-norm), "read" where it is consumed.
    """

    tensor: str
    dim: int
    positions: torch.Tensor
    role: Role


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Elements that can only go together, across all the tensors they touch.

    Attributes:
        name: Unique; the first layer that writes the group, in the order of execution.
        kind: "channels" so far.
        size: How many elements it has.
        slices: Every tensor it touches.
        layers: The layers (modules) that write it; one row of a report, however many they are.
        readers: The layers that read it.
    """

    name: str
    kind: str
    size: int
    slices: tuple[Slice, ...]
    layers: tuple[str, ...]
    readers: tuple[str, ...]

    def count(self, sparsity: float) -> int:
        """Return how many elements a sparsity removes: the nearest whole number, leaving at least one."""
        return min(round(sparsity * self.size), self.size - 1)


@dataclass(frozen=True, slots=True)
class LockedGroup:
    """Elements that can't be removed, and the reason, in words a user understands."""

    name: str
    kind: str
    size: int
    layers: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """All of a network's groups: those offered, each proven sliceable, and those locked.

    Attributes:
        groups: Offered groups in the order of execution; each one is proven (see `proof.py`).
        locked: What can't be pruned, with the reason.
    """

    groups: tuple[Group, ...]
    locked: tuple[LockedGroup, ...] = ()
    _by_name: Mapping[str, Group] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_name = {group.name: group for group in self.groups}
        if len(by_name) < len(self.groups):
            raise ValueError("group names must be unique")
        object.__setattr__(self, "_by_name", by_name)

    def __getitem__(self, name: str) -> Group:
        return self._by_name[name]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def names(self) -> tuple[str, ...]:
        """The offered groups' names, in order."""
        return tuple(self._by_name)

    def removed(self, policy: Policy) -> dict[str, int]:
        """Return how many elements of every group a policy removes; groups it does not name lose none.

        Raises:
            PolicyError: The policy names a group that is locked or unknown.
        """
        for name in policy:
            if name not in self._by_name:
                reasons = {locked.name: locked.reason for locked in self.locked}
                if name in reasons:
                    raise PolicyError(f"group '{name}' is locked: {reasons[name]}")
                raise PolicyError(f"the network has no group '{name}'; its groups are {', '.join(self.names)}")
        return {group.name: group.count(policy.get(group.name, 0.0)) for group in self.groups}

    def policy(self, removed: Mapping[str, int]) -> Policy:
        """Return the policy whose sparsities are exactly these counts; two policies that slice alike become equal."""
        return Policy({group.name: removed.get(group.name, 0) / group.size for group in self.groups})

    def rounded(self, policy: Policy) -> Policy:
        """Return the policy with every sparsity moved to the whole number of elements it removes."""
        return self.policy(self.removed(policy))
