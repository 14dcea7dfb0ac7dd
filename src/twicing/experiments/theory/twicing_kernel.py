"""A A against the kernel convolved with itself: when 2 A - A A is the twicing kernel 2 K - K*K, and when it is not."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from twicing.classical.nadaraya_watson import nadaraya_watson_weights
from twicing.experiments.curves import Picture
from twicing.experiments.drawing import Panel, drawing_settings
from twicing.experiments.theory.drawing import guide_line, kind_line, legend
from twicing.experiments.theory.experiment import LIMIT, OWN, STATED, TWICING, Claim, Experiment

SIGMA = 0.02
POINTS = 1001
# Points this far from the ends see the whole kernel, and so does what they see.
MARGIN = 14 * SIGMA
# How uneven the points lie: x = u + s sin(2 pi u) / (2 pi) has density 1 / (1 + s cos(2 pi u)).
UNEVEN = (0.0, 0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class TwicingKernel:
    """Products of Gaussian smoothing matrices on points of [0, 1].

    convolution: the largest difference of A A spacing, A unnormalised and evenly spaced, to the density of variance
    2 sigma^2, relative to its peak. squared_variance: the variance of a row of A A, in units of sigma^2.
    second_moment, fourth_moment: of a row of 2 A - A A, in units of sigma^2 and sigma^4.
    uneven: for each unevenness of the points, how far the normalised A A lies from the normalised kernel of variance
    2 sigma^2 (total variation, mean over interior rows). asymmetry: |A - A^T| / |A|, Frobenius, of the normalised A.
    offsets, kernel, convolved, twiced: the curves of one row, in units of sigma.
    """

    convolution: float
    squared_variance: float
    second_moment: float
    fourth_moment: float
    unevenness: tuple[float, ...]
    uneven: tuple[float, ...]
    asymmetry: tuple[float, ...]
    offsets: tuple[float, ...]
    kernel: tuple[float, ...]
    convolved: tuple[float, ...]
    twiced: tuple[float, ...]


def measure(_seed: int) -> TwicingKernel:
    """Nothing here is random."""
    x = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    spacing = 1 / (POINTS - 1)
    apart = x[:, None] - x
    K, wider = _density(apart, SIGMA**2), _density(apart, 2 * SIGMA**2)
    squared = K @ K * spacing
    inside = (x > MARGIN) & (x < 1 - MARGIN)
    middle = POINTS // 2
    row, row_squared, offsets = K[middle], squared[middle], apart[middle]
    twiced = 2 * row - row_squared
    uneven, asymmetry = [], []
    for strength in UNEVEN:
        points = (x + strength * torch.sin(2 * math.pi * x) / (2 * math.pi))[:, None]
        A = nadaraya_watson_weights(points, points, bandwidth=SIGMA)
        target = nadaraya_watson_weights(points, points, bandwidth=math.sqrt(2) * SIGMA)
        uneven.append(float((A @ A - target)[inside].abs().sum(1).mean() / 2))
        asymmetry.append(float((A - A.T).norm() / A.norm()))
    near = offsets.abs() < 5 * SIGMA
    return TwicingKernel(
        convolution=float((squared - wider)[inside][:, inside].abs().max() / wider.max()),
        squared_variance=_moment(offsets, row_squared, 2),
        second_moment=_moment(offsets, twiced, 2),
        fourth_moment=_moment(offsets, twiced, 4),
        unevenness=UNEVEN,
        uneven=tuple(uneven),
        asymmetry=tuple(asymmetry),
        offsets=tuple((offsets[near] / SIGMA).tolist()),
        kernel=tuple((row[near] * SIGMA).tolist()),
        convolved=tuple((row_squared[near] * SIGMA).tolist()),
        twiced=tuple((twiced[near] * SIGMA).tolist()),
    )


def claims(numbers: TwicingKernel) -> tuple[Claim, ...]:
    """What the numbers show."""
    return (
        Claim(
            "A A, A unnormalised on evenly spaced points, is the kernel convolved with itself: a Gaussian of variance "
            "2 sigma^2.",
            f"{TWICING}, appendix A.5",
            STATED,
            f"largest difference {numbers.convolution:.1e} of the peak; variance {numbers.squared_variance:.6f} "
            "sigma^2",
            numbers.convolution < 1e-10 and abs(numbers.squared_variance - 2) < 1e-6,
        ),
        Claim(
            "2 K - K*K has no second moment, which is why the h^2 term of the bias is gone; the next one is -6 "
            "sigma^4.",
            f"{TWICING}, Proposition 2; the fourth moment is our derivation",
            STATED,
            f"second moment {numbers.second_moment:.1e} sigma^2, fourth {numbers.fourth_moment:.6f} sigma^4",
            abs(numbers.second_moment) < 1e-9 and abs(numbers.fourth_moment + 6) < 1e-6,
        ),
        Claim(
            "2 K - K*K is negative beyond 2 sqrt(log(2 sqrt 2)) = 2.04 sigma: twicing has negative weights.",
            "our derivation, docs/theory.md",
            OWN,
            f"smallest value {min(numbers.twiced):.4f} / sigma; first negative at |x| = "
            f"{_sign_change(numbers):.2f} sigma",
            min(numbers.twiced) < 0 and abs(_sign_change(numbers) - SIGN_CHANGE) < 0.06,
        ),
        Claim(
            "With rows that sum to 1 it holds only for evenly spaced points: elsewhere A A is not the kernel of "
            "variance "
            "2 sigma^2, and A is not symmetric.",
            "our measurement",
            LIMIT,
            f"total variation {numbers.uneven[0]:.1e} for even points and {numbers.uneven[-1]:.3f} where the spacing "
            f"varies by {1 + numbers.unevenness[-1]:g} : {1 - numbers.unevenness[-1]:g}; |A - A^T| / |A| up to "
            f"{max(numbers.asymmetry):.2f}",
            numbers.uneven[0] < 1e-6 and numbers.uneven[-1] > 0.003,
        ),
    )


@drawing_settings()
def picture(numbers: TwicingKernel) -> Picture:
    """The three kernels, and how far uneven points lead away."""
    shape = Panel("twicing-kernel-shape", "One row of the matrices, even points")
    for place, (values, name) in enumerate(
        ((numbers.kernel, "K"), (numbers.twiced, "2 K - K*K"), (numbers.convolved, "K*K"))
    ):
        kind_line(shape.axes, place, numbers.offsets, values, name)
    guide_line(shape.axes, (-5, 5), (0, 0))
    shape.axes.set(xlabel="distance / sigma", ylabel="weight x sigma")
    legend(shape.axes)
    away = Panel("twicing-kernel-uneven", "Normalised A, uneven points")
    kind_line(away.axes, 2, numbers.unevenness, numbers.uneven, "", "o")
    away.axes.set(xlabel="unevenness of the spacing", ylabel="A A against the wider kernel", ylim=(0, None))
    caption = (
        "Left: twicing sharpens the kernel and gives far neighbours a negative weight. Right: total variation between "
        "rows of A A and of the normalised kernel of variance 2 sigma^2."
    )
    return Picture("twicing-kernel", [shape, away], caption)


# Where 2 exp(-x^2 / 2) = exp(-x^2 / 4) / sqrt(2).
SIGN_CHANGE = 2 * math.sqrt(math.log(2 * math.sqrt(2)))


def _density(apart: Tensor, variance: float) -> Tensor:
    return torch.exp(-apart.square() / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def _moment(offsets: Tensor, weights: Tensor, power: int) -> float:
    return float(((offsets / SIGMA) ** power * weights).sum() / weights.sum())


def _sign_change(numbers: TwicingKernel) -> float:
    return min(abs(offset) for offset, value in zip(numbers.offsets, numbers.twiced, strict=True) if value < 0)


ABOUT = (
    "The paper reads A as a kernel K and A A as K*K. On evenly spaced points, away from the ends and without dividing "
    "by the rows' sums, this is a quadrature of the convolution and holds to rounding. Attention divides, and its "
    "tokens do not lie evenly."
)
EXPERIMENT = Experiment("kernel", "The twicing kernel", ABOUT, measure, claims, picture)
