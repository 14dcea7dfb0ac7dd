"""Queries that may attend to nothing: their row of A is zero, and without care its NaN poisons every token.

A plain softmax of such a row is 0/0 = NaN. Plain attention loses one output; the second pass of twicing multiplies the
NaN by the zeros of every other row. So the row is opened before the softmax and emptied after it, without a branch.
"""

import torch
from torch import Tensor

NEGATIVE_INFINITY = float("-inf")


def open_empty_rows(attn_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask with its empty rows opened, and which rows were not empty.

    attn_mask: [..., N, N], bool (True = attend) or float (added to the scores; -inf = do not attend).
    Returns the mask in its own shape and dtype, where no row is empty any more, and a bool tensor [..., N, 1].
    Rows of huge negative but finite numbers are not empty, as in SDPA; a NaN stays, so that a diverged run shows.
    """
    if attn_mask.dtype == torch.bool:
        occupied = attn_mask.any(-1, keepdim=True)
        return attn_mask | ~occupied, occupied
    occupied = (attn_mask != NEGATIVE_INFINITY).any(-1, keepdim=True)
    return torch.where(occupied, attn_mask, 0.0), occupied


def empty_again(rows: Tensor, occupied: Tensor) -> Tensor:
    """The rows [..., N, D] with zero, in value and in gradient, where nothing could be attended to."""
    return torch.where(occupied, rows, 0.0)


def masked_softmax(scores: Tensor, attn_mask: Tensor | None) -> Tensor:
    """The softmax of scores [..., N, S] under a mask that broadcasts to them; the row of an empty one is zero."""
    if attn_mask is None:
        return scores.softmax(-1)
    opened, occupied = open_empty_rows(attn_mask)
    scores = scores.masked_fill(~opened, NEGATIVE_INFINITY) if opened.dtype == torch.bool else scores + opened
    return empty_again(scores.softmax(-1), occupied)
