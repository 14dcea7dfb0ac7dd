"""Attention as weighted least squares, layer by layer, and what twicing is in that picture."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twicing.experiments.curves import Picture
from twicing.experiments.drawing import TESTED, Panel, drawing_settings
from twicing.experiments.theory.experiment import FILTERING, OUR_READING, OWN, STATED, Claim, Experiment
from twicing.ops.attention import twicing_attention
from twicing.ops.boost import boosted_values
from twicing.ops.reference import attention_matrix, effective_matrix

TOKENS, WIDTH, LAYERS = 40, 16, 6
DIGITS = 1e-10


@dataclass(frozen=True)
class LeastSquares:
    """Random tokens y with positions p, queries, keys and values all x = y + p.

    layers: the largest difference between attention and a least-squares solver, for each of the stacked layers.
    composed: between the last layer and the product of all matrices times the first tokens.
    rise: the smallest rise of the weighted squares when the estimate is moved at random.
    twiced: between twicing attention and the solver on the boosted values 2 x - A x.
    negative: the share of negative weights of 2 A - A A. row: one row of A and of 2 A - A A.
    """

    layers: tuple[float, ...]
    composed: float
    rise: float
    twiced: float
    negative: float
    row: dict[int, tuple[float, ...]]


def measure(seed: int) -> LeastSquares:
    """A stack of attention layers without projections, each against numpy's least-squares solver."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64)
    p = 0.5 * torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64)
    first = tokens = y + p
    product = torch.eye(TOKENS, dtype=torch.float64)
    layers = []
    for _ in range(LAYERS):
        kernel = torch.exp(tokens @ tokens.T / WIDTH**0.5)
        product = attention_matrix(tokens, tokens) @ product
        after = _attend(tokens, order=1)
        layers.append(_largest(after - _solved(kernel, tokens)))
        tokens = after
    kernel, estimate = torch.exp(first @ first.T / WIDTH**0.5), _attend(first, order=1)
    lowest = _weighted_squares(kernel, first, estimate)
    moved = (
        _weighted_squares(kernel, first, estimate + 0.01 * torch.randn(estimate.shape, generator=draw)) - lowest
        for _ in range(200)
    )
    A = attention_matrix(first, first)
    B = effective_matrix(first, first)
    return LeastSquares(
        layers=tuple(layers),
        composed=_largest(tokens - product @ first),
        rise=min(float(rises.min()) for rises in moved),
        twiced=_largest(_attend(first, order=2) - _solved(kernel, boosted_values(lambda v: A @ v, first))),
        negative=float((B < 0).double().mean()),
        row={1: tuple(A[0].tolist()), 2: tuple(B[0].tolist())},
    )


def claims(numbers: LeastSquares) -> tuple[Claim, ...]:
    """What the numbers show."""
    return (
        Claim(
            "Without projections, attention is the weighted-least-squares estimate of each token with the kernel "
            "exp((y_i + p_i)(y_j + p_j) / sqrt d).",
            f"{FILTERING}, Theorem 3.1",
            STATED,
            f"against a least-squares solver: largest difference {numbers.layers[0]:.1e}; 200 random moves of the "
            f"estimate raise the weighted squares by {numbers.rise:.1e} or more",
            numbers.layers[0] < DIGITS and numbers.rise > 0,
        ),
        Claim(
            "n layers are n such estimates, each with the kernel of the layer before; together they are one matrix.",
            f"{FILTERING}, corollary of Theorem 3.1",
            OUR_READING,
            f"{len(numbers.layers)} layers: largest difference {max(numbers.layers):.1e}; product of their matrices "
            f"{numbers.composed:.1e}",
            max(numbers.layers) < DIGITS and numbers.composed < DIGITS,
        ),
        Claim(
            "Twicing is the same estimate of boosted values, 2 x - A x: no least squares of x itself, as its "
            "weights on "
            "x can be negative.",
            "our derivation, docs/theory.md",
            OWN,
            f"against the solver on boosted values {numbers.twiced:.1e}; {100 * numbers.negative:.0f} % of the weights "
            "of 2 A - A A are negative",
            numbers.twiced < DIGITS and numbers.negative > 0,
        ),
    )


@drawing_settings()
def picture(numbers: LeastSquares) -> Picture:
    """The weights of one token."""
    panel = Panel("least-squares-row", "The weights of one token", size=(5.4, 2.5))
    places = np.arange(1, TOKENS)
    # The token's own weight is far larger than the others and would hide them.
    panel.axes.bar(places - 0.2, numbers.row[1][1:], 0.4, color=TESTED[0], label="A")
    panel.axes.bar(places + 0.2, numbers.row[2][1:], 0.4, color=TESTED[1], label="2 A - A A")
    panel.axes.set(xlabel="token (the first one looks at the others)", ylabel="weight")
    panel.axes.legend(fontsize=7.5)
    caption = (
        f"The first of {TOKENS} random tokens: its weights on the others. On itself: {numbers.row[1][0]:.2f} under A, "
        f"{numbers.row[2][0]:.2f} under 2 A - A A. Bars below zero are why twicing is no weighted mean."
    )
    return Picture("least-squares", [panel], caption)


def _attend(tokens: Tensor, order: int) -> Tensor:
    one = tokens[None, None]
    return twicing_attention(one, one, one, order=order)[0, 0]


def _solved(kernel: Tensor, values: Tensor) -> Tensor:
    """For each row of weights k, the u that minimises sum_j k_j |v_j - u|^2, by a solver that knows no softmax."""
    root = kernel.sqrt().numpy()
    rows = [np.linalg.lstsq(weights[:, None], weights[:, None] * values.numpy(), rcond=None)[0][0] for weights in root]
    return torch.from_numpy(np.stack(rows))


def _weighted_squares(kernel: Tensor, values: Tensor, estimate: Tensor) -> Tensor:
    return (kernel * torch.cdist(estimate, values, compute_mode="donot_use_mm_for_euclid_dist").square()).sum(1)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


ABOUT = (
    "A weighted mean minimises a sum of weighted squares; attention without projections is one for every token. It is "
    "held against numpy's least-squares solver, which knows nothing of softmax."
)
EXPERIMENT = Experiment("least-squares", "Attention as weighted least squares", ABOUT, measure, claims, picture)
