"""What happens to the picked candidate: full fine-tuning, the test set read once, and saving."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, Final

from torch import nn

from autoprune import export
from autoprune.errors import ConfigError
from autoprune.evaluation import Candidate, Evaluator, Measurement, Precision, Samples, measure
from autoprune.finetuning import Recipe
from autoprune.seeds import derive
from autoprune.structure import Cut, cut
from autoprune.task import FINALISER, Task
from autoprune.threads import suited_threads

__all__ = ["FULL_LR", "PrunedNetwork", "read_test"]

FULL_LR: Final = 0.05
"""Peak learning rate of full fine-tuning, which has steps enough to come back from more than a short one bears (see
`benchmarks/closed_form.md`)."""


def read_test(task: Task, networks: Iterable[nn.Module]) -> list[Measurement]:
    """Read the test set, once in the task's life, and return what fully fine-tuned networks do on it.

    Networks are taken one after another, and the images stay in memory meanwhile.

    Raises:
        TestSetError: The task has no test split, or it was read before.
    """
    device = task.example_input.device
    batches = list(task.open_test(FINALISER).batches(500))
    found = []
    for network in networks:
        placed = Precision().placed(batches, device)
        found.append(measure(network.to(device), placed, task.metric, task.loss).summary("full"))
    return found


class PrunedNetwork:
    """A smaller network with what was measured of it.

    Args:
        evaluator: What built it.
        candidate: The candidate that it is.
        model: The network, in eval mode.
        measured: On the validation split, as it is now.
        rule: Why it was picked.
    """

    def __init__(
        self, evaluator: Evaluator, candidate: Candidate, model: nn.Module, measured: Measurement, rule: str
    ) -> None:
        self.candidate = candidate
        self.model = model
        self.measured = measured
        self.rule = rule
        self._evaluator = evaluator

    @property
    def accuracy(self) -> float:
        """On the validation split."""
        return self.measured.accuracy

    @property
    def fidelity(self) -> str:
        """How far the weights are recovered."""
        return self.measured.fidelity

    def finetune(
        self,
        epochs: int = 10,
        *,
        recipe: Recipe | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> "PrunedNetwork":
        """Return the network after full fine-tuning on the training split; this one is left as it is.

        Args:
            epochs: Passes over the training split.
            recipe: Settings; by default those of the search's short fine-tuning, at a peak learning rate of `FULL_LR`.
            progress: Called after every step with the steps done and the step's loss.

        Raises:
            ConfigError: `epochs` is below 1, or the learning rate is not above 0.
            DivergedError: The loss is not finite.
        """
        if epochs < 1:
            raise ConfigError(f"`epochs >= 1` must hold, but got epochs={epochs}")
        settings = recipe or replace(self._evaluator.pipeline.recovery.recipe, lr=FULL_LR)
        if not settings.lr > 0:
            raise ConfigError(f"`lr > 0` must hold, but got lr={settings.lr}")
        steps = epochs * self._evaluator.bench.task.steps_per_epoch(settings.batch_size)
        model = cut(self.model, Cut())
        seed = derive(self._evaluator.pipeline.seed, "full fine-tuning", self.candidate.id)
        self._evaluator.pipeline.train(model, steps, settings, seed, self.candidate.removed, progress)
        bench = self._evaluator.bench
        measured = bench.measure(model, bench.precision.full).summary("full")
        return PrunedNetwork(self._evaluator, self.candidate, model, measured, self.rule)

    def test(self) -> tuple[Measurement, Measurement]:
        """Read the test set, once in the task's life, and return what this and the dense network do on it.

        Raises:
            TestSetError: The task has no test split, or it was read before.
        """
        bench = self._evaluator.bench
        task, networks = bench.task, (self.model, bench.original)
        with suited_threads(bench.macs):  # one pass, in which no more than a batch or two is held: all may be too many
            parts = [
                [measure(network, [batch], task.metric, task.loss) for network in networks]
                for batch in bench.placed(task.open_test(FINALISER).batches(500))
            ]
        pruned, dense = (reduce(Samples.joined, found) for found in zip(*parts, strict=True))
        return pruned.summary(self.fidelity), dense.summary("dense")

    def save(self, folder: str | Path) -> Path:
        """Write the network to a folder that `autoprune.load` reads, and prove that it loads to the same outputs.

        Raises:
            RunError: The folder can't be written, or the saved network computes something else.
        """
        bench = self._evaluator.bench
        measured: dict[str, Any] = {
            "id": self.candidate.id,
            "policy": dict(self.candidate.policy),
            "widths": {g.name: f"{g.size} -> {g.size - self.candidate.removed[g.name]}" for g in bench.structure},
            "accuracy": self.measured.accuracy,
            "accuracy_se": self.measured.accuracy_se,
            "fidelity": self.fidelity,
            "rule": self.rule,
            "val_cut_from_train": bench.task.describe()["val_cut_from_train"],
            **self.candidate.cost.to_dict(),
        }
        return export.save(
            self.model,
            folder,
            dense=bench.original,
            change=bench.change(self.candidate.removed),
            example_input=bench.task.example_input,
            measured=measured,
        )
