"""The forward of a box of heads: U = A R with R = V + g (V - A V), by blocks of rows of A.

A = diag(c) P, where P = exp(S - shift), and c multiplies the few columns of a product instead of those of A. Without a
causal order all of R is needed before any of U: two sweeps over the blocks, which are made again, but for the last (and
so for the only one, where all of A is one block). With it, R of earlier rows is final: one sweep uses each for both.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from twicing.ops.blocked.plan import Plan
from twicing.ops.blocked.scratch import Scratch
from twicing.ops.blocked.weights import LEAST_SUM, MOST_SUM, Heads, rows_of


@dataclass(frozen=True)
class Result:
    """What is filled for G = b h heads: U, [b, h, N, Dv], in any dtype; O = A V, [G, N, Dv]; shift and c, [G, N, 1]."""

    output: Tensor
    smoothed: Tensor
    shift: Tensor
    inverse: Tensor


class Forward:
    """The forward of one box after another, with one set of buffers."""

    def __init__(self, plan: Plan, value_width: int, scratch: Scratch, *, has_dropout: bool):
        self.rows = plan.row_blocks()
        self.block = scratch.take(plan.block_size)
        self.boosted = scratch.take(plan.heads, plan.tokens, value_width)
        self.product = scratch.take(plan.heads * plan.rows * value_width)
        self.dropped = scratch.take(plan.block_size if has_dropout else 0)

    def run(self, heads: Heads, result: Result) -> None:
        """Fill the result."""
        box = _Box(heads, result, self.boosted[: len(result.smoothed)], self.product, self.dropped)
        for rows in self.rows:
            weights = box.make(self.block, rows)
            box.smooth_values(weights, rows)
            if heads.is_causal or rows is self.rows[-1]:
                box.smooth_boosted(weights, rows)
        if not heads.is_causal:
            for rows in self.rows[:-1]:
                box.smooth_boosted(box.make_again(self.block, rows), rows)


@dataclass(frozen=True)
class _Box:
    """One box: R, [G, N, Dv], and room for a product, and for a block with dropout."""

    heads: Heads
    result: Result
    boosted: Tensor
    product: Tensor
    dropped: Tensor

    def make(self, buffer: Tensor, rows: slice) -> Tensor:
        """P of these rows; the shift and c of the result."""
        heads, shift = self.heads, rows_of(self.result.shift, rows)
        weights = heads.weights(heads.block(buffer, rows), rows, None)
        sums = weights.sum(-1, keepdim=True)
        least, most = torch.aminmax(sums)
        # Not "less than or greater than": a NaN has to be carried on as well.
        is_shifted = not (least.item() >= LEAST_SUM and most.item() <= MOST_SUM)
        if is_shifted:
            heads.largest_score(weights, rows, out=shift)
            torch.sum(heads.weights(weights, rows, shift), -1, keepdim=True, out=sums)
        else:
            shift.zero_()
        inverse = torch.reciprocal(sums, out=rows_of(self.result.inverse, rows))
        if is_shifted:
            # A row that may attend to nothing is zero.
            inverse.masked_fill_(sums == 0.0, 0.0)
        if heads.dropout is not None:
            inverse.mul_(heads.dropout.upscale)
        return weights

    def make_again(self, buffer: Tensor, rows: slice) -> Tensor:
        """P of these rows, with the shift of the result."""
        return self.heads.weights(self.heads.block(buffer, rows), rows, rows_of(self.result.shift, rows))

    def smooth_values(self, weights: Tensor, rows: slice) -> None:
        """O = A V and R = V + g (V - O) of these rows."""
        product, smoothed = self.product_with(weights, self.heads.value, rows), rows_of(self.result.smoothed, rows)
        torch.mul(product, rows_of(self.result.inverse, rows), out=smoothed)
        # lerp is exact at gain 0, where R is V.
        torch.lerp(smoothed, rows_of(self.heads.value, rows), self.heads.gain_and_one, out=rows_of(self.boosted, rows))

    def smooth_boosted(self, weights: Tensor, rows: slice) -> None:
        """U = A R of these rows."""
        product, inverse = self.product_with(weights, self.boosted, rows), rows_of(self.result.inverse, rows)
        by_entry = self.heads.by_entry
        torch.mul(by_entry(product), by_entry(inverse), out=self.result.output[:, :, rows])

    def product_with(self, weights: Tensor, values: Tensor, rows: slice) -> Tensor:
        """P of these rows, as dropout leaves it, times the values, [G, rows, Dv]; until the next one is asked for."""
        if self.heads.dropout is not None:
            weights = self.heads.kept(self.dropped, rows).mul_(weights)
        values = rows_of(values, self.heads.columns(rows))
        size = *weights.shape[:2], values.shape[-1]
        # Not into its place: a batch of products is fast only where all of the result is contiguous.
        return torch.bmm(weights, values, out=self.product[: math.prod(size)].view(size))
