"""Content and position in the logits: four terms, of which two mix what has nothing to do with each other."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twicing.experiments.curves import Picture
from twicing.experiments.drawing import Panel, drawing_settings
from twicing.experiments.theory.experiment import FILTERING, LIMIT, OUR_READING, Claim, Experiment
from twicing.ops.reference import attention_matrix

TOKENS, WIDTH, DRAWS = 64, 64, 400
TERMS = ("token-token", "token-position", "position-token", "position-position")
# How many tokens are alike in the picture, side by side.
GROUP = 16


@dataclass(frozen=True)
class CrossTerms:
    """Logits (e_i + p_i)(e_j + p_j) / sqrt d off the diagonal, tokens N(0, 1), sinusoidal positions, many draws.

    mean_cross: the largest mean of a cross term over draws, in units of its standard error.
    variance: measured variance of e_i p_j / its prediction |p_j|^2 / d, mean over entries.
    shares: of the logits' variance (over pairs and draws), by term.
    with_distance: correlation of each term with |i - j|, over all pairs and draws.
    moved: how far the cross terms move the weights on the other tokens, total variation of a row, mean.
    trained: the same correlation of the token-position term where tokens carry their position (content that depends
    on place), which is what training may find useful.
    matrices: the four terms of one draw of grouped tokens, for the figure.
    """

    mean_cross: float
    variance: float
    shares: dict[str, float]
    with_distance: dict[str, float]
    moved: float
    trained: float
    matrices: dict[str, tuple[tuple[float, ...], ...]]


def sinusoidal(tokens: int, width: int) -> Tensor:
    """The positions of the original transformer, [tokens, width], float64; |p|^2 = width / 2."""
    place = torch.arange(tokens, dtype=torch.float64)[:, None]
    rate = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.stack([torch.sin(place * rate), torch.cos(place * rate)], dim=2).flatten(1)


def terms(content: Tensor, position: Tensor) -> dict[str, Tensor]:
    """The four parts of the logits, [N, N] each, in the order of TERMS; they sum to x x^T / sqrt d, x = e + p."""
    pairs = ((content, content), (content, position), (position, content), (position, position))
    return {name: a @ b.T / content.shape[1] ** 0.5 for name, (a, b) in zip(TERMS, pairs, strict=True)}


def measure(seed: int) -> CrossTerms:
    """Independent tokens at fixed positions."""
    draw = torch.Generator().manual_seed(seed)
    position = sinusoidal(TOKENS, WIDTH)
    off_diagonal = ~torch.eye(TOKENS, dtype=torch.bool)
    i, j = torch.nonzero(off_diagonal, as_tuple=True)
    drawn: dict[str, list[Tensor]] = {name: [] for name in TERMS}
    moved = []
    for _ in range(DRAWS):
        content = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64)
        parts = terms(content, position)
        for name, part in parts.items():
            drawn[name].append(part[i, j])
        tokens = content + position
        # A token looks at itself before all; what it makes of the others is the question.
        without = (parts["token-token"] + parts["position-position"]).masked_fill(~off_diagonal, -torch.inf).softmax(1)
        moved.append(float((attention_matrix(tokens, tokens, off_diagonal) - without).abs().sum(1).mean() / 2))
    stacked = {name: torch.stack(values) for name, values in drawn.items()}
    cross = stacked["token-position"]
    standard_error = cross.std(0) / math.sqrt(DRAWS)
    expected = position[j].square().sum(1) / WIDTH
    variances = {name: float(values.var()) for name, values in stacked.items()}
    total = float(sum(stacked.values(), torch.zeros(())).var())
    apart = (i - j).abs().double()
    # Content that is a noisy function of place, as a trained embedding may be.
    placed = position + 0.5 * torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64)
    grouped = torch.randn(TOKENS // GROUP, WIDTH, generator=draw, dtype=torch.float64).repeat_interleave(GROUP, 0)
    grouped = grouped + 0.3 * torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64)
    return CrossTerms(
        mean_cross=float((cross.mean(0) / standard_error).abs().max()),
        variance=float((cross.var(0) / expected).mean()),
        shares={name: value / total for name, value in variances.items()},
        with_distance={name: _correlation(values, apart.expand_as(values)) for name, values in stacked.items()},
        moved=float(np.mean(moved)),
        trained=_correlation(terms(placed, position)["token-position"][i, j], apart),
        matrices={name: tuple(tuple(row) for row in part.tolist()) for name, part in terms(grouped, position).items()},
    )


def claims(numbers: CrossTerms) -> tuple[Claim, ...]:
    """What the numbers show."""
    mixed = ("token-position", "position-token")
    share = sum(numbers.shares[name] for name in mixed)
    entries = TOKENS * (TOKENS - 1)
    # The largest of so many standard normal draws.
    expected_largest = math.sqrt(2 * math.log(entries))
    return (
        Claim(
            "Where tokens are independent of their positions, the cross terms are noise: mean zero, variance "
            "|p_j|^2 / d.",
            f"{FILTERING}, Proposition 3.2",
            OUR_READING,
            f"largest mean of {entries} entries {numbers.mean_cross:.1f} standard errors (of pure noise about "
            f"{expected_largest:.1f}); variance / prediction {numbers.variance:.4f}",
            numbers.mean_cross < 1.5 * expected_largest and abs(numbers.variance - 1) < 0.02,
        ),
        Claim(
            "They know nothing of the distance between tokens, which the position-position term is there for.",
            f"{FILTERING}, Proposition 3.2",
            OUR_READING,
            f"correlation with |i - j|: cross terms {numbers.with_distance[mixed[0]]:+.4f} and "
            f"{numbers.with_distance[mixed[1]]:+.4f}, position-position {numbers.with_distance[TERMS[3]]:+.2f}",
            all(abs(numbers.with_distance[name]) < 0.02 for name in mixed) and numbers.with_distance[TERMS[3]] < -0.5,
        ),
        Claim(
            "The noise is large: it changes where attention looks.",
            "our measurement",
            OUR_READING,
            f"cross terms make {100 * share:.0f} % of the logits' variance between different tokens and move "
            f"{100 * numbers.moved:.0f} % of a row's weight on them",
            share > 0.2 and numbers.moved > 0.1,
        ),
        Claim(
            "Where content depends on place, as it may after training, a cross term carries information and "
            "dropping it "
            "loses some.",
            "our measurement",
            LIMIT,
            f"correlation of the token-position term with |i - j| {numbers.trained:+.2f} where tokens are their "
            "position "
            "plus noise",
            numbers.trained < -0.3,
        ),
    )


@drawing_settings()
def picture(numbers: CrossTerms) -> Picture:
    """The four matrices, on one scale of colours."""
    largest = max(abs(value) for matrix in numbers.matrices.values() for row in matrix for value in row)
    panels = []
    for name, matrix in numbers.matrices.items():
        panel = Panel(f"cross-{name}", name, size=(3.0, 2.6))
        shown = panel.axes.imshow(np.array(matrix), cmap="RdBu", vmin=-largest, vmax=largest, interpolation="nearest")
        panel.axes.grid(visible=False)
        panel.axes.set(xlabel="key", ylabel="query")
        panel.figure.colorbar(shown, ax=panel.axes, shrink=0.85)
        panels.append(panel)
    caption = (
        f"The four parts of the logits of {TOKENS} tokens in groups of {GROUP}: content shows the groups, position the "
        "distance, and the mixed terms stripes that mean nothing, as every token has them with every place."
    )
    return Picture("cross", panels, caption)


def _correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


ABOUT = (
    "A token that has its position added meets every other in four ways: content with content, content with place, "
    "place with content, place with place. Bilateral attention keeps the first and the last."
)
EXPERIMENT = Experiment("cross-terms", "Cross terms as noise", ABOUT, measure, claims, picture)
