"""Single weights as groups: unstructured, N:M and tiles. The layers whose weights multiply are known by their classes.

No run of the network is needed, and no proof: a zero in a weight is a zero. Which weights go is in `masks.py`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self, final

from torch import nn
from torch.nn.parameter import is_lazy

from autoprune.errors import ConfigError
from autoprune.structure.groups import Group, LockedGroup, Pattern
from autoprune.structure.masks import units

__all__ = ["WeightKind", "find_weights"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_ONE_WEIGHT = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, *_EMBEDDINGS)
"""Layers that multiply with their parameter "weight" and with no other."""
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@final
@dataclass(frozen=True, slots=True)
class WeightKind:
    """What a kind of weights means, read from its name.

    Attributes:
        name: "weights", an N:M pattern such as "2:4", or a tile such as "16x16".
        run: M of an N:M pattern, else 0.
        stay: N of an N:M pattern, of which a multiple stays in every run; else 1.
        tile: Rows and columns of a tile, else `(1, 1)`.
    """

    name: str
    run: int = 0
    stay: int = 1
    tile: tuple[int, int] = (1, 1)

    @classmethod
    def read(cls, name: str) -> Self:
        """Return the kind of a name.

        Raises:
            ConfigError: The name is no kind of weights.
        """
        if name == "weights":
            return cls(name)
        read = re.fullmatch(r"([0-9]+)([:x])([0-9]+)", name)
        if read is None:
            raise ConfigError(
                f"'{name}' is no kind of weights; write 'weights' for single ones, an N:M pattern such as '2:4', or "
                "rows and columns of a block such as '16x16'"
            )
        first, second = int(read[1]), int(read[3])
        if read[2] == ":":
            if not 0 < first < second:
                raise ConfigError(f"`0 < N < M` must hold for an N:M pattern, of which N stay, but got '{name}'")
            return cls(name, run=second, stay=first)
        if first * second < 2:
            raise ConfigError(f"a block has two weights or more, but got '{name}'; single ones are the kind 'weights'")
        return cls(name, tile=(first, second))


def find_weights(model: nn.Module, kind: str, *, embeddings: bool = True) -> tuple[list[Group], list[LockedGroup]]:
    """Find the weights of a network that can be zeroed: one group a tensor, in the order of registration.

    Offered are the weights of linear, bilinear, convolutional, embedding, attention and recurrent layers. What scales,
    shifts or normalises has one dimension and is not listed; any other parameter is, as locked. A tensor that several
    layers share is one group, of all of them.

    A group's elements are its weights, or its whole tiles; of an N:M pattern the M places of a run, so that removing
    some means removing as many in every run, the least salient there. What stays of a run is a multiple of N, so 2:4
    has one choice, and 1:4 is the kind that lets a search choose among 3:4, 2:4 and 1:4.

    Args:
        model: Any network; only its parameters' shapes are read.
        kind: "weights", an N:M pattern such as "2:4" or "4:8", or a tile such as "16x16".
        embeddings: Whether embeddings are offered; a tensor that an embedding shares with another layer is one.

    Returns:
        Groups named after their layer and the kind, such as `fc1:2:4`, and what is locked, with the reason.

    Raises:
        ConfigError: There is no such kind.
    """
    read = WeightKind.read(kind)
    groups: list[Group] = []
    locked: list[LockedGroup] = []
    for found in _tensors(model):
        name, pattern = f"{found.base}:{kind}", Pattern(found.tensor, read.run, read.tile, found.transposed)
        reason = _unfit(found) or ("embeddings are left out" if found.embedded and not embeddings else None)
        if reason is None:
            number = units(pattern, found.weight.shape)
            size, reason = pattern.run or number, _too_small(found, pattern, number)
        else:
            size = 0 if is_lazy(found.weight) else found.weight.numel()
        if reason is None:
            stay = read.stay
            groups.append(Group(name, kind, size, (), found.layers, (), multiple=stay, least=stay, pattern=pattern))
        else:
            locked.append(LockedGroup(name, kind, size, found.layers, reason))
    return groups, locked


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """A parameter of two dimensions or more, and the layers that hold it.

    Attributes:
        tensor: Its first name.
        base: What its groups are named after.
        weight: The parameter.
        modules: The layers, by name; first those that multiply with it.
        multiplied: Whether the first layer multiplies with it.
    """

    tensor: str
    base: str
    weight: nn.Parameter
    modules: dict[str, nn.Module]
    multiplied: bool

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.modules)

    @property
    def first(self) -> nn.Module:
        return next(iter(self.modules.values()))

    @property
    def transposed(self) -> bool:
        return self.multiplied and isinstance(self.first, _TRANSPOSED)

    @property
    def embedded(self) -> bool:
        return any(isinstance(module, _EMBEDDINGS) for module in self.modules.values())


def _tensors(model: nn.Module) -> Iterator[_Found]:
    """Yield every parameter that is no vector, once, in the order of registration."""
    holders: dict[nn.Parameter, list[tuple[str, str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            holders.setdefault(parameter, []).append((name, key, module))
    for parameter, held in holders.items():
        multiplying = [holder for holder in held if _multiplies(holder[2], holder[1])]
        if not multiplying and (is_lazy(parameter) or sum(length > 1 for length in parameter.shape) < 2):
            continue
        name, key, _ = (multiplying or held)[0]
        first_name, first_key, _ = held[0]
        yield _Found(
            tensor=_joined(first_name, first_key),
            base=name if key == "weight" and name else _joined(name, key),
            weight=parameter,
            modules={name: module for name, _, module in multiplying or held},
            multiplied=bool(multiplying),
        )


def _joined(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


def _multiplies(module: nn.Module, key: str) -> bool:
    """Say whether a layer multiplies with its parameter of that name."""
    if isinstance(module, _ONE_WEIGHT):
        return key == "weight"
    if isinstance(module, nn.MultiheadAttention):
        return key in _ATTENTION
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and key.startswith("weight_")


def _unfit(found: _Found) -> str | None:
    """Return why none of a tensor's weights can be zeroed, whatever the pattern, or None."""
    if not found.multiplied:
        return (
            f"it belongs to {type(found.first).__name__}; offered are the weights of linear, convolutional, "
            "embedding, attention and recurrent layers"
        )
    if is_lazy(found.weight):
        return "its weights have no shape before the network has run once"
    if not found.weight.is_floating_point():
        return f"its weights are {str(found.weight.dtype).removeprefix('torch.')}, not floating-point"
    if not found.weight.requires_grad:
        return "its weights are frozen"
    return None


def _too_small(found: _Found, pattern: Pattern, number: int) -> str | None:
    """Return why a tensor can't lose any of its units, of which it has `number`, or None."""
    if pattern.run == 0 and pattern.tile == (1, 1):
        return None if number > 1 else "it has fewer than two weights, and a layer is never emptied"
    if found.transposed and found.first.groups != 1:
        return f"it is a transposed convolution in {found.first.groups} groups, whose weights form no single matrix"
    if pattern.run > 0:
        inputs = found.weight.shape[0 if found.transposed else 1]
        return None if number else f"each of its outputs has {inputs} inputs at a position, but a run is {pattern.run}"
    if number < 2:
        height, width = pattern.tile
        return f"it has {number} whole blocks of {height}x{width}, and a layer is never emptied"
    return None
