"""The one training loop: short fine-tuning of candidates, full fine-tuning of the picked one, and baselines."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoprune.errors import DivergedError
from autoprune.seeds import seeded_torch
from autoprune.structure.masks import hold_zeros

__all__ = ["Recipe", "backward", "descent", "one_cycle", "train"]


_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How weights are trained: SGD with Nesterov momentum under a one-cycle learning rate.

    The cycle (Smith & Topin 2018, https://arxiv.org/abs/1708.07120) rises over the first `warmup` of the steps and
    falls along a cosine to almost nothing, so that short trainings end as settled as long ones.

    Attributes:
        lr: Peak learning rate.
        momentum: Of SGD.
        weight_decay: L2 penalty.
        warmup: Fraction of the steps that the rate rises.
        batch_size: Samples a step.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.2
    batch_size: int = 128


def train(
    model: nn.Module,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    *,
    recipe: Recipe,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    seed: int,
    zeroed: Sequence[str] = (),
    running: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Train a network in place for a number of steps, and leave it in eval mode.

    Args:
        model: The network.
        batches: At least `steps` batches `(inputs, targets)`.
        steps: Gradient steps; 0 leaves the weights as they are.
        recipe: The settings.
        loss: Per-sample loss, `(outputs, targets) -> (n,)`.
        seed: Of dropout and its like; the order of the data is the batches' own.
        zeroed: Names of the parameters whose zeros stay zero (see `autoprune.structure.masks.hold_zeros`).
        running: What the forward pass runs under, as in `torch.autocast`; the loss is of outputs in float32 at least.
        progress: Called after every step with the steps done and the step's loss.

    Raises:
        DivergedError: The loss of a step is not finite.
        ConfigError: The network has no parameter of a name in `zeroed`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if steps > 0 and parameters:
        optimizer = descent(parameters, recipe)
        model.train()
        with seeded_torch(seed, parameters[0].device), torch.enable_grad(), hold_zeros(model, zeroed):
            batch = next(batches)
            for step in range(steps):
                for settings in optimizer.param_groups:
                    settings["lr"] = recipe.lr * one_cycle((step + 1) / steps, recipe.warmup)
                optimizer.zero_grad(set_to_none=True)
                loss_now = backward(model, batch, loss, running)
                if step + 1 < steps:  # read while an accelerator computes, before its loss is waited for
                    batch = next(batches)
                value = float(loss_now.item())
                if not math.isfinite(value):
                    raise DivergedError(f"the loss is {value} at fine-tuning step {step + 1} of {steps}")
                optimizer.step()
                if progress is not None:
                    progress(step + 1, value)
    model.eval()


def descent(parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.SGD:
    """Return the optimizer of a recipe; its learning rate is set before every step."""
    return torch.optim.SGD(
        parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0
    )


def backward(
    model: nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    running: Callable[[], AbstractContextManager[Any]],
) -> torch.Tensor:
    """Run a network on a batch, add the mean loss's gradients to its parameters', and return that loss, `()`."""
    inputs, targets = batch
    with running():
        outputs = model(inputs)
    value = loss(outputs.float() if outputs.dtype in _HALF else outputs, targets).mean()
    value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return value.detach()


def one_cycle(done: float, warmup: float) -> float:
    """Return the learning rate as a fraction of its peak, when `done` in (0, 1] of the steps are taken.

    A line up to 1 at `warmup`, then half a cosine down to 0.001 at the end.
    """
    if done <= warmup:
        return done / warmup
    share = (done - warmup) / (1 - warmup)
    return 0.001 + 0.999 * (1 + math.cos(math.pi * share)) / 2
