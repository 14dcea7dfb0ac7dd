"""The forward of a box of heads: U = A R with R = V + g (V - A V), by blocks of rows of A.

A = diag(c) P, where P = exp(S - shift), and c multiplies the few columns of a product instead of those of A. In causal
order R of earlier rows is final: one sweep over the blocks uses each for both products. Without it, a block's product
with R takes in the rows that are known by then, its own included, and only the columns of the others are made again in
a second sweep: half of A, or none where A is one block.
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

    def __init__(self, plan: Plan, value_width: int, scratch: Scratch, *, is_causal: bool, has_dropout: bool):
        self.blocks = plan.blocks
        has_second_sweep = not is_causal and len(self.blocks) > 1
        self.buffer = scratch.take(plan.block_size)
        self.boosted = scratch.take(plan.heads, plan.tokens, value_width)
        self.partial = scratch.take(plan.heads, plan.tokens if has_second_sweep else 0, value_width)
        self.product = scratch.take(plan.heads * plan.length * value_width)
        self.dropped = scratch.take(plan.block_size if has_dropout else 0)

    def run(self, heads: Heads, result: Result) -> None:
        """Fill the result."""
        count = len(result.smoothed)
        boosted, partial = self.boosted[:count], self.partial[:count]
        box = _Box(heads, result, boosted, partial, self.product, self.dropped)
        for rows in self.blocks:
            weights = box.make(self.buffer, rows)
            box.smooth_values(weights, rows)
            box.smooth_known(weights, rows)
        if not heads.is_causal:
            for rows in self.blocks[:-1]:
                box.smooth_others(self.buffer, rows)


@dataclass(frozen=True)
class _Box:
    """One box: R and P R so far, [G, N, Dv], and room for a product, and for a block with dropout."""

    heads: Heads
    result: Result
    boosted: Tensor
    partial: Tensor
    product: Tensor
    dropped: Tensor

    def make(self, buffer: Tensor, rows: slice) -> Tensor:
        """P of these rows; the shift and c of the result."""
        heads, shift, columns = self.heads, rows_of(self.result.shift, rows), self.heads.columns(rows)
        weights = heads.weights(buffer, rows, columns, None)
        sums = weights.sum(-1, keepdim=True)
        least, most = torch.aminmax(sums)
        # Not "less than or greater than": a NaN has to be carried on as well.
        is_shifted = not (least.item() >= LEAST_SUM and most.item() <= MOST_SUM)
        if is_shifted:
            heads.largest_score(buffer, rows, columns, out=shift)
            torch.sum(heads.weights(buffer, rows, columns, shift), -1, keepdim=True, out=sums)
        else:
            shift.zero_()
        inverse = torch.reciprocal(sums, out=rows_of(self.result.inverse, rows))
        if is_shifted:
            # A row that may attend to nothing is zero.
            inverse.masked_fill_(sums == 0.0, 0.0)
        if heads.dropout is not None:
            inverse.mul_(heads.dropout.upscale)
        return weights

    def smooth_values(self, weights: Tensor, rows: slice) -> None:
        """O = A V and R = V + g (V - O) of these rows."""
        product = self.product_with(weights, self.heads.value, rows, self.heads.columns(rows))
        smoothed = torch.mul(product, rows_of(self.result.inverse, rows), out=rows_of(self.result.smoothed, rows))
        # lerp is exact at gain 0, where R is V.
        torch.lerp(smoothed, rows_of(self.heads.value, rows), self.heads.gain_and_one, out=rows_of(self.boosted, rows))

    def smooth_known(self, weights: Tensor, rows: slice) -> None:
        """P R with the rows of R that are known, of the first to these: U where there are no others."""
        product = self.product_with(weights[:, :, : rows.stop], self.boosted, rows, slice(0, rows.stop))
        if self.heads.is_causal or rows.stop == self.heads.tokens:
            self.finish(product, rows)
        else:
            self.partial[:, rows] = product

    def smooth_others(self, buffer: Tensor, rows: slice) -> None:
        """U, with the rows of R after these, for which the weights are made again."""
        columns, made = slice(rows.stop, self.heads.tokens), self.heads.last_columns(rows.stop)
        weights = self.heads.weights(buffer, rows, made, rows_of(self.result.shift, rows))
        product = self.product_with(weights[:, :, columns.start - made.start :], self.boosted, rows, columns)
        self.finish(product.add_(self.partial[:, rows]), rows)

    def finish(self, product: Tensor, rows: slice) -> None:
        """U = c P R of these rows."""
        by_entry, inverse = self.heads.by_entry, rows_of(self.result.inverse, rows)
        torch.mul(by_entry(product), by_entry(inverse), out=self.result.output[:, :, rows])

    def product_with(self, weights: Tensor, values: Tensor, rows: slice, columns: slice) -> Tensor:
        """P of this block, as dropout leaves it, times the values, [G, rows, Dv]; until the next one is asked for."""
        if self.heads.dropout is not None:
            weights = self.heads.kept(self.dropped, rows, columns).mul_(weights)
        values = rows_of(values, columns)
        size = *weights.shape[:2], values.shape[-1]
        # Not into its place: a batch of products is fast only where all of the result is contiguous.
        return torch.bmm(weights, values, out=self.product[: math.prod(size)].view(size))
