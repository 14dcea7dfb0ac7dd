"""Twicing by PyTorch's own fused attention: `order` calls of scaled_dot_product_attention, O(N) memory.

U = SDPA(Q, K, R) with R = V + g (V - SDPA(Q, K, V)).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from twicing.ops.boost import boost
from twicing.ops.call import Call, to_query_heads
from twicing.ops.empty_rows import empty_again, open_empty_rows

ABOUT = "one call of scaled_dot_product_attention for each smoothing, O(N) memory"


def refuses(call: Call) -> str | None:
    """Dropout is refused: every call would draw a mask of its own."""
    if call.dropout_p > 0.0:
        return (
            f"each of its {call.order} calls of scaled_dot_product_attention would drop other weights, and twicing "
            "needs one A. Use backend='reference' (or 'auto'), or dropout_p=0."
        )
    return None


def run(call: Call) -> Tensor:
    """U = SDPA(Q, K, R). Keys and values are repeated to the query heads, since R differs from head to head."""
    query = call.query
    key = to_query_heads(call.key, query, call.enable_gqa)
    value = to_query_heads(call.value, query, call.enable_gqa)
    if call.attn_mask is None:

        def smooth(v: Tensor) -> Tensor:
            return fused(query, key, v, is_causal=call.is_causal, scale=call.scale)

    else:
        attn_mask, occupied = open_empty_rows(call.attn_mask)

        def smooth(v: Tensor) -> Tensor:
            return empty_again(fused(query, key, v, attn_mask, scale=call.scale), occupied)

    return boost(smooth, value, call.order, call.gain)


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention, kept from what its CPU kernel gets wrong without a word (seen in torch 2.13).

    It reads an fp32 mask beside fp64 queries as if it were in fp64; and in causal order it multiplies the -inf of what
    is forbidden by the scale, which is NaN or +inf where the scale is not positive.
    """
    if attn_mask is not None and attn_mask.dtype == torch.float32 and query.dtype == torch.float64:
        attn_mask = attn_mask.double()
    if is_causal and scale is not None and scale <= 0.0:
        query, scale = scale * query, 1.0
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
