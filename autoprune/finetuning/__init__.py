"""How weights recover from slicing: one file a method, the training loop among them."""

from autoprune.finetuning.recalibrate import recalibrate
from autoprune.finetuning.reconstruct import Refit, reconstruct
from autoprune.finetuning.shared import SharedWeights, train_shared
from autoprune.finetuning.train import Recipe, train

__all__ = ["Recipe", "Refit", "SharedWeights", "recalibrate", "reconstruct", "train", "train_shared"]
