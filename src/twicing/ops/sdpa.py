"""Twicing by PyTorch's own fused attention: `order` calls of scaled_dot_product_attention, O(N) memory.

U = SDPA(Q, K, R) with R = V + g (V - SDPA(Q, K, V)).
"""

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
            return F.scaled_dot_product_attention(query, key, v, is_causal=call.is_causal, scale=call.scale)

    else:
        attn_mask, occupied = open_empty_rows(call.attn_mask)

        def smooth(v: Tensor) -> Tensor:
            smoothed = F.scaled_dot_product_attention(query, key, v, attn_mask, scale=call.scale)
            return empty_again(smoothed, occupied)

    return boost(smooth, value, call.order, call.gain)
