"""The weights of a box of heads, one block of A at a time: exp(scale Q K^T + mask), and what dropout leaves of them.

They are not divided by their row sums, as A is: dividing the few columns of a product is less work than all of A.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from twicing.ops.blocked import plan
from twicing.ops.empty_rows import NEGATIVE_INFINITY

# Row sums of exp(S) in this range need no maximum taken off the scores first: neither they nor their inverses, times
# values and gradients, come near fp32's limits.
LEAST_SUM, MOST_SUM = 1e-15, 1e15


@dataclass(frozen=True)
class Dropout:
    """Which weights are dropped: the same for the same seed, head and square of A, for a backward to draw them again.

    However heads were put together in boxes then, which depends on the number of threads, and A cut into blocks.
    """

    share: float
    seed: int

    @property
    def upscale(self) -> float:
        """What the kept weights are multiplied by: 1 / (1 - p), or 0 where nothing is kept."""
        return 0.0 if self.share == 1.0 else 1.0 / (1.0 - self.share)

    def draw(self, out: Tensor, first_head: int, rows: slice, columns: slice, tokens: int) -> Tensor:
        """1 where a weight is kept and 0 where it is dropped, in a block [G, rows, columns] of heads of N tokens.

        Rows and columns start at a square's edge; what a square has beyond their end is drawn too, and not used.
        """
        generator, edge = torch.Generator(), plan.DROPOUT_TILE
        across = -(-tokens // edge)
        for head, of_head in enumerate(out, first_head):
            for i in range(rows.start, rows.stop, edge):
                for j in range(columns.start, columns.stop, edge):
                    generator.manual_seed(self.seed + (head * across + i // edge) * across + j // edge)
                    square = out.new_empty(min(edge, tokens - i), min(edge, tokens - j))
                    square.bernoulli_(1.0 - self.share, generator=generator)
                    part = of_head[i - rows.start :, j - columns.start :][:edge, :edge]
                    part.copy_(square[: part.shape[0], : part.shape[1]])
        return out


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """The rows of [G, N, ...]; the tensor itself where they are all, since a slice takes as long as a small kernel."""
    return tensor if rows.stop - rows.start == tensor.shape[1] else tensor[:, rows]


@dataclass(frozen=True)
class Heads:
    """What a box of G heads is computed from, in the dtype of its sums.

    query, key: [G, N, D]; value: [G, N, Dv]; minus_gain, gain_and_one: -g and 1 + g, [G or 1, 1, 1].
    attn_mask: [b or 1, h or 1, N or 1, N or 1] for a box of b h = G heads, bool or added to the scores.
    first: the number of its first head among all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    minus_gain: Tensor
    gain_and_one: Tensor
    attn_mask: Tensor | None
    box_shape: tuple[int, int]
    first: int
    scale: float
    is_causal: bool
    dropout: Dropout | None

    @property
    def tokens(self) -> int:
        """N."""
        return self.query.shape[-2]

    def columns(self, rows: slice) -> slice:
        """The keys that any of these rows may attend to, and more where these would be too few columns."""
        return slice(0, min(max(rows.stop, plan.LEAST_COLUMNS), self.tokens) if self.is_causal else self.tokens)

    def last_columns(self, first: int) -> slice:
        """The keys from the first one on, and more where these would be too few columns."""
        return slice(max(0, min(first, self.tokens - plan.LEAST_COLUMNS)), self.tokens)

    def rows(self, columns: slice) -> slice:
        """The queries that may attend to any of these columns."""
        return slice(columns.start if self.is_causal else 0, self.tokens)

    def block(self, buffer: Tensor, rows: slice, columns: slice) -> Tensor:
        """The start of a flat buffer as the contiguous block [G, rows, columns] of A."""
        size = self.query.shape[0], rows.stop - rows.start, columns.stop - columns.start
        return buffer[: math.prod(size)].view(size)

    def weights(self, buffer: Tensor, rows: slice, columns: slice, shift: Tensor | None) -> Tensor:
        """P = exp(S - shift) at the start of the buffer, S = scale Q K^T + mask."""
        block = self._scores(self.block(buffer, rows, columns), rows, columns)
        if shift is not None and shift.any():
            block.sub_(shift)
        # What is forbidden is zeroed after and not set to -inf before, of which exp would take twice as long.
        block.exp_()
        if self.is_causal:
            _from_diagonal(block, rows, columns).tril_()
        return self._forbidden_filled(block, rows, columns, 0.0)

    def largest_score(self, buffer: Tensor, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """The maximum of every row of S, [G, rows, 1]: the shift with which nothing overflows. Uses up the buffer."""
        block = self._scores(self.block(buffer, rows, columns), rows, columns)
        self._forbidden_filled(block, rows, columns, NEGATIVE_INFINITY)
        if self.is_causal:
            part = _from_diagonal(block, rows, columns)
            part.masked_fill_(torch.ones(part.shape[1:], dtype=torch.bool).triu_(1), NEGATIVE_INFINITY)
        torch.amax(block, -1, keepdim=True, out=out)
        # A row that may attend to nothing: exp(-inf - 0) is zero, exp(-inf + inf) would be NaN.
        return out.masked_fill_(out == NEGATIVE_INFINITY, 0.0)

    def kept(self, buffer: Tensor, rows: slice, columns: slice) -> Tensor:
        """1 where dropout keeps a weight of this block and 0 elsewhere."""
        assert self.dropout is not None
        return self.dropout.draw(self.block(buffer, rows, columns), self.first, rows, columns, self.tokens)

    def mask_part(self, mask: Tensor, rows: slice, columns: slice) -> Tensor:
        """The part of a mask (or of its gradient) that belongs to this block."""
        mask = mask if mask.shape[-2] == 1 else mask[:, :, rows]
        return mask if mask.shape[-1] == 1 else mask[..., columns]

    def by_entry(self, block: Tensor) -> Tensor:
        """A block [G, rows, columns] as [b, h, rows, columns], to meet a mask."""
        return block.view(*self.box_shape, *block.shape[1:])

    def _scores(self, block: Tensor, rows: slice, columns: slice) -> Tensor:
        """S in the block, with scores of the forbidden pairs too."""
        query, key = rows_of(self.query, rows), rows_of(self.key, columns)
        torch.baddbmm(block, query, key.mT, beta=0, alpha=self.scale, out=block)
        if self.attn_mask is not None and self.attn_mask.dtype != torch.bool:
            self.by_entry(block).add_(self.mask_part(self.attn_mask, rows, columns))
        return block

    def _forbidden_filled(self, block: Tensor, rows: slice, columns: slice, filling: float) -> Tensor:
        """The block with what a boolean mask forbids filled."""
        if self.attn_mask is not None and self.attn_mask.dtype == torch.bool:
            self.by_entry(block).masked_fill_(~self.mask_part(self.attn_mask, rows, columns), filling)
        return block


def _from_diagonal(block: Tensor, rows: slice, columns: slice) -> Tensor:
    """The part of a block on the diagonal of A and to its right: in causal order, the only one with forbidden pairs."""
    first = max(rows.start, columns.start)
    last = min(rows.stop, columns.stop)
    return block[:, first - rows.start : last - rows.start, first - columns.start :]
