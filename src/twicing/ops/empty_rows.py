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
