"""What one run of a network showed: the records that `trace.py` returns, and that groups and costs are made of."""

from dataclasses import dataclass, field

from autoprune.structure.labels import Area, Maps, Nodes

__all__ = ["Block", "LeafCall", "Product", "Storage", "Trace"]


@dataclass(frozen=True, slots=True)
class Product:
    """One operator that multiplies and adds.

    Attributes:
        at: Number of the operator.
        parameter: The weight that takes part; None between activations.
        macs: Multiply-adds.
    """

    at: int
    parameter: str | None
    macs: Area


@dataclass(slots=True)
class Storage:
    """Memory that an operator allocated for an activation.

    Attributes:
        born: Number of the operator; -1 for the network's input.
        numel: How many numbers it holds.
        itemsize: Bytes of each.
        died: Number of the first operator that ran without it.
    """

    born: int
    numel: Area
    itemsize: int
    died: int = 1 << 60


@dataclass(frozen=True, slots=True)
class LeafCall:
    """One call of a module that calls no other.

    Attributes:
        at: Number of the first operator in it.
        module: Its name.
        inputs: Shape of every tensor argument, with the labels of its positions.
    """

    at: int
    module: str
    inputs: tuple[tuple[tuple[int, ...], Area], ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A module that adds to its input, so that the identity could take its place.

    Attributes:
        module: Its name.
        start: Number of its first operator.
        end: Number of the first operator after it.
        branches: Which operand of which additions, by the operator's number, is the part that would go.
        source: Position in `Trace.storages` of its input.
        result: Position in `Trace.storages` of its output.
    """

    module: str
    start: int
    end: int
    branches: tuple[tuple[int, int], ...]
    source: int
    result: int


@dataclass(slots=True)
class Trace:
    """What one run of a network showed. Operators have numbers, in the order of execution.

    Attributes:
        nodes: Labels, and what is known of them.
        products: Everything that multiplies and adds.
        storages: Memory of activations.
        calls: Calls of leaf modules.
        blocks: Modules that the identity could take the place of; none holds another.
        names: Modules in the order of their first call, with that order.
        norms: Operators that reduce across labels: number → the maps of the argument, and the dimensions reduced.
        sized: Weight → a module, its attribute, and how many positions along the first dimension it counts.
        operators: Name of every operator.
        unfollowed: How often each operator ran on labels that is in no table.
    """

    nodes: Nodes = field(default_factory=Nodes)
    products: list[Product] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    calls: list[LeafCall] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    norms: dict[int, tuple[Maps, tuple[int, ...]]] = field(default_factory=dict)
    sized: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    operators: list[str] = field(default_factory=list)
    unfollowed: dict[str, int] = field(default_factory=dict)
