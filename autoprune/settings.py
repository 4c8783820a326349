"""`SearchSettings`: all that a search can be told besides its task. One frozen record, checked when it is made."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from autoprune import registry
from autoprune.cost import Budget
from autoprune.errors import ConfigError, UnknownNameError
from autoprune.evaluation import PRECISIONS, RUNGS, Recovery
from autoprune.evaluation.ladder import FEWEST, FEWEST_SAMPLED, HIGHEST, rungs
from autoprune.finetuning import Recipe
from autoprune.rewards import PROTOCOLS
from autoprune.structure.analysis import KINDS
from autoprune.structure.weights import WeightKind

__all__ = ["SearchSettings"]


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How to search.

    Attributes:
        budget: Upper limits on the cost, as in `macs<=50%` or `macs<=20M,params<=0.4`.
        max_drop: Largest tolerated loss of accuracy; without a budget the search looks for the cheapest network in it.
        protocol: What an agent with one objective raises (see `autoprune.rewards`): "resource", the accuracy within the
            budget; "accuracy" or "accuracy-params", AMC's accuracy-guaranteed reward, for which no budget is needed,
            and by which the pick is made too.
        agent: Name of what proposes policies, with the settings that it brings.
        space: Name of the search space.
        candidates: Distinct policies that the agent may have evaluated.
        control: Random policies evaluated beside them as a control; None means a tenth of the candidates.
        criterion: Name of the score by which elements are ordered.
        recover: How candidates are recovered before they are fine-tuned: "reconstructed" (layers fitted in closed form)
            or "recalibrated" (batch-norm statistics only).
        finetune_steps: Gradient steps of short fine-tuning for every candidate. None by default: reconstructed,
            policies rank as well without (`benchmarks/closed_form.md`), and the picked one is fine-tuned afterwards.
        promote: Share of the candidates that get those steps, once the agent has finished: the best, then the same
            share of these for as much longer, and so on (see `autoprune.evaluation.ladder`). 1: all, as they are
            proposed, so that the agent learns from what they are afterwards. "auto": some from the best to the worst
            get those steps first, and the better they rank as before, the fewer follow.
        shared_steps: Gradient steps in which one set of weights is trained under changing policies, before anything is
            evaluated; all candidates are then cut from these (see `autoprune.finetuning.shared`). 0: from the dense
            network's own.
        race: Whether a candidate that is clearly worse than its rival is measured no further, and its accuracy
            estimated (see `autoprune.evaluation.race`). The rival is uniform at the whole budget, or what the agent
            names: `evolution` the parent. For agents with one objective, and candidates that are not fine-tuned as they
            are proposed.
        lr: Peak learning rate of short fine-tuning, and of those steps.
        precision: What candidates are fine-tuned and measured in: "auto" (the fastest that agrees with float32 on this
            machine), "float32" or "bfloat16". The result's numbers are in float32.
        calibration_images: Augmented training images that batch-norm statistics and fits are made from.
        activations_memory: Bytes, in GB, that the dense network's activations may take while single groups are probed.
        moments_memory: Bytes, in GB, that the moments of the layers' inputs may take.
        sensitivity: Sparsities at which every group is measured before the search; empty for no analysis.
        units: What may be removed: "channels", "heads", "blocks", and as zeros in place "weights", N:M patterns such as
            "2:4" and tiles such as "16x16".
        multiple: The channels that stay in a layer are a multiple of this.
        normalised: Whether groups that a norm runs across are offered too.
        max_sparsity: Highest sparsity of any group.
        bounds: Group name or pattern → `lock`, `min`, `max` (see `autoprune.bounds`).
        time_limit: Seconds after which nothing new is evaluated, or None.
        seed: Of everything that is random.
        agent_seed: Of what the agent draws alone; None: the seed. What becomes of a policy does not depend on it.

    Raises:
        ConfigError: A value out of range.
        UnknownNameError: An agent, space or criterion that does not exist.
    """

    budget: str | None = None
    max_drop: float | None = None
    protocol: str = "resource"
    agent: str = "surrogate"
    space: str = "group"
    candidates: int = 60
    control: int | None = None
    criterion: str = "l1"
    recover: str = "reconstructed"
    finetune_steps: int = 0
    promote: float | str = 1.0
    shared_steps: int = 0
    race: bool = False
    lr: float = 0.01
    precision: str = "auto"
    calibration_images: int = 2000
    moments_memory: float = 2.0
    activations_memory: float = 2.0
    sensitivity: tuple[float, ...] = (0.25, 0.5, 0.75)
    units: tuple[str, ...] = ("channels", "heads")
    multiple: int = 1
    normalised: bool = False
    max_sparsity: float = 0.9
    bounds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    time_limit: float | None = None
    seed: int = 0
    agent_seed: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        budget = Budget.parse(self.budget)
        object.__setattr__(self, "budget", str(budget) or None)
        object.__setattr__(self, "sensitivity", tuple(float(s) for s in self.sensitivity))
        object.__setattr__(self, "bounds", {name: dict(line) for name, line in self.bounds.items()})
        self._check_name("search space", self.space)
        self._check_name("criterion", self.criterion)
        object.__setattr__(self, "units", tuple(self.units))
        for unit in self.units:
            if unit not in KINDS:
                WeightKind.read(unit)
        if not self.units:
            raise ConfigError("`units` must name what may be removed, for example channels")
        lowest = {"candidates": 1, "multiple": 1, "finetune_steps": 0, "shared_steps": 0, "calibration_images": 2}
        for name, minimum in lowest.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"`{name} >= {minimum}` must hold, but got {name}={getattr(self, name)}")
        if self.control is not None and self.control < 0:
            raise ConfigError(f"`control >= 0` must hold, but got control={self.control}")
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise ConfigError(f"`0 <= max_drop < 1` must hold, but got max_drop={self.max_drop}; 0.01 is one point")
        self._check_promotion()
        if self.protocol not in PROTOCOLS:
            raise UnknownNameError("protocol", self.protocol, tuple(PROTOCOLS))
        if self.protocol != "resource" and self.max_drop is not None:
            raise ConfigError(f"protocol {self.protocol} has a reward of its own; give it or max_drop")
        if self.race and (self.protocol != "resource" or self.max_drop is not None or self.budget is None):
            raise ConfigError("`race` compares with uniform at the same cost; give a budget, and no max_drop")
        if self.race and self.recovery.finetune_steps:
            raise ConfigError(
                "`race` saves measuring, which is little where every candidate is fine-tuned first; leave it out, or "
                "promote a share"
            )
        if not 0 < self.max_sparsity < 1:
            raise ConfigError(f"`0 < max_sparsity < 1` must hold, but got max_sparsity={self.max_sparsity}")
        if not all(0 < s < 1 for s in self.sensitivity):
            raise ConfigError(
                f"`0 < sparsity < 1` must hold for every measured sparsity, but got {list(self.sensitivity)}"
            )
        if self.recover not in RUNGS:
            raise UnknownNameError("recovery", self.recover, RUNGS)
        if self.precision not in PRECISIONS:
            raise UnknownNameError("precision", self.precision, PRECISIONS)
        for name in ("lr", "time_limit", "moments_memory", "activations_memory"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"`{name} > 0` must hold, but got {name}={getattr(self, name)}")

    def _check_promotion(self) -> None:
        share = HIGHEST if self.promote == "auto" else self.promote
        if isinstance(share, str) or not (0 < share <= HIGHEST or share == 1):
            raise ConfigError(
                f'`0 < promote <= {HIGHEST}`, `promote == 1` or `promote == "auto"` must hold, but got '
                f"promote={self.promote!r}"
            )
        if share < 1 and not self.finetune_steps:
            raise ConfigError("`promote` says who is fine-tuned, but there are no steps; give finetune_steps")
        if self.promote == "auto" and self.candidates < 2 * FEWEST_SAMPLED:
            raise ConfigError(
                f"{self.candidates} candidates are too few to learn who to promote; give promote a number, or raise "
                f"candidates to {2 * FEWEST_SAMPLED}"
            )
        if share < 1 and not rungs(self.candidates, self.finetune_steps, share):
            raise ConfigError(
                f"{share:g} of {self.candidates} candidates are fewer than {FEWEST}, too few to compare; raise "
                "promote or candidates"
            )

    def _check_types(self) -> None:
        texts = ("budget", "protocol", "agent", "space", "criterion", "recover", "precision")
        steps = ("finetune_steps", "shared_steps")
        wholes = ("candidates", "multiple", "control", *steps, "calibration_images", "seed", "agent_seed")
        numbers = ("max_drop", "lr", "max_sparsity", "time_limit", "moments_memory", "activations_memory")
        optional = ("budget", "max_drop", "control", "time_limit", "agent_seed")
        for names, kind, word in (
            (texts, str, "text"),
            (wholes, int, "a whole number"),
            (numbers, (int, float), "a number"),
        ):
            for name in names:
                value = getattr(self, name)
                if not (isinstance(value, kind) and not isinstance(value, bool)) and not (
                    value is None and name in optional
                ):
                    raise ConfigError(f"`{name}` must be {word}, but got {value!r}")
        if isinstance(self.promote, bool) or not isinstance(self.promote, int | float | str):
            raise ConfigError(f'`promote` must be a number or "auto", but got {self.promote!r}')
        if not isinstance(self.bounds, Mapping):
            raise ConfigError(
                f"`bounds` must be a table, but got {self.bounds!r}; read a file by autoprune.bounds.read_bounds"
            )

    def _check_name(self, family: str, name: str) -> None:
        if name not in registry.names(family):
            raise UnknownNameError(family, name, registry.names(family))

    @property
    def limits(self) -> Budget:
        """The budget, read."""
        return Budget.parse(self.budget)

    @property
    def control_size(self) -> int:
        """How many random policies are the control."""
        return max(1, self.candidates // 10) if self.control is None else self.control

    @property
    def agents_own_seed(self) -> int:
        """What the agent's seed is derived from."""
        return self.seed if self.agent_seed is None else self.agent_seed

    @property
    def recovery(self) -> Recovery:
        """How far candidates are recovered when they are proposed."""
        return Recovery(self.calibration_images, self.finetune_steps if self.promote == 1 else 0, self.recipe)

    @property
    def recipe(self) -> Recipe:
        """How weights are trained while policies are searched."""
        return Recipe(lr=self.lr)

    @property
    def measured_with(self) -> dict[str, Any]:
        """What sensitivity cells depend on."""
        names = ("criterion", "recover", "calibration_images", "seed", "units", "multiple", "normalised")
        values = {name: getattr(self, name) for name in names}
        return values | {"units": list(self.units)} | self.shared_with

    @property
    def whole_budget(self) -> bool:
        """Whether candidates use the whole budget, instead of trading accuracy for cost; an agent may still trade."""
        return self.budget is not None and self.max_drop is None and self.protocol == "resource"

    @property
    def shared_with(self) -> dict[str, Any]:
        """What the shared weights depend on besides `measured_with`; empty where there are none."""
        if not self.shared_steps:
            return {}
        names = ("shared_steps", "lr", "budget", "max_drop", "space", "max_sparsity", "bounds")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object; the time limit is left out, since it does not change what a search is."""
        values = dataclasses.asdict(self)
        del values["time_limit"]
        return values | {"control": self.control_size, "sensitivity": list(self.sensitivity), "units": list(self.units)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Make settings from names and values.

        Raises:
            UnknownNameError: There is no setting of a name.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise UnknownNameError("setting", name, known)
        return cls(**values)
