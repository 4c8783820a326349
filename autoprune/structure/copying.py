"""Copying a network's Python objects quickly: what `copy.deepcopy` makes of them, without its detours."""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["copied", "twin"]

_FUNCTIONS = (type(len), type(lambda: 0))
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type, *_FUNCTIONS})
"""Types whose values `copy.deepcopy` returns as they are."""

_DICTIONARIES = frozenset({dict, OrderedDict})
_OWN = frozenset(vars(nn.Module()))  # each module has its own; others may be shared, even empty ones

_OWN_WAYS = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getnewargs_ex__", "__getnewargs__", "__slots__")
_CHILDREN = ("_parameters", "_buffers", "_modules")
_NOT_COPIED = "_compiled_call_impl"  # as `nn.Module.__getstate__` has it


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return `copy.deepcopy(model, memo)`; most modules are plain, and their dictionaries are copied directly.

    Args:
        model: The network.
        memo: What stands for an object, by its id; objects that are not there are copied.
    """
    plain: dict[type, bool] = {}
    made: list[tuple[nn.Module, nn.Module]] = []
    for module in _not_in(memo, model):
        kind = type(module)
        if kind not in plain:
            plain[kind] = _is_plain(kind)
        if plain[kind]:
            memo[id(module)] = new = kind.__new__(kind)
            made.append((module, new))
    for module, new in made:
        values = new.__dict__
        values.update(module.__dict__)
        values.pop(_NOT_COPIED, None)
        for key, value in module.__dict__.items():
            kind = type(value)
            if kind in _ATOMS:
                continue
            if key in _OWN and not value:  # hooks that nobody set, for the most part
                values[key] = kind()
            elif key != _NOT_COPIED:
                values[key] = _value(key, value, memo)
    result: nn.Module = copy.deepcopy(model, memo)
    return result


def twin(model: nn.Module) -> nn.Module:
    """Return a copy with the same parameters and buffers, which another thread can run at the same time."""
    return copied(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _not_in(memo: Mapping[int, Any], model: nn.Module) -> list[nn.Module]:
    """Return the modules that will be copied: not those that something stands for, nor what only those hold."""
    found: dict[int, nn.Module] = {}
    ahead = [model]
    while ahead:
        module = ahead.pop()
        if id(module) not in memo and id(module) not in found:
            found[id(module)] = module
            ahead += [child for child in module._modules.values() if child is not None]
    return list(found.values())


def _value(key: str, value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind is tuple and _ATOMS.issuperset(map(type, value)):
        return value
    if key in _CHILDREN and kind in _DICTIONARIES:
        return kind((k, memo[id(v)] if id(v) in memo else copy.deepcopy(v, memo)) for k, v in value.items())
    return copy.deepcopy(value, memo)


def _is_plain(kind: type[nn.Module]) -> bool:
    """Say whether `copy.deepcopy` of an instance is a new object with a copied `__dict__`, and nothing else."""
    own_state = kind.__getstate__ is not nn.Module.__getstate__
    own_restoring = not kind.__setstate__.__module__.startswith("torch.nn.")  # torch's fill in what old pickles lack
    ways = any(name in vars(base) for base in kind.__mro__[:-1] for name in _OWN_WAYS)
    return not (own_state or own_restoring or ways)
