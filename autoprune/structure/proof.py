"""The proof that slicing is exact: the smaller network against the dense one with the elements zeroed.

Removing an element must equal zeroing it wherever it is read (in the weights of its readers). Where it does not,
because an operator between writer and reader mixes elements or the code fixes their number, the group is locked. Two
kinds of group have a reference of their own: a norm that runs across the group's dimension is, in the reference, over
the elements that stay; and a block that goes is, in the reference, an addition of zero.

All groups are removed in part at once and compared; only where that fails are they halved, down to the culprits. So a
network without faults costs a few runs, however many groups it has, and each group is proven beside all the others.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoprune.errors import StructureError
from autoprune.inputs import call, each_tensor
from autoprune.seeds import kept_torch
from autoprune.structure.groups import Group, Structure
from autoprune.structure.labels import distinct, varying
from autoprune.structure.seen import Trace
from autoprune.structure.surgery import remove
from autoprune.structure.trace import in_mode, plain_attention, trace
from autoprune.structure.tracer import tensors

__all__ = ["TOLERANCE", "Proof"]

TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest output."""

_RUNS = 4
"""How many times elements of every group are removed."""


class Proof:
    """Proves the groups of one network on one random input.

    It runs in float64 where the network can, so that the tolerance measures the slicing and not the rounding. And it
    runs on a copy where a parameter that is constant, as fresh ones are, has random values, and where batch-norm
    statistics are measured anew before each comparison: behind a scale of 0 or 1e-6, or where half of the elements of
    every layer are gone and the signal with them, no fault would show.

    Args:
        model: The dense network; not changed.
        example_input: Its shapes and dtypes are used, and its values where they are integers.
        generator: Randomness of the inputs and of the elements removed.
        training: Whether to compare also what the network computes in training only (see `trace.in_mode`).
    """

    def __init__(
        self, model: nn.Module, example_input: Any, generator: torch.Generator, *, training: bool = False
    ) -> None:
        self._generator = generator
        self._training = training
        self._traced: Trace | None = None
        self._model = in_mode(copy.deepcopy(model), training=training)
        self._device = next((t.device for t in (*model.parameters(), *tensors(example_input))), None)
        with torch.no_grad():
            for parameter in self._model.parameters():
                if parameter.is_floating_point() and parameter.numel() > 1 and parameter.min() == parameter.max():
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        self._inputs = self._found_inputs(example_input)

    def _found_inputs(self, example_input: Any) -> Any:
        """Return a random input that the network runs on: in float64 if it can, with two samples if it can.

        Raises:
            StructureError: It runs on none.
        """
        batch = next((len(tensor) for tensor in tensors(example_input) if tensor.dim()), 0)
        for precision, samples in itertools.product((torch.float64, torch.float32), (2, batch)):
            change = partial(self._random, precision=precision, batch=batch, samples=samples)
            inputs = self._inputs = each_tensor(example_input, change)
            try:
                with kept_torch(self._device):
                    self._outputs(self._model.to(precision))
                return inputs
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # the network's code insists on another precision or batch
                reason = error
        raise StructureError(
            f"{type(self._model).__name__} runs on the example input, but not on a random one of the same shapes in "
            f"float32, so that nothing can be proven: {_first_line(reason)}"
        ) from reason

    def _random(self, tensor: torch.Tensor, *, precision: torch.dtype, batch: int, samples: int) -> torch.Tensor:
        """Return random numbers of a tensor's shape, its own if they are integers, for so many samples."""
        rows = torch.arange(samples) % batch if tensor.dim() and len(tensor) == batch else slice(None)
        like = tensor[rows] if tensor.dim() else tensor
        if not tensor.is_floating_point():
            return like
        return torch.randn(like.shape, generator=self._generator, dtype=precision).to(tensor.device)

    @property
    def _trace(self) -> Trace:
        if self._traced is None:
            self._traced = trace(self._model, self._inputs, training=self._training)
        return self._traced

    def faults(self, groups: Sequence[Group]) -> dict[str, str]:
        """Return why groups can't be sliced, by name; those not named are exact.

        About half of the elements of every group are removed, several times: every element is removed once and kept
        once at least, and of any two among 14 or fewer, one is removed without the other. So a wrong position shows.
        Then one of every group is, which shows code that needs an even number, say; and then the blocks.
        """
        going = {group.name: _removals(group, self._generator) for group in groups}
        runs = [{name: sets[run] for name, sets in going.items()} for run in range(_RUNS)]
        runs.append({name: sets[0][:1] for name, sets in going.items()})  # an odd number, if code needs an even one
        if any(group.block is not None for group in groups):
            runs.append({name: sets[_RUNS] for name, sets in going.items()})
        found: dict[str, str] = {}
        sound = list(groups)
        with kept_torch(self._device):
            for removed in runs:
                faulty = dict(self._culprits(sound, removed))
                found |= faulty
                sound = [group for group in sound if group.name not in faulty]
        return found

    @property
    def steady(self) -> bool:
        """Whether the network computes the same twice, and numbers."""
        return self._hopeless is None

    @cached_property
    def _hopeless(self) -> str | None:
        """Why nothing can be proven of this network, if so."""
        with kept_torch(self._device):
            pairs = list(zip(self._outputs(self._model), self._outputs(self._model), strict=True))
        if any(first.isnan().any() for first, _ in pairs):
            return "the network's output on random input is not a number, which proves nothing"
        if not all(torch.equal(*pair) for pair in pairs):
            return "the network computes something else each time it runs, as with dropout that is always on"
        return None

    def fault(self, group: Group) -> str | None:
        """Return why one group can't be sliced, or None if slicing it is exact."""
        return self.faults([group]).get(group.name)

    def _culprits(
        self, groups: Sequence[Group], removed: Mapping[str, list[int]], beside: Sequence[Group] = ()
    ) -> Iterator[tuple[str, str]]:
        """Yield the groups whose removal is not exact, beside others that are, with the reason."""
        there = [group for group in groups if removed[group.name]]
        if not there:
            return
        fault = self._compare([*beside, *there], removed)
        if fault is None:
            return
        if len(there) == 1 or self._hopeless is not None:
            yield from ((group.name, self._hopeless or fault) for group in there)
            return
        half = len(there) // 2
        first = dict(self._culprits(there[:half], removed, beside))
        yield from first.items()
        sound = [group for group in there[:half] if group.name not in first]
        yield from self._culprits(there[half:], removed, [*beside, *sound])

    def _compare(self, groups: Sequence[Group], removed: Mapping[str, list[int]]) -> str | None:
        """Return how the network without the elements differs from the reference, or None if it does not."""
        there = {group.name: removed[group.name] for group in groups}
        try:
            zeroed = self._zeroed(groups, there)
        except IndexError:
            return "its elements do not line up with the weights that read them"
        try:
            reference = self._reference(groups, there)
            with _fresh_statistics(self._model) as norms:
                if norms:
                    self._outputs(self._model, zeroed, reference)
            expected = self._outputs(self._model, zeroed, reference)
            del zeroed
            outputs = self._outputs(remove(self._model, Structure(tuple(groups)), there))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the network's own code raises
            return f"the network fails without some of its elements: {_first_line(error)}"
        if [o.shape for o in outputs] != [e.shape for e in expected]:
            return "its elements are the network's output"
        for output, one in zip(outputs, expected, strict=True):
            difference = _difference(output, one)
            if not difference <= TOLERANCE:
                return f"removing its elements is not the same as zeroing them (outputs differ by {difference:.0e})"
        return None

    def _zeroed(self, groups: Sequence[Group], removed: Mapping[str, list[int]]) -> dict[str, torch.Tensor]:
        """Return the weights with zeros where elements that go are read; written, where a group has no reader."""
        parameters = dict(self._model.named_parameters())
        everything = {**dict(self._model.named_buffers()), **parameters}
        zeroed: dict[str, torch.Tensor] = {}
        for group in groups:
            parts = [p for p in group.slices if p.role == "read"] or [p for p in group.slices if p.tensor in parameters]
            for part in parts:
                if part.tensor not in zeroed:
                    zeroed[part.tensor] = everything[part.tensor].detach().clone()
                gone = part.positions[removed[group.name]].flatten()
                zeroed[part.tensor].index_fill_(part.dim, gone.to(zeroed[part.tensor].device), 0.0)
        return zeroed

    def _reference(self, groups: Sequence[Group], removed: Mapping[str, list[int]]) -> "_Reference | None":
        """Return how norms and blocks of the dense network behave when elements are gone; None if as ever."""
        normalised = [group for group in groups if group.normalised]
        blocks = {group.block for group in groups if group.block is not None and removed[group.name]}
        if not normalised and not blocks:
            return None
        reference = _Reference(self._trace.operators)
        for block in self._trace.blocks:
            if block.module in blocks:
                reference.branches.update(dict(block.branches))
        nodes = self._trace.nodes
        starts = dict(zip(nodes.sides, nodes.starts, strict=True))
        gone = np.zeros(len(nodes), dtype=bool)
        for group in normalised:
            for part in group.slices:
                gone[starts[part.tensor, part.dim] + part.positions[removed[group.name]].flatten().numpy()] = True
        for at, (maps, _) in self._trace.norms.items():
            for label in maps:
                dims = varying(label)
                if len(dims) == 1 and gone[distinct(label)].any():
                    line = label.movedim(dims[0], 0).flatten(1)[:, 0] if label.dim() > 1 else label
                    reference.stays[at] = (dims[0], torch.from_numpy(np.flatnonzero(~gone[line.numpy()])))
        return reference

    def _outputs(
        self,
        model: nn.Module,
        replaced: Mapping[str, torch.Tensor] | None = None,
        reference: "_Reference | None" = None,
    ) -> list[torch.Tensor]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, dict(replaced or {}), args, kwargs)

        with torch.no_grad():
            if reference is None:
                outputs = call(run, self._inputs)
            else:
                with plain_attention(), reference.anew():
                    outputs = call(run, self._inputs)
        return [torch.view_as_real(t) if t.is_complex() else t for t in tensors(outputs)]


