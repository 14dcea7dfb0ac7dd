# Triton reads these functions, not mypy: their arguments are pointers, tiles and constants of the compiler.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Forward kernels: O = A V, R = (1 + g) V - g O, U = A R, in blocks of rows of A, which is never written out.

What all of them are given: query [B, H, N, D], key [B, Hkv, N, D] and value [B, Hkv, N, Dv] by any strides (four each);
key_mask [B, 1 or H, N] by three strides; gain [H or 1], seed [1]; group, the query heads that share a key head.
What they write is contiguous: output U, smoothed O and boosted R, [B, H, N, Dv]; row_terms [2, B, H, N], the shift
(the largest score of the row, in units of log 2) and the inverse (1 / sum exp2(S - shift)).
R is formed in fp32 and rounded once.
"""

import triton
import triton.language as tl

from twicing.ops.triton.tiles import (
    NOTHING,
    head_of,
    inverse_of,
    kept,
    next_largest,
    read,
    read_terms,
    scores,
    write,
    write_terms,
)


@triton.jit
def smooth_kernel(
    query, key, value, key_mask, gain, seed, smoothed, boosted, row_terms,
    query_strides, key_strides, value_strides, mask_strides, gain_stride,
    all_heads, heads, group, n, scale, dropout_p, upscale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ORDER: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    KEEPS_SMOOTHED: tl.constexpr, KEEPS_TERMS: tl.constexpr,
):  # fmt: skip
    """The first sweep: O and the row terms of one block of rows of one head, and R for the second sweep.

    With ORDER 1 it is standard attention, and O is the output.
    """
    blocks = tl.cdiv(n, ROWS)
    flat, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    batch, head = flat // heads, flat % heads
    rows = first + tl.arange(0, ROWS)
    q_base = head_of(query, query_strides, batch, head)
    k_base = head_of(key, key_strides, batch, head // group)
    v_base = head_of(value, value_strides, batch, head // group)
    m_base = head_of(key_mask, mask_strides, batch, head)
    q = read(q_base, query_strides[2], query_strides[3], rows, n, D, BLOCK_D)
    drawn = tl.load(seed) if HAS_DROPOUT else 0
    largest = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    end = tl.minimum(first + ROWS, n) if IS_CAUSAL else n
    whole = (first if IS_CAUSAL else n) // COLUMNS * COLUMNS
    for edge in tl.static_range(2):
        for start in range(whole if edge else 0, end if edge else whole, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            k = read(k_base, key_strides[2], key_strides[3], columns, n, D, BLOCK_D)
            v = read(v_base, value_strides[2], value_strides[3], columns, n, DV, BLOCK_DV)
            block = scores(q, k, rows, columns, n, scale, m_base, mask_strides[2], IS_CAUSAL, HAS_MASK, edge == 1)
            before = largest
            largest, shift = next_largest(largest, block)
            weights, decay = tl.exp2(block - shift[:, None]), tl.exp2(before - shift)
            total = total * decay + tl.sum(weights, 1)
            if HAS_DROPOUT:
                weights = tl.where(kept(drawn, flat, rows[:, None], columns[None, :], dropout_p), weights, 0.0)
            sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None], input_precision="ieee")
    inverse = inverse_of(total)
    sums = sums * (inverse * upscale)[:, None]
    out = flat.to(tl.int64) * n
    if KEEPS_SMOOTHED:
        write(smoothed + out * DV, sums, rows, n, DV, BLOCK_DV)
    if KEEPS_TERMS:
        shift = tl.where(largest == NOTHING, 0.0, largest)
        write_terms(row_terms, shift, inverse, flat, all_heads, rows, n)
    if ORDER == 2:
        g = tl.load(gain + head * gain_stride).to(tl.float32)
        v = read(v_base, value_strides[2], value_strides[3], rows, n, DV, BLOCK_DV).to(tl.float32)
        write(boosted + out * DV, (1.0 + g) * v - g * sums, rows, n, DV, BLOCK_DV)


@triton.jit
def smooth_again_kernel(
    query, key, boosted, key_mask, seed, output, row_terms,
    query_strides, key_strides, mask_strides,
    all_heads, heads, group, n, scale, dropout_p, upscale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """The second sweep: U = A R of one block of rows. With the row terms known there is no running maximum."""
    blocks = tl.cdiv(n, ROWS)
    flat, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    batch, head = flat // heads, flat % heads
    rows = first + tl.arange(0, ROWS)
    k_base = head_of(key, key_strides, batch, head // group)
    m_base = head_of(key_mask, mask_strides, batch, head)
    q = read(head_of(query, query_strides, batch, head), query_strides[2], query_strides[3], rows, n, D, BLOCK_D)
    drawn = tl.load(seed) if HAS_DROPOUT else 0
    out = flat.to(tl.int64) * n
    shift, inverse = read_terms(row_terms, flat, all_heads, rows, n)
    sums = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    end = tl.minimum(first + ROWS, n) if IS_CAUSAL else n
    whole = (first if IS_CAUSAL else n) // COLUMNS * COLUMNS
    for edge in tl.static_range(2):
        for start in range(whole if edge else 0, end if edge else whole, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            k = read(k_base, key_strides[2], key_strides[3], columns, n, D, BLOCK_D)
            r = read(boosted + out * DV, DV, 1, columns, n, DV, BLOCK_DV)
            block = scores(q, k, rows, columns, n, scale, m_base, mask_strides[2], IS_CAUSAL, HAS_MASK, edge == 1)
            weights = tl.exp2(block - shift[:, None])
            if HAS_DROPOUT:
                weights = tl.where(kept(drawn, flat, rows[:, None], columns[None, :], dropout_p), weights, 0.0)
            sums = tl.dot(weights.to(r.dtype), r, sums, input_precision="ieee")
    write(output + out * DV, sums * (inverse * upscale)[:, None], rows, n, DV, BLOCK_DV)


@triton.jit
def causal_head_kernel(
    query, key, value, gain, seed, output, smoothed, boosted, row_terms,
    query_strides, key_strides, value_strides, gain_stride,
    all_heads, heads, group, n, scale, dropout_p, upscale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, IS_TRAINING: tl.constexpr,
):  # fmt: skip
    """One causal head in a single sweep: R of earlier rows is final, so that A V and A R are summed together.

    Only the weights of the diagonal block are used twice. ROWS is a multiple of COLUMNS.
    """
    flat = tl.program_id(0)
    batch, head = flat // heads, flat % heads
    q_base = head_of(query, query_strides, batch, head)
    k_base = head_of(key, key_strides, batch, head // group)
    v_base = head_of(value, value_strides, batch, head // group)
    out = flat.to(tl.int64) * n
    r_base = boosted + out * DV
    g = tl.load(gain + head * gain_stride).to(tl.float32)
    drawn = tl.load(seed) if HAS_DROPOUT else 0
    for first in range(0, n, ROWS):
        rows = first + tl.arange(0, ROWS)
        q = read(q_base, query_strides[2], query_strides[3], rows, n, D, BLOCK_D)
        largest = tl.full([ROWS], NOTHING, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, BLOCK_DV], tl.float32)
        sums_again = tl.zeros([ROWS, BLOCK_DV], tl.float32)
        for start in range(0, first, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            k = read(k_base, key_strides[2], key_strides[3], columns, n, D, BLOCK_D)
            v = read(v_base, value_strides[2], value_strides[3], columns, n, DV, BLOCK_DV)
            r = read(r_base, DV, 1, columns, n, DV, BLOCK_DV)
            block = scores(q, k, rows, columns, n, scale, q_base, 0, True, False, False)
            before = largest
            largest, shift = next_largest(largest, block)
            weights, decay = tl.exp2(block - shift[:, None]), tl.exp2(before - shift)
            total = total * decay + tl.sum(weights, 1)
            if HAS_DROPOUT:
                weights = tl.where(kept(drawn, flat, rows[:, None], columns[None, :], dropout_p), weights, 0.0)
            narrow = weights.to(v.dtype)
            sums = tl.dot(narrow, v, sums * decay[:, None], input_precision="ieee")
            sums_again = tl.dot(narrow, r, sums_again * decay[:, None], input_precision="ieee")
        k = read(k_base, key_strides[2], key_strides[3], rows, n, D, BLOCK_D)
        v = read(v_base, value_strides[2], value_strides[3], rows, n, DV, BLOCK_DV)
        block = scores(q, k, rows, rows, n, scale, q_base, 0, True, False, True)
        before = largest
        largest, shift = next_largest(largest, block)
        weights, decay = tl.exp2(block - shift[:, None]), tl.exp2(before - shift)
        inverse = inverse_of(total * decay + tl.sum(weights, 1))
        if HAS_DROPOUT:
            weights = tl.where(kept(drawn, flat, rows[:, None], rows[None, :], dropout_p), weights, 0.0)
        narrow = weights.to(v.dtype)
        factor = (inverse * upscale)[:, None]
        sums = tl.dot(narrow, v, sums * decay[:, None], input_precision="ieee") * factor
        r = ((1.0 + g) * v.to(tl.float32) - g * sums).to(v.dtype)
        sums_again = tl.dot(narrow, r, sums_again * decay[:, None], input_precision="ieee") * factor
        write(r_base, r, rows, n, DV, BLOCK_DV)
        write(output + out * DV, sums_again, rows, n, DV, BLOCK_DV)
        if IS_TRAINING:
            write(smoothed + out * DV, sums, rows, n, DV, BLOCK_DV)
            write_terms(row_terms, shift, inverse, flat, all_heads, rows, n)
        # Other warps of this program read these rows of R from global memory next: bar.sync orders that.
        tl.debug_barrier()


@triton.jit
def small_head_kernel(
    query, key, value, key_mask, gain, seed, output, smoothed, boosted, row_terms,
    query_strides, key_strides, value_strides, mask_strides, gain_stride,
    all_heads, heads, group, n, scale, dropout_p, upscale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_TRAINING: tl.constexpr,
):  # fmt: skip
    """One short head, not causal: A is kept in registers between the passes. COLUMNS >= N, and BLOCKS ROWS >= N."""
    flat = tl.program_id(0)
    batch, head = flat // heads, flat % heads
    q_base = head_of(query, query_strides, batch, head)
    v_base = head_of(value, value_strides, batch, head // group)
    m_base = head_of(key_mask, mask_strides, batch, head)
    out = flat.to(tl.int64) * n
    columns = tl.arange(0, COLUMNS)
    k = read(head_of(key, key_strides, batch, head // group), key_strides[2], key_strides[3], columns, n, D, BLOCK_D)
    v = read(v_base, value_strides[2], value_strides[3], columns, n, DV, BLOCK_DV)
    g = tl.load(gain + head * gain_stride).to(tl.float32)
    drawn = tl.load(seed) if HAS_DROPOUT else 0
    attn = ()
    factors = ()
    for place in tl.static_range(BLOCKS):
        rows = place * ROWS + tl.arange(0, ROWS)
        q = read(q_base, query_strides[2], query_strides[3], rows, n, D, BLOCK_D)
        block = scores(q, k, rows, columns, n, scale, m_base, mask_strides[2], False, HAS_MASK, True)
        _, shift = next_largest(tl.full([ROWS], NOTHING, tl.float32), block)
        weights = tl.exp2(block - shift[:, None])
        inverse = inverse_of(tl.sum(weights, 1))
        if HAS_DROPOUT:
            weights = tl.where(kept(drawn, flat, rows[:, None], columns[None, :], dropout_p), weights, 0.0)
        narrow = weights.to(v.dtype)
        factor = (inverse * upscale)[:, None]
        sums = tl.dot(narrow, v, input_precision="ieee") * factor
        own = read(v_base, value_strides[2], value_strides[3], rows, n, DV, BLOCK_DV).to(tl.float32)
        write(boosted + out * DV, (1.0 + g) * own - g * sums, rows, n, DV, BLOCK_DV)
        # Triton's compiler lengthens a tuple in no other way.
        attn = attn + (narrow,)  # type: ignore[assignment]  # noqa: RUF005
        factors = factors + (factor,)  # type: ignore[assignment]  # noqa: RUF005
        if IS_TRAINING:
            write(smoothed + out * DV, sums, rows, n, DV, BLOCK_DV)
            write_terms(row_terms, shift, inverse, flat, all_heads, rows, n)
    # R was written by all warps of this program, and each reads rows of others: bar.sync orders that.
    tl.debug_barrier()
    r = read(boosted + out * DV, DV, 1, columns, n, DV, BLOCK_DV)
    for place in tl.static_range(BLOCKS):
        rows = place * ROWS + tl.arange(0, ROWS)
        sums = tl.dot(attn[place], r, input_precision="ieee") * factors[place]
        write(output + out * DV, sums, rows, n, DV, BLOCK_DV)
