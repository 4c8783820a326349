"""Building the smaller network: index selection along the dimensions that groups name, and nothing else."""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from autoprune.structure.groups import Structure

__all__ = ["Kept", "kept_indices", "remove", "select"]

Kept = Mapping[str, Mapping[int, torch.Tensor]]
"""Tensor name → dimension → sorted int64 indices that stay."""


def kept_indices(model: nn.Module, structure: Structure, removed: Mapping[str, Sequence[int]]) -> Kept:
    """Return what stays of every tensor when elements of groups go.

    Args:
        model: The dense network.
        structure: Its groups.
        removed: Group name → the elements that go, as numbers below the group's size.

    Returns:
        Only tensors and dimensions that shrink.
    """
    gone: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
    for name, elements in removed.items():
        if len(elements):
            rows = torch.as_tensor(elements, dtype=torch.int64)
            for part in structure[name].slices:
                gone[part.tensor, part.dim].append(part.positions[rows].flatten())
    tensors = _tensors(model)
    kept: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for (tensor, dim), positions in gone.items():
        stays = torch.ones(tensors[tensor].shape[dim], dtype=torch.bool)
        stays[torch.cat(positions)] = False
        kept[tensor][dim] = stays.nonzero().flatten()
    return dict(kept)


def remove(model: nn.Module, structure: Structure, removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy of the network without the given elements; the network itself is not touched.

    Args:
        model: The dense network.
        structure: Its groups.
        removed: Group name → the elements that go.

    Returns:
        A network of the same classes, with its own memory, hooks, mode, device, dtypes and `requires_grad` kept.
    """
    return select(model, kept_indices(model, structure, removed))


def select(model: nn.Module, kept: Kept) -> nn.Module:
    """Return a copy of the network that has only the kept indices of the named tensors.

    The copy never holds the dense tensors: each is put in the copier's memo in its small form, so that the Python
    objects of the network are copied by Python's own rules and its tensors by index selection.

    Args:
        model: The network to copy.
        kept: What stays; tensors not named stay whole.
    """
    memo: dict[int, object] = {}
    shrunk: set[int] = set()
    with torch.no_grad():
        for name, tensor in _tensors(model).items():
            small = tensor.detach()
            for dim, indices in kept.get(name, {}).items():
                small = small.index_select(dim, indices.to(small.device))
            small = small.clone() if small.data_ptr() == tensor.data_ptr() else small.contiguous()
            if isinstance(tensor, nn.Parameter):
                small = nn.Parameter(small, tensor.requires_grad)
            memo[id(tensor)] = small
            if name in kept:
                shrunk.add(id(small))
        smaller = copy.deepcopy(model, memo)
    for module in smaller.modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(id(tensor) in shrunk for tensor in own):
            _refresh_sizes(module)
    return smaller


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _refresh_sizes(module: nn.Module) -> None:
    """Make a module's size attributes those of its tensors."""
    match module:
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            depthwise = module.groups > 1
            module.out_channels = module.weight.shape[0]
            module.groups = module.out_channels if depthwise else 1
            module.in_channels = module.weight.shape[1] * module.groups
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            depthwise = module.groups > 1
            module.in_channels = module.weight.shape[0]
            module.groups = module.in_channels if depthwise else 1
            module.out_channels = module.weight.shape[1] * module.groups
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
