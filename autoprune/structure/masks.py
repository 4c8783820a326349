"""The arithmetic of single weights: how many a pattern zeroes, which ones, and how zeros outlive training.

Pure functions of shapes and tensors, and one context manager; which tensors have a pattern is in `weights.py`. A weight
is looked at as a matrix, `(outputs, positions · inputs)`, the input channel fastest; a linear layer has one position, a
3×3 convolution nine. All counts are whole numbers from shapes alone, so that a cost formula can be exact.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from autoprune.errors import ConfigError
from autoprune.structure.groups import Pattern

__all__ = ["hold_zeros", "mask", "runs", "tile_sums", "units", "zeros"]

_AT_ONCE = 1 << 20  # weights whose runs are ranked at a time; it needs up to 12 bytes for each
_COMPARED = 32  # longest run that is ranked by comparing all pairs: of 2:4, four times faster than by sorting


def units(pattern: Pattern, shape: Sequence[int]) -> int:
    """Return how many units of a pattern a tensor has: weights, runs or tiles.

    Args:
        pattern: What a unit is.
        shape: The weight's, `(outputs, inputs, *kernel)`; any where units are single weights.
    """
    if pattern.run == 0 and pattern.tile == (1, 1):
        return math.prod(shape)
    outputs, inputs = (shape[1], shape[0]) if pattern.transposed else (shape[0], shape[1])
    positions = math.prod(shape[2:])
    if pattern.run > 0:
        return outputs * positions * (inputs // pattern.run)
    height, width = pattern.tile
    return (outputs // height) * (positions * inputs // width)


def zeros(pattern: Pattern, shape: Sequence[int], removed: int, size: int) -> int:
    """Return exactly how many weights become zero.

    Of runs, every one that the tensor has loses `removed` weights. Of single weights and tiles, of which a tensor that
    was sliced has fewer than the group's `size`, the same share goes, rounded down: `units · removed // size`.

    Args:
        pattern: What a unit is.
        shape: The weight's, when it is masked.
        removed: Elements of the group that go, `0` to `size`.
        size: Elements of the group: the dense tensor's weights or tiles, or the length of a run.

    Raises:
        ConfigError: `removed` is not in that range.
    """
    if not 0 <= removed <= size:
        raise ConfigError(f"`0 <= removed <= size` must hold, but got {removed} of {size} for `{pattern.tensor}`")
    number = units(pattern, shape)
    if pattern.run > 0:
        return number * removed
    height, width = pattern.tile
    return (number * removed // max(1, size)) * height * width


def mask(pattern: Pattern, saliency: torch.Tensor, removed: int, size: int) -> torch.Tensor:
    """Return which weights stay. The least salient go, as many as `zeros` says; of equal ones, the first go.

    Args:
        pattern: What a unit is; a tile's saliency is the sum of its weights'.
        saliency: One number a weight, in the weight's shape when it is masked; higher means keep.
        removed: Elements of the group that go.
        size: Elements of the group.

    Returns:
        bool, in the shape and on the device of `saliency`; True stays.

    Raises:
        ConfigError: `removed` is not in `0` to `size`, or the saliency has NaN.
    """
    gone = zeros(pattern, saliency.shape, removed, size)
    stays = torch.ones(saliency.shape, dtype=torch.bool, device=saliency.device)
    if gone == 0:
        return stays
    saliency = saliency.detach()
    if saliency.isnan().any():
        raise ConfigError(f"the saliency of `{pattern.tensor}` has NaN; score the network before its training diverged")
    if pattern.run > 0:
        whole = saliency.shape[0 if pattern.transposed else 1] // pattern.run * pattern.run
        parts = torch.split(runs(pattern, saliency), 1 + _AT_ONCE // pattern.run)
        kept = torch.cat([_largest_of_each(part, removed) for part in parts])
        view = _positioned(stays, pattern.transposed)[:, :, :whole]
        view.copy_(kept.view(view.shape))
    elif pattern.tile == (1, 1):
        stays.view(-1)[_smallest(saliency.flatten(), gone)] = False
    else:
        height, width = pattern.tile
        sums = tile_sums(pattern, saliency)
        tiles = _smallest(sums.flatten(), gone // (height * width)).view(sums.shape)
        view = _positioned(stays, pattern.transposed)
        matrix = torch.ones(len(view), view[0].numel(), dtype=torch.bool, device=stays.device)
        covered = matrix[: height * sums.shape[0], : width * sums.shape[1]]
        covered.copy_(~tiles.repeat_interleave(height, 0).repeat_interleave(width, 1))
        view.copy_(matrix.view(view.shape))
    return stays


def tile_sums(pattern: Pattern, saliency: torch.Tensor) -> torch.Tensor:
    """Return `(rows // height, columns // width)` sums of the saliency over whole tiles, in single precision or better.

    Args:
        pattern: One of tiles.
        saliency: One number a weight, in the weight's shape.
    """
    height, width = pattern.tile
    matrix = _positioned(saliency, pattern.transposed).flatten(1)
    rows, columns = len(matrix) // height, matrix.shape[1] // width
    tiles = matrix[: rows * height, : columns * width].reshape(rows, height, columns, width)
    return tiles.sum((1, 3), dtype=torch.promote_types(saliency.dtype, torch.float32))


def runs(pattern: Pattern, saliency: torch.Tensor) -> torch.Tensor:
    """Return `(units, run)`: the saliency of each whole run of neighbours along the inputs.

    Args:
        pattern: One of runs.
        saliency: One number a weight, in the weight's shape.
    """
    positioned = _positioned(saliency, pattern.transposed)
    whole = positioned.shape[2] // pattern.run * pattern.run
    return positioned[:, :, :whole].reshape(-1, pattern.run)


@contextmanager
def hold_zeros(model: nn.Module, tensors: Iterable[str]) -> Iterator[None]:
    """Keep the zeros of some weights at zero while anything trains the network inside a `with`.

    Two guards, both gone at the end. The gradients of the zeros are zeroed before anything reads them, so that clipping
    and optimizers that look at a whole tensor see the network that is left; a sparse gradient is left as it is. And
    after each step of any `torch.optim.Optimizer` the weights are zeroed again, so that neither momentum from before
    the `with` nor a step that does not go by the gradient brings one back. A loop that changes weights without an
    optimizer has the first guard alone.

    Weights that are zero when it begins are held, and no others; weights that are named but have no zeros may become
    zero and leave it again. Names that share a tensor mean the same.

    Args:
        model: The network; its parameters stay the same objects.
        tensors: Names as in `named_parameters`.

    Raises:
        ConfigError: The network has no parameter of that name.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in (tensors := list(tensors)):
        if name not in parameters:
            raise ConfigError(f"the network has no parameter '{name}' whose zeros could be held")
    held = {parameters[name]: parameters[name].detach() == 0 for name in tensors}

    def zero_again(*_: object) -> None:
        with torch.no_grad():
            for parameter, gone in held.items():
                parameter.masked_fill_(gone.to(parameter.device), 0.0)

    with ExitStack() as hooks:
        hooks.callback(register_optimizer_step_post_hook(zero_again).remove)
        for parameter, gone in held.items():
            if parameter.requires_grad:
                hook = parameter.register_hook(_Silence(gone))  # type: ignore[no-untyped-call]  # torch's own
                hooks.callback(hook.remove)
        yield


