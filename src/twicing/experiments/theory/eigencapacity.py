"""How fast a repeated smoother loses its spectrum, and what the order and the gain change about it."""

from dataclasses import dataclass

import torch

from twicing.classical import eigencapacity as theory
from twicing.experiments.curves import Picture
from twicing.experiments.drawing import LINE_WIDTH, TESTED, Panel, drawing_settings
from twicing.experiments.theory.drawing import guide_line, legend, log_scale, order_line
from twicing.experiments.theory.experiment import OWN, STATED, TWICING, Claim, Experiment, slope, yes

TIMES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# The last steps of TIMES, where the power law has set in.
TAIL = 4
ORDERS = (1, 2, 3)
GAINS = (0.0, 0.5, 0.9, 1.0, 1.1)
# Layers in the paper's figure 3.
SHOWN_TIMES = (1, 2, 6, 12)
COEFFICIENTS = (0.9, 0.99, 1.0, 1.25, 1.5, 1.75, 2.0, 2.01, 2.1)
GRID = 101
DIGITS = 1e-10


@dataclass(frozen=True)
class Eigencapacity:
    """Per order: kappa_n in closed form, by quadrature and asymptotically; per gain: kappa_n; p^n at n = 1, 2, 6, 12.

    slopes and gain_slopes: of log kappa_n against log n over the last times. admissible: whether a x + (1 - a) x^2 is,
    for each coefficient. largest_is_two: whether a = 2 is the largest of them at every x.
    """

    times: tuple[int, ...]
    closed: dict[int, tuple[float, ...]]
    numeric: dict[int, tuple[float, ...]]
    asymptotic: dict[int, tuple[float, ...]]
    slopes: dict[int, float]
    by_gain: dict[float, tuple[float, ...]]
    gain_slopes: dict[float, float]
    x: tuple[float, ...]
    dynamics: dict[int, dict[int, tuple[float, ...]]]
    coefficients: tuple[float, ...]
    admissible: tuple[bool, ...]
    largest_is_two: bool


def measure(_seed: int) -> Eigencapacity:
    """Nothing here is random."""
    closed = {order: tuple(theory.eigencapacity(n, order) for n in TIMES) for order in ORDERS}
    numeric = {order: tuple(theory.eigencapacity_by_quadrature(n, order) for n in TIMES) for order in ORDERS}
    by_gain = {gain: tuple(theory.eigencapacity_by_quadrature(n, 2, gain) for n in TIMES) for gain in GAINS}
    x = torch.linspace(0, 1, GRID, dtype=torch.float64)
    admissible = tuple(theory.admissible(a) for a in COEFFICIENTS)
    allowed = [theory.boosted_eigenvalue(x, 2, a - 1) for a, fits in zip(COEFFICIENTS, admissible, strict=True) if fits]
    twiced = theory.boosted_eigenvalue(x)
    return Eigencapacity(
        times=TIMES,
        closed=closed,
        numeric=numeric,
        asymptotic={order: tuple(theory.asymptote(n, order) for n in TIMES) for order in ORDERS},
        slopes={order: slope(TIMES[-TAIL:], numeric[order][-TAIL:]) for order in ORDERS},
        by_gain=by_gain,
        gain_slopes={gain: slope(TIMES[-TAIL:], values[-TAIL:]) for gain, values in by_gain.items()},
        x=tuple(x.tolist()),
        dynamics={
            order: {n: tuple((theory.boosted_eigenvalue(x, order) ** n).tolist()) for n in SHOWN_TIMES}
            for order in (1, 2)
        },
        coefficients=COEFFICIENTS,
        admissible=admissible,
        largest_is_two=all(bool((twiced >= one - 1e-12).all()) for one in allowed),
    )


