"""The arithmetic of recovery: what is left of a linear map when some of its inputs go, and which go best.

A layer computes W x. With the second moments H = E[x xᵀ] + λ I of what it reads, the loss of keeping only the inputs S
is tr((V − W) H (V − W)ᵀ), least for V = W_S + W_R H_RS (H_SS)⁻¹, where R is what goes: ridge regression pulled towards
the dense weights. The least loss is tr(W_R ((H⁻¹)_RR)⁻¹ W_Rᵀ), the block form of Optimal Brain Surgeon (Hassibi & Stork
1993; for groups of weights Frantar & Alistarh 2022, https://arxiv.org/abs/2208.11580, eq. 3 and 4).
"""

from collections.abc import Sequence
from typing import Protocol

import torch

__all__ = [
    "FLOOR",
    "Elimination",
    "Eliminator",
    "fitted",
    "gram",
    "kept_from_rows",
    "kept_weights",
    "losses",
    "masked_weights",
    "regularised",
    "removal_order",
    "shrinkage",
]

FLOOR = 1e-3
"""Least ridge, relative to the mean of the moments' diagonal."""

EXACT = 20_000_000_000
"""Multiply-adds that the exact solution of a masked layer may take: a second or two."""

_BYTES = 1 << 28  # of the systems that are solved at once
_WIDE = 144  # columns of a block of products: wide enough that half of the work less is not lost to smaller products
_BLOCK = 128  # columns after which the errors are carried on to the rest


def shrinkage(second: torch.Tensor, rows: int, size: int | None = None) -> torch.Tensor:
    """Return the ridge for moments that were estimated from so many rows, relative to the mean of their diagonal.

    Oracle approximating shrinkage (Chen et al. 2010, https://arxiv.org/abs/0907.4698, eq. 23): with its intensity r the
    best estimate is (1 − r) H + r tr(H)/d I, that is a ridge of r/(1 − r) of the mean of the diagonal. Few rows or even
    moments give more. `FLOOR` at least, since the rows of one image are alike, and at most 1.

    Args:
        second: `(..., d, d)`, symmetric.
        rows: How many rows it is the mean of.
        size: d, where `second` is X Xᵀ / rows in place of Xᵀ X / rows, which has the same eigenvalues but for zeros.

    Returns:
        `(...)`.
    """
    size = second.shape[-1] if size is None else size
    trace, squares = second.diagonal(dim1=-2, dim2=-1).sum(-1), second.square().sum((-2, -1))
    above = (1 - 2 / size) * squares + trace**2
    below = (rows + 1 - 2 / size) * (squares - trace**2 / size)
    intensity = torch.where(above < below, above / below, 0.5)  # one half is a ridge of 1
    return (intensity / (1 - intensity)).clamp(FLOOR, 1.0)


def regularised(second: torch.Tensor, rows: int) -> torch.Tensor:
    """Return `(..., d, d)` float64 moments with their ridge; the identity where they are all zero."""
    second = second.double()
    mean = second.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(mean > 0, shrinkage(second, rows) * mean, 1.0)
    return second + ridge[..., None, None] * torch.eye(second.shape[-1], dtype=second.dtype, device=second.device)


def gram(rows: torch.Tensor) -> torch.Tensor:
    """Return Xᵀ X of `(..., n, d)` rows, `(..., d, d)`; of wide ones, what lies below the diagonal is mirrored."""
    width = rows.shape[-1]
    if width <= _WIDE:
        return rows.mT @ rows
    products = rows.new_empty(*rows.shape[:-2], width, width)
    for start in range(0, width, _WIDE):
        block = slice(start, start + _WIDE)
        above = rows[..., block].mT @ rows[..., start:]
        products[..., block, start:] = above
        products[..., start:, block] = above.mT
    return products


