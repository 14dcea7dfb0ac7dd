"""Kernel regression, and its twiced form: the estimator that twicing attention is an instance of.

    f(x) = sum_j K(|x - x_j| / h) r_j / sum_j K(|x - x_j| / h),   r = boosted_values(S, y)

S is the same average at the training points. Order 1 (r = y) is Nadaraya-Watson; order 2 is Tukey's twicing, whose
bias falls as h^4 instead of h^2. arXiv 2503.00687, sections 2.1 and 3.3, Proposition 2.
"""

import math
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from twicing.classical.kernels import log_kernel
from twicing.ops.boost import boosted_values, check_number, check_order

try:
    from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("The estimator needs scikit-learn, which is missing: pip install 'twicing[lab]'") from error

# Rows of weights that are in memory at once.
ROWS = 1024


def nadaraya_watson_weights(
    points: Tensor,
    train: Tensor,
    *,
    bandwidth: float,
    kernel: str = "gaussian",
    period: float | Tensor | None = None,
) -> Tensor:
    """The smoothing matrix, K(|x_i - x_j| / h) over its row's sum, [n, m]; rows sum to 1.

    points: [n, d]; train: [m, d], where the values are known. bandwidth: h, in the units of the points; the standard
    deviation of the Gaussian kernel. period: of every coordinate, or [d]; None for a space that does not close.
    In the dtype of the points. Raises ValueError for an unknown kernel, or a point that no training point is near.
    Source: arXiv 2503.00687, equation 3.
    """
    log_weights = log_kernel(kernel)(_distances(points, train, period) / bandwidth)
    alone = ~(log_weights > -torch.inf).any(1)
    if alone.any():
        raise ValueError(
            f"no training point lies within the {kernel} kernel's bandwidth {bandwidth:g} of {int(alone.sum())} of the "
            f"{len(points)} points: take a larger bandwidth, or the gaussian kernel, which reaches everywhere."
        )
    return log_weights.softmax(1)


class NadarayaWatson(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Nadaraya-Watson regression, boosted: a scikit-learn regressor on ops/boost.py.

    bandwidth: h > 0, in the units of X: one for all columns, so scale them first. The Gaussian's standard deviation.
    kernel: gaussian, laplace, box, triangular, epanechnikov, biweight or tricube.
    order: how often the values are smoothed: 1 is Nadaraya-Watson, 2 twicing; not the order of a kernel, which for
        order m is 2 m. Higher orders have less bias and more variance. gain: g, see twicing.boost().
    period: where X closes upon itself, as angles do: the period of every column, or one for each.
    After fit(): boosted_values_, [n] or [n, outputs], what predict() averages. Arithmetic in float64; fit() takes
    order - 1 passes over all n^2 pairs, predict() one over n x m, some rows at a time.
    Raises ValueError for parameters out of range and for a point that no training point is near.
    Source: Tukey, Exploratory Data Analysis, 1977; Stuetzle and Mittal, 1979; arXiv 2503.00687, Proposition 2.
    """

    def __init__(
        self,
        bandwidth: float = 1.0,
        kernel: str = "gaussian",
        *,
        order: int = 2,
        gain: float = 1.0,
        period: float | ArrayLike | None = None,
    ) -> None:
        self.bandwidth = bandwidth
        self.kernel = kernel
        self.order = order
        self.gain = gain
        self.period = period

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Remember the points and boost their values. X: [n, d]; y: [n] or [n, outputs]."""
        if not 0 < self.bandwidth < math.inf:
            raise ValueError(f"bandwidth must be a positive number, in the units of X: got {self.bandwidth}.")
        log_kernel(self.kernel)
        check_order(self.order)
        check_number(self.gain)
        checked = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        points, values = torch.tensor(checked[0]), torch.tensor(np.asarray(checked[1], dtype=np.float64))
        self._period_ = self._checked_period(points.shape[1])
        self._points_ = points
        boosted = boosted_values(lambda v: self._average(points, v), values, self.order, self.gain)
        self.boosted_values_: NDArray[np.float64] = boosted.numpy()
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Average the boosted values around each point. X: [m, d]. Returns [m] or [m, outputs], float64."""
        check_is_fitted(self)
        points = torch.tensor(validate_data(self, X, reset=False, dtype=np.float64))
        return self._average(points, torch.from_numpy(self.boosted_values_)).numpy()

    def weights(self, X: ArrayLike) -> NDArray[np.float64]:
        """The smoothing matrix between new points and the training points, [m, n]: rows sum to 1, no boosting."""
        check_is_fitted(self)
        return self._weights(torch.tensor(validate_data(self, X, reset=False, dtype=np.float64))).numpy()

    def _weights(self, points: Tensor) -> Tensor:
        return nadaraya_watson_weights(
            points, self._points_, bandwidth=self.bandwidth, kernel=self.kernel, period=self._period_
        )

    def _average(self, points: Tensor, values: Tensor) -> Tensor:
        return torch.cat([self._weights(some) @ values for some in points.split(ROWS)])

    def _checked_period(self, columns: int) -> Tensor | None:
        if self.period is None:
            return None
        period = torch.tensor(np.broadcast_to(np.asarray(self.period, dtype=np.float64), (columns,)).copy())
        if not bool((period > 0).all() and period.isfinite().all()):
            raise ValueError(f"period must be positive, one number or one for each column: got {self.period}.")
        return period


def _distances(points: Tensor, train: Tensor, period: float | Tensor | None) -> Tensor:
    if period is None:
        # The default mode subtracts large squares where there are many points, and near points would come out wrong.
        return torch.cdist(points, train, compute_mode="donot_use_mm_for_euclid_dist")
    squares = points.new_zeros(len(points), len(train))
    for column, turn in enumerate(torch.as_tensor(period, dtype=points.dtype).expand(points.shape[1]).tolist()):
        apart = (points[:, column, None] - train[:, column]).abs() % turn
        squares += torch.minimum(apart, turn - apart).square()
    return squares.sqrt()
