"""Bootstrap bands over inputs: how far a mean would move with other inputs of the same kind.

The percentile bootstrap of Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. All curves and
ratios use the same resamples, so that what is compared is paired by input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
# Between them lie 95 %.
ENDS = (0.025, 0.975)
# Of normal numbers, a band of 2 inputs holds the mean in half of the cases, one of 5 in 83 %, of 10 in 91 %, of 32 in
# 94 %. A band of fewer than these is to be called too narrow.
ENOUGH_INPUTS = 10

Numbers = NDArray[np.float64]
Statistic = Callable[[Numbers], Numbers]


@dataclass(frozen=True, eq=False)
class Band:
    """A value and the ends of its 95 % band over inputs, arrays of one shape."""

    value: Numbers
    low: Numbers
    high: Numbers


def resamples(inputs: int, seed: int) -> Numbers:
    """How much each input weighs in each resample, [RESAMPLES, inputs]: rows sum to 1.

    Raises ValueError for fewer than two inputs, which have no band.
    """
    if inputs < 2:
        raise ValueError(f"a band over inputs needs 2 or more: got {inputs}. Give more images, or a longer text.")
    draw = np.random.default_rng(seed)
    counts = draw.multinomial(inputs, np.full(inputs, 1 / inputs), size=RESAMPLES)
    return counts.astype(np.float64) / inputs


def band(values: Numbers, weights: Numbers, statistic: Statistic = lambda means: means) -> Band:
    """statistic(mean over inputs), and between which values 95 % of the resamples lie.

    values: [inputs, ...]. weights: of resamples(). statistic: [..., *rest] -> [..., *out], on means of values whose
    first axis is the resample; it must be a smooth function of the means, such as a ratio.
    """
    resampled = statistic((weights @ values.reshape(len(values), -1)).reshape(-1, *values.shape[1:]))
    # Values that occurred: between two infinite ratios there is nothing to interpolate.
    low, high = np.quantile(resampled, ENDS, axis=0, method="inverted_cdf")
    return Band(statistic(values.mean(axis=0)[None])[0], low, high)
