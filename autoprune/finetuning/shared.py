"""Shared recovery: one set of weights is trained under many policies, and every candidate is cut from it.

A network that was trained whole only suffers from being sliced. Trained while it is sliced, now like this and now like
that, its weights serve all those smaller networks, which then need no training of their own, but statistics of
batch-norm or a fit in closed form. Paid for once, and not for every candidate.

The way is that of universally slimmable networks (Yu & Huang 2019, https://arxiv.org/abs/1903.05134): of each batch
the gradients of the largest network, of the smallest and of a few between them are added up (their sandwich rule).
Once-for-all (Cai et al. 2020, https://arxiv.org/abs/1908.09791) trains one set of weights for many networks likewise.
We differ in three ways. What is between is any policy of a search, not one width for all layers. All networks learn
from the task's own loss, none from the largest one's outputs, since a loss need not be one of classes. And the steps
are few, from a network that is trained already.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from autoprune.data import tensor_bytes
from autoprune.errors import DivergedError, RunError
from autoprune.finetuning.train import Recipe, backward, descent, one_cycle
from autoprune.seeds import seeded_torch
from autoprune.structure import Cut, add_gradients, cut

__all__ = ["SharedWeights", "train_shared"]


def train_shared(
    model: nn.Module,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    changes: Iterator[Sequence[Cut]],
    steps: int,
    *,
    recipe: Recipe,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    seed: int,
    running: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Train a dense network in place, and small ones cut from it with it; leave it in eval mode.

    Each step takes one batch. The dense network's gradients and those of the step's small networks, at the places that
    they were cut from, are added up, and the dense weights take one step. In every network batch-norm uses the batch's
    own statistics; the dense network's running ones come from its own passes alone.

    Args:
        model: The dense network.
        batches: At least `steps` batches `(inputs, targets)`.
        changes: At least `steps` times the cuts of that step's small networks.
        steps: Gradient steps; 0 leaves the weights as they are.
        recipe: The settings.
        loss: Per-sample loss, `(outputs, targets) -> (n,)`.
        seed: Of dropout and its like.
        running: What the forward pass runs under, as in `torch.autocast`; the loss is of outputs in float32 at least.
        progress: Called after every step with the steps done and the dense network's loss.

    Raises:
        DivergedError: The loss of a network is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if steps > 0 and parameters:
        optimizer = descent(parameters, recipe)
        model.train()
        with seeded_torch(seed, parameters[0].device), torch.enable_grad():
            for step in range(steps):
                for settings in optimizer.param_groups:
                    settings["lr"] = recipe.lr * one_cycle((step + 1) / steps, recipe.warmup)
                batch = next(batches)
                optimizer.zero_grad(set_to_none=True)
                values = [backward(model, batch, loss, running)]
                for change in next(changes):
                    smaller = cut(model, change)
                    values.append(backward(smaller, batch, loss, running))
                    add_gradients(model, smaller, change)
                losses = [float(value.item()) for value in values]
                if not all(map(math.isfinite, losses)):
                    raise DivergedError(
                        f"a loss is not finite at step {step + 1} of {steps} of training shared weights; a lower lr "
                        "may help"
                    )
                optimizer.step()
                if progress is not None:
                    progress(step + 1, losses[0])
    model.eval()


@dataclass(frozen=True, slots=True, eq=False)
class SharedWeights:
    """What `train_shared` made of a network: its parameters, and the buffers that a state dict holds.

    Attributes:
        tensors: By their first names, on the CPU.
    """

    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Copy the weights of a network."""
        return cls({name: tensor.cpu().contiguous().clone() for name, tensor in _kept(model)})

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Give these weights to a network of the same architecture, in place."""
        for name, tensor in _kept(model):
            tensor.copy_(self.tensors[name])

    @property
    def digest(self) -> str:
        """A digest of all numbers."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            found.update(name.encode() + tensor_bytes(tensor))
        return found.hexdigest()[:16]

    def save(self, path: Path, digest: Mapping[str, str]) -> None:
        """Write a file, with what it was made from, so that it is there whole or not at all."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(dict(self.tensors), temporary, {"shared": json.dumps(dict(digest))})
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, digest: Mapping[str, str]) -> Self:
        """Read what `save` wrote.

        Raises:
            RunError: The file can't be read, or is of something else.
        """
        try:
            with safe_open(path, "pt") as file:
                written = json.loads(file.metadata()["shared"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except Exception as error:  # safetensors raises its own, and json its
            raise RunError(f"{path} holds no shared weights ({error}); move it away to train them anew") from error
        for what in {**written, **digest}:
            if written.get(what) != digest.get(what):
                raise RunError(
                    f"{path} holds weights that were trained with another {what} ({written.get(what)}, not "
                    f"{digest.get(what)}); move it away to train them anew"
                )
        return cls(tensors)


def _kept(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a state dict holds, each tensor once."""
    names = model.state_dict().keys()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name in names:
            yield name, tensor.detach()