def fitted(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Return the ridge regression of outputs on inputs, in as many unknowns as there are rows or inputs, the fewer.

    Args:
        inputs: `(groups, n, d)`.
        outputs: `(groups, n, outputs)`.

    Returns:
        `(groups, outputs, d)` float64.
    """
    count, width = inputs.shape[1:]
    if count >= width:
        second = regularised(gram(inputs) / count, count)
        cross = (inputs.transpose(1, 2) @ outputs / count).double()
        return torch.cholesky_solve(cross, torch.linalg.cholesky(second)).transpose(1, 2)
    products = (inputs @ inputs.transpose(1, 2)).double() / count
    factor = torch.linalg.cholesky(products + _ridge_of_rows(products, width))
    return torch.cholesky_solve(outputs.double() / count, factor).transpose(1, 2) @ inputs.double()


def _ridge_of_rows(products: torch.Tensor, size: int) -> torch.Tensor:
    """Return `(..., n, n)`: the ridge of the moments of n rows of `size` numbers, of which `products` are known."""
    count = products.shape[-1]
    mean = products.diagonal(dim1=-2, dim2=-1).sum(-1) / size
    ridge = torch.where(mean > 0, shrinkage(products, count, size) * mean, 1.0)
    return ridge[..., None, None] * torch.eye(count, dtype=products.dtype, device=products.device)


def kept_from_rows(weight: torch.Tensor, rows: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return what `kept_weights` gives for the rows' moments with their ridge, in as many unknowns as there are rows.

    Args:
        weight: `(outputs, d)`.
        rows: `(n, d)`, with mean 0 where that is made up for.
        kept: `(k,)` columns that stay.

    Returns:
        `(outputs, k)` float64.
    """
    weight, rows = weight.double(), rows.double()
    count, size = rows.shape
    gone = torch.ones(size, dtype=torch.bool, device=rows.device)
    gone[kept] = False
    there, lost = rows[:, kept], rows[:, gone] @ weight[:, gone].T
    inner = there @ there.T / count + _ridge_of_rows(rows @ rows.T / count, size)
    solved = torch.cholesky_solve(lost / count, torch.linalg.cholesky(inner))
    return weight[:, kept] + solved.T @ there


def kept_weights(weight: torch.Tensor, second: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the weights of the kept inputs that make up best for those that go.

    Args:
        weight: `(outputs, d)`.
        second: `(d, d)`, with its ridge.
        kept: `(k,)` columns that stay.

    Returns:
        `(outputs, k)` float64.
    """
    weight = weight.double()
    stays = torch.zeros(len(second), dtype=torch.bool, device=second.device)
    stays[kept] = True
    gone = (~stays).nonzero()[:, 0]
    factor = torch.linalg.cholesky(second[kept][:, kept])
    lost = weight[:, gone] @ second[gone][:, kept]
    return weight[:, kept] + torch.cholesky_solve(lost.T, factor).T


def masked_weights(weight: torch.Tensor, second: torch.Tensor, stays: torch.Tensor, exact: int = EXACT) -> torch.Tensor:
    """Return the weights with zeros in given places that make up best for what was there.

    Each row is a least-squares problem of its own over the k weights that stay, solved exactly where all of them take
    no more than `exact` multiply-adds (outputs · k³); else column by column, each error made up for by the columns to
    its right, as SparseGPT does (Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774, algorithm 1, with the mask
    given).

    Args:
        weight: `(outputs, d)`.
        second: `(d, d)`, with its ridge.
        stays: `(outputs, d)`, false where a weight is to be zero.
        exact: Multiply-adds that the exact solution may take.

    Returns:
        `(outputs, d)` float64.
    """
    weight = weight.double()
    most = int(stays.sum(1).max()) if len(stays) else 0
    if len(weight) * most**3 > exact:
        return _swept(weight, second, stays)
    solved = torch.zeros_like(weight)
    if most == 0:
        return solved
    wanted = weight @ second
    columns = torch.argsort(stays.int(), dim=1, descending=True, stable=True)[:, :most]  # those that stay first
    there = stays.gather(1, columns)
    at_once = max(1, _BYTES // (8 * most**2))
    for start in range(0, len(weight), at_once):
        rows = slice(start, start + at_once)
        mine, both = columns[rows], there[rows, :, None] & there[rows, None, :]
        inner = second[mine[:, :, None], mine[:, None, :]] * both + torch.diag_embed((~there[rows]).double())
        aim = wanted[rows].gather(1, mine) * there[rows]
        left = torch.cholesky_solve(aim[:, :, None], torch.linalg.cholesky(inner))[:, :, 0]
        solved[rows] = solved[rows].scatter(1, mine, left)
    return solved


def _swept(weight: torch.Tensor, second: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(second)), upper=True)
    left = weight.clone()
    for start in range(0, weight.shape[1], _BLOCK):
        end = min(start + _BLOCK, weight.shape[1])
        errors = torch.zeros_like(left[:, start:end])
        for column in range(start, end):
            errors[:, column - start] = left[:, column] * ~stays[:, column] / factor[column, column]
            left[:, column:end] -= errors[:, column - start, None] * factor[column, column:end]
        left[:, end:] -= errors @ factor[start:end, end:]
    return left * stays


def losses(weight: torch.Tensor, inverse: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the least loss after each of a sequence of removals, from one factorisation.

    With the columns in the order of removal and L Lᵀ = (H⁻¹) restricted to them, the loss after the first r columns is
    ‖W_R L_RR⁻ᵀ‖², and L_RR is the leading block of L whatever r is.

    Args:
        weight: `(outputs, d)`.
        inverse: `(d, d)`, H⁻¹.
        order: `(steps, b)` columns that go at each step.

    Returns:
        `(steps + 1,)` float64, from 0, never falling.
    """
    columns = order.flatten()
    factor = torch.linalg.cholesky(inverse[columns][:, columns])
    parts = torch.linalg.solve_triangular(factor, weight[:, columns].double().T, upper=False)
    gains = parts.square().sum(1).reshape(order.shape).sum(1)
    return torch.cat([gains.new_zeros(1), gains.cumsum(0)])


class Elimination(Protocol):
    """One reader of a group while its elements go."""

    def costs(self, left: torch.Tensor) -> torch.Tensor:
        """Return the loss that each of the elements left adds if it goes next, `(left,)`."""
        ...

    def remove(self, elements: torch.Tensor) -> None:
        """Take elements away."""
        ...


class Eliminator:
    """One reader of a group while its elements go, one after another.

    Args:
        weight: `(outputs, d)`.
        inverse: `(d, d)`, H⁻¹.
        columns: `(elements, b)`: what each element is to the reader.
    """

    def __init__(self, weight: torch.Tensor, inverse: torch.Tensor, columns: torch.Tensor) -> None:
        self._weight, self._inverse = weight.double().clone(), inverse.clone()
        self._columns = columns

    def costs(self, left: torch.Tensor) -> torch.Tensor:
        """Return the loss that each of the elements left adds if it goes next: w ((H⁻¹)_cc)⁻¹ wᵀ, `(left,)`."""
        columns = self._columns[left]
        blocks = self._inverse[columns[:, :, None], columns[:, None, :]]
        weights = self._weight[:, columns].transpose(0, 1)  # (left, outputs, b)
        solved = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), weights.transpose(1, 2), upper=False)
        costs: torch.Tensor = solved.square().sum((1, 2))
        return costs

    def remove(self, elements: torch.Tensor) -> None:
        """Take elements away, and let what is left make up for them."""
        columns = self._columns[elements].flatten()
        rows = self._inverse[columns]
        factor = torch.linalg.cholesky(rows[:, columns])
        solved = torch.cholesky_solve(rows, factor)
        self._weight -= self._weight[:, columns] @ solved
        self._inverse -= rows.T @ solved
        # What is gone has nothing to say any more; rounding must not bring it back.
        self._weight[:, columns] = 0.0
        self._inverse[columns] = 0.0
        self._inverse[:, columns] = 0.0


def removal_order(readers: Sequence[Elimination], size: int, steps: int = 64) -> torch.Tensor:
    """Return a group's elements, least important first: Optimal Brain Surgeon over all its readers at once.

    At every step the element goes whose removal adds least to the sum of the readers' losses, after the best
    compensation, and the others' weights make up for it; of groups of more than `steps` several go at each step.

    Args:
        readers: The layers that read the group; used up.
        size: Elements in the group.
        steps: Into how many steps a large group's removal is cut, at least.
    """
    left = torch.arange(size)
    order: list[torch.Tensor] = []
    while len(left):
        costs = torch.stack([reader.costs(left).cpu() for reader in readers]).sum(0)
        ranks = torch.argsort(costs, stable=True)[: max(1, size // steps)]
        going = left[ranks]
        order.append(going)
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[ranks] = False
        left = left[stays]
        if len(left):
            for reader in readers:
                reader.remove(going)
    return torch.cat(order)
