"""Building the smaller network: what goes (`Cut`), and the copy that never had it (`cut`)."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from autoprune.errors import StructureError
from autoprune.structure.blocks import Skipped
from autoprune.structure.copying import copied
from autoprune.structure.groups import Structure
from autoprune.structure.heads import refit
from autoprune.structure.labels import Labels
from autoprune.structure.masks import mask

__all__ = ["Cut", "Kept", "Removal", "Weakest", "add_gradients", "aliases", "carry_over", "cut", "plan", "remove"]

Kept = Mapping[str, Mapping[int, torch.Tensor]]
"""Tensor name → dimension → sorted int64 indices that stay."""


@dataclass(frozen=True, slots=True, eq=False)
class Weakest:
    """A removal of weights that are zeroed in place: so many, the least salient first.

    Attributes:
        count: How many of the group's elements go.
        saliency: `(shape of the dense tensor)`; higher means keep.
    """

    count: int
    saliency: torch.Tensor


_ON_THE_WAY = 1 << 20  # bytes of a tensor that has lost its rows and is to lose its columns

Removal = Sequence[int] | torch.Tensor | Weakest
"""What goes of one group: elements by number, or the weakest of the weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """All that changes between a network and the smaller one.

    Attributes:
        kept: What stays of tensors that shrink.
        attributes: Module → attribute → its new value.
        blocks: Modules that the identity takes the place of.
        zeroed: Tensor name → bool mask in the small tensor's shape, true where the weight becomes zero.
    """

    kept: Kept = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    zeroed: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the architecture as JSON has it; of zeroed weights only the names, the zeros are in the weights."""
        return {
            "kept": {
                tensor: {str(dim): indices.tolist() for dim, indices in dims.items()}
                for tensor, dims in sorted(self.kept.items())
            },
            "attributes": {module: dict(values) for module, values in sorted(self.attributes.items())},
            "blocks": list(self.blocks),
            "zeroed": sorted(self.zeroed),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        kept = {
            tensor: {int(dim): torch.tensor(indices, dtype=torch.int64) for dim, indices in dims.items()}
            for tensor, dims in values["kept"].items()
        }
        return cls(kept, values["attributes"], tuple(values["blocks"]))


def plan(model: nn.Module, structure: Structure, removed: Mapping[str, Removal]) -> Cut:
    """Return what changes when elements of groups go.

    Where channels and single weights of one tensor go, the channels go first, and the weights among what is left.

    Args:
        model: The dense network.
        structure: Its groups.
        removed: Group name → what goes of it.
    """
    gone: dict[tuple[str, int], list[tuple[str, torch.Tensor]]] = defaultdict(list)
    rows: dict[str, Labels] = {}
    attributes: dict[str, dict[str, int]] = defaultdict(dict)
    blocks: list[str] = []
    for name, removal in removed.items():
        group = structure[name]
        if group.pattern is not None or not len(removal):  # type: ignore[arg-type]
            continue
        if group.block is not None:
            blocks.append(group.block)
            continue
        rows[name] = np.asarray(removal.cpu() if isinstance(removal, torch.Tensor) else removal, dtype=np.int64)
        for part in group.slices:
            gone[part.tensor, part.dim].append((name, part.positions))
        for changed in group.attributes:
            now = attributes[changed.module].get(changed.name, _number(model, changed.module, changed.name))
            attributes[changed.module][changed.name] = now - changed.each * len(rows[name])
    tensors = _tensors(model)
    kept: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    alike: dict[tuple[object, ...], torch.Tensor] = {}  # most slices of a group share their positions
    for (tensor, dim), parts in gone.items():
        length = tensors[tensor].shape[dim]
        key = (length, *((name, id(positions)) for name, positions in parts))
        if key not in alike:
            stays = np.ones(length, dtype=bool)
            for name, positions in parts:
                stays[positions.numpy()[rows[name]]] = False
            alike[key] = torch.from_numpy(np.flatnonzero(stays))
        kept[tensor][dim] = alike[key]
    zeroed: dict[str, torch.Tensor] = {}
    for name, removal in removed.items():
        group = structure[name]
        if isinstance(removal, Weakest) and group.pattern is not None and removal.count:
            tensor = group.pattern.tensor
            left = _selected(removal.saliency, kept.get(tensor, {}))
            goes = ~mask(group.pattern, left, removal.count, group.size)
            zeroed[tensor] = zeroed[tensor] | goes if tensor in zeroed else goes
    return Cut(dict(kept), dict(attributes), tuple(blocks), zeroed)


def _number(model: nn.Module, module: str, attribute: str) -> int:
    value = getattr(model.get_submodule(module), attribute)
    return int(value)


def remove(model: nn.Module, structure: Structure, removed: Mapping[str, Removal]) -> nn.Module:
    """Return a copy of the network without the given elements; the network itself is not touched.

    Args:
        model: The dense network.
        structure: Its groups.
        removed: Group name → what goes of it.

    Returns:
        A network of the same classes, with its own memory, hooks, mode, device, dtypes and `requires_grad` kept.
    """
    return cut(model, plan(model, structure, removed))


def cut(model: nn.Module, change: Cut) -> nn.Module:
    """Return a copy of the network that never had what a cut takes away.

    The copy never holds the dense tensors: each is put in the copier's memo in its small form, so that the Python
    objects of the network are copied by Python's own rules and its tensors by index selection.

    Args:
        model: The network to copy.
        change: What goes; all else stays whole.

    Raises:
        StructureError: A block that goes is the network itself.
    """
    memo: dict[int, object] = {}
    blocks = [name for block in change.blocks for name in aliases(model, block)]
    for block in change.blocks:
        if not block:
            raise StructureError("the network as a whole can't be replaced by the identity")
        memo[id(model.get_submodule(block))] = Skipped().train(model.get_submodule(block).training)
    shrunk: set[int] = set()
    with torch.no_grad():
        for name, tensor in _outside(model, blocks):
            kept = change.kept.get(name)
            small = _selected(tensor, kept) if kept else tensor.detach().clone()
            if name in change.zeroed:
                small.masked_fill_(change.zeroed[name].to(small.device), 0.0)
            if isinstance(tensor, nn.Parameter):
                small = nn.Parameter(small, tensor.requires_grad)
            memo[id(tensor)] = small
            if kept:
                shrunk.add(id(small))
        smaller = copied(model, memo)
    for name, values in change.attributes.items():
        if not _within(name, blocks):
            module = smaller.get_submodule(name)
            for attribute, value in values.items():
                setattr(module, attribute, value)
            refit(module)
    for module in smaller.modules():
        if _is_layer(module) and any(id(tensor) in shrunk for tensor in _own(module)):
            _refresh_sizes(module)
    return smaller


def carry_over(optimizer: torch.optim.Optimizer, model: nn.Module, smaller: nn.Module, change: Cut) -> dict[str, Any]:
    """Return an optimizer's state for the smaller network: momentum and its like sliced with their parameters.

    Args:
        optimizer: Of the dense network's parameters.
        model: The dense network.
        smaller: What `cut` made of it.
        change: The cut.

    Returns:
        What `load_state_dict` of an optimizer takes that was made anew, of the same class, with the smaller network's
        parameters in the same order and groups; parameters of blocks that went are left out.

    Raises:
        StructureError: The optimizer holds a parameter that is not the network's, or keeps numbers of which nobody
            knows what they belong to, as L-BFGS does.
    """
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    there = dict(smaller.named_parameters(remove_duplicate=False))
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    number = 0
    for group in optimizer.param_groups:
        known = [names.get(id(parameter), []) for parameter in group["params"]]
        if not all(known):
            raise StructureError(
                "the optimizer holds a parameter that is not the network's; make one of its own for it"
            )
        stays = [any(name in there for name in its) for its in known]
        numbers = list(range(number, number + sum(stays)))
        number += len(numbers)
        parameters = [parameter for parameter, stay in zip(group["params"], stays, strict=True) if stay]
        for place, parameter in zip(numbers, parameters, strict=True):
            if parameter in optimizer.state:
                name = names[id(parameter)][0]
                state[place] = {
                    key: _carried(value, parameter, name, change) for key, value in optimizer.state[parameter].items()
                }
        carried = {key: value for key, value in group.items() if key != "params"}
        if "param_names" in carried:
            carried["param_names"] = [n for n, stay in zip(carried["param_names"], stays, strict=True) if stay]
        groups.append({**carried, "params": numbers})
    return {"state": state, "param_groups": groups}


def add_gradients(model: nn.Module, smaller: nn.Module, change: Cut) -> None:
    """Add the gradients of a smaller network to those of the dense one, at the places that it was cut from.

    The sum gets what the dense network would get with the removed elements zeroed wherever they are read. Nothing is
    added for what went, nor for weights that the cut made zero.

    Args:
        model: The dense network; a parameter that has no gradient yet gets one.
        smaller: What `cut` made of it, after its backward pass; parameters without a gradient, as frozen ones, add
            nothing.
        change: The cut.
    """
    there = dict(smaller.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for first, parameter in model.named_parameters():
        stays = [name for name in names[id(parameter)] if name in there]  # it may have gone with a block
        gradient = there[stays[0]].grad if stays else None
        if gradient is None:
            continue
        if first in change.zeroed:
            gradient = gradient.masked_fill(change.zeroed[first].to(gradient.device), 0.0)
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        _add_at(parameter.grad, change.kept.get(first, {}), gradient)


def _add_at(total: torch.Tensor, kept: Mapping[int, torch.Tensor], part: torch.Tensor) -> None:
    """Add a part to the places of a tensor that were kept; the reverse of `_selected`."""
    if not kept:
        total += part
        return
    last = max(kept)
    indices = [kept[dim] if dim in kept else torch.arange(total.shape[dim]) for dim in range(last + 1)]
    along = [index.to(total.device).view(-1, *[1] * (last - dim)) for dim, index in enumerate(indices)]
    total[tuple(along)] += part


def _carried(value: Any, parameter: torch.Tensor, name: str, change: Cut) -> Any:
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    if value.dim() == 0:
        return value.clone()
    sizes = list(zip(value.shape, parameter.shape, strict=False))
    if value.dim() != parameter.dim() or any(own not in (1, size) for own, size in sizes):
        raise StructureError(
            f"the optimizer keeps {list(value.shape)} numbers for `{name}`, which is {list(parameter.shape)}, and what "
            "of them belongs to what is not known; start the smaller network's optimizer afresh"
        )
    kept = {dim: indices for dim, indices in change.kept.get(name, {}).items() if value.shape[dim] > 1}
    small = _selected(value, kept).clone()
    if name in change.zeroed and value.shape == parameter.shape:
        small.masked_fill_(change.zeroed[name].to(small.device), 0.0)
    return small


def _selected(tensor: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Return the kept part of a tensor, in its memory layout; on the way there is no more than a megabyte, or a row."""
    if not kept:
        return tensor
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        innermost = {0: 0, 1: 3, 2: 1, 3: 2}  # as it lies in memory
        lying = _selected(tensor.permute(0, 2, 3, 1), {innermost[dim]: indices for dim, indices in kept.items()})
        return lying.permute(0, 3, 1, 2)
    *first, last = sorted(kept)  # rows first: they are copied whole, and leave less to pick columns from
    at_once = len(tensor)
    if first and first[0] == 0 and last:
        at_once = max(1, _ON_THE_WAY * len(tensor) // max(1, tensor.numel() * tensor.element_size()))
    if at_once >= len(tensor):
        for dim in (*first, last):
            tensor = tensor.index_select(dim, kept[dim].to(tensor.device))
        return tensor
    indices = {dim: index.to(tensor.device) for dim, index in kept.items()}
    result = tensor.new_empty([len(indices[dim]) if dim in indices else n for dim, n in enumerate(tensor.shape)])
    for start in range(0, len(result), at_once):
        some = tensor.index_select(0, indices[0][start : start + at_once])
        for dim in first[1:]:
            some = some.index_select(dim, indices[dim])
        torch.index_select(some, last, indices[last], out=result[start : start + at_once])
        del some  # before the next are made
    return result


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer under its first name; in one walk, which torch's own iterators take four of."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    ahead = [("", model)]
    while ahead:
        prefix, module = ahead.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[prefix + name] = tensor
        if module._modules:
            children = [(f"{prefix}{name}.", child) for name, child in module._modules.items() if child is not None]
            ahead += reversed(children)
    return found


def aliases(model: nn.Module, module: str) -> list[str]:
    """Return every name of a module, which has several where it is registered more than once."""
    wanted = model.get_submodule(module)
    return [name for name, other in model.named_modules(remove_duplicate=False) if other is wanted]


def _within(name: str, blocks: Sequence[str]) -> bool:
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def _outside(model: nn.Module, blocks: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and buffer under its first name, but those that only removed blocks hold."""
    if not blocks:
        return iter(_tensors(model).items())
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    needed = {id(tensor) for name, tensor in everything if not _within(name, blocks)}
    return ((name, tensor) for name, tensor in _tensors(model).items() if id(tensor) in needed)


# -- sizes that modules keep beside their tensors ---------------------------------------------------------------------


def _own(module: nn.Module) -> Iterator[torch.Tensor | None]:
    """Yield a layer's tensors; those of a parametrized one are in its parts."""
    yield from module._parameters.values()
    yield from module._buffers.values()
    if module._modules:
        yield from module.parameters()


def _is_layer(module: nn.Module) -> bool:
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.modules.batchnorm._NormBase)
    return isinstance(module, (*kinds, nn.GroupNorm, nn.LayerNorm, nn.PReLU))


def _refresh_sizes(module: nn.Module) -> None:
    """Make a module's size attributes those of its tensors."""
    match module:
        case nn.modules.conv._ConvTransposeNd():
            module.in_channels = module.weight.shape[0]
            module.out_channels = module.weight.shape[1] * module.groups
        case nn.modules.conv._ConvNd():
            module.out_channels = module.weight.shape[0]
            module.in_channels = module.weight.shape[1] * module.groups
        case nn.Linear():
            module.out_features, module.in_features = module.weight.shape
        case nn.Embedding():
            module.embedding_dim = module.weight.shape[1]
        case nn.modules.batchnorm._NormBase():
            sized = module.weight if module.weight is not None else module.running_mean
            module.num_features = module.num_features if sized is None else sized.shape[0]
        case nn.GroupNorm():
            module.num_channels = module.weight.shape[0]
        case nn.LayerNorm():
            module.normalized_shape = tuple(module.weight.shape)
        case nn.PReLU():
            module.num_parameters = module.weight.shape[0]
