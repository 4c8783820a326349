"""From a network to its proven groups: trace, find, prove."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autoprune.errors import ConfigError, StructureError
from autoprune.inputs import first_sample
from autoprune.structure.blocks import find_blocks
from autoprune.structure.channels import Found, find_channels, unseen_layers
from autoprune.structure.groups import Group, LockedGroup, Structure
from autoprune.structure.heads import adaptations
from autoprune.structure.proof import Proof
from autoprune.structure.seen import Trace
from autoprune.structure.trace import trace
from autoprune.structure.weights import WeightKind, find_weights

__all__ = ["KINDS", "analyse"]

KINDS = ("channels", "heads", "blocks")
"""Kinds of element that are removed in earnest; every other kind is a pattern of weights (see `weights.py`)."""


def analyse(
    model: nn.Module,
    example_input: Any,
    *,
    kinds: Sequence[str] = ("channels", "heads"),
    multiple: int = 1,
    normalised: bool = False,
    embeddings: bool = True,
    seed: int = 0,
) -> Structure:
    """Find a network's groups and prove each one.

    Args:
        model: Any network; left as it was.
        example_input: What the network runs on: a tensor `(batch, ...)`, a tuple of positional or a mapping of keyword
            arguments.
        kinds: What may be removed: "channels", "heads", "blocks", "weights", N:M patterns such as "2:4" and tiles such
            as "16x16".
        multiple: The channels that stay are a multiple of this.
        normalised: Whether to offer groups that a norm runs across, proven against a norm over what stays.
        embeddings: Whether weights that are zeroed in place may be those of embeddings.
        seed: Randomness of the proof's inputs.

    Returns:
        Proven groups, and locked ones with the reason.

    Raises:
        StructureError: The network is compiled or wrapped, can't be copied, or does not run on the input.
        ConfigError: A kind can't be read, there are two that zero weights, or the multiple is not positive.
    """
    if multiple < 1:
        raise ConfigError(f"`multiple >= 1` must hold, but got {multiple}")
    weights = [WeightKind.read(kind).name for kind in kinds if kind not in KINDS]
    if len(weights) > 1:
        raise ConfigError(f"weights are zeroed in one way at a time, but got {' and '.join(weights)}; name one")
    groups: list[Group] = []
    locked: list[LockedGroup] = []
    given_up: list[str] = []
    if set(kinds) & set(KINDS):
        seen = _followed(model, example_input, torch.Generator().manual_seed(seed))
        traced, proof = seen.traced, seen.proof
        found = find_channels(model, traced, multiple=multiple, normalised=normalised)
        offered = [group for group in found.groups if group.kind in kinds]
        beyond = _beyond_proof(model, seen, offered, found.locked)
        locked += [LockedGroup(g.name, g.kind, g.size, g.layers, beyond[g.name]) for g in offered if g.name in beyond]
        offered = [group for group in offered if group.name not in beyond]
        if "blocks" in kinds:
            taken = {group.name for group in offered}
            blocks = find_blocks(traced)
            offered += [replace(b, name=f"{b.name}:blocks") if b.name in taken else b for b in blocks]
        proven, faults = _prove(proof, model, offered, found)
        groups += proven
        locked += [group for group in found.locked if group.kind in kinds]
        locked += _merged(offered, faults, found)
        given_up += [
            f"operator `{name}`, which ran {'once' if count == 1 else f'{count} times'}, is not followed; "
            "what flows into it is locked"
            for name, count in sorted(traced.unfollowed.items())
        ]
        given_up += seen.given_up
    for kind in weights:
        more, not_these = find_weights(model, kind, embeddings=embeddings)
        groups += more
        locked += not_these
    return Structure(tuple(groups), tuple(locked), tuple(given_up))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What runs of a network show.

    Attributes:
        traced: Sees every layer, if one run does that can be proven.
        proof: Of the same run.
        random: A run that sees more layers, but that computes something else each time.
        given_up: What could not be run.
    """

    traced: Trace
    proof: Proof
    random: Trace | None = None
    given_up: tuple[str, ...] = ()


