"""How much an error in a layer's output changes what the network gives."""

import copy
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from autoprune.inputs import call, evaluating
from autoprune.structure.trace import plain_attention
from autoprune.structure.tracer import tensors

__all__ = ["influences"]

IMAGES = 256  # at most that are looked at
_AT_ONCE = 16  # since the backward pass keeps all activations


def influences(
    model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], weights: Collection[str], seed: int
) -> dict[str, torch.Tensor]:
    """Return the share of the outputs' power that an error of size 1 in each output of a layer makes.

    To first order an error e in a layer's output changes the network's outputs by J e. For a random v with unit
    variance E[(vᵀ J e)²] = ‖J e‖², so that one backward pass of vᵀ outputs gives what all outputs change by (Hutchinson
    1989). The error is taken to be the same at all positions (pixels, tokens), as what pruning does to neighbours is
    much alike: the gradients are added up over them before they are squared.

    Args:
        model: The network, run in eval mode on a copy.
        batches: `(inputs, targets)`; about 256 samples are looked at.
        weights: Names of the layers' weights.
        seed: Of the random vectors.

    Returns:
        Weight → `(outputs,)` float64, relative to the variance of the network's outputs over samples, summed over
        outputs; layers that run otherwise than as a module are missing, and all of a network without gradients.
    """
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, torch.Tensor] = {}
    for name in weights:
        module = _runs_it(copied, name)
        if module is not None:
            module.register_forward_hook(_adder(name, sums))
    samples, power = 0, 0.0
    level = torch.zeros(())
    with torch.enable_grad(), evaluating(copied), plain_attention():
        for inputs in _parts(batches):
            leaves = _leaves(copied, inputs)
            outputs = [one for one in tensors(call(copied, inputs)) if one.is_floating_point() and one.requires_grad]
            if not (leaves and outputs):  # code that runs without gradients
                return {}
            vectors = [torch.randn(one.shape, generator=generator).to(one) for one in outputs]
            total = torch.stack([(one * v).sum() for one, v in zip(outputs, vectors, strict=True)]).sum()
            torch.autograd.grad(total, leaves, allow_unused=True)
            flat = torch.cat([one.detach().double().reshape(len(inputs), -1) for one in outputs], 1)
            samples += len(inputs)
            level, power = level.to(flat) + flat.sum(0), power + float(flat.square().sum())
    if not samples:
        return {}
    variance = power / samples - float((level / samples).square().sum())
    return {name: total / samples / max(variance, 1e-12) for name, total in sums.items()}


def _parts(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterable[torch.Tensor]:
    left = IMAGES
    for inputs, _ in batches:
        for part in torch.split(inputs[:left], _AT_ONCE):
            yield part.clone()
        left -= len(inputs)
        if left <= 0:
            return


def _leaves(model: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return what gradients flow back to: the inputs, or where those are whole numbers the embeddings."""
    if inputs.is_floating_point():
        return [inputs.requires_grad_()]
    return [m.weight.requires_grad_() for m in model.modules() if isinstance(m, nn.Embedding)]


def _runs_it(model: nn.Module, weight: str) -> nn.Module | None:
    """Return the module whose output is that of a layer."""
    owner, _, name = weight.rpartition(".")
    if name != "weight":
        return None
    parent = model.get_submodule(owner.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return parent if owner.endswith("out_proj") else None
    return model.get_submodule(owner)


def _adder(name: str, sums: dict[str, torch.Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        channels = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1

        def add(gradient: torch.Tensor) -> None:
            coherent = (
                gradient.double().movedim(channels, -1).flatten(1, -2) if gradient.dim() > 2 else gradient[:, None]
            )
            found = coherent.double().sum(1).square().sum(0)
            sums[name] = sums[name] + found if name in sums else found

        if first.requires_grad:
            first.register_hook(add)

    return hook
