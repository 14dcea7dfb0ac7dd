"""Residual connections and the signal-to-noise ratio: when x + A x is cleaner than x, and when it is not."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from twicing.experiments.curves import Picture
from twicing.experiments.drawing import Panel, drawing_settings
from twicing.experiments.theory.drawing import guide_line, kind_line, legend
from twicing.experiments.theory.experiment import FILTERING, LIMIT, OUR_READING, OWN, Claim, Experiment, yes
from twicing.ops.boost import boost
from twicing.ops.reference import attention_matrix

TOKENS, WIDTH, GROUPS, DRAWS = 96, 32, 6, 20
NOISES = (0.1, 0.2, 0.3, 0.45, 0.6)
# Factors on queries and keys: attention that tells groups apart, and attention that is nearly flat.
SHARP, FLAT = 1.0, 0.1
# The share of the noise's variance that all tokens have in common, in the second case.
SHARED = 0.8


@dataclass(frozen=True)
class Part:
    """Means over draws, by noise: gains of the signal-to-noise ratio as factors.

    alpha, beta: |A u| / |u| of the signal, |A n| / |n| of the noise. residual: of x + A x. alone: of A x.
    twiced: of x + (2 A - A A) x. predicted: (1 + alpha) / (1 + beta), draw by draw.
    lowest: residual / predicted, the smallest of all draws. fits: the share of draws in which alpha > beta and a gain
    of x + A x above 1 agree.
    """

    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    residual: tuple[float, ...]
    alone: tuple[float, ...]
    twiced: tuple[float, ...]
    predicted: tuple[float, ...]
    lowest: float
    fits: float


@dataclass(frozen=True)
class ResidualSnr:
    """sharp: attention tells the groups apart, the noise is each token's own. flat: it hardly does, and most of the
    noise is common to all tokens. The signals of the groups have mean zero in both.
    """

    noises: tuple[float, ...]
    sharp: Part
    flat: Part


def measure(seed: int) -> ResidualSnr:
    """Signal plus noise through one attention layer without projections, which is linear once A is formed."""
    draw = torch.Generator().manual_seed(seed)
    return ResidualSnr(NOISES, _part(draw, SHARP, 0.0), _part(draw, FLAT, SHARED))


def _part(draw: torch.Generator, sharpness: float, shared: float) -> Part:
    rows: list[list[tuple[float, ...]]] = [[] for _ in NOISES]
    agree = 0
    for _ in range(DRAWS):
        for place, sd in enumerate(NOISES):
            centres = torch.randn(GROUPS, WIDTH, generator=draw, dtype=torch.float64)
            signal = (centres - centres.mean(0)).repeat_interleave(TOKENS // GROUPS, 0)
            common = torch.randn(1, WIDTH, generator=draw, dtype=torch.float64)
            own = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64)
            noise = sd * (math.sqrt(shared) * common + math.sqrt(1 - shared) * own)
            found = _gains(signal, noise, sharpness)
            rows[place].append(found)
            agree += (found[0] > found[1]) == (found[2] > 1)
    lowest = min(found[2] / found[5] for row in rows for found in row)
    alpha, beta, residual, alone, twiced, predicted = torch.tensor(rows, dtype=torch.float64).mean(1).T.tolist()
    return Part(
        alpha=tuple(alpha),
        beta=tuple(beta),
        residual=tuple(residual),
        alone=tuple(alone),
        twiced=tuple(twiced),
        predicted=tuple(predicted),
        lowest=lowest,
        fits=agree / (DRAWS * len(NOISES)),
    )


def _gains(signal: Tensor, noise: Tensor, sharpness: float) -> tuple[float, ...]:
    noisy = sharpness * (signal + noise)
    A = attention_matrix(noisy, noisy)
    alpha, beta = _size(A @ signal) / _size(signal), _size(A @ noise) / _size(noise)

    def gain(layer: Tensor) -> float:
        return (_size(layer @ signal) / _size(layer @ noise)) / (_size(signal) / _size(noise))

    identity = torch.eye(len(signal), dtype=torch.float64)
    twiced = boost(lambda v: A @ v, identity)
    return alpha, beta, gain(identity + A), gain(A), gain(identity + twiced), (1 + alpha) / (1 + beta)


def claims(numbers: ResidualSnr) -> tuple[Claim, ...]:
    """What the numbers show."""
    sharp, flat = numbers.sharp, numbers.flat
    between = all(1 < a < b for a, b in zip(sharp.residual, sharp.alone, strict=True))
    return (
        Claim(
            "Where attention keeps more of the signal than of the noise (alpha > beta), x + A x has a higher "
            "signal-to-noise ratio than x, by the factor (1 + alpha) / (1 + beta) or more.",
            f"{FILTERING}, Proposition 3.1",
            OUR_READING,
            f"factors {_listed(sharp.residual)} for noise {_listed(numbers.noises)}; {sharp.lowest:.2f} of the formula "
            f"or more in every draw; alpha > beta and a gain agree in {100 * sharp.fits:.0f} % of draws",
            all(value > 1 for value in sharp.residual) and sharp.fits == 1 and sharp.lowest > 0.99,
        ),
        Claim(
            "By the same formula A x alone gains more, alpha / beta, at the price of the signal's size: the residual "
            "connection protects the signal, it does not clean better than its layer.",
            "our derivation, docs/theory.md",
            OWN,
            f"A x alone: {_listed(sharp.alone)}; x + A x below it throughout: {yes(between)}",
            between,
        ),
        Claim(
            "With twicing in the layer, more of the signal is kept and more of the noise: x + (2 A - A A) x gains less "
            "where there is much noise.",
            "our measurement",
            LIMIT,
            f"{_listed(sharp.twiced)} against {_listed(sharp.residual)} with A alone",
            sharp.twiced[-1] < 0.97 * sharp.residual[-1],
        ),
        Claim(
            "The assumption can fail: nearly flat attention keeps noise that all tokens share and loses signals that "
            "have no common mean, and x + A x is noisier than x.",
            "our measurement",
            LIMIT,
            f"alpha {_listed(flat.alpha)}, beta {_listed(flat.beta)}; factors {_listed(flat.residual)}",
            all(a < b for a, b in zip(flat.alpha, flat.beta, strict=True))
            and all(value < 0.9 for value in flat.residual)
            and flat.fits == 1,
        ),
    )


@drawing_settings()
def picture(numbers: ResidualSnr) -> Picture:
    """The gain in dB against the noise, for sharp and for flat attention."""
    panels = []
    for name, title, part in (
        ("sharp", "Attention within groups", numbers.sharp),
        ("flat", "Flat attention, shared noise", numbers.flat),
    ):
        panel = Panel(f"snr-{name}", title)
        guide_line(panel.axes, (numbers.noises[0], numbers.noises[-1]), (0, 0))
        for place, (found, label) in enumerate(
            ((part.residual, "x + A x"), (part.twiced, "x + (2 A - A A) x"), (part.alone, "A x"))
        ):
            kind_line(panel.axes, place, numbers.noises, _decibels(found), label, "os^"[place])
        guide_line(panel.axes, numbers.noises, _decibels(part.predicted), "(1 + alpha) / (1 + beta)")
        panel.axes.set(xlabel="noise / signal", ylabel="gain of the ratio [dB]")
        panels.append(panel)
    legend(panels[1].axes, "center right")
    caption = (
        f"{TOKENS} tokens in {GROUPS} groups, width {WIDTH}, {DRAWS} draws, A formed from the noisy tokens. The "
        "ratio is |signal| / "
        "|noise|, of the whole sequence; A is applied to both apart, as the layer is linear once A is given."
    )
    return Picture("snr", panels, caption)


def _decibels(factors: tuple[float, ...]) -> list[float]:
    return [20 * math.log10(factor) for factor in factors]


def _size(values: Tensor) -> float:
    return float(values.norm())


def _listed(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{number:.3g}" for number in numbers)


ABOUT = (
    "Tokens are signal plus noise. The paper's assumption, as far as we know it, is that attention scales the signal "
    "by alpha and the noise by a smaller beta; here both are measured."
)
EXPERIMENT = Experiment("snr", "Residual connections and noise", ABOUT, measure, claims, picture)