def _followed(model: nn.Module, example_input: Any, generator: torch.Generator) -> _Seen:
    """Run a network in eval mode; and in training mode, if eval mode does not show every layer.

    Layers that run in training only (auxiliary classifiers) read channels too.
    """
    _require_copyable(model)
    sample = first_sample(example_input)
    traced = trace(model, sample)
    proof = Proof(model, example_input, generator)
    hidden = unseen_layers(model, traced)
    if not hidden:
        return _Seen(traced, proof)
    try:
        more = trace(model, sample, training=True)
        if len(unseen_layers(model, more)) >= len(hidden):
            return _Seen(traced, proof)
        thorough = Proof(model, example_input, generator, training=True)
    except StructureError as error:
        layers = f"`{hidden[0]}`{f' and {len(hidden) - 1} more layers' if hidden[1:] else ''}"
        return _Seen(traced, proof, given_up=(f"{layers}, which may run in training mode: there {error}",))
    return _Seen(more, thorough) if thorough.steady else _Seen(traced, proof, random=more)


def _beyond_proof(
    model: nn.Module, seen: _Seen, offered: Iterable[Group], locked: Iterable[LockedGroup]
) -> dict[str, str]:
    """Return by name the groups that more is done with in a training mode that is random, and what."""
    if seen.random is None:
        return {}
    hidden = set(unseen_layers(model, seen.traced))
    there = find_channels(model, seen.random, normalised=True)
    doing = {
        (part.tensor, part.dim): f"`{layer}` reads it"
        for group in there.groups
        for layer in (*group.layers, *group.readers)
        if layer in hidden
        for part in group.slices
    }
    known = {layer for group in locked for layer in group.layers}
    stuck = {layer: group.reason for group in there.locked for layer in group.layers if layer not in known}
    beyond: dict[str, str] = {}
    for group in offered:
        reasons = [doing[part.tensor, part.dim] for part in group.slices if (part.tensor, part.dim) in doing]
        reasons += [stuck[layer] for layer in group.layers if layer in stuck]
        if reasons:
            beyond[group.name] = (
                f"in training mode, which computes something else each time so that nothing can be proven, {reasons[0]}"
            )
    return beyond


def _require_copyable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                raise StructureError(
                    f"`{name}.{attribute}` is computed from other tensors, as by weight norm or pruning masks, so that "
                    "the network can't be copied; make it a plain parameter first"
                )


def _prove(
    proof: Proof, model: nn.Module, offered: Iterable[Group], found: Found
) -> tuple[list[Group], dict[str, str]]:
    """Return the groups that are exact, heads with the attributes that make them so, and why the others are not."""
    choices = {
        group.name: [(*group.attributes, *more) for more in adaptations(model, found.owners[group.name], group.size)]
        or [group.attributes]
        if group.kind == "heads"
        else [group.attributes]
        for group in offered
    }
    proven: dict[str, Group] = {}
    faults: dict[str, str] = {}
    left = list(offered)
    order = [group.name for group in left]
    turn = 0
    while left:
        tried = [replace(group, attributes=choices[group.name][turn]) for group in left]
        faults_now = proof.faults(tried)
        proven |= {group.name: group for group in tried if group.name not in faults_now}
        faults = faults_now | faults
        turn += 1
        left = [group for group in left if group.name in faults_now and turn < len(choices[group.name])]
    return [proven[name] for name in order if name in proven], {n: r for n, r in faults.items() if n not in proven}


def _merged(offered: Iterable[Group], faults: dict[str, str], found: Found) -> list[LockedGroup]:
    """Return the groups that failed, those of one kind and layer as one."""
    locked: dict[tuple[str, ...], LockedGroup] = {}
    for group in offered:
        if group.name in faults:
            note = found.notes.get(group.name)
            alike = (group.kind, *group.layers[:1])
            before = locked.get(alike)
            reason = faults[group.name] if note is None else f"{note}: {faults[group.name]}"
            locked[alike] = (
                LockedGroup(group.name, group.kind, group.size, group.layers, reason)
                if before is None
                else replace(before, size=before.size + group.size)
            )
    return list(locked.values())