class _Silence:
    """A gradient hook that zeroes what belongs to weights that are gone."""

    def __init__(self, gone: torch.Tensor) -> None:
        self._gone = gone

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        if gradient.layout != torch.strided:
            return gradient
        return gradient.masked_fill(self._gone.to(gradient.device), 0.0)


def _positioned(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Return a weight as `(outputs, positions, inputs)`, a view where the weight is contiguous."""
    ordered = weight.transpose(0, 1) if transposed else weight
    return ordered.reshape(*ordered.shape[:2], -1).transpose(1, 2)


def _smallest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return `(n,)` bool that is True for exactly so many of the `(n,)` smallest; of equal ones, for the first."""
    threshold = values.kthvalue(count).values
    chosen = values < threshold
    missing = count - int(chosen.sum())
    chosen[(values == threshold).nonzero().flatten()[:missing]] = True
    return chosen


def _largest_of_each(runs: torch.Tensor, removed: int) -> torch.Tensor:
    """Return `(n, m)` bool that is False for so many of the smallest in each row; of equal ones, for the first."""
    if runs.shape[1] > _COMPARED:
        order = runs.argsort(dim=1, stable=True)
        return torch.ones_like(runs, dtype=torch.bool).scatter_(1, order[:, :removed], False)
    columns = runs.t().contiguous()
    ranks = torch.zeros(columns.shape, dtype=torch.uint8, device=runs.device)
    for first, second in combinations(range(len(columns)), 2):
        lower = columns[first] <= columns[second]
        ranks[second] += lower
        ranks[first] += ~lower
    return (ranks >= removed).t()
