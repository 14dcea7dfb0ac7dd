"""The bias of kernel regression against its bandwidth: h^2 without twicing, h^4 with it, and neither at a boundary."""

import math
from dataclasses import dataclass

import numpy as np

from twicing.classical.nadaraya_watson import NadarayaWatson
from twicing.experiments.curves import Picture
from twicing.experiments.drawing import Panel, drawing_settings
from twicing.experiments.theory.drawing import guide_line, legend, log_scale, order_line
from twicing.experiments.theory.experiment import LIMIT, OWN, STATED, TWICING, Claim, Experiment, slope

BANDWIDTHS = (0.006, 0.0085, 0.012, 0.017, 0.024)
POINTS = 1201
ORDERS = (1, 2, 3)
INTERIOR = (0.3, 0.7)
# (Integral of (2 K - K*K)^2) / (integral of K^2) of the Gaussian: 4 - 4 sqrt(2/3) + sqrt(1/2).
VARIANCE_RATIO = 4 - 4 * math.sqrt(2 / 3) + math.sqrt(1 / 2)


@dataclass(frozen=True)
class Bias:
    """Per order: the error on noise-free data at each bandwidth, and the slope of its logarithm.

    periodic and interior: largest error; open_interval: root mean square over all points, the ends included.
    exact: of sin(2 pi x) on the circle, measured / (1 - exp(-2 pi^2 h^2))^order - 1, the largest.
    variance_ratio: variance of order 2 / order 1 on pure noise, from the weights.
    """

    bandwidths: tuple[float, ...]
    periodic: dict[int, tuple[float, ...]]
    interior: dict[int, tuple[float, ...]]
    open_interval: dict[int, tuple[float, ...]]
    periodic_slopes: dict[int, float]
    interior_slopes: dict[int, float]
    open_slopes: dict[int, float]
    exact: float
    variance_ratio: float


def curve(x: np.ndarray) -> np.ndarray:
    """A smooth function of period 1 with all harmonics."""
    return np.exp(np.sin(2 * np.pi * x))


def measure(_seed: int) -> Bias:
    """Nothing here is random: the data have no noise, and the variance is computed from the weights."""
    circle, line = np.arange(POINTS) / POINTS, np.linspace(0, 1, POINTS)
    inside = (line > INTERIOR[0]) & (line < INTERIOR[1])
    periodic: dict[int, list[float]] = {order: [] for order in ORDERS}
    interior: dict[int, list[float]] = {order: [] for order in ORDERS}
    everywhere: dict[int, list[float]] = {order: [] for order in ORDERS}
    exact = 0.0
    for h in BANDWIDTHS:
        for order in ORDERS:
            closed = _errors(circle, curve(circle), h, order, period=1.0)
            opened = _errors(line, curve(line), h, order, period=None)
            periodic[order].append(float(np.abs(closed).max()))
            interior[order].append(float(np.abs(opened[inside]).max()))
            everywhere[order].append(float(np.sqrt(np.mean(opened**2))))
            wave = np.sin(2 * np.pi * circle)
            known = (1 - math.exp(-2 * math.pi**2 * h**2)) ** order
            off = np.abs(_errors(circle, wave, h, order, period=1.0) + known * wave).max()
            exact = max(exact, float(off) / known)
    return Bias(
        bandwidths=BANDWIDTHS,
        periodic=_fixed(periodic),
        interior=_fixed(interior),
        open_interval=_fixed(everywhere),
        periodic_slopes=_slopes(periodic),
        interior_slopes=_slopes(interior),
        open_slopes=_slopes(everywhere),
        exact=exact,
        variance_ratio=_variance(2) / _variance(1),
    )


def _fixed(by_order: dict[int, list[float]]) -> dict[int, tuple[float, ...]]:
    return {order: tuple(values) for order, values in by_order.items()}


def _slopes(by_order: dict[int, list[float]]) -> dict[int, float]:
    return {order: slope(BANDWIDTHS, values) for order, values in by_order.items()}


def _errors(x: np.ndarray, y: np.ndarray, h: float, order: int, period: float | None) -> np.ndarray:
    model = NadarayaWatson(h, order=order, period=period)
    return model.fit(x[:, None], y).predict(x[:, None]) - y


def _variance(order: int) -> float:
    """The variance of the estimate at one point where the data are noise of variance 1: the sum of squared weights."""
    x = np.arange(POINTS)[:, None] / POINTS
    impulses = np.zeros((POINTS, 1))
    impulses[0] = 1.0
    weights = NadarayaWatson(BANDWIDTHS[-1], order=order, period=1.0).fit(x, impulses).predict(x)
    return float(np.square(weights).sum())


