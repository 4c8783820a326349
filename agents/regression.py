"""A Gaussian process over policies: what to expect of one that was not evaluated, and how sure that is.

scikit-learn's has no kernel that adds up over groups, and no trend: on policies of two networks, ranked after twenty
evaluations of others, its best kernel reached half of the rank correlation.
"""

import itertools
from typing import Any, Final, NamedTuple, final

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular

__all__ = ["GaussianProcess", "Kernel"]

_Array = npt.NDArray[np.floating[Any]]

_LENGTHS: Final = (0.3, 1.0, 3.0)  # of the range of a coordinate
_SHARES: Final = (0.0, 0.5, 0.9, 1.0)  # of what adds up over the groups
_VARIANCES: Final = (1.0, 5.0)
_NOISES: Final = (0.003, 0.03, 0.2)
_TREND: Final = 4.0  # variance of its coefficients
_LOWEST: Final = 3.0  # times as far below the median as the upper decile is above: lower values are all alike


class Kernel(NamedTuple):
    """How alike the values of two points are expected to be.

    Attributes:
        alone: Length over which a group's own part changes.
        together: Length over which all groups' part changes.
        share: Of what adds up over the groups.
        variance: Of both.
        noise: Variance of what no policy's neighbours tell.
    """

    alone: float
    together: float
    share: float
    variance: float
    noise: float

    def mixed(self, alone: _Array, together: _Array) -> _Array:
        """Return the covariance of points, from how alike they are group by group and in all."""
        return self.variance * (self.share * alone + (1 - self.share) * together)


@final
class GaussianProcess:
    """Regression of values on points, with a trend.

    Rasmussen & Williams 2006, *Gaussian Processes for Machine Learning*: sections 2.2, 2.7 (a trend whose coefficients
    have a normal prior) and 5.4.1 (hyperparameters of the highest marginal likelihood, here of a grid: values are few,
    and a grid never fails to converge). One part of the kernel adds up over the coordinates (Duvenaud et al. 2011,
    https://arxiv.org/abs/1112.4394), as groups mostly do; how large a part, the likelihood decides.

    Args:
        points: `(n, groups)`, each coordinate of a range of about 1.
        trend: `(n,)` what values go with by and large.
        values: `(n,)`, higher is better. Very low ones are lifted, so that a failure does not outweigh all else.
        kernel: Hyperparameters, if they are known; choosing them takes a hundred times as long as all else.

    Attributes:
        kernel: The hyperparameters.
    """

    def __init__(self, points: _Array, trend: _Array, values: _Array, kernel: Kernel | None = None) -> None:
        middle = np.median(values)
        reach = np.quantile(values, 0.9) - middle
        values = np.maximum(values, middle - _LOWEST * reach) if reach > 0 else values
        self._centre, self._spread = float(values.mean()), float(values.std()) or 1.0
        self._trend_centre, self._trend_spread = float(trend.mean()), float(trend.std()) or 1.0
        self._points, self._trend = points, trend
        self._values = (values - self._centre) / self._spread
        self.kernel = kernel or self._likeliest()
        self._solve()

    def predict(self, points: _Array, trend: _Array) -> tuple[_Array, _Array]:
        """Return the expected values of points, and their standard deviations, noise left out.

        Args:
            points: `(k, groups)`.
            trend: `(k,)`.

        Returns:
            `(k,)` and `(k,)`.
        """
        between = self._covariance(self._points, self._trend, points, trend)
        solved = _solved(self._factor, between)
        prior = self.kernel.variance + _TREND * (self._basis(trend) ** 2).sum(1)
        variances = np.maximum(prior - (solved**2).sum(0), 0.0)
        expected = solved.T @ self._weights
        return self._centre + self._spread * expected, self._spread * np.sqrt(variances)

    def believe(self, points: _Array, trend: _Array) -> None:
        """Take what is expected of points for their values, as of policies that are under way.

        Args:
            points: `(k, groups)`.
            trend: `(k,)`.
        """
        expected, _ = self.predict(points, trend)
        self._points = np.concatenate([self._points, points])
        self._trend = np.concatenate([self._trend, trend])
        self._values = np.concatenate([self._values, (expected - self._centre) / self._spread])
        self._solve()

    def _likeliest(self) -> Kernel:
        alone = {length: _alone(self._points, self._points, length) for length in _LENGTHS}
        together = {length: _together(self._points, self._points, length) for length in _LENGTHS}
        basis = self._basis(self._trend)
        trend = _TREND * basis @ basis.T
        best, highest = None, -np.inf
        for kernel in itertools.starmap(Kernel, itertools.product(_LENGTHS, _LENGTHS, _SHARES, _VARIANCES, _NOISES)):
            if (kernel.share == 0 and kernel.alone != 1) or (kernel.share == 1 and kernel.together != 1):
                continue  # a length that does not matter
            covariance = kernel.mixed(alone[kernel.alone], together[kernel.together]) + trend
            factor = np.linalg.cholesky(covariance + kernel.noise * np.eye(len(basis)))
            weights = _solved(factor, self._values)
            likelihood = -0.5 * weights @ weights - np.log(np.diag(factor)).sum()
            if likelihood > highest:
                best, highest = kernel, likelihood
        assert best is not None  # the grid is not empty
        return best

    def _solve(self) -> None:
        covariance = self._covariance(self._points, self._trend, self._points, self._trend)
        self._factor = np.linalg.cholesky(covariance + self.kernel.noise * np.eye(len(covariance)))
        self._weights = _solved(self._factor, self._values)

    def _covariance(self, points: _Array, trend: _Array, others: _Array, of_others: _Array) -> _Array:
        kernel = self.kernel
        alike = kernel.mixed(_alone(points, others, kernel.alone), _together(points, others, kernel.together))
        return alike + _TREND * self._basis(trend) @ self._basis(of_others).T

    def _basis(self, trend: _Array) -> _Array:
        return np.stack([np.ones(len(trend)), (trend - self._trend_centre) / self._trend_spread], axis=1)


def _solved(factor: _Array, right: _Array) -> _Array:
    solved: _Array = solve_triangular(factor, right, lower=True, check_finite=False)
    return solved


def _alone(points: _Array, others: _Array, length: float) -> _Array:
    """Return the mean over coordinates of how alike points are in each, `(n, k)`."""
    alike = np.zeros((len(points), len(others)))
    for one, other in zip(points.T, others.T, strict=True):
        alike += np.exp(-0.5 * (np.subtract.outer(one, other) / length) ** 2)
    mean: _Array = alike / points.shape[1]
    return mean


def _together(points: _Array, others: _Array, length: float) -> _Array:
    """Return how alike points are in all coordinates, `(n, k)`; at half a length, since a sum averages differences."""
    products = points @ others.T
    squares = (points**2).sum(1)[:, None] + (others**2).sum(1)[None, :] - 2 * products
    alike: _Array = np.exp(-0.5 * np.maximum(squares, 0.0) / points.shape[1] / (0.5 * length) ** 2)
    return alike
