"""How one rate is shared out among tensors: the three schemes of See, Luong & Manning 2016, section 3.2.

Compression of Neural Machine Translation Models via Pruning, https://arxiv.org/abs/1606.09274; its "classes" of weights
are groups here. Pure functions from weights to a policy: they say how much of each group goes, and magnitude then says
which. What is to be left out of the rate, such as embeddings, is not handed in.

In all three the total is the whole number of weights nearest to the rate, as far as that leaves every group its largest
weight.
"""

import math
from collections.abc import Callable, Mapping

import torch

from autoprune.errors import ConfigError, PolicyError
from autoprune.policy import Policy

__all__ = ["blocks_below", "class_blind", "class_distribution", "class_uniform"]


def class_blind(weights: Mapping[str, torch.Tensor], sparsity: float) -> Policy:
    """Share out by one threshold on `|w|` for all groups: just the smallest weights of the whole network go.

    Ties go by order: of the groups, then in the group. So if every group loses its smallest, those are exactly the
    smallest overall.

    Args:
        weights: Group name → weights, or scores of them, of any shape; magnitudes are compared.
        sparsity: Fraction of all weights to remove, in [0, 1).

    Returns:
        A sparsity below 1 for every group, each a whole number of its weights.

    Raises:
        PolicyError: The sparsity is out of range.
        ConfigError: A weight is NaN, or a group has none.
    """
    return _one_threshold(weights, lambda _: 1.0, sparsity)


def class_uniform(weights: Mapping[str, torch.Tensor], sparsity: float) -> Policy:
    """Share out evenly: the same fraction of every group, to the weight below or above.

    Those whose fraction of a weight is the largest get the one above, the first of equal ones, until the total is met;
    it is missed only by weights that would be a small group's last, which stays.

    Args:
        weights: Group name → weights, of any shape; only their number matters.
        sparsity: Fraction of all weights to remove, in [0, 1).

    Returns:
        A sparsity below 1 for every group, each a whole number of its weights.

    Raises:
        PolicyError: The sparsity is out of range.
        ConfigError: A group has no weights.
    """
    sizes = _sizes(weights)
    total = _total(sizes, sparsity)
    removed = {name: min(math.floor(sparsity * size), size - 1) for name, size in sizes.items()}
    missing = total - sum(removed.values())
    more = [name for name, size in sizes.items() if removed[name] < size - 1]
    for name in sorted(more, key=lambda name: removed[name] - sparsity * sizes[name])[:missing]:
        removed[name] += 1
    return _policy(removed, sizes)


def class_distribution(weights: Mapping[str, torch.Tensor], sparsity: float) -> Policy:
    """Share out by a threshold for each group, `lambda · sigma`: sigma is its weights' deviation, lambda one for all.

    Lambda is what makes the total right, so the smallest of all `|w| / sigma` go; ties go as in `class_blind`. Where
    sigma is 0, as all weights are the same, nothing lies below it: such a group loses none before the others lost all.

    Args:
        weights: Group name → weights with their signs, of any shape.
        sparsity: Fraction of all weights to remove, in [0, 1).

    Returns:
        A sparsity below 1 for every group, each a whole number of its weights.

    Raises:
        PolicyError: The sparsity is out of range.
        ConfigError: A weight is NaN, or a group has none.
    """
    return _one_threshold(weights, lambda values: values.std(correction=0).item(), sparsity)


_Scale = Callable[[torch.Tensor], float]


def _one_threshold(weights: Mapping[str, torch.Tensor], scale: _Scale, sparsity: float) -> Policy:
    """Remove the smallest `|w| / scale` of all groups, but never the largest of a group.

    A group that is to lose its largest is to lose all, so holding the largest back changes nothing for the others.
    """
    sizes = _sizes(weights)
    total = _total(sizes, sparsity)
    if total == 0:
        return _policy(dict.fromkeys(sizes, 0), sizes)
    dtype = torch.float64 if any(values.dtype == torch.float64 for values in weights.values()) else torch.float32
    candidates = torch.empty(sum(sizes.values()) - len(sizes), dtype=dtype)
    parts = dict(zip(sizes, torch.split(candidates, [size - 1 for size in sizes.values()]), strict=True))
    for name, part in parts.items():
        part.copy_(_ratios(name, weights[name], scale, dtype))
    ordered = candidates.numpy()
    ordered.partition(total - 1)  # in place; a k-th value of torch's takes three times the memory
    threshold = float(ordered[total - 1])
    removed: dict[str, int] = {}
    ties: dict[str, int] = {}
    for name in sizes:
        ratios = _ratios(name, weights[name], scale, dtype)
        removed[name], ties[name] = int((ratios < threshold).sum()), int((ratios == threshold).sum())
    missing = total - sum(removed.values())
    for name, tied in ties.items():
        taken = min(tied, missing)
        removed[name] += taken
        missing -= taken
    return _policy(removed, sizes)


def _ratios(name: str, weights: torch.Tensor, scale: _Scale, dtype: torch.dtype) -> torch.Tensor:
    """Return `(n - 1,)` ratios `|w| / scale` without the largest, in any order; infinite where the scale is 0."""
    values = weights.detach().flatten().to("cpu", dtype)
    if values.isnan().any():
        raise ConfigError(f"the weights of '{name}' have NaN; allocate before the network's training diverged")
    unit = scale(values)
    ratios = values.abs().div_(unit) if unit > 0 else torch.full_like(values, math.inf)
    ratios[ratios.argmax()] = ratios[-1].item()
    return ratios[:-1]


def _sizes(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    sizes = {name: values.numel() for name, values in weights.items()}
    for name, size in sizes.items():
        if size == 0:
            raise ConfigError(f"every group must have weights, but '{name}' has none; leave it out")
    return sizes


def _total(sizes: Mapping[str, int], sparsity: float) -> int:
    """Return how many weights go in all: the nearest to the rate that leaves each group one."""
    if not 0 <= sparsity < 1:
        raise PolicyError(f"`0 <= sparsity < 1` must hold for what is shared out, but got {sparsity}")
    return min(round(sparsity * sum(sizes.values())), sum(sizes.values()) - len(sizes))


def _policy(removed: Mapping[str, int], sizes: Mapping[str, int]) -> Policy:
    return Policy({name: removed[name] / size for name, size in sizes.items()})


def blocks_below(scores: Mapping[str, torch.Tensor], number: int) -> Policy:
    """Return the policy that drops the blocks of the lowest scores: a threshold on them, stated as how many fall below.

    Args:
        scores: Group name → `(1,)` score of a block, comparable between blocks (see `scoring.identity`).
        number: How many blocks go; ties go by order.

    Raises:
        ConfigError: There are not so many blocks.
    """
    if not 0 <= number <= len(scores):
        raise ConfigError(f"`0 <= number <= {len(scores)}` must hold, but got number={number}")
    order = sorted(scores, key=lambda name: float(scores[name]))
    return Policy({name: float(name in order[:number]) for name in scores})
