"""How a call is cut: boxes of a few heads, and their rows in blocks, so that a block of A stays in the cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Of A in a box, for each thread that shares its kernels: 1 to 4 MiB were best where a core's second-level cache had 2.
BOX_BYTES = 2 << 20
# A head's A that is no larger is one block: one product of all rows is faster than several that stay in the cache. A
# backward works on a block of dA beside it.
WHOLE_BYTES = {"forward": 16 << 20, "backward": 4 << 20}
# Blocks of some rows of a head, made anew wherever they are needed: keeping them in memory was no faster.
ROWS_BYTES = 4 << 20
# Products of fewer rows are too thin to be fast.
LEAST_ROWS = 16
# Blocks of rows in a causal sweep, which wastes half a block of each, and the rows that suffice however long it is.
CAUSAL_BLOCKS = 8
CAUSAL_ROWS = 256
# Of A in a box, however many threads there are.
MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Plan:
    """heads: how many are worked on together; rows: of A in one block."""

    tokens: int
    heads: int
    rows: int

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
    rows = max(LEAST_ROWS, ROWS_BYTES // row_bytes // LEAST_ROWS * LEAST_ROWS)
    if is_causal:
        rows = min(rows, CAUSAL_ROWS, max(LEAST_ROWS, -(-tokens // CAUSAL_BLOCKS)))
    elif tokens * row_bytes <= WHOLE_BYTES[direction]:
        rows = tokens
    rows = max(1, min(rows, tokens))
    block_bytes = rows * row_bytes
    one_for_each_thread = min(threads, MOST_BYTES // block_bytes)
    together = max(min(BOX_BYTES * threads, MOST_BYTES) // block_bytes, one_for_each_thread)
    return Plan(tokens, max(1, min(together, heads)), rows)


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
