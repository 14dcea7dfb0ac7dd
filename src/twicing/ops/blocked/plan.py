"""How a call is cut: boxes of a few heads, and their rows in blocks, so that a block of A stays in the cache."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

# The second-level cache of a core: of 0.5 to 8 MiB, 2 to 4 were best where that had 2.
BLOCK_BYTES = 2 << 20
# A head whose A is larger makes it twice instead of keeping it: memory stays O(N).
KEPT_BYTES = 64 << 20
# Products of fewer rows are too thin to be fast.
LEAST_ROWS = 16
# Blocks of rows in a causal sweep, which wastes half a block of each.
CAUSAL_BLOCKS = 16


@dataclass(frozen=True)
class Plan:
    """heads: how many are worked on together; rows: of A in one block; keeps: whether all blocks of a box are kept."""

    tokens: int
    heads: int
    rows: int
    keeps: bool

    @property
    def block_size(self) -> int:
        """Numbers in one block of A, [heads, rows, tokens]."""
        return self.heads * self.rows * self.tokens

    @property
    def kept_size(self) -> int:
        """Numbers in what is kept of A: all blocks, or one."""
        return self.heads * self.tokens * self.tokens if self.keeps else self.block_size

    def row_blocks(self) -> list[slice]:
        """The rows of A, block by block."""
        return [slice(start, min(start + self.rows, self.tokens)) for start in range(0, self.tokens, self.rows)]

    def place(self, buffer: Tensor, rows: slice) -> Tensor:
        """Where the block of these rows lies in the buffer of what is kept."""
        return buffer[self.heads * self.tokens * rows.start :] if self.keeps else buffer


def plan(heads: int, tokens: int, element_size: int, *, is_causal: bool) -> Plan:
    """The cut for so many heads, with element_size bytes for each number of A."""
    row_bytes = max(1, tokens) * element_size
    rows = max(LEAST_ROWS, BLOCK_BYTES // row_bytes // LEAST_ROWS * LEAST_ROWS)
    if is_causal:
        rows = min(rows, max(LEAST_ROWS, -(-tokens // CAUSAL_BLOCKS)))
    rows = max(1, min(rows, tokens))
    together = max(1, min(heads, BLOCK_BYTES // (rows * row_bytes)))
    return Plan(tokens, together, rows, keeps=not is_causal and tokens * row_bytes <= KEPT_BYTES)


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
