"""The backward of a box of heads, by blocks of columns of A. With G = dL/dU, O = A V, R = V + g (V - O), U = A R:

    dR = A^T G                          dV = (1+g) dR - g A^T dR              dg = sum dR * (V - O)
    dA = G R^T - g dR V^T               delta_i = G_i . U_i - g dR_i . O_i    dS = A * (dA - delta)
    dQ = scale dS K                     dK = scale dS^T Q                     dMask = dS

A = diag(c) P, where P = exp(S - shift) is made again: c multiplies the rows of G, g dR and delta instead of those of A.
A block of columns has all that these columns' dR is a sum of; dS also needs dR of its rows. In causal order these are
the block's own and later ones, and one sweep from the last block to the first does all. Without it, a block gives dS of
the rows up to its own, and only the later rows are made again in a second sweep: half of A, or none where A is one
block. Products with P^T are faster by columns too, since a block's rows lie closer together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from twicing.ops.blocked.plan import Plan
from twicing.ops.blocked.scratch import Scratch
from twicing.ops.blocked.weights import Heads, rows_of


@dataclass(frozen=True)
class Saved:
    """What the forward left behind for G heads, and G: all [G, N, Dv], but shift (None: all zero) and c [G, N, 1]."""

    upstream: Tensor
    output: Tensor
    smoothed: Tensor
    shift: Tensor | None
    inverse: Tensor


@dataclass(frozen=True)
class Gradients:
    """What is filled: [G, N, D], [G, N, D], [G, N, Dv], [G, 1, 1]; the mask's, [b, h, N, N] or less, is added to."""

    query: Tensor
    key: Tensor
    value: Tensor
    gain: Tensor | None
    attn_mask: Tensor | None


class Backward:
    """The backward of one box after another, with one set of buffers."""

    def __init__(self, plan: Plan, width: int, value_width: int, scratch: Scratch, *, has_dropout: bool):
        self.blocks = plan.blocks
        self.buffer = scratch.take(plan.block_size)
        self.d_buffer = scratch.take(plan.block_size)
        self.dropped = scratch.take(plan.block_size if has_dropout else 0)
        self.product = scratch.take(plan.heads * plan.tokens * max(width, value_width))
        widths = (2 * value_width + 1, 2 * value_width + 1, value_width, value_width, 1)
        self.room = [scratch.take(plan.heads, plan.tokens, width) for width in widths]
        left, right, *_ = self.room
        # With dropout delta is subtracted by itself, and this column stays zero.
        left[:, :, -1:] = 0.0
        right[:, :, -1:] = 1.0

    def run(self, heads: Heads, saved: Saved, gradients: Gradients) -> None:
        """Fill the gradients."""
        count, width = len(saved.output), heads.value.shape[-1]
        left, right, d_boosted, products, delta = (
            tensor if len(tensor) == count else tensor[:count] for tensor in self.room
        )
        box = _Box(
            heads, saved, gradients, self.d_buffer, self.dropped, self.product, left, right, d_boosted, products, delta,
            left_first=left[:, :, :width],
            left_second=left[:, :, width:-1],
            left_last=left[:, :, -1:],
            inverse=saved.inverse,
            is_one_block=len(self.blocks) == 1,
        )  # fmt: skip
        box.prepare()
        for columns in reversed(self.blocks) if heads.is_causal else self.blocks:
            rows = heads.rows(columns)
            known = rows if heads.is_causal else slice(0, columns.stop)
            weights = box.make(self.buffer, rows, columns)
            box.to_boosted(weights, rows, columns)
            box.complete(columns)
            box.to_inputs(weights[:, : known.stop - known.start], known, columns, first=True)
        if not heads.is_causal:
            for columns in self.blocks[:-1]:
                rows = slice(columns.stop, heads.tokens)
                box.to_inputs(box.make(self.buffer, rows, columns), rows, columns, first=False)
        box.finish()