@dataclass
class _Reference(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own has no types
    """Runs a dense network with norms over the elements that stay, and without what some blocks add.

    Attributes:
        operators: Names of the operators that the trace saw. An operator is found again by its name and how often that
            name came before, since copies for the sake of memory layout come and go.
        stays: Operator's number → a dimension, and its indices that the operator reduces.
        branches: Number of an addition → which operand counts as zero.
    """

    operators: Sequence[str]
    stays: dict[int, tuple[int, torch.Tensor]] = field(default_factory=dict)
    branches: dict[int, int] = field(default_factory=dict)
    _seen: Counter[str] = field(default_factory=Counter)
    _numbers: dict[tuple[str, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        before: Counter[str] = Counter()
        for number, name in enumerate(self.operators):
            self._numbers[name, before[name]] = number
            before[name] += 1

    def anew(self) -> "_Reference":
        """Return the same, at its start."""
        self._seen.clear()
        return self

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name
        at = self._numbers.get((name, self._seen[name]), -1)
        self._seen[name] += 1
        if at in self.branches:
            args = list(args)
            place = self.branches[at]
            if place == 0 and name.endswith("_"):
                args[0].zero_()
            else:
                args[place] = torch.zeros_like(args[place])
        if at not in self.stays:
            return function(*args, **kwargs)
        dim, stays = self.stays[at]
        inputs = args[0]
        stays = stays.to(inputs.device)
        small = inputs.index_select(dim, stays)
        if name not in ("aten::native_layer_norm", "aten::native_group_norm"):
            return function(small, *args[1:], **kwargs)
        if name == "aten::native_layer_norm":
            shape, own = list(args[1]), dim - (inputs.dim() - len(args[1]))
            shape[own] = len(stays)
            weights = [None if weight is None else weight.index_select(own, stays) for weight in args[2:4]]
            output, *rest = function(small, shape, *weights, *args[4:])
        else:
            weights = [None if weight is None else weight.index_select(0, stays) for weight in args[1:3]]
            output, *rest = function(small.contiguous(), *weights, args[3], len(stays), *args[5:])
        return (inputs.new_zeros(inputs.shape).index_copy_(dim, stays, output), *rest)


@contextmanager
def _fresh_statistics(model: nn.Module) -> Iterator[bool]:
    """Within, let every batch-norm take its statistics from the batch, and keep them; yields whether there is one."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
        norm.num_batches_tracked = None  # or counting would be an operator more than the trace saw
    try:
        yield bool(norms)
    except ValueError:  # one value a channel has no variance; the statistics stay as they are
        pass
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.eval()
            norm.momentum, norm.num_batches_tracked = momentum, count


def _difference(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest finite number of the reference; infinities must agree."""
    if reference.numel() == 0:
        return 0.0
    output, reference = output.double(), reference.double()
    scale = torch.where(reference.isfinite(), reference, 0.0).abs().max().clamp_min(1e-30)
    difference = torch.where(output == reference, 0.0, output - reference)
    return float(difference.abs().max() / scale)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _removals(group: Group, generator: torch.Generator) -> list[list[int]]:
    """Return the sets of elements that go, run by run; blocks go in a run of their own, since their inside goes too.

    Every element gets a binary code that says in which of the runs it goes. Codes come in complementary pairs, so that
    each run removes some elements and leaves some, and no code is all zeros or all ones.
    """
    if group.block is not None:
        return [*[[]] * _RUNS, [0]]
    runs = min(_RUNS, (group.size + 1).bit_length())
    codes = [code for half in range(1, 2 ** (runs - 1)) for code in (half, 2**runs - 1 - half)]
    shuffled = torch.randperm(group.size, generator=generator).tolist()
    goes = [[e for place, e in enumerate(shuffled) if codes[place % len(codes)] >> run & 1] for run in range(runs)]
    return [*goes, *[[]] * (_RUNS - runs), goes[0]]
