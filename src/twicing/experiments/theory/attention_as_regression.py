"""Softmax attention as kernel regression: exact for keys of equal length, and what other lengths change."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from twicing.classical.nadaraya_watson import nadaraya_watson_weights
from twicing.experiments.curves import Picture
from twicing.experiments.drawing import Panel, drawing_settings
from twicing.experiments.theory.drawing import guide_line, kind_line, legend
from twicing.experiments.theory.experiment import LIMIT, OWN, STATED, TWICING, Claim, Experiment
from twicing.ops.attention import twicing_attention
from twicing.ops.boost import boost
from twicing.ops.reference import attention_matrix

TOKENS = 197
WIDTHS = (8, 16, 64)
WIDTH = 64
KEY_LENGTHS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
# By which factor the lengths of keys differ, largest to smallest.
UNEVEN = (1.0, 1.1, 1.25, 1.5, 2.0)
DIGITS = 1e-12


@dataclass(frozen=True)
class AttentionAsRegression:
    """How far attention is from kernel regression with a Gaussian of variance sqrt(D).

    normalised: for each width, the largest difference of a weight where keys have length 1. twiced: of the output, of
    order 2. uneven: mean total variation between the rows, where the lengths of keys differ by a factor.
    reweighted: the largest difference once K is multiplied by exp(|k|^2 / (2 sqrt D)).
    neighbours: exp(entropy of a row) / N, the share of tokens that a row averages, against the keys' length.
    """

    widths: tuple[int, ...]
    normalised: tuple[float, ...]
    twiced: float
    unevenness: tuple[float, ...]
    uneven: tuple[float, ...]
    reweighted: float
    key_lengths: tuple[float, ...]
    neighbours: tuple[float, ...]


def measure(seed: int) -> AttentionAsRegression:
    """Random directions, of given lengths."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(width: int) -> Tensor:
        return torch.randn(TOKENS, width, generator=draw, dtype=torch.float64)

    def regression(query: Tensor, key: Tensor) -> Tensor:
        return nadaraya_watson_weights(query, key, bandwidth=key.shape[1] ** 0.25)

    normalised = []
    for width in WIDTHS:
        query, key = 3 * tokens(width), _of_length_one(tokens(width))
        normalised.append(_largest(attention_matrix(query, key) - regression(query, key)))
    query, key, value = 3 * tokens(WIDTH), _of_length_one(tokens(WIDTH)), tokens(WIDTH)
    weights = regression(query, key)
    attended = twicing_attention(query[None, None], key[None, None], value[None, None])[0, 0]
    twiced = _largest(attended - boost(lambda v: weights @ v, value))
    uneven, reweighted = [], 0.0
    direction = _of_length_one(tokens(WIDTH))
    for factor in UNEVEN:
        lengths = 4 * torch.linspace(1, factor, TOKENS, dtype=torch.float64)[:, None]
        query, key = 4 * direction, lengths * direction
        attn, weights = attention_matrix(query, key), regression(query, key)
        uneven.append(float((attn - weights).abs().sum(1).mean() / 2))
        heavier = weights * torch.exp(key.square().sum(1) / (2 * math.sqrt(WIDTH)))
        reweighted = max(reweighted, _largest(attn - heavier / heavier.sum(1, keepdim=True)))
    neighbours = []
    for length in KEY_LENGTHS:
        attn = attention_matrix(length * direction, length * direction)
        neighbours.append(float(torch.special.entr(attn).sum(1).exp().mean()) / TOKENS)
    return AttentionAsRegression(
        WIDTHS, tuple(normalised), twiced, UNEVEN, tuple(uneven), reweighted, KEY_LENGTHS, tuple(neighbours)
    )


def claims(numbers: AttentionAsRegression) -> tuple[Claim, ...]:
    """What the numbers show."""
    return (
        Claim(
            "Where all keys have the same length, softmax attention is Nadaraya-Watson regression with a Gaussian "
            "kernel of variance sqrt(D); the queries may have any length.",
            f"{TWICING}, appendix A.4",
            STATED,
            f"largest difference of a weight {max(numbers.normalised):.1e} over widths "
            f"{', '.join(map(str, numbers.widths))}",
            max(numbers.normalised) < DIGITS,
        ),
        Claim(
            "So twicing attention is twiced kernel regression.",
            f"{TWICING}, section 3.3",
            STATED,
            f"twicing_attention() against boost() of the regression: largest difference {numbers.twiced:.1e}",
            numbers.twiced < DIGITS,
        ),
        Claim(
            "Keys of other lengths weigh exp(|k|^2 / (2 sqrt D)) more: attention prefers long keys, regression "
            "does not.",
            "our derivation, docs/theory.md",
            LIMIT,
            f"with that factor put in they differ by at most {numbers.reweighted:.1e}; without it, half of the summed "
            f"differences of a row is {numbers.uneven[1]:.3f} where lengths differ by {numbers.unevenness[1]:g} and "
            f"{numbers.uneven[-1]:.3f} where by {numbers.unevenness[-1]:g}",
            numbers.reweighted < DIGITS and numbers.uneven[0] < DIGITS and numbers.uneven[-1] > 0.1,
        ),
        Claim(
            "The bandwidth is D^(1/4) whatever the data are, so the length of keys decides how local attention is: at "
            "length 1 it averages nearly all tokens.",
            "our measurement",
            OWN,
            f"a row averages {100 * numbers.neighbours[0]:.1f} % of the tokens at length 1 and "
            f"{100 * numbers.neighbours[-1]:.1f} % at length {numbers.key_lengths[-1]:g} (D = {WIDTH})",
            numbers.neighbours[0] > 0.95 and numbers.neighbours[-1] < 0.05,
        ),
    )


@drawing_settings()
def picture(numbers: AttentionAsRegression) -> Picture:
    """How far uneven keys lead away, and how many tokens a row averages."""
    away = Panel("regression-uneven", "Keys of unequal length")
    kind_line(away.axes, 2, numbers.unevenness, numbers.uneven, "attention against regression", "o")
    guide_line(away.axes, (1, numbers.unevenness[-1]), (0, 0), "exact where lengths are equal")
    away.axes.set(xlabel="longest key / shortest key", ylabel="total variation of a row", ylim=(-0.03, None))
    legend(away.axes, "upper left")
    local = Panel("regression-neighbours", "How many tokens a row averages")
    kind_line(local.axes, 1, numbers.key_lengths, [100 * share for share in numbers.neighbours], "", "o")
    local.axes.set(xlabel=f"length of queries and keys, D = {WIDTH}", ylabel="effective share of tokens [%]")
    caption = (
        "Left: the weights of attention against those of kernel regression, random directions. Right: the exponential "
        "of a row's entropy, as a share of all tokens; at length sqrt(D) = 8 the entries of a key are of size 1."
    )
    return Picture("regression", [away, local], caption)


def _of_length_one(vectors: Tensor) -> Tensor:
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


ABOUT = (
    "exp(q k / sqrt D) = exp(-|q - k|^2 / (2 sqrt D)) exp(|q|^2 / (2 sqrt D)) exp(|k|^2 / (2 sqrt D)): the middle "
    "factor is the same along a row and cancels in the softmax, the last one only where keys have equal lengths."
)
EXPERIMENT = Experiment("regression", "Softmax attention as kernel regression", ABOUT, measure, claims, picture)