@dataclass(frozen=True)
class _Box:
    """One box, and its buffers: c [G, -g dR, -delta] and [R, V, 1], whose product is c (dA - delta); dR, c delta."""

    heads: Heads
    saved: Saved
    gradients: Gradients
    d_buffer: Tensor
    dropped: Tensor
    product: Tensor
    left: Tensor
    right: Tensor
    d_boosted: Tensor
    products: Tensor
    delta: Tensor
    left_first: Tensor
    left_second: Tensor
    left_last: Tensor
    inverse: Tensor
    is_one_block: bool

    def prepare(self) -> None:
        """Fill what is known before the first block."""
        heads, saved, width = self.heads, self.saved, self.heads.value.shape[-1]
        torch.mul(saved.upstream, self.inverse, out=self.left_first)
        torch.lerp(saved.smoothed, heads.value, heads.gain_and_one, out=self.right[:, :, :width])
        self.right[:, :, width:-1] = heads.value
        if not self.is_one_block:
            # Every block adds to it, and none is the first for all of its rows.
            self.gradients.query.zero_()

    def make(self, buffer: Tensor, rows: slice, columns: slice) -> Tensor:
        """P of this block."""
        shift = None if self.saved.shift is None else rows_of(self.saved.shift, rows)
        return self.heads.weights(buffer, rows, columns, shift)

    def to_boosted(self, weights: Tensor, rows: slice, columns: slice) -> None:
        """dR = A^T G of these columns."""
        d_boosted = rows_of(self.d_boosted, columns)
        left = self.drop(weights, rows, columns).mT
        self.add_product(d_boosted, left, rows_of(self.left_first, rows), first=True)

    def complete(self, rows: slice) -> None:
        """-g dR and delta, where dR is final."""
        saved = self.saved
        d_smoothed = torch.mul(
            rows_of(self.d_boosted, rows), self.heads.minus_gain, out=rows_of(self.left_second, rows)
        )
        d_smoothed.mul_(rows_of(self.inverse, rows))
        products = rows_of(self.products, rows)
        torch.mul(rows_of(self.left_first, rows), rows_of(saved.output, rows), out=products)
        products.addcmul_(d_smoothed, rows_of(saved.smoothed, rows))
        delta = torch.sum(products, -1, keepdim=True, out=rows_of(self.delta, rows))
        if self.heads.dropout is None:
            torch.neg(delta, out=rows_of(self.left_last, rows))
        else:
            # Dropout enlarged c for what it keeps, but delta belongs to all of A.
            delta.mul_(1.0 - self.heads.dropout.share)

    def to_inputs(self, weights: Tensor, rows: slice, columns: slice, *, first: bool) -> None:
        """dV -= g A^T dR; dS, and what it gives to queries, keys and mask. first: of the blocks of these columns."""
        heads, gradients = self.heads, self.gradients
        d_value, left = rows_of(gradients.value, columns), self.drop(weights, rows, columns).mT
        self.add_product(d_value, left, rows_of(self.left_second, rows), first=first)
        d_scores = heads.block(self.d_buffer, rows, columns)
        torch.bmm(rows_of(self.left, rows), rows_of(self.right, columns).mT, out=d_scores)
        if heads.dropout is not None:
            d_scores.mul_(heads.kept(self.dropped, rows, columns)).sub_(rows_of(self.delta, rows))
        d_scores.mul_(weights)
        d_query, d_key = rows_of(gradients.query, rows), rows_of(gradients.key, columns)
        self.add_product(d_query, d_scores, rows_of(heads.key, columns), first=self.is_one_block, scale=heads.scale)
        self.add_product(d_key, d_scores.mT, rows_of(heads.query, rows), first=first, scale=heads.scale)
        if gradients.attn_mask is not None:
            part = heads.mask_part(gradients.attn_mask, rows, columns)
            part += heads.by_entry(d_scores).sum_to_size(part.shape)

    def finish(self) -> None:
        """dV += (1+g) dR, and dg."""
        self.gradients.value.addcmul_(self.d_boosted, self.heads.gain_and_one)
        if self.gradients.gain is not None:
            left_behind = self.heads.value - self.saved.smoothed
            torch.sum(left_behind.mul_(self.d_boosted), (-2, -1), keepdim=True, out=self.gradients.gain)

    def add_product(self, out: Tensor, left: Tensor, right: Tensor, *, first: bool, scale: float = 1.0) -> None:
        """out += scale left right; where it is the first, out = scale left right."""
        if out.is_contiguous():
            out.baddbmm_(left, right, beta=0 if first else 1, alpha=scale)
            return
        # A batch of products is fast only where the whole result is contiguous, and some rows of each head are not.
        product = torch.bmm(left, right, out=self.product[: out.numel()].view(out.shape))
        if first:
            torch.mul(product, scale, out=out)
        else:
            out.add_(product, alpha=scale)

    def drop(self, weights: Tensor, rows: slice, columns: slice) -> Tensor:
        """What dropout leaves of P; c makes up for the rest."""
        return weights if self.heads.dropout is None else self.heads.kept(self.dropped, rows, columns).mul_(weights)
