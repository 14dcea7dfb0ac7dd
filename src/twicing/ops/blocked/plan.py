"""How a call is cut: boxes of a few heads, and their rows in blocks, so that a block of A stays in the cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Of a block, for each thread that shares its kernels: 1 to 4 MiB were best where a core's second-level cache had 2.
BLOCK_BYTES = 2 << 20
# A head's A that is no larger is one block: one product of all rows is faster than several that stay in the cache. A
# backward works on a block of dA beside it.
WHOLE_BYTES = {"forward": 16 << 20, "backward": 4 << 20}
# Of A, at a time. What finds no room is made twice instead of being kept: memory stays O(N).
KEPT_BYTES = 64 << 20
# Products of fewer rows are too thin to be fast.
LEAST_ROWS = 16
# Blocks of rows in a causal sweep, which wastes half a block of each; rows and bytes that suffice however long it is.
CAUSAL_BLOCKS = 8
CAUSAL_ROWS = 256
CAUSAL_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Plan:
    """heads: how many are worked on together; rows: of A in one block; kept: how many blocks of a box are kept.

    The last block of a box needs no room of its own. Others that find none are made again when they are needed again.
    """

    tokens: int
    heads: int
    rows: int
    kept: int

    @property
    def block_size(self) -> int:
        """Numbers in one block of A, [heads, rows, tokens]."""
        return self.heads * self.rows * self.tokens

    def row_blocks(self) -> list[slice]:
        """The rows of A, block by block."""
        return [slice(start, min(start + self.rows, self.tokens)) for start in range(0, self.tokens, self.rows)]


def plan(heads: int, tokens: int, element_size: int, *, is_causal: bool, direction: str) -> Plan:
    """The cut for so many heads, with element_size bytes for each number of A. direction: forward or backward."""
    threads, row_bytes = torch.get_num_threads(), max(1, tokens) * element_size
    most_bytes = CAUSAL_BLOCK_BYTES if is_causal else BLOCK_BYTES
    rows = max(LEAST_ROWS, most_bytes // row_bytes // LEAST_ROWS * LEAST_ROWS)
    if is_causal:
        rows = min(rows, CAUSAL_ROWS, max(LEAST_ROWS, -(-tokens // CAUSAL_BLOCKS)))
    elif tokens * row_bytes <= WHOLE_BYTES[direction]:
        rows = tokens
    rows = max(1, min(rows, tokens))
    block_bytes = rows * row_bytes
    # A head for each thread, if there is room.
    together = max(BLOCK_BYTES * threads // block_bytes, min(threads, KEPT_BYTES // block_bytes))
    together = max(1, min(together, heads))
    kept = 0 if is_causal else min(-(-tokens // rows) - 1, KEPT_BYTES // (together * block_bytes))
    return Plan(tokens, together, rows, kept)


@dataclass(frozen=True)
class Box:
    """Heads that are worked on together: all heads of some batch entries, or some heads of one. flat: among all."""

    batch: slice
    heads: slice
    flat: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Batch entries, and heads of each."""
        return self.batch.stop - self.batch.start, self.heads.stop - self.heads.start

    def __len__(self) -> int:
        return self.flat.stop - self.flat.start


def boxes(batch: int, heads: int, together: int) -> Iterator[Box]:
    """All heads [batch, heads], in boxes of nearly equal size, none of more heads than can be worked on together."""
    if together >= heads:
        for entries in _even(batch, together // max(1, heads)):
            yield Box(entries, slice(0, heads), slice(entries.start * heads, entries.stop * heads))
        return
    for entry in range(batch):
        for some in _even(heads, together):
            yield Box(slice(entry, entry + 1), some, slice(entry * heads + some.start, entry * heads + some.stop))


def _even(count: int, most: int) -> Iterator[slice]:
    """The range cut into as few pieces of nearly equal size as there can be, none longer than most."""
    pieces = -(-count // most)
    yield from (slice(count * piece // pieces, count * (piece + 1) // pieces) for piece in range(pieces))
