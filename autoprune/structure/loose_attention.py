"""Runs a stranger's attention with fewer heads though its code reads the width of all heads off its input.

The code that the whole field copies, `B, N, C = x.shape … reshape(B, N, C)`, is kept as it is; what is left of `C` is
found while it runs. Whether the outcome is right is for the proof to say.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["LooseAttention", "reads_width_off_input", "refit"]

_RESHAPES = {torch.Tensor.view, torch.Tensor.reshape, torch.reshape}
_REFITTED: dict[type[nn.Module], type[nn.Module]] = {}
"""Class → what a refitted module's class is; itself where that runs as it is."""


class LooseAttention(nn.Module):
    """Put before a module's class, runs its forward so that the last size of every reshape is as much as there is.

    For the dense module that changes nothing, since sizes but one determine the last.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take and return what the module's class does."""
        with _LastSizeFits():
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Let copies and pickles name the class that can be imported."""
        return _blank, (type(self).__mro__[2],), super().__getstate__()  # type: ignore[no-untyped-call]


def reads_width_off_input(kind: type[nn.Module]) -> bool:
    """Return whether the forward of a class reshapes to a last size that it has computed, not stored.

    True where its source can't be read: `LooseAttention` does no harm.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return True
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    sizes = [call.args for call in calls if ast.unparse(call.func).endswith((".reshape", ".view")) and call.args]
    complete = [size for size in sizes if "-1" not in map(ast.unparse, size)]
    names = [node.id for size in complete for node in ast.walk(size[-1]) if isinstance(node, ast.Name)]
    return any(name != "self" for name in names)


def refit(module: nn.Module) -> None:
    """Make the module run loosely if its class may need it; the class becomes a subclass of what it was."""
    kind = type(module)
    if kind not in _REFITTED:
        loose = reads_width_off_input(kind)
        _REFITTED[kind] = type(f"Loose{kind.__name__}", (LooseAttention, kind), {}) if loose else kind
    if _REFITTED[kind] is not kind:
        module.__class__ = _REFITTED[kind]


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Return a refitted module without a state, which the copier gives it."""
    module = object.__new__(kind)
    refit(module)
    return module


class _LastSizeFits(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _RESHAPES and len(args) > 1:
            tensor, sizes = args[0], args[1] if isinstance(args[1], tuple | list) else args[1:]
            if len(sizes) > 1 and -1 not in sizes:
                args = (tensor, (*sizes[:-1], -1))
        return func(*args, **(kwargs or {}))
