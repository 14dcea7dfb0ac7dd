# Triton reads these functions, not mypy: their arguments are pointers, tiles and constants of the compiler.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Parts that all kernels are made of: tiles of rows in memory, scores, and the weights that dropout keeps.

Addresses are 64 bits wide: B H N D passes 2^31 at sizes that fit into a GPU. Products of fp32 tiles are exact fp32
(Triton's default would be TF32).
"""

import triton
import triton.language as tl
from triton import knobs

# The decorator below looks at the environment when this file is imported, and never again.
IS_INTERPRETED: bool = knobs.runtime.interpret

LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def head_of(pointer, strides, batch, head):
    """Where a head of [B, H, N, D] begins."""
    return pointer + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def _places(base, row_stride, column_stride, rows, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses of a tile [rows, BLOCK] of [N, WIDTH], and which of them exist."""
    columns = tl.arange(0, BLOCK)
    place = base + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    exists = (rows < n)[:, None]
    if WIDTH != BLOCK:
        exists = exists & (columns < WIDTH)[None, :]
    return place, exists


@triton.jit
def read(base, row_stride, column_stride, rows, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of [N, WIDTH] as a tile [rows, BLOCK], zero where there is nothing."""
    place, exists = _places(base, row_stride, column_stride, rows, n, WIDTH, BLOCK)
    return tl.load(place, mask=exists, other=0.0)


@triton.jit
def write(base, tile, rows, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write a tile [rows, BLOCK] into a contiguous [N, WIDTH], in the dtype of what is pointed to."""
    place, exists = _places(base, WIDTH, 1, rows, n, WIDTH, BLOCK)
    tl.store(place, tile.to(base.dtype.element_ty), mask=exists)


@triton.jit
def read_flat(base, rows, n):
    """Numbers of [N], zero beyond it."""
    return tl.load(base + rows, mask=rows < n, other=0.0)


@triton.jit
def read_terms(row_terms, head, all_heads, rows, n):
    """The shift and the inverse of rows of a head, from [2, B H, N], zero beyond N."""
    shift = read_flat(row_terms + head.to(tl.int64) * n, rows, n)
    return shift, read_flat(row_terms + (head.to(tl.int64) + all_heads) * n, rows, n)


@triton.jit
def write_terms(row_terms, shift, inverse, head, all_heads, rows, n):
    """Write what read_terms() reads."""
    tl.store(row_terms + head.to(tl.int64) * n + rows, shift, mask=rows < n)
    tl.store(row_terms + (head.to(tl.int64) + all_heads) * n + rows, inverse, mask=rows < n)


@triton.jit
def scores(
    query, key, rows, columns, n, scale, key_mask, mask_stride,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    """S = scale Q K^T in units of log 2, [rows, columns], with -inf where a query may not attend.

    IS_EDGE: whether the tile may reach beyond N, or across the diagonal where that is an end.
    """
    result = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E)
    if IS_EDGE:
        allowed = (columns < n)[None, :]
        if IS_CAUSAL:
            allowed = allowed & (columns[None, :] <= rows[:, None])
        result = tl.where(allowed, result, NOTHING)
    if HAS_MASK:
        attended = tl.load(key_mask + columns.to(tl.int64) * mask_stride, mask=columns < n, other=0)
        result = tl.where((attended != 0)[None, :], result, NOTHING)
    return result


@triton.jit
def weights_by_key(
    query, key, rows, columns, n, scale, shift, inverse, key_mask, mask_stride,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    """A^T, [columns, rows], made again from the row terms; zero in rows beyond N, whose inverse is zero.

    Columns beyond N hold anything, even infinity, unless IS_EDGE.
    """
    result = tl.dot(key, tl.trans(query), input_precision="ieee") * (scale * LOG2_E)
    if IS_EDGE:
        allowed = (columns < n)[:, None]
        if IS_CAUSAL:
            allowed = allowed & (columns[:, None] <= rows[None, :])
        result = tl.where(allowed, result, NOTHING)
    if HAS_MASK:
        attended = tl.load(key_mask + columns.to(tl.int64) * mask_stride, mask=columns < n, other=0)
        result = tl.where((attended != 0)[:, None], result, NOTHING)
    return tl.exp2(result - shift[None, :]) * inverse[None, :]


@triton.jit
def kept(seed, head, rows, columns, dropout_p):
    """Whether dropout keeps each weight: the same for the same seed, head, row and column, in whatever tile.

    rows and columns: [M, 1] and [1, N], or [1, M] and [N, 1]. The four counters of Philox are column, row, head and 0.
    """
    nothing = (rows * 0 + columns * 0).to(tl.uint32)
    bits, _, _, _ = tl.philox(
        seed, nothing + columns.to(tl.uint32), nothing + rows.to(tl.uint32), nothing + head.to(tl.uint32), nothing
    )
    return tl.uint_to_uniform_float(bits) >= dropout_p


@triton.jit
def next_largest(largest, block):
    """The running maximum with a block of scores, and the shift: that, or 0 where there is nothing to attend to yet."""
    largest = tl.maximum(largest, tl.max(block, 1))
    return largest, tl.where(largest == NOTHING, 0.0, largest)


@triton.jit
def inverse_of(total):
    """1 / total, and zero for a row that may attend to nothing: a NaN stays."""
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
