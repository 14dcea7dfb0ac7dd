"""The weights of a box of heads, one block of rows at a time: exp(scale Q K^T + mask), and what dropout leaves of them.

They are not divided by their row sums, as A is: dividing the few columns of a product is less work than all of A.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from twicing.ops.empty_rows import NEGATIVE_INFINITY

# Row sums of exp(S) in this range need no maximum taken off the scores first: neither they nor their inverses, times
# values and gradients, come near fp32's limits.
LEAST_SUM, MOST_SUM = 1e-15, 1e15


@dataclass(frozen=True)
class Dropout:
    """Which weights are dropped: the same for the same seed, head and block of rows, for a backward to draw them again.

    However heads were put together in boxes then: that depends on the number of threads.
    """

    share: float
    seed: int

    @property
    def upscale(self) -> float:
        """What the kept weights are multiplied by: 1 / (1 - p), or 0 where nothing is kept."""
        return 0.0 if self.share == 1.0 else 1.0 / (1.0 - self.share)

    def draw(self, out: Tensor, first_head: int, first_row: int, tokens: int) -> Tensor:
        """1 where a weight is kept and 0 where it is dropped, in a block [G, rows, columns] of heads of N tokens."""
        generator = torch.Generator()
        for head, rows in enumerate(out, first_head):
            generator.manual_seed(self.seed + head * tokens + first_row)
            rows.bernoulli_(1.0 - self.share, generator=generator)
        return out


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """The rows of [G, N, ...]; the tensor itself where they are all, since threads wait for each other in Python."""
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
        """The keys that any of these rows may attend to."""
        return slice(0, rows.stop if self.is_causal else self.tokens)

    def block(self, buffer: Tensor, rows: slice) -> Tensor:
        """The start of a flat buffer as the contiguous block [G, rows, columns] of A."""
        size = (self.query.shape[0], rows.stop - rows.start, self.columns(rows).stop)
        return buffer[: size[0] * size[1] * size[2]].view(size)

    def weights(self, block: Tensor, rows: slice, shift: Tensor | None) -> Tensor:
        """P = exp(S - shift) in the block, S = scale Q K^T + mask."""
        self._scores(block, rows)
        if shift is not None and shift.any():
            block.sub_(shift)
        # What is forbidden is zeroed after and not set to -inf before, of which exp would take twice as long.
        block.exp_()
        if self.is_causal:
            block[:, :, rows].tril_()
        return self._forbidden_filled(block, rows, 0.0)

    def largest_score(self, block: Tensor, rows: slice, out: Tensor) -> Tensor:
        """The maximum of every row of S, [G, rows, 1]: the shift with which nothing overflows. Uses up the block."""
        self._forbidden_filled(self._scores(block, rows), rows, NEGATIVE_INFINITY)
        if self.is_causal:
            size = rows.stop - rows.start
            future = torch.ones(size, size, dtype=torch.bool).triu_(1)
            block[:, :, rows].masked_fill_(future, NEGATIVE_INFINITY)
        torch.amax(block, -1, keepdim=True, out=out)
        # A row that may attend to nothing: exp(-inf - 0) is zero, exp(-inf + inf) would be NaN.
        return out.masked_fill_(out == NEGATIVE_INFINITY, 0.0)

    def kept(self, buffer: Tensor, rows: slice) -> Tensor:
        """1 where dropout keeps a weight of these rows and 0 elsewhere."""
        assert self.dropout is not None
        return self.dropout.draw(self.block(buffer, rows), self.first, rows.start, self.tokens)

    def mask_rows(self, mask: Tensor, rows: slice) -> Tensor:
        """The part of a mask (or of its gradient) that belongs to these rows."""
        return mask if mask.shape[-2] == 1 else mask[:, :, rows]

    def by_entry(self, block: Tensor) -> Tensor:
        """A block [G, rows, columns] as [b, h, rows, columns], to meet a mask."""
        return block.view(*self.box_shape, *block.shape[1:])

    def _scores(self, block: Tensor, rows: slice) -> Tensor:
        """S in the block, with scores of the forbidden pairs too."""
        key = rows_of(self.key, self.columns(rows))
        torch.baddbmm(block, rows_of(self.query, rows), key.mT, beta=0, alpha=self.scale, out=block)
        if self.attn_mask is not None and self.attn_mask.dtype != torch.bool:
            self.by_entry(block).add_(self.mask_rows(self.attn_mask, rows))
        return block

    def _forbidden_filled(self, block: Tensor, rows: slice, filling: float) -> Tensor:
        """The block with what a boolean mask forbids filled."""
        if self.attn_mask is not None and self.attn_mask.dtype == torch.bool:
            self.by_entry(block).masked_fill_(~self.mask_rows(self.attn_mask, rows), filling)
        return block