def claims(numbers: Eigencapacity) -> tuple[Claim, ...]:
    """What the numbers show."""
    off = {
        order: max(abs(a / b - 1) for a, b in zip(numbers.numeric[order], numbers.closed[order], strict=True))
        for order in ORDERS
    }
    ends = {order: numbers.closed[order][-1] / numbers.asymptotic[order][-1] for order in ORDERS}
    slopes, gain_slopes = numbers.slopes, numbers.gain_slopes
    in_range = [a for a, fits in zip(numbers.coefficients, numbers.admissible, strict=True) if fits]
    outside = [a for a, fits in zip(numbers.coefficients, numbers.admissible, strict=True) if not fits]
    last = numbers.times[-1]
    return (
        Claim(
            "kappa_n is 1 / (n + 1) for A and 4^n (n!)^2 / (2 n + 1)! for 2 A - A A.",
            f"{TWICING}, Proposition 1",
            STATED,
            f"quadrature differs from the closed forms by at most {max(off[1], off[2]):.1e} (relative), n = 1 to "
            f"{last}",
            max(off[1], off[2]) < DIGITS,
        ),
        Claim(
            "For large n they come to 1 / n and sqrt(pi / n) / 2: twicing loses capacity as n^-1/2 instead of n^-1.",
            f"{TWICING}, Proposition 1",
            STATED,
            f"log-log slopes {slopes[1]:.4f} and {slopes[2]:.4f}; exact / asymptotic {ends[1]:.5f} and {ends[2]:.5f} "
            f"at n = {last}",
            abs(slopes[1] + 1) < 0.01
            and abs(slopes[2] + 0.5) < 0.01
            and all(abs(end - 1) < 1e-3 for end in ends.values()),
        ),
        Claim(
            "Order m loses it as n^(-1/m): kappa_n = Gamma(1 + 1/m) n! / Gamma(n + 1 + 1/m).",
            "our derivation, docs/theory.md",
            OWN,
            f"order 3: slope {slopes[3]:.4f}, quadrature off by at most {off[3]:.1e}",
            off[3] < DIGITS and abs(slopes[3] + 1 / 3) < 0.01,
        ),
        Claim(
            "Of a x + (1 - a) x^2, those with 1 <= a <= 2 lower no eigenvalue and lift none above 1; a = 2 is the "
            "largest of them at every x.",
            f"{TWICING}, section 3.2",
            STATED,
            f"admissible: {_listed(in_range)}; not: {_listed(outside)}; one above 2 x - x^2: "
            f"{yes(not numbers.largest_is_two)}",
            numbers.largest_is_two and all((1 <= a <= 2) == (a in in_range) for a in numbers.coefficients),
        ),
        Claim(
            "Only the gain 1 changes the exponent: below it the loss is as n^-1 again, only later; above it "
            "eigenvalues "
            "pass 1 and grow.",
            "our derivation, docs/theory.md",
            OWN,
            "slopes over the last times: "
            + ", ".join(f"{value:+.2f} at g = {g:g}" for g, value in gain_slopes.items()),
            all(value < -0.75 for g, value in gain_slopes.items() if g < 1)
            and abs(gain_slopes[1.0] + 0.5) < 0.01
            and all(value > 0 for g, value in gain_slopes.items() if g > 1),
        ),
    )


@drawing_settings()
def picture(numbers: Eigencapacity) -> Picture:
    """kappa_n against n by order and by gain, and the dynamics of p^n (the paper's figure 3)."""
    decay = Panel("eigencapacity-decay", "Capacity left after n layers")
    for order in ORDERS:
        guide_line(decay.axes, numbers.times, numbers.asymptotic[order])
        order_line(decay.axes, order, numbers.times, numbers.numeric[order])
    log_scale(decay.axes)
    decay.axes.set(xlabel="layers n", ylabel="kappa")
    legend(decay.axes)
    gains = Panel("eigencapacity-gains", "The same for other gains, order 2")
    for place, (gain, values) in enumerate(numbers.by_gain.items()):
        gains.axes.plot(numbers.times, values, color=TESTED[place], linewidth=LINE_WIDTH, label=f"g = {gain:g}")
    log_scale(gains.axes)
    gains.axes.set(xlabel="layers n", ylabel="kappa", ylim=(5e-5, 2))
    legend(gains.axes)
    panels = [decay, gains]
    for order, name in ((1, "x^n"), (2, "(2 x - x^2)^n")):
        panel = Panel(f"eigencapacity-dynamics-{order}", f"{name}, n = {', '.join(map(str, SHOWN_TIMES))}")
        for place, (n, values) in enumerate(numbers.dynamics[order].items()):
            panel.axes.plot(numbers.x, values, color=TESTED[place], linewidth=LINE_WIDTH, label=f"n = {n}")
        panel.axes.set(xlabel="eigenvalue x of A", ylabel="what is left")
        legend(panel.axes)
        panels.append(panel)
    caption = (
        "Dotted lines are the asymptotes. Lower row: the paper's figure 3; under twicing, the eigenvalues that a deep "
        "stack keeps begin further from 1. At g = 1.1 the capacity grows without bound (cut off here)."
    )
    return Picture("eigencapacity", panels, caption)


def _listed(numbers: list[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


ABOUT = (
    "If the eigenvalues of A are spread evenly over [0, 1], kappa_n is their mean after n equal layers. It is computed "
    "three ways: in closed form, by quadrature of the polynomial that ops/boost.py itself makes, and asymptotically. "
    "What A must be for this to speak of a transformer is the subject of the last section."
)
EXPERIMENT = Experiment("eigencapacity", "Eigencapacity", ABOUT, measure, claims, picture)
