"""The records of what can be removed: `Group` and what it is made of, `Structure`. How they are found is elsewhere."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from autoprune.errors import PolicyError
from autoprune.policy import Policy

__all__ = ["Attribute", "Group", "LockedGroup", "Pattern", "Role", "Slice", "Structure", "nearest"]

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


@dataclass(frozen=True, slots=True)
class Attribute:
    """A number that a module's code reads, and that shrinks with a group, such as a number of heads.

    Attributes:
        module: The module's name.
        name: The attribute, an int.
        each: How much of it goes with every element.
    """

    module: str
    name: str
    each: int


@dataclass(frozen=True, slots=True)
class Pattern:
    """How single weights of one tensor are removed: as zeros, the tensor keeps its shape.

    The weight is looked at as a matrix, `(outputs, positions · inputs)`; of a convolution the input channel changes
    fastest. What does not fill a whole run or tile, at an edge, stays.

    Attributes:
        tensor: The weight's name.
        run: M of an N:M pattern: of every M neighbours along the inputs as many go as elements of the group do; 0 for
            the other patterns.
        tile: Rows and columns of the blocks that go together; `(1, 1)` for single weights.
        transposed: Whether the tensor is `(inputs, outputs, *kernel)`, as in transposed convolutions.
    """

    tensor: str
    run: int = 0
    tile: tuple[int, int] = (1, 1)
    transposed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Elements that can only go together, across all the tensors they touch.

    Attributes:
        name: Unique; the first layer that writes the group, in the order of execution.
        kind: The kind of its elements: "channels", "heads", "blocks", "weights", an N:M pattern such as "2:4" or a
            tile such as "16x16".
        size: How many elements it has.
        slices: Every tensor it touches; none where elements are weights or a block.
        layers: The layers (modules) that write it; one row of a report, however many they are.
        readers: The layers that read it.
        multiple: What stays is a multiple of this many elements, or all of them.
        least: Fewest elements that stay; 0 for a block, which may vanish.
        normalised: Whether a norm runs across the group's own dimension, so that removing is not the same as zeroing:
            the norm is then over the elements that stay.
        attributes: Numbers in modules that shrink with it.
        block: The module that the identity takes the place of; None but for kind "blocks", whose groups have one
            element each.
        pattern: How weights are zeroed; None where elements are removed in earnest.
    """

    name: str
    kind: str
    size: int
    slices: tuple[Slice, ...]
    layers: tuple[str, ...]
    readers: tuple[str, ...]
    multiple: int = 1
    least: int = 1
    normalised: bool = False
    attributes: tuple[Attribute, ...] = ()
    block: str | None = None
    pattern: Pattern | None = None

    def count(self, sparsity: float) -> int:
        """Return how many elements a sparsity removes: the nearest number allowed."""
        return self.nearest(sparsity * self.size)

    def nearest(self, removed: float) -> int:
        """Return the number of elements to remove that is nearest to `removed` and allowed.

        Allowed is what leaves `least` elements or more and a multiple of `multiple`, or all. Python's rounding decides
        between two that are equally near.
        """
        return int(nearest(removed, self.size, self.multiple, self.least))


def nearest(
    removed: npt.ArrayLike, sizes: npt.ArrayLike, multiples: npt.ArrayLike, least: npt.ArrayLike
) -> npt.NDArray[np.int64]:
    """Return the nearest allowed numbers of elements to remove; all arguments broadcast together.

    Allowed is what leaves `least` elements or more and a multiple of `multiples`; and to remove none. Ties go to the
    even multiple, as everywhere in numpy.
    """
    removed, sizes, multiples, least = (np.asarray(values) for values in (removed, sizes, multiples, least))
    offset = sizes % multiples  # the fewest that can go
    most = np.maximum(sizes - multiples * -(-least // multiples), 0)
    steps = offset + multiples * np.maximum(np.rint((removed - offset) / multiples), 0)
    settled: npt.NDArray[np.int64] = np.minimum(np.where(removed < offset / 2, 0, steps), most).astype(np.int64)
    return settled


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
        given_up: What the analysis could not follow, in words a user understands; empty where it followed everything.
    """

    groups: tuple[Group, ...]
    locked: tuple[LockedGroup, ...] = ()
    given_up: tuple[str, ...] = ()
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
            PolicyError: The policy names a group that is locked or unknown, or asks to remove all of one that may not
                vanish.
        """
        for name, sparsity in policy.items():
            if name not in self._by_name:
                reasons = {locked.name: locked.reason for locked in self.locked}
                if name in reasons:
                    raise PolicyError(f"group '{name}' is locked: {reasons[name]}")
                raise PolicyError(f"the network has no group '{name}'; its groups are {', '.join(self.names)}")
            if sparsity == 1 and self._by_name[name].least > 0:
                raise PolicyError(
                    f"only a block may vanish (sparsity 1), but '{name}' is a group of {self._by_name[name].kind}; "
                    "to remove as much as possible ask for 0.99, which keeps at least one element"
                )
        return {group.name: group.count(policy.get(group.name, 0.0)) for group in self.groups}

    def policy(self, removed: Mapping[str, int]) -> Policy:
        """Return the policy whose sparsities are exactly these counts; two policies that slice alike become equal."""
        return Policy({group.name: removed.get(group.name, 0) / group.size for group in self.groups})

    def rounded(self, policy: Policy) -> Policy:
        """Return the policy with every sparsity moved to the whole number of elements it removes."""
        return self.policy(self.removed(policy))
