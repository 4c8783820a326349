"""Calling a network: with one tensor, a tuple of positional or a mapping of keyword arguments; and in eval mode."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["call", "each_tensor", "evaluating", "first_sample"]


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Return what a network makes of an input; a list is one argument, as a tensor is."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def each_tensor(inputs: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return an input with every tensor in it changed."""
    return tree_map_only(torch.Tensor, change, inputs)


def first_sample(inputs: Any) -> Any:
    """Return an input for one sample: the first of the batch, of every tensor whose first dimension is the batch.

    That is the first tensor's, and of the others those as long.
    """
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    batch = len(leaves[0]) if leaves else 0
    return each_tensor(inputs, lambda tensor: tensor[:1] if tensor.dim() and len(tensor) == batch else tensor)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network in eval mode inside a `with`; each module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
