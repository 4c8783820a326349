"""The pipeline: what happens to a policy between being proposed and being known. Nothing here counts or records.

Slice, recover, measure. What comes out depends on the policy and the seed alone, so it may run anywhere, any number of
times: a pipeline can be pickled, and is as good elsewhere.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import nn

from autoprune.errors import DivergedError
from autoprune.evaluation.candidate import Measurement
from autoprune.evaluation.measure import Samples
from autoprune.evaluation.workbench import Workbench
from autoprune.finetuning import Recipe, train
from autoprune.policy import Policy
from autoprune.seeds import derive
from autoprune.threads import suited_threads

__all__ = ["Outcome", "Pipeline", "Probe", "Recovery"]


@dataclass(frozen=True, slots=True)
class Recovery:
    """How far a candidate's weights are recovered before it is measured.

    Attributes:
        calibration_images: Augmented training images for the batch-norm statistics.
        finetune_steps: Gradient steps of short fine-tuning; 0 stops at the first rung.
        recipe: Of the fine-tuning.
    """

    calibration_images: int = 2000
    finetune_steps: int = 0
    recipe: Recipe = field(default_factory=Recipe)


@dataclass(frozen=True, slots=True)
class Probe:
    """A policy that is measured as the cells of a sensitivity report are (see `Workbench.probe`)."""

    policy: Policy

    @property
    def id(self) -> str:
        """Other than the policy's, which may be a candidate too."""
        return f"probe {self.policy.id}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a policy or a probe.

    Attributes:
        id: The policy's or the probe's id.
        measurements: One a rung, least recovered first; empty if it failed.
        seconds: Time that it took where it ran.
        failure: Why it failed, or None.
        drop_se: Of a probe, the standard error of the accuracy lost (see `Samples.drop_error`).
        executed: Of a probe, the share of a whole pass's multiply-adds that ran where it ran (see `Workbench`).
    """

    id: str
    measurements: tuple[Measurement, ...]
    seconds: float
    failure: str | None = None
    drop_se: float | None = None
    executed: float | None = None


class Pipeline:
    """Turns policies into networks and what these measure.

    Args:
        bench: The network and its data.
        recovery: How far weights are recovered.
        seed: Of fine-tuning.
        rival: A candidate that is clearly worse than this policy is measured no further (see
            `autoprune.evaluation.race`); the same for all, so that what comes out depends on the policy alone.
    """

    def __init__(self, bench: Workbench, recovery: Recovery, seed: int, rival: Policy | None = None) -> None:
        self.bench = bench
        self.recovery = recovery
        self.seed = seed
        self.rival = None if rival is None else bench.structure.rounded(rival)

    @property
    def device(self) -> torch.device:
        """The network's."""
        return self.bench.device

    def __call__(self, work: Policy | Probe) -> Outcome:
        """Return what comes of a policy or a probe; a policy that diverges has failed, which is an outcome too."""
        return self._probed(work) if isinstance(work, Probe) else self._evaluated(work)

    def _probed(self, probe: Probe) -> Outcome:
        started = time.perf_counter()
        samples = self.bench.probe(self.bench.structure.removed(probe.policy))
        drop_se = samples.drop_error(self.bench.dense)
        seconds = round(time.perf_counter() - started, 4)
        found = (samples.summary(self.bench.rung),)
        return Outcome(probe.id, found, seconds, drop_se=drop_se, executed=self.bench.executed[-1])

    def _evaluated(self, policy: Policy) -> Outcome:
        self.bench.forget()  # what probes kept
        started = time.perf_counter()
        failure = None
        measurements: tuple[Measurement, ...] = ()
        try:
            _, measurements = self.recovered(policy)
        except DivergedError as error:
            failure = str(error)
        if failure is None and not all(math.isfinite(m.loss) for m in measurements):
            failure = f"the validation loss is {measurements[-1].loss}"
        seconds = round(time.perf_counter() - started, 4)
        return Outcome(policy.id, measurements if failure is None else (), seconds, failure)

    def recovered(self, policy: Policy, *, final: bool = False) -> tuple[nn.Module, tuple[Measurement, ...]]:
        """Build a policy's network and recover its weights, always to the same result.

        Args:
            policy: Which network.
            final: Whether to measure it once only, when it is done, and in float32.

        Returns:
            The network, in eval mode, and what it measured, at every rung.

        Raises:
            DivergedError: The loss is not finite while fine-tuning.
        """
        bench, steps = self.bench, self.recovery.finetune_steps
        removed = bench.structure.removed(policy)
        model, rung = bench.recovered(removed), bench.rung
        measurements: list[Measurement] = []
        if steps > 0:
            measurements += [] if final else [bench.measure(model).summary(rung)]
            if not all(math.isfinite(m.loss) for m in measurements):
                return model, tuple(measurements)
            self.train(model, steps, self.recovery.recipe, derive(self.seed, "fine-tuning", policy.id), removed)
            rung = "short"
        rival = None if final or self.rival is None or policy.id == self.rival.id else self._rival
        last = bench.measure(model, bench.precision.full if final else None, rival).summary(rung, rival)
        measurements.append(replace(last, steps=steps))
        return model, tuple(measurements)

    @cached_property
    def _rival(self) -> Samples | None:
        """What the rival does on all validation samples, or None if it can't be told."""
        assert self.rival is not None
        samples = self.bench.measure(self.bench.recovered(self.bench.structure.removed(self.rival)))
        return samples if bool(torch.isfinite(samples.losses).all()) else None

    def train(
        self,
        model: nn.Module,
        steps: int,
        recipe: Recipe,
        seed: int,
        removed: Mapping[str, int],
        progress: Callable[[int, float], None] | None = None,
    ) -> None:
        """Fine-tune a network in place on the task's augmented training stream (see `autoprune.finetuning.train`).

        Weights that the counts `removed` keep at zero stay there.
        """
        task = self.bench.task
        patterns = [(group, group.pattern) for group in self.bench.structure if group.pattern is not None]
        zeroed = [pattern.tensor for group, pattern in patterns if removed.get(group.name)]
        zeroed = [name for name in zeroed if name in dict(model.named_parameters())]
        batches = self.bench.placed(task.train_batches(recipe.batch_size, seed))
        with suited_threads(self.bench.macs):
            train(
                model,
                batches,
                steps,
                recipe=recipe,
                loss=task.loss,
                seed=seed,
                zeroed=zeroed,
                running=partial(self.bench.choice.training.running, self.bench.device),
                progress=progress,
            )
