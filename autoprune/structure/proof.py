"""The proof that slicing a group is exact: the smaller network against the dense one with the elements zeroed.

Removing an element must equal zeroing it wherever it is read (in the weights of its readers). Where it does not,
because an operator between writer and reader mixes elements or the code fixes their number, the group is locked.
"""

import copy

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from autoprune.structure.groups import Group, Structure
from autoprune.structure.surgery import remove

__all__ = ["TOLERANCE", "Proof"]

TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest output."""

_RUNS = 5
"""How many times elements of a group are removed, at most."""


class Proof:
    """Proves the groups of one network on one random input.

    It runs in float64 where the network can, so that the tolerance measures the slicing and not the rounding. And it
    runs on a copy where a parameter that is constant, as fresh ones are, has random values: behind a scale of 0 or 1e-6
    no fault would show.

    Args:
        model: The dense network; not changed.
        example_input: `(batch, ...)`; its shape and dtype are used, and its values where they are integers.
        generator: Randomness of the inputs and of the elements removed.
    """

    def __init__(self, model: nn.Module, example_input: torch.Tensor, generator: torch.Generator) -> None:
        self._generator = generator
        inputs = example_input
        if inputs.is_floating_point():
            shape = (2, *inputs.shape[1:])
            inputs = torch.randn(shape, generator=generator, dtype=torch.float64).to(inputs.device)
        self._model = copy.deepcopy(model).eval()
        with torch.no_grad():
            for parameter in self._model.parameters():
                if parameter.is_floating_point() and parameter.numel() > 1 and parameter.min() == parameter.max():
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        self._inputs = inputs
        try:
            self._model.double()
            self._outputs(self._model)
        except Exception:  # the network's code insists on another precision
            self._model.float()
            self._inputs = inputs.float() if inputs.is_floating_point() else inputs

    def fault(self, group: Group) -> str | None:
        """Return why a group can't be sliced, or None if slicing it is exact.

        About half of the elements are removed, several times: every element is removed once and kept once at least,
        and of any two among 30 or fewer, one is removed without the other. So a wrong position shows.
        """
        if group.size < 2:
            return "it has one element only, and a layer is never emptied"
        faults = (self._fault(group, removed) for removed in _removals(group.size, self._generator))
        return next((fault for fault in faults if fault is not None), None)

    def _fault(self, group: Group, removed: list[int]) -> str | None:
        try:
            zeroed = self._zeroed(group, removed)
            smaller = remove(self._model, Structure((group,)), {group.name: removed})
        except IndexError:
            return "its elements do not line up with the weights that read them"
        expected = self._outputs(self._model, zeroed)
        try:
            outputs = self._outputs(smaller)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the network's own code raises
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            return f"the network fails without some of its elements: {first_line}"
        if [o.shape for o in outputs] != [e.shape for e in expected]:
            return "its elements are the network's output"
        for output, reference in zip(outputs, expected, strict=True):
            difference = _difference(output, reference)
            if not difference <= TOLERANCE:
                return f"removing its elements is not the same as zeroing them (outputs differ by {difference:.0e})"
        return None

    def _zeroed(self, group: Group, removed: list[int]) -> dict[str, torch.Tensor]:
        tensors = dict(self._model.named_parameters())
        zeroed: dict[str, torch.Tensor] = {}
        for part in group.slices:
            if part.role == "read":
                gone = part.positions[removed].flatten()
                weight = zeroed.get(part.tensor, tensors[part.tensor].detach())
                zeroed[part.tensor] = weight.index_fill(part.dim, gone.to(weight.device), 0.0)
        return zeroed

    def _outputs(self, model: nn.Module, replaced: dict[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
        with torch.no_grad():
            outputs = torch.func.functional_call(model, replaced or {}, (self._inputs,))
        return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _difference(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest number of the reference."""
    if reference.numel() == 0:
        return 0.0
    scale = reference.double().abs().max().clamp_min(1e-30)
    return float((output.double() - reference.double()).abs().max() / scale)


def _removals(size: int, generator: torch.Generator) -> list[list[int]]:
    """Return sets of elements to remove, one after another.

    Every element gets a binary code that says in which of the runs it goes. Codes come in complementary pairs, so that
    each run removes some elements and leaves some, and no code is all zeros or all ones.
    """
    runs = min(_RUNS, (size + 1).bit_length())
    codes = [code for half in range(1, 2 ** (runs - 1)) for code in (half, 2**runs - 1 - half)]
    shuffled = torch.randperm(size, generator=generator).tolist()
    return [[e for place, e in enumerate(shuffled) if codes[place % len(codes)] >> run & 1] for run in range(runs)]
