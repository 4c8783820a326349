"""The environment that agents act in: it turns actions into policies, and nothing more.

Agents that propose whole policies use `evaluate`, `value` and `objectives`; agents that decide group by group use
Gymnasium's `reset` and `step`. Both end in the same evaluator, which counts, caches and records. `submit` and `decide`
do the same without waiting, for several policies under way together.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from torch import nn
from torch.utils._pytree import tree_leaves

from autoprune.analytic import Analytic
from autoprune.cost import FeasibleSet
from autoprune.errors import ConfigError, SearchOver
from autoprune.evaluation import Candidate, Result
from autoprune.inputs import call, first_sample
from autoprune.policy import Policy
from autoprune.scoring import Scores
from autoprune.sensitivity import SensitivityReport
from autoprune.structure import Structure

__all__ = ["ORDERS", "LayerFacts", "Observation", "Proposed", "PruningEnv", "Space", "Submit", "layer_facts"]

Array = npt.NDArray[np.float32]
ORDERS = ("forward", "reverse", "random")
"""In which an episode may decide the groups."""


class Submit(Protocol):
    """Begins to measure a policy; in a race, against a rival. See `PruningEnv.submit`."""

    def __call__(self, policy: Policy, rival: Policy | None = None, /) -> Result:
        """Return what waits for the candidate; raise `SearchOver` when evaluations or time are spent."""
        ...


class Space(Protocol):
    """What the environment needs of a search space; `autoprune.search_spaces.base.SearchSpace` says what each does."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """One name a coordinate."""
        ...

    def decode(self, point: Sequence[float]) -> Policy:
        """Return the policy that a point stands for."""
        ...

    def encode(self, policy: Policy) -> list[float]:
        """Return a point for a policy."""
        ...


@dataclass(frozen=True, slots=True)
class Proposed:
    """A policy that was proposed; called, it waits for the candidate.

    Attributes:
        id: Of the policy. The same for all that remove the same elements, which are evaluated once.
        result: What waits.
    """

    id: str
    result: Result

    def __call__(self) -> Candidate:
        """Wait for the candidate, and return it."""
        return self.result()


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What an agent may know of the layer that writes a group.

    Attributes:
        outputs: Channels or features that go out.
        inputs: Channels or features that come in.
        height: Of what goes out, in pixels; 1 where there are none.
        width: Likewise.
        stride: In pixels; 0 for a linear layer.
        kernel: Side of the kernel in pixels; 0 for a linear layer.
    """

    outputs: int
    inputs: int
    height: int
    width: int
    stride: int
    kernel: int


_NO_FACTS = LayerFacts(0, 0, 0, 0, 0, 0)


def layer_facts(model: nn.Module, example_input: torch.Tensor, structure: Structure) -> dict[str, LayerFacts]:
    """Return the facts of each group's first layer.

    Args:
        model: The dense network; a copy runs once, in eval mode.
        example_input: `(batch, ...)`.
        structure: Its groups; one whose first layer does not run is left out.
    """
    watched = copy.deepcopy(model).eval()
    modules = dict(watched.named_modules())
    shapes: dict[str, torch.Size] = {}
    for group in structure:
        if group.layers[0] in modules:
            modules[group.layers[0]].register_forward_hook(_note_shape(group.layers[0], shapes))
    with torch.no_grad():
        call(watched, first_sample(example_input))
    firsts = {group.name: group.layers[0] for group in structure if group.layers[0] in shapes}
    return {group: _facts(modules[layer], shapes[layer]) for group, layer in firsts.items()}


def _note_shape(name: str, shapes: dict[str, torch.Size]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.dim()), None)
        if first is not None:
            shapes.setdefault(name, first.shape)

    return hook


