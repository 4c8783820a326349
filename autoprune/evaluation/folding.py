"""Batch-norm folded into the convolution before it: one pass over the memory less for every pair, the same outputs.

In eval mode batch-norm multiplies and adds by channel, which the convolution can do with other weights. Which pairs
stand so is seen when the dense network runs, and proven: folded, it must give the same outputs.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from autoprune.inputs import evaluating
from autoprune.structure.copying import copied

__all__ = ["Folding"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TOLERANCE = 1e-4  # of the outputs' largest; rounding is a hundredth of it, another reader of the convolution far more


class Folding:
    """The batch-norms of a network that can be folded, in it and in whatever is cut from it.

    Args:
        model: The dense network; its mode is restored.
        inputs: A few samples.

    Attributes:
        pairs: Names of convolution and batch-norm.
    """

    def __init__(self, model: nn.Module, inputs: torch.Tensor) -> None:
        self.pairs: tuple[tuple[str, str], ...] = ()
        with torch.no_grad(), evaluating(model):
            found = tuple(_adjacent(model, inputs))
            expected = model(inputs)
            self.pairs = found
            if not self._same(model, inputs, expected):
                alone: list[tuple[str, str]] = []
                for pair in found:
                    self.pairs = (pair,)
                    alone += self.pairs if self._same(model, inputs, expected) else ()
                self.pairs = tuple(alone)
                if not self._same(model, inputs, expected):
                    self.pairs = ()

    def __call__(self, model: nn.Module, without: Iterable[str] = ()) -> nn.Module:
        """Return a copy of a network with batch-norm folded; all other tensors are the network's own.

        Args:
            model: The dense network or one cut from it, to be used in eval mode only.
            without: Modules that will not run, so that nothing is folded into or out of them, or what they hold.
        """
        idle = tuple(f"{name}." for name in without)
        there = dict(model.named_modules())
        memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        for pair in self.pairs:
            convolution, norm = (there.get(name) for name in pair)
            if idle and any(f"{name}.".startswith(idle) for name in pair):
                continue
            if isinstance(convolution, _CONVOLUTIONS) and isinstance(norm, _NORMS):  # else their block is gone
                memo[id(convolution)] = _folded(convolution, norm)
                memo[id(norm)] = nn.Identity()
        return copied(model, memo)

    def _same(self, model: nn.Module, inputs: torch.Tensor, expected: torch.Tensor) -> bool:
        try:
            found = self(model)(inputs)
        except Exception:  # code that looks into the modules that are gone
            return False
        allowed = _TOLERANCE * float(expected.abs().max())
        return found.shape == expected.shape and bool((found - expected).abs().max() <= allowed)


def _folded(convolution: _ConvNd, norm: _BatchNorm) -> nn.Module:
    """Return a convolution that does what both do in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    new = object.__new__(type(convolution))
    new.__dict__.update(convolution.__dict__, _parameters={"weight": weight, "bias": bias})
    return new


def _adjacent(model: nn.Module, inputs: torch.Tensor) -> list[tuple[str, str]]:
    """Return the convolutions and batch-norms that run once, the one on the other's output, by name."""
    outputs: dict[str, Any] = {}
    read: dict[str, Any] = {}
    times = Counter[str]()

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            times[name] += 1
            if type(module) in _CONVOLUTIONS:
                outputs[name] = output
            else:
                read[name] = given[0] if given else None

        return hook

    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in _CONVOLUTIONS or (type(module) in _NORMS and module.running_mean is not None)
    ]
    seen = [(name, module) for name, module in candidates if not (module._forward_hooks or module._forward_pre_hooks)]
    handles = [module.register_forward_hook(after(name)) for name, module in seen]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    pairs = [(conv, norm) for norm, given in read.items() for conv, output in outputs.items() if given is output]
    return [pair for pair in pairs if all(times[name] == 1 for name in pair)]
