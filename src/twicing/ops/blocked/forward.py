"""The forward of a box of heads: U = A R with R = V + g (V - A V), by blocks of rows of A.

Without a causal order all of R is needed before any of U: two sweeps over the blocks, which are kept or made again.
With it, R of earlier rows is final, so that one sweep uses each block for both and forgets it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from twicing.ops.blocked.plan import Plan
from twicing.ops.blocked.scratch import Scratch
from twicing.ops.blocked.weights import LEAST_SUM, MOST_SUM, Heads, rows_of


class Forward:
    """The forward of one box after another, with one set of buffers."""

    def __init__(self, plan: Plan, value_width: int, scratch: Scratch, *, has_dropout: bool):
        self.plan = plan
        self.block = scratch.take(plan.kept_size)
        self.boosted, self.smoothed = (scratch.take(plan.heads, plan.tokens, value_width) for _ in range(2))
        self.row_terms = scratch.take(plan.heads, plan.tokens, 2)
        self.dropped = scratch.take(plan.block_size if has_dropout else 0)

    def run(self, heads: Heads, output: Tensor, smoothed: Tensor | None, row_terms: Tensor | None) -> None:
        """Fill U [G, N, Dv]; where asked to, O = A V and the row terms [G, N, 2]: A = exp(S - first) times second."""
        smoothed = self.smoothed[: len(output)] if smoothed is None else smoothed
        row_terms = self.row_terms[: len(output)] if row_terms is None else row_terms
        shift, inverse = row_terms[:, :, :1], row_terms[:, :, 1:]
        box = _Box(heads, output, smoothed, shift, inverse, self.boosted[: len(output)], self.dropped)
        blocks = self.plan.row_blocks()
        if heads.is_causal:
            for rows in blocks:
                weights = box.make(self.block, rows)
                box.smooth_values(weights, rows)
                box.smooth_boosted(weights, rows)
            return
        for rows in blocks:
            weights = box.make(self.plan.place(self.block, rows), rows)
            box.smooth_values(weights, rows)
        for rows in blocks:
            weights = heads.block(self.plan.place(self.block, rows), rows)
            if not self.plan.keeps:
                heads.weights(weights, rows, rows_of(box.shift, rows))
            box.smooth_boosted(weights, rows)


@dataclass(frozen=True)
class _Box:
    """One box: what is filled, R [G, N, Dv], and room for a block with dropout."""

    heads: Heads
    output: Tensor
    smoothed: Tensor
    shift: Tensor
    inverse: Tensor
    boosted: Tensor
    dropped: Tensor

    def make(self, buffer: Tensor, rows: slice) -> Tensor:
        """P = exp(S - shift) of these rows; what makes rows of A of its rows goes to shift and inverse."""
        heads, shift = self.heads, rows_of(self.shift, rows)
        weights = heads.weights(heads.block(buffer, rows), rows)
        sums = weights.sum(-1, keepdim=True)
        least, most = torch.aminmax(sums)
        # Not "less than or greater than": a NaN has to be carried on as well.
        if least.item() >= LEAST_SUM and most.item() <= MOST_SUM:
            shift.zero_()
            inverse = torch.reciprocal(sums, out=rows_of(self.inverse, rows))
        else:
            heads.largest_score(weights, rows, out=shift)
            torch.sum(heads.weights(weights, rows, shift), -1, keepdim=True, out=sums)
            inverse = torch.reciprocal(sums, out=rows_of(self.inverse, rows))
            # A row that may attend to nothing is zero.
            inverse.masked_fill_(sums == 0.0, 0.0)
        if heads.dropout is not None:
            inverse.mul_(heads.dropout.upscale)
        return weights

    def smooth_values(self, weights: Tensor, rows: slice) -> None:
        """O = A V and R = V + g (V - O) of these rows."""
        smoothed = self.smooth(weights, self.heads.value, rows, self.smoothed)
        # lerp is exact at gain 0, where R is V.
        boosted, value = rows_of(self.boosted, rows), rows_of(self.heads.value, rows)
        torch.lerp(smoothed, value, self.heads.gain_and_one, out=boosted)

    def smooth_boosted(self, weights: Tensor, rows: slice) -> None:
        """U = A R of these rows."""
        self.smooth(weights, self.boosted, rows, self.output)

    def smooth(self, weights: Tensor, values: Tensor, rows: slice, out: Tensor) -> Tensor:
        """A, as dropout leaves it, times the values: these rows of out."""
        if self.heads.dropout is not None:
            weights = self.heads.kept(self.dropped, rows).mul_(weights)
        values, out = rows_of(values, self.heads.columns(rows)), rows_of(out, rows)
        return torch.baddbmm(out, weights, values, beta=0, out=out).mul_(rows_of(self.inverse, rows))