def _facts(layer: nn.Module, shape: torch.Size) -> LayerFacts:
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        height, width = (1, *shape[2:])[-2:]
        return LayerFacts(
            layer.out_channels, layer.in_channels, height, width, int(layer.stride[0]), int(layer.kernel_size[0])
        )
    weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() > 1)
    return LayerFacts(shape[-1], weights // shape[-1], 1, 1, 0, 0)


class Observation(NamedTuple):
    """The features of the group that is decided next, each in [0, 1]; their meaning is in `PruningEnv`'s table."""

    position: float
    kind: float
    outputs: float
    inputs: float
    height: float
    width: float
    stride: float
    kernel: float
    cost: float
    latency: float
    size: float
    slope: float
    target: float
    fewest: float
    most: float
    reduced: float
    rest: float
    last: float


class PruningEnv(gymnasium.Env[Array, Array]):
    """One episode decides one policy, group by group, in the order of execution.

    ## Description
    Follows AMC (He et al. 2018, https://arxiv.org/abs/1802.03494): the agent walks through the network and says for
    each layer how much goes; the reward is the accuracy of the whole. It differs in that a step is a group of coupled
    layers, not a layer, and that an action is a fraction of what is feasible: AMC's is a ratio that is clipped to the
    budget (Algorithm 1) behind the agent's back, so that the agent learns from an action that was never executed.

    ## Action Space
    `Box(-1, 1, (1,))`. An action `a` removes as many elements as are nearest to `lo + u (hi - lo)`, with
    `u = (a + 1) / 2`, of the numbers that the group allows (`Group.nearest`: what stays may have to be a multiple).
    `lo` is the fewest that still let the budget be met when all groups to come lose the most they may, and `hi` is the
    most that the group may lose. So every episode meets the budget, and a cheaper policy than the budget asks for is
    allowed. Actions that come to the same number are the same to the environment; where `lo == hi`, all are.

    ## Observation Space
    `Box(0, 1, (18,))`, the fields of `Observation`: features of the group that is decided next, the same after `reset`
    and after `step`. Rows 12, 15 and 16 count what the budget limits, as a share of the dense network's; of several
    limits the one that is used most. (AMC's height and width are of what a layer reads.)

    | Index | Name | Meaning | Min | Max |
    |---|---|---|---|---|
    | 0 | position | Index of the group, divided by the number of groups | 0 | 1 |
    | 1 | kind | 0: its first layer is a convolution, 1: it is linear | 0 | 1 |
    | 2 | outputs | Channels that go out of its first layer, relative to the largest group's | 0 | 1 |
    | 3 | inputs | Channels that come into its first layer, likewise | 0 | 1 |
    | 4 | height | Height of what goes out, likewise | 0 | 1 |
    | 5 | width | Width of what goes out, likewise | 0 | 1 |
    | 6 | stride | Stride, likewise | 0 | 1 |
    | 7 | kernel | Side of the kernel, likewise | 0 | 1 |
    | 8 | cost | Share of the multiply-adds in the layers that write or read it | 0 | 1 |
    | 9 | latency | Share of the predicted latency that goes with as much of it as may; 0 without a table | 0 | 1 |
    | 10 | size | Elements in the group, relative to the largest group's | 0 | 1 |
    | 11 | slope | Mean rise of the loss by sparsity, relative to the most sensitive group's; or 0 | 0 | 1 |
    | 12 | target | Cost that the episode's budget allows | 0 | 1 |
    | 13 | fewest | Sparsity at action -1, `lo` divided by the group's size | 0 | 1 |
    | 14 | most | Sparsity at action 1, `hi` divided by the group's size | 0 | 1 |
    | 15 | reduced | Cost removed so far | 0 | 1 |
    | 16 | rest | Cost that this group and those to come can remove | 0 | 1 |
    | 17 | last | Sparsity of the group decided before; 0 at the first | 0 | 1 |

    The observation that ends an episode has position 1, features 1 to 11, 13, 14 and 16 zero, and the others as usual.

    ## Rewards
    0 until the last group; then the value of the evaluated candidate, `worst` if it failed.

    ## Starting State
    Nothing is decided. `reset(options=...)` says how the episode goes, the same as the last one's where it does not:

    * `order`: in which order groups are decided: "forward" (the default), "reverse" or "random" (drawn by the
      generator that `reset(seed=...)` seeds). An order has the last groups pay for what the first ones kept.
    * `share`: the episode's budget: 1, the whole (the default), to 0, the smallest network that can be reached. An
      agent that saw several has learnt policies for several (as CACP, whose agent sees the target as well).

    ## Episode End
    1. Termination: the last group is decided and the policy is evaluated.

    There is no truncation. `step` raises `SearchOver` in place of the last step when the evaluations are spent.

    ## Information
    `group`: name of the group that was decided (after `reset`: that is decided first); `removed`: how many elements it
    loses; `saturated`: whether `lo == hi`; at the end `policy` and `candidate`.

    ## Arguments
    See below.

    ## Version History
    * v0: initial version.

    Args:
        feasible: The policies to choose from.
        space: What points of a search space stand for, for agents that use one.
        submit: Begins to measure a policy.
        value: What to raise, of a candidate that did not fail.
        evaluations: How many policies may be evaluated.
        at_once: How many may be under way together.
        warm_starts: Policies that are worth to be evaluated first.
        layers: Facts of the groups' layers; missing ones are zero in the observation.
        slopes: Mean rise of the loss by sparsity, of each group; missing or negative ones are zero in the observation.
        predicted: What moments predict of policies, for agents that use it.
        measured: What the groups lose one by one, for agents that use it.
        scores: How much every element matters (see `autoprune.scoring`), for agents that use it.
        worst: Value of a candidate that failed.
        name: Tells the search from others that work on the same, and stays when it goes on.
        known: Policies that the search itself proposed before its process ended, in their order; none but where it
            goes on. They need not be looked at: whoever proposes one again gets its candidate at once.

    Raises:
        ConfigError: There is no group to decide.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(
        self,
        feasible: FeasibleSet,
        space: Space,
        submit: Submit,
        *,
        value: Callable[[Candidate], float],
        evaluations: int,
        at_once: int = 1,
        warm_starts: Sequence[Policy] = (),
        layers: Mapping[str, LayerFacts] = MappingProxyType({}),
        slopes: Mapping[str, float] = MappingProxyType({}),
        predicted: Analytic | None = None,
        measured: SensitivityReport | None = None,
        scores: Scores = MappingProxyType({}),
        worst: float = 0.0,
        name: str = "",
        known: Sequence[Policy] = (),
    ) -> None:
        if not len(feasible.structure):
            raise ConfigError("there is nothing to search: the network has no group that can be pruned")
        self.feasible = feasible
        self.space = space
        self.evaluations = evaluations
        self.at_once = at_once
        self.warm_starts = tuple(warm_starts)
        self.predicted = predicted
        self.measured = measured
        self.scores = scores
        self.worst = worst
        self.name = name
        self.known = tuple(known)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = spaces.Box(0.0, 1.0, (len(Observation._fields),), np.float32)
        self._submit = submit
        self._value = value
        self._groups = feasible.structure.groups
        self._dense = feasible.utilisation(np.zeros_like(feasible.lower))
        self._constant = _constant_features(feasible, layers, slopes)
        self._removed = feasible.lower.copy()  # of groups that are not decided yet it is not looked at
        self._order = np.arange(len(self._groups))
        self._kind_of_order, self._target = "forward", 1.0
        self._decided = len(self._groups)  # so many; an episode starts with `reset`
        self._tally = Counter[str]()

    # -- for agents that propose whole policies -------------------------------------------------------------------

    def submit(self, policy: Policy, *, rival: Policy | None = None) -> Proposed:
        """Begin to measure a policy: `proposed = env.submit(policy)`, and `proposed()` waits for its candidate.

        `at_once` policies may be under way; with more, this waits for one of them.

        Args:
            policy: What to measure.
            rival: Where the search is a race (`SearchSettings.race`), the policy is measured no further once it is
                clearly worse than this one; by default than uniform. The first that is named for a policy counts. A
                rival that was not measured yet, not to the end, or by another worker, is measured for it.

        Raises:
            SearchOver: Evaluations or time are spent.
        """
        return Proposed(self.feasible.structure.rounded(policy).id, self._submit(policy, rival))

    def evaluate(self, policy: Policy) -> Candidate:
        """Measure a policy.

        Raises:
            SearchOver: Evaluations or time are spent.
        """
        return self.submit(policy)()

    def value(self, candidate: Candidate) -> float:
        """Return what to raise, always finite; `worst` for a candidate that failed."""
        if candidate.failure is not None:
            return self.worst
        value = float(self._value(candidate))
        return value if math.isfinite(value) else self.worst

    def objectives(self, candidate: Candidate) -> tuple[float, float, float]:
        """Return accuracy (NaN if the candidate failed), and MACs and parameters relative to the dense network."""
        dense = self.feasible.costs.dense
        return candidate.accuracy, candidate.macs / dense.macs, candidate.params / dense.params

    # -- for agents that decide group by group --------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode; the seed is of random orders.

        Raises:
            ConfigError: An option that does not exist.
        """
        super().reset(seed=seed)
        options = options or {}
        order, share = options.get("order", self._kind_of_order), options.get("share")
        if order not in ORDERS or not (share is None or 0 <= share <= 1) or set(options) - {"order", "share"}:
            raise ConfigError(f"`order` is one of {', '.join(ORDERS)} and `0 <= share <= 1`, but got {options}")
        self._kind_of_order = order
        if share is not None:
            self._target = self.feasible.target(share)
        groups = len(self._groups)
        self._order = self.np_random.permutation(groups) if order == "random" else np.arange(groups)
        if order == "reverse":
            self._order = self._order[::-1]
        self._decided = 0
        return self._observation(), {"group": self._groups[self._next].name}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Decide the next group; at the last, wait for the candidate.

        Raises:
            ConfigError: The action is not in the action space.
            ResetNeeded: The episode has ended.
            SearchOver: The evaluations are spent.
        """
        observation, proposed, info = self.decide(action)
        if proposed is None:
            return observation, 0.0, False, False, info
        candidate = proposed()
        return observation, self.value(candidate), True, False, info | {"candidate": candidate}

    def decide(self, action: Array) -> tuple[Array, Proposed | None, dict[str, Any]]:
        """Decide the next group as `step` does, but wait for nothing: episodes may be under way together.

        Returns:
            The observation; what waits for the candidate, if this was the last group; and the information.

        Raises:
            ConfigError: The action is not in the action space.
            ResetNeeded: The episode has ended.
            SearchOver: The evaluations are spent.
        """
        if self._decided == len(self._groups):
            raise ResetNeeded("the episode has ended, or never began: call `reset` before `step`")
        if not self.action_space.contains(np.asarray(action, dtype=np.float32)):
            raise ConfigError(f"an action is one number in [-1, 1], but got {np.asarray(action).tolist()}")
        low, high = self.interval
        decided = self._groups[self._next]
        wanted = decided.nearest(low + (float(action[0]) + 1) / 2 * (high - low))
        self._removed[self._next] = min(high, max(low, wanted))
        info = {"group": decided.name, "removed": int(self._removed[self._next]), "saturated": low == high}
        self._tally.update(decisions=1, saturated=int(low == high))
        self._decided += 1
        last = self._decided == len(self._groups)
        if not last:
            return self._observation(), None, info
        policy = self.feasible.policy(self._removed)
        return self._observation(), self.submit(policy), info | {"policy": policy}

    @property
    def interval(self) -> tuple[int, int]:
        """The fewest and the most elements that the group that is decided next may lose; -1 and 1 as actions."""
        return self.feasible.interval(self._removed, self._next, self._undecided, self._target)

    @property
    def saturated(self) -> float | None:
        """Share of all decisions so far, of this environment and those beside it, that had no choice."""
        return self._tally["saturated"] / self._tally["decisions"] if self._tally["decisions"] else None

    def beside(self) -> "PruningEnv":
        """Return another environment of the same search, whose episodes are its own; one has not begun."""
        other = copy.copy(self)
        other._removed = self._removed.copy()
        other._decided = len(self._groups)
        return other

    def without_evaluation(self) -> "PruningEnv":
        """Return the same environment, its episode not begun, for trying an agent out: nothing is measured.

        The last decision's information has the `policy`, and there is no candidate to wait for.
        """
        other = self.beside()
        other._tally = Counter()

        def nothing(policy: Policy, rival: Policy | None = None) -> Result:
            def refuse() -> Candidate:
                raise SearchOver("this environment measures nothing")

            return refuse

        other._submit = nothing
        return other

    @property
    def _next(self) -> int:
        return int(self._order[self._decided])

    @property
    def _undecided(self) -> npt.NDArray[np.bool_]:
        undecided = np.zeros(len(self._groups), dtype=np.bool_)
        undecided[self._order[self._decided :]] = True
        return undecided

    def action_for(self, policy: Policy) -> Array:
        """Return the action that takes what a policy says from the group that is decided next, or the nearest to it."""
        low, high = self.interval
        wanted = self.feasible.removed(policy)[self._next]
        share = (wanted - low) / (high - low) if high > low else 0.0
        return np.array([min(1.0, max(-1.0, 2 * share - 1))], dtype=np.float32)

    def _observation(self) -> Array:
        undecided, over = self._undecided, self._decided == len(self._groups)
        before = self._order[self._decided - 1]
        most_expensive = self.feasible.utilisation(np.where(undecided, self.feasible.lower, self._removed))
        cheapest = self.feasible.utilisation(np.where(undecided, self.feasible.upper, self._removed))
        changing = {
            "position": 1.0 if over else self._next / len(self._groups),
            "target": min(1.0, self._target / self._dense),
            "reduced": 1 - most_expensive / self._dense,
            "rest": (most_expensive - cheapest) / self._dense,
            "last": self._removed[before] / self._groups[before].size if self._decided else 0.0,
        }
        if over:
            features = Observation(**dict.fromkeys(Observation._fields, 0.0) | changing)
        else:
            size = self._groups[self._next].size
            low, high = self.interval
            features = Observation(**self._constant[self._next] | changing, fewest=low / size, most=high / size)
        return np.clip(np.array(features, dtype=np.float32), 0.0, 1.0)  # rounding errors only: all are shares


def _constant_features(
    feasible: FeasibleSet, layers: Mapping[str, LayerFacts], slopes: Mapping[str, float]
) -> list[dict[str, float]]:
    """Return, for each group, the features that no decision changes."""
    groups = feasible.structure.groups
    facts = [layers.get(group.name, _NO_FACTS) for group in groups]
    columns: dict[str, list[float]] = {
        "outputs": [fact.outputs for fact in facts],
        "inputs": [fact.inputs for fact in facts],
        "height": [fact.height for fact in facts],
        "width": [fact.width for fact in facts],
        "stride": [fact.stride for fact in facts],
        "kernel": [fact.kernel for fact in facts],
        "size": [group.size for group in groups],
        "slope": [max(0.0, slopes.get(group.name, 0.0)) for group in groups],
    }
    scaled = {name: [value / (max(values) or 1) for value in values] for name, values in columns.items()}
    return [
        {name: values[index] for name, values in scaled.items()}
        | {
            "kind": float(group.name in layers and facts[index].kernel == 0),
            "cost": min(1.0, feasible.costs.macs_share(group.name)),
            "latency": _latency_share(feasible, index),
        }
        for index, group in enumerate(groups)
    ]


def _latency_share(feasible: FeasibleSet, index: int) -> float:
    """Return the share of the dense network's predicted latency that goes with the most a group may lose."""
    dense = feasible.costs.dense.latency_ms
    if dense is None:
        return 0.0
    removed = np.zeros_like(feasible.upper)
    removed[index] = feasible.upper[index]
    without = feasible.costs.cost(removed).latency_ms
    return 0.0 if without is None else min(1.0, max(0.0, 1 - without / dense))