def claims(numbers: Bias) -> tuple[Claim, ...]:
    """What the numbers show."""
    periodic, interior, opened = numbers.periodic_slopes, numbers.interior_slopes, numbers.open_slopes
    at_h = numbers.periodic[1][-1] / numbers.periodic[2][-1]
    return (
        Claim(
            "The bias of Nadaraya-Watson falls as h^2, that of its twiced form as h^4.",
            f"{TWICING}, Proposition 2",
            STATED,
            f"slopes on a circle {periodic[1]:.2f} and {periodic[2]:.2f}, at interior points {interior[1]:.2f} and "
            f"{interior[2]:.2f}; at h = {numbers.bandwidths[-1]:g} twicing's bias is {at_h:.0f} times smaller",
            all(abs(found[1] - 2) < 0.1 and abs(found[2] - 4) < 0.2 for found in (periodic, interior)),
        ),
        Claim(
            "Order m has a bias of h^(2 m): order 3 gives h^6.",
            "our derivation, docs/theory.md",
            OWN,
            f"slopes of order 3: {periodic[3]:.2f} on a circle, {interior[3]:.2f} at interior points",
            all(abs(found[3] - 6) < 0.3 for found in (periodic, interior)),
        ),
        Claim(
            "On the circle the bias of sin(2 pi x) is (1 - exp(-2 pi^2 h^2))^m sin(2 pi x), exactly.",
            "our derivation, docs/theory.md",
            OWN,
            f"measured and formula differ by at most {numbers.exact:.1e} (relative) over bandwidths and orders",
            numbers.exact < 1e-5,
        ),
        Claim(
            "Where the data end, twicing does not mend the order of the bias.",
            "our measurement",
            LIMIT,
            f"slopes of the root mean square over an open interval: {opened[1]:.2f} (order 1) and {opened[2]:.2f} "
            f"(order 2) instead of 2 and 4",
            opened[1] < 1.8 and opened[2] < 2.0,
        ),
        Claim(
            "Less bias is paid for in variance: twicing's is 4 - 4 sqrt(2/3) + sqrt(1/2) = 1.44 times as large.",
            "our derivation, docs/theory.md",
            OWN,
            f"{numbers.variance_ratio:.4f} times, from the weights, against {VARIANCE_RATIO:.4f}",
            abs(numbers.variance_ratio - VARIANCE_RATIO) < 1e-3,
        ),
    )


@drawing_settings()
def picture(numbers: Bias) -> Picture:
    """Error against bandwidth: on a circle, at interior points, and over an open interval."""
    panels = []
    for name, title, found, slopes in (
        ("periodic", "On a circle: largest error", numbers.periodic, numbers.periodic_slopes),
        ("interior", "Interior points: largest error", numbers.interior, numbers.interior_slopes),
        ("open", "With the ends: root mean square", numbers.open_interval, numbers.open_slopes),
    ):
        panel = Panel(f"bias-{name}", title)
        for order in ORDERS:
            whole = 2 * order
            ends = (numbers.bandwidths[0], numbers.bandwidths[-1])
            guide_line(panel.axes, ends, [found[order][-1] * (h / ends[1]) ** whole for h in ends])
            order_line(panel.axes, order, numbers.bandwidths, found[order])
            first = (ends[0], found[order][0])
            panel.axes.annotate(f"{slopes[order]:.2f}", first, (-4, 4), textcoords="offset points", fontsize=7.5)
        log_scale(panel.axes)
        panel.axes.set(xlabel="bandwidth h", ylabel="error")
        panel.axes.set_xticks((0.006, 0.012, 0.024), ("0.006", "0.012", "0.024"))
        panel.axes.minorticks_off()
        panels.append(panel)
    legend(panels[0].axes, "lower right")
    caption = (
        "Noise-free data of a smooth function, Gaussian kernel. Numbers are fitted slopes; dotted lines have slopes 2, "
        "4 and 6. With the ends of the interval counted in, the order of the bias is lost, with twicing and without."
    )
    return Picture("bias", panels, caption)


ABOUT = (
    "NadarayaWatson of classical/nadaraya_watson.py is fitted to noise-free values of exp(sin 2 pi x), so that what it "
    "misses is bias alone. The order counts how often the values are smoothed; a statistician would say that twicing "
    "turns a kernel of order 2 into one of order 4."
)
EXPERIMENT = Experiment("bias", "Bias against bandwidth", ABOUT, measure, claims, picture)
