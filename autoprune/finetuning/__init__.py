"""How weights recover from slicing: one file a method, the training loop among them."""

from autoprune.finetuning.recalibrate import recalibrate
from autoprune.finetuning.train import DivergedError, Recipe, train

__all__ = ["DivergedError", "Recipe", "recalibrate", "train"]
