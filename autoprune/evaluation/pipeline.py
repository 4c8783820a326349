"""The pipeline: what happens to a policy between being proposed and being known. Nothing here counts or records.

Slice, recover, measure. What comes out depends on the work and the seed alone, so it may run anywhere, any number of
times: a pipeline can be pickled, and is as good elsewhere.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

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

__all__ = ["Outcome", "Pipeline", "Probe", "Raced", "Recovery", "work_id"]

_RIVALS = 16  # networks whose samples are kept: an agent breeds from one policy again and again


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
class Raced:
    """A policy that is measured no further once it is clearly worse than another (see `autoprune.evaluation.race`)."""

    policy: Policy
    rival: Policy

    @property
    def id(self) -> str:
        """What is known of a policy depends on its rival."""
        return work_id(self.policy.id, self.rival.id)


def work_id(policy_id: str, rival_id: str | None) -> str:
    """Return the id of the work that a policy is, with or without a rival."""
    return policy_id if rival_id is None else f"{policy_id} against {rival_id}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of work: a policy, raced or not, or a probe.

    Attributes:
        id: The work's.
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
    """

    def __init__(self, bench: Workbench, recovery: Recovery, seed: int) -> None:
        self.bench = bench
        self.recovery = recovery
        self.seed = seed
        self._rivals: dict[str, Samples] = {}  # of whole measurements, by policy id; who is asked for comes last

    @property
    def device(self) -> torch.device:
        """The network's."""
        return self.bench.device

    def __call__(self, work: Policy | Raced | Probe) -> Outcome:
        """Return what comes of a policy or a probe; a policy that diverges has failed, which is an outcome too."""
        if isinstance(work, Probe):
            return self._probed(work)
        return self._evaluated(work.policy, work.rival) if isinstance(work, Raced) else self._evaluated(work)

    def _probed(self, probe: Probe) -> Outcome:
        started = time.perf_counter()
        samples = self.bench.probe(self.bench.structure.removed(probe.policy))
        drop_se = samples.drop_error(self.bench.dense)
        seconds = round(time.perf_counter() - started, 4)
        found = (samples.summary(self.bench.rung),)
        return Outcome(probe.id, found, seconds, drop_se=drop_se, executed=self.bench.executed[-1])

    def _evaluated(self, policy: Policy, rival: Policy | None = None) -> Outcome:
        self.bench.forget()  # what probes kept
        started = time.perf_counter()
        failure = None
        measurements: tuple[Measurement, ...] = ()
        try:
            _, measurements = self.recovered(policy, rival=rival)
        except DivergedError as error:
            failure = str(error)
        if failure is None and not all(math.isfinite(m.loss) for m in measurements):
            failure = f"the validation loss is {measurements[-1].loss}"
        seconds = round(time.perf_counter() - started, 4)
        identity = work_id(policy.id, None if rival is None else rival.id)
        return Outcome(identity, measurements if failure is None else (), seconds, failure)

    def recovered(
        self, policy: Policy, *, final: bool = False, rival: Policy | None = None
    ) -> tuple[nn.Module, tuple[Measurement, ...]]:
        """Build a policy's network and recover its weights, always to the same result.

        Args:
            policy: Which network.
            final: Whether to measure it once only, when it is done, and in float32.
            rival: Once it is clearly worse than this policy, it is measured no further (see `Workbench.measure`);
                neither what is final nor what is fine-tuned.

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
        races = bench.races and not final and steps == 0
        other = self._samples_of(rival) if races and rival is not None else None
        samples = bench.measure(model, bench.precision.full if final else None, other)
        if races and len(samples) == bench.task.n_val:
            self._keep(policy.id, samples)
        last = samples.summary(rung, other)
        measurements.append(replace(last, steps=steps))
        return model, tuple(measurements)

    def _samples_of(self, rival: Policy) -> Samples | None:
        """Return what a rival does on all validation samples, or None if it can't be told."""
        samples = self._rivals.pop(rival.id, None)
        if samples is None:  # it was evaluated elsewhere, or long ago, or not to the end
            samples = self.bench.measure(self.bench.recovered(self.bench.structure.removed(rival)))
        self._keep(rival.id, samples)
        return samples if bool(torch.isfinite(samples.losses).all()) else None

    def _keep(self, policy_id: str, samples: Samples) -> None:
        self._rivals[policy_id] = samples
        if len(self._rivals) > _RIVALS:
            del self._rivals[next(iter(self._rivals))]

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
