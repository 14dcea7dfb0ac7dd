"""How a call is cut: boxes of a few heads, and A in blocks that stay in the cache, of rows or (backward) of columns."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Of A in a box, for each thread that shares its kernels: 1 to 4 MiB were best where a core's second-level cache had 2.
# A backward has as much of dA beside it.
BOX_BYTES = {"forward": 4 << 20, "backward": 2 << 20}
# A head's A that is no larger is one block: one product of all rows is faster than several that stay in the cache.
WHOLE_BYTES = {"forward": 16 << 20, "backward": 4 << 20}
# Larger heads' blocks of some rows or columns, many of which are made twice.
PART_BYTES = {"forward": 8 << 20, "backward": 4 << 20}
# Products of fewer rows are too thin to be fast.
LEAST_ROWS = 16
# Products of fewer columns are rounded otherwise (by MKL: seen up to 188 columns, and not from 256 on). Scores made
# again would not be those whose sums were taken, and gradients twice as far off. With more threads than heads they can
# still differ, and then gradients of scores in the hundreds are off by a few 1e-5.
LEAST_COLUMNS = 256
# Blocks in a causal sweep, which wastes half a square of each, and the length that suffices for however many tokens.
CAUSAL_BLOCKS = 8
CAUSAL_LENGTH = 256
# Dropout is drawn by squares of A, which no block may cut: both directions draw them.
DROPOUT_TILE = 256
# Of A in a box of several heads, however many threads there are.
MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Plan:
    """heads: how many are worked on together; blocks: the rows of A (forward) or its columns (backward), cut."""

    tokens: int
    heads: int
    blocks: list[slice]

    @property
    def length(self) -> int:
        """How many rows or columns the longest block has."""
        return _longest(self.blocks)

    @property
    def block_size(self) -> int:
        """Numbers in the largest block of A, [heads, length, tokens] or [heads, tokens, length]."""
        return self.heads * self.length * self.tokens


def plan(
    heads: int, tokens: int, element_size: int, *, is_causal: bool, direction: str, has_dropout: bool = False
) -> Plan:
    """The cut for so many heads, with element_size bytes for each number of A. direction: forward or backward."""
    threads, row_bytes = torch.get_num_threads(), max(1, tokens) * element_size
    least = LEAST_ROWS if direction == "forward" else LEAST_COLUMNS
    unit = DROPOUT_TILE if has_dropout else LEAST_ROWS
    length = PART_BYTES[direction] // row_bytes
    is_whole = tokens <= LEAST_COLUMNS if is_causal else tokens * row_bytes <= WHOLE_BYTES[direction]
    if is_causal:
        length = min(length, CAUSAL_LENGTH, -(-tokens // CAUSAL_BLOCKS))
    blocks = [slice(0, tokens)] if is_whole else _cut(tokens, max(least, unit, length // unit * unit), least)
    block_bytes = max(1, _longest(blocks)) * row_bytes
    one_for_each_thread = min(threads, MOST_BYTES // block_bytes)
    together = max(min(BOX_BYTES[direction] * threads, MOST_BYTES) // block_bytes, one_for_each_thread)
    return Plan(tokens, max(1, min(together, heads)), blocks)


def _cut(tokens: int, length: int, least: int) -> list[slice]:
    """The tokens in blocks of this length; the last one is longer where there would be less left than the least."""
    starts = list(range(0, max(1, tokens - least + 1), length))
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], tokens], strict=True)]


def _longest(blocks: list[slice]) -> int:
    return max(block.stop - block.start for block in blocks)


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
