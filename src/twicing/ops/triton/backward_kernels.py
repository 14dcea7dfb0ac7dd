# Triton reads these functions, not mypy: their arguments are pointers, tiles and constants of the compiler.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Backward kernels, with G = dL/dU, O = A V, R = V + g (V - O), U = A R, and A made again from the row terms:

    dR = A^T G                          dV = (1+g) dR - g A^T dR              dg = sum dR * (V - O)
    dA = G R^T - g dR V^T               delta_i = G_i . U_i - g dR_i . O_i    dS = A * (dA - delta)
    dQ = scale dS K                     dK = scale dS^T Q

With dropout, A in the products is the dropped one, A * kept / (1 - p), and dS = A * (dA * kept / (1 - p) - delta).
Three kernels in parallel over blocks: 2 + 5 + 4 units of N^2 D. One kernel per head: 2 + 6, and 7 where it is causal,
since dR of later rows is final there. No atomics: the same bits every time.

What all of them are given is as in forward_kernels.py, and upstream G by any strides; what they write is contiguous:
d_boosted dR, [B, H, N, Dv], in the inputs' dtype; delta [B, H, N]; d_gain [B, H, blocks], parts of dg; d_query, d_key
[B, H, N, D] and d_value [B, H, N, Dv], per query head. With ORDER 1, of standard attention, R is V, and dR is not used.
"""

import triton
import triton.language as tl

from twicing.ops.triton.tiles import head_of, kept, read, read_flat, read_terms, scores, weights_by_key, write


@triton.jit
def _finish_block(
    gradient, d_boosted, upstream, output, smoothed, boosted, v, g, delta, d_gain, rows, n,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ORDER: tl.constexpr, WRITES_BOOSTED: tl.constexpr,
):  # fmt: skip
    """With dR of some rows complete: write it (rounded), delta, and their part of dg. Returns that dR, and delta.

    delta is made from the rounded dR, as dA will be, so that the rows of dS still sum to zero.
    """
    u = read(output, DV, 1, rows, n, DV, BLOCK_DV).to(tl.float32)
    row_delta = tl.sum(upstream.to(tl.float32) * u, 1)
    narrow = gradient.to(v.dtype)
    if ORDER == 2:
        o = read(smoothed, DV, 1, rows, n, DV, BLOCK_DV).to(tl.float32)
        write(d_boosted, narrow, rows, n, DV, BLOCK_DV)
        row_delta = row_delta - g * tl.sum(narrow.to(tl.float32) * o, 1)
        if WRITES_BOOSTED:
            write(boosted, (1.0 + g) * v.to(tl.float32) - g * o, rows, n, DV, BLOCK_DV)
        # Columns of A beyond N hold anything, even infinity: not only times zero.
        part = tl.where((rows < n)[:, None], gradient * (v.to(tl.float32) - o), 0.0)
        tl.store(d_gain, tl.sum(tl.sum(part, 1), 0))
    tl.store(delta + rows, row_delta, mask=rows < n)
    return narrow, row_delta


@triton.jit
def _gradient_of_scores(
    attn, keeps, g_rows, dr_rows, row_delta, v, r, g, upscale,
    ORDER: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """dS^T of a tile, [columns, rows], from A^T (not dropped), G and dR of the rows, V and R of the columns."""
    if ORDER == 2:
        d_attn = -g * tl.dot(v, tl.trans(dr_rows), input_precision="ieee")
        d_attn = tl.dot(r, tl.trans(g_rows), d_attn, input_precision="ieee")
    else:
        d_attn = tl.dot(v, tl.trans(g_rows), input_precision="ieee")
    if HAS_DROPOUT:
        d_attn = tl.where(keeps, d_attn * upscale, 0.0)
    return attn * (d_attn - row_delta[None, :])


@triton.jit
def boosted_gradient_kernel(
    upstream, output, smoothed, row_terms, query, key, value, key_mask, gain, seed, boosted, d_boosted, delta, d_gain,
    upstream_strides, query_strides, key_strides, value_strides, mask_strides, gain_stride,
    all_heads, heads, group, n, scale, dropout_p, upscale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ORDER: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """The first sweep: dR, delta and a part of dg for one block of columns of A; and R, for the other sweeps."""
    blocks = tl.cdiv(n, COLUMNS)
    flat, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * COLUMNS
    batch, head = flat // heads, flat % heads
    columns = first + tl.arange(0, COLUMNS)
    q_base = head_of(query, query_strides, batch, head)
    k_base = head_of(key, key_strides, batch, head // group)
    v_base = head_of(value, value_strides, batch, head // group)
    g_base = head_of(upstream, upstream_strides, batch, head)
    m_base = head_of(key_mask, mask_strides, batch, head)
    out = flat.to(tl.int64) * n
    g = tl.load(gain + head * gain_stride).to(tl.float32)
    v = read(v_base, value_strides[2], value_strides[3], columns, n, DV, BLOCK_DV)
    sums = tl.zeros([COLUMNS, BLOCK_DV], tl.float32)
    if ORDER == 2:
        drawn = tl.load(seed) if HAS_DROPOUT else 0
        k = read(k_base, key_strides[2], key_strides[3], columns, n, D, BLOCK_D)
        begin = first // ROWS * ROWS if IS_CAUSAL else 0
        # Rows of tiles from here on are below the diagonal.
        whole = tl.minimum(tl.cdiv(first + COLUMNS, ROWS) * ROWS, n) if IS_CAUSAL else 0
        for edge in tl.static_range(2):
            for start in range(begin if edge else whole, whole if edge else n, ROWS):
                rows = start + tl.arange(0, ROWS)
                q = read(q_base, query_strides[2], query_strides[3], rows, n, D, BLOCK_D)
                g_rows = read(g_base, upstream_strides[2], upstream_strides[3], rows, n, DV, BLOCK_DV)
                shift, inverse = read_terms(row_terms, flat, all_heads, rows, n)
                attn = weights_by_key(
                    q, k, rows, columns, n, scale, shift, inverse, m_base, mask_strides[2],
                    IS_CAUSAL, HAS_MASK, edge == 1,
                )  # fmt: skip
                if HAS_DROPOUT:
                    attn = tl.where(kept(drawn, flat, rows[None, :], columns[:, None], dropout_p), attn, 0.0)
                sums = tl.dot(attn.to(g_rows.dtype), g_rows, sums, input_precision="ieee")
    g_own = read(g_base, upstream_strides[2], upstream_strides[3], columns, n, DV, BLOCK_DV)
    _finish_block(
        sums * upscale, d_boosted + out * DV, g_own, output + out * DV, smoothed + out * DV, boosted + out * DV, v, g,
        delta + out, d_gain + tl.program_id(0), columns, n, DV, BLOCK_DV, ORDER, True,
    )  # fmt: skip


@triton.jit
def key_gradients_kernel(
    upstream, row_terms, query, key, value, key_mask, gain, seed, boosted, d_boosted, delta, d_key, d_value,
    upstream_strides, query_strides, key_strides, value_strides, mask_strides, gain_stride,
    all_heads, heads, group, n, scale, dropout_p, upscale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ORDER: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """The second sweep: dK and dV for one block of columns of A."""
    blocks = tl.cdiv(n, COLUMNS)
    flat, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * COLUMNS
    batch, head = flat // heads, flat % heads
    columns = first + tl.arange(0, COLUMNS)
    q_base = head_of(query, query_strides, batch, head)
    k_base = head_of(key, key_strides, batch, head // group)
    v_base = head_of(value, value_strides, batch, head // group)
    g_base = head_of(upstream, upstream_strides, batch, head)
    m_base = head_of(key_mask, mask_strides, batch, head)
    out = flat.to(tl.int64) * n
    g = tl.load(gain + head * gain_stride).to(tl.float32)
    drawn = tl.load(seed) if HAS_DROPOUT else 0
    k = read(k_base, key_strides[2], key_strides[3], columns, n, D, BLOCK_D)
    v = read(v_base, value_strides[2], value_strides[3], columns, n, DV, BLOCK_DV)
    r = read(boosted + out * DV, DV, 1, columns, n, DV, BLOCK_DV) if ORDER == 2 else v
    k_sums = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    v_sums = tl.zeros([COLUMNS, BLOCK_DV], tl.float32)
    begin = first // ROWS * ROWS if IS_CAUSAL else 0
    # Rows of tiles from here on are below the diagonal.
    whole = tl.minimum(tl.cdiv(first + COLUMNS, ROWS) * ROWS, n) if IS_CAUSAL else 0
    for edge in tl.static_range(2):
        for start in range(begin if edge else whole, whole if edge else n, ROWS):
            rows = start + tl.arange(0, ROWS)
            q = read(q_base, query_strides[2], query_strides[3], rows, n, D, BLOCK_D)
            g_rows = read(g_base, upstream_strides[2], upstream_strides[3], rows, n, DV, BLOCK_DV)
            dr_rows = read(d_boosted + out * DV, DV, 1, rows, n, DV, BLOCK_DV) if ORDER == 2 else g_rows
            shift, inverse = read_terms(row_terms, flat, all_heads, rows, n)
            row_delta = read_flat(delta + out, rows, n)
            attn = weights_by_key(
                q, k, rows, columns, n, scale, shift, inverse, m_base, mask_strides[2],
                IS_CAUSAL, HAS_MASK, edge == 1,
            )  # fmt: skip
            keeps = kept(drawn, flat, rows[None, :], columns[:, None], dropout_p) if HAS_DROPOUT else False
            dropped = tl.where(keeps, attn, 0.0) if HAS_DROPOUT else attn
            v_sums = tl.dot(dropped.to(dr_rows.dtype), dr_rows, v_sums, input_precision="ieee")
            d_scores = _gradient_of_scores(
                attn, keeps, g_rows, dr_rows, row_delta, v, r, g, upscale, ORDER, HAS_DROPOUT
            )
            k_sums = tl.dot(d_scores.to(q.dtype), q, k_sums, input_precision="ieee")
    if ORDER == 2:
        dr = read(d_boosted + out * DV, DV, 1, columns, n, DV, BLOCK_DV).to(tl.float32)
        v_sums = (1.0 + g) * dr - (g * upscale) * v_sums
    else:
        v_sums = v_sums * upscale
    write(d_value + out * DV, v_sums, columns, n, DV, BLOCK_DV)
    write(d_key + out * D, k_sums * scale, columns, n, D, BLOCK_D)


@triton.jit
def query_gradients_kernel(
    upstream, row_terms, query, key, value, key_mask, gain, seed, boosted, d_boosted, delta, d_query,
    upstream_strides, query_strides, key_strides, value_strides, mask_strides, gain_stride,
    all_heads, heads, group, n, scale, dropout_p, upscale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ORDER: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """The third sweep: dQ for one block of rows of A."""
    blocks = tl.cdiv(n, ROWS)
    flat, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    batch, head = flat // heads, flat % heads
    rows = first + tl.arange(0, ROWS)
    q_base = head_of(query, query_strides, batch, head)
    k_base = head_of(key, key_strides, batch, head // group)
    v_base = head_of(value, value_strides, batch, head // group)
    g_base = head_of(upstream, upstream_strides, batch, head)
    m_base = head_of(key_mask, mask_strides, batch, head)
    out = flat.to(tl.int64) * n
    drawn = tl.load(seed) if HAS_DROPOUT else 0
    q = read(q_base, query_strides[2], query_strides[3], rows, n, D, BLOCK_D)
    g_rows = read(g_base, upstream_strides[2], upstream_strides[3], rows, n, DV, BLOCK_DV)
    dr_rows = read(d_boosted + out * DV, DV, 1, rows, n, DV, BLOCK_DV) if ORDER == 2 else g_rows
    g = tl.load(gain + head * gain_stride).to(tl.float32)
    shift, inverse = read_terms(row_terms, flat, all_heads, rows, n)
    row_delta = read_flat(delta + out, rows, n)
    sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
    end = tl.minimum(first + ROWS, n) if IS_CAUSAL else n
    whole = (first if IS_CAUSAL else n) // COLUMNS * COLUMNS
    for edge in tl.static_range(2):
        for start in range(whole if edge else 0, end if edge else whole, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            k = read(k_base, key_strides[2], key_strides[3], columns, n, D, BLOCK_D)
            v = read(v_base, value_strides[2], value_strides[3], columns, n, DV, BLOCK_DV)
            block = scores(q, k, rows, columns, n, scale, m_base, mask_strides[2], IS_CAUSAL, HAS_MASK, edge == 1)
            attn = tl.exp2(block - shift[:, None]) * inverse[:, None]
            if ORDER == 2:
                r = read(boosted + out * DV, DV, 1, columns, n, DV, BLOCK_DV)
                d_attn = -g * tl.dot(dr_rows, tl.trans(v), input_precision="ieee")
                d_attn = tl.dot(g_rows, tl.trans(r), d_attn, input_precision="ieee")
            else:
                d_attn = tl.dot(g_rows, tl.trans(v), input_precision="ieee")
            if HAS_DROPOUT:
                keeps = kept(drawn, flat, rows[:, None], columns[None, :], dropout_p)
                d_attn = tl.where(keeps, d_attn * upscale, 0.0)
            d_scores = attn * (d_attn - row_delta[:, None])
            sums = tl.dot(d_scores.to(k.dtype), k, sums, input_precision="ieee")
    write(d_query + out * D, sums * scale, rows, n, D, BLOCK_D)


@triton.jit
def head_backward_kernel(
    upstream, output, smoothed, row_terms, query, key, value, key_mask, gain, seed,
    d_boosted, delta, d_gain, d_query, d_key, d_value,
    upstream_strides, query_strides, key_strides, value_strides, mask_strides, gain_stride,
    all_heads, heads, group, n, scale, dropout_p, upscale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
    ORDER: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """The backward of one whole head by one program, which alone writes dQ of its head: d_query is fp32 here.

    Causal: one descending sweep over blocks of columns, in which dR of later rows is final. Otherwise dR comes first,
    in a sweep of its own. The diagonal block, or without a causal order the first, is the first to write dQ.
    """
    flat = tl.program_id(0)
    batch, head = flat // heads, flat % heads
    q_base = head_of(query, query_strides, batch, head)
    k_base = head_of(key, key_strides, batch, head // group)
    v_base = head_of(value, value_strides, batch, head // group)
    g_base = head_of(upstream, upstream_strides, batch, head)
    m_base = head_of(key_mask, mask_strides, batch, head)
    out = flat.to(tl.int64) * n
    dr_base, dq_base = d_boosted + out * DV, d_query + out * D
    g = tl.load(gain + head * gain_stride).to(tl.float32)
    drawn = tl.load(seed) if HAS_DROPOUT else 0
    blocks = tl.cdiv(n, BLOCK)
    if not IS_CAUSAL:
        for place in range(blocks):
            columns = place * BLOCK + tl.arange(0, BLOCK)
            v = read(v_base, value_strides[2], value_strides[3], columns, n, DV, BLOCK_DV)
            sums = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
            if ORDER == 2:
                k = read(k_base, key_strides[2], key_strides[3], columns, n, D, BLOCK_D)
                for start in range(0, n, BLOCK):
                    rows = start + tl.arange(0, BLOCK)
                    q = read(q_base, query_strides[2], query_strides[3], rows, n, D, BLOCK_D)
                    g_rows = read(g_base, upstream_strides[2], upstream_strides[3], rows, n, DV, BLOCK_DV)
                    shift, inverse = read_terms(row_terms, flat, all_heads, rows, n)
                    attn = weights_by_key(
                        q, k, rows, columns, n, scale, shift, inverse, m_base, mask_strides[2], False, HAS_MASK, False
                    )
                    if HAS_DROPOUT:
                        attn = tl.where(kept(drawn, flat, rows[None, :], columns[:, None], dropout_p), attn, 0.0)
                    sums = tl.dot(attn.to(g_rows.dtype), g_rows, sums, input_precision="ieee")
            g_own = read(g_base, upstream_strides[2], upstream_strides[3], columns, n, DV, BLOCK_DV)
            _finish_block(
                sums * upscale, dr_base, g_own, output + out * DV, smoothed + out * DV, dr_base, v, g,
                delta + out, d_gain + flat * blocks + place, columns, n, DV, BLOCK_DV, ORDER, False,
            )  # fmt: skip
        # Other warps of this program read these rows of dR and delta from global memory next.
        tl.debug_barrier()
    for step in range(blocks):
        place = blocks - 1 - step if IS_CAUSAL else step
        columns = place * BLOCK + tl.arange(0, BLOCK)
        k = read(k_base, key_strides[2], key_strides[3], columns, n, D, BLOCK_D)
        v = read(v_base, value_strides[2], value_strides[3], columns, n, DV, BLOCK_DV)
        r = v
        if ORDER == 2:
            o = read(smoothed + out * DV, DV, 1, columns, n, DV, BLOCK_DV).to(tl.float32)
            r = ((1.0 + g) * v.to(tl.float32) - g * o).to(v.dtype)
        k_sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        v_sums = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
        r_sums = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
        for start in range((place + 1) * BLOCK if IS_CAUSAL else 0, n, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            q = read(q_base, query_strides[2], query_strides[3], rows, n, D, BLOCK_D)
            g_rows = read(g_base, upstream_strides[2], upstream_strides[3], rows, n, DV, BLOCK_DV)
            dr_rows = read(dr_base, DV, 1, rows, n, DV, BLOCK_DV) if ORDER == 2 else g_rows
            shift, inverse = read_terms(row_terms, flat, all_heads, rows, n)
            row_delta = read_flat(delta + out, rows, n)
            # dQ sums over columns, and those beyond N must be zero; a causal order has none of them here.
            attn = weights_by_key(
                q, k, rows, columns, n, scale, shift, inverse, m_base, mask_strides[2], False, HAS_MASK, not IS_CAUSAL
            )
            keeps = kept(drawn, flat, rows[None, :], columns[:, None], dropout_p) if HAS_DROPOUT else False
            dropped = (tl.where(keeps, attn, 0.0) if HAS_DROPOUT else attn).to(g_rows.dtype)
            v_sums = tl.dot(dropped, dr_rows, v_sums, input_precision="ieee")
            if IS_CAUSAL and ORDER == 2:
                r_sums = tl.dot(dropped, g_rows, r_sums, input_precision="ieee")
            d_scores = _gradient_of_scores(
                attn, keeps, g_rows, dr_rows, row_delta, v, r, g, upscale, ORDER, HAS_DROPOUT
            ).to(q.dtype)
            k_sums = tl.dot(d_scores, q, k_sums, input_precision="ieee")
            # The first to write does not read what was there before.
            written = rows if IS_CAUSAL else tl.where(place > 0, rows, n)
            d_q = read(dq_base, D, 1, written, n, D, BLOCK_D)
            d_q = d_q + scale * tl.dot(tl.trans(d_scores), k, input_precision="ieee")
            write(dq_base, d_q, rows, n, D, BLOCK_D)
        if IS_CAUSAL:
            q = read(q_base, query_strides[2], query_strides[3], columns, n, D, BLOCK_D)
            g_rows = read(g_base, upstream_strides[2], upstream_strides[3], columns, n, DV, BLOCK_DV)
            shift, inverse = read_terms(row_terms, flat, all_heads, columns, n)
            attn = weights_by_key(
                q, k, columns, columns, n, scale, shift, inverse, m_base, mask_strides[2], True, HAS_MASK, True
            )
            keeps = kept(drawn, flat, columns[None, :], columns[:, None], dropout_p) if HAS_DROPOUT else False
            dropped = (tl.where(keeps, attn, 0.0) if HAS_DROPOUT else attn).to(g_rows.dtype)
            if ORDER == 2:
                r_sums = tl.dot(dropped, g_rows, r_sums, input_precision="ieee")
            dr_rows, row_delta = _finish_block(
                r_sums * upscale, dr_base, g_rows, output + out * DV, smoothed + out * DV, dr_base, v, g,
                delta + out, d_gain + flat * blocks + place, columns, n, DV, BLOCK_DV, ORDER, False,
            )  # fmt: skip
            if ORDER == 1:
                dr_rows = g_rows
            v_sums = tl.dot(dropped, dr_rows, v_sums, input_precision="ieee")
            d_scores = _gradient_of_scores(
                attn, keeps, g_rows, dr_rows, row_delta, v, r, g, upscale, ORDER, HAS_DROPOUT
            ).to(q.dtype)
            k_sums = tl.dot(d_scores, q, k_sums, input_precision="ieee")
            write(dq_base, scale * tl.dot(tl.trans(d_scores), k, input_precision="ieee"), columns, n, D, BLOCK_D)
            v_own = (1.0 + g) * r_sums * upscale
        else:
            v_own = (1.0 + g) * read(dr_base, DV, 1, columns, n, DV, BLOCK_DV).to(tl.float32) if ORDER == 2 else v_sums
        v_sums = v_own - (g * upscale) * v_sums if ORDER == 2 else v_sums * upscale
        write(d_value + out * DV, v_sums, columns, n, DV, BLOCK_DV)
        write(d_key + out * D, k_sums * scale, columns, n, D, BLOCK_D)
        # Rows of dR, delta and dQ that were written here are read by other warps of this program next.
        tl.debug_barrier()
