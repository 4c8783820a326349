"""Your own network and data: make a Task of them, search, and take the smaller network.

Run it as it is, or give its task to the command line: `autoprune search --task examples/own_model.py:make_task ...`.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import autoprune as ap
from autoprune.finetuning import Recipe, train


class Net(nn.Module):
    """A small network with functional activations and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 32, 3, padding=1)
        self.outer = nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return scores `(n, 10)` of images `(n, 1, 8, 8)`."""
        x = functional.relu(self.norm(self.stem(images)))
        x = functional.relu(x + self.outer(functional.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


def make_task() -> ap.Task:
    """Return the trained network with its data; validation is cut from the training samples."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    targets = torch.from_numpy(digits.target).long()
    torch.manual_seed(0)
    net = Net()
    split = {"train": (images[:1400], targets[:1400]), "test": (images[1400:], targets[1400:])}
    untrained = ap.Task(net, **split, val_fraction=0.25)
    recipe = Recipe(lr=0.1, batch_size=64)
    train(net, untrained.train_batches(64, seed=0), 120, recipe=recipe, loss=untrained.loss, seed=0)
    return ap.Task(net, **split, val_fraction=0.25, name="my network")


if __name__ == "__main__":
    out = sys.argv[1] if len(sys.argv) > 1 else "runs/own_model"
    task = make_task()
    result = ap.search(task, budget="macs<=40%", candidates=12, finetune_steps=20, out=out)
    small = result.pick().finetune(epochs=3)
    small.save(f"{out}/mine")
    again = ap.load(f"{out}/mine", build=Net)
    print(f"{result.dense['accuracy']:.1%} dense, {small.accuracy:.1%} at {small.candidate.macs:,} MACs")
    print(again)
