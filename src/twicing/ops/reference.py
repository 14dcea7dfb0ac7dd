"""The specification: the dense attention matrix A, and what twicing makes of it. O(N^2) memory, any dtype and device.

Everything else in this room is checked against this file. Second derivatives and forward-mode ones work here too.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from twicing.ops.autocast import as_autocast, autocast_off
from twicing.ops.boost import boost
from twicing.ops.call import (
    Call,
    check_gain_is_used,
    check_mask,
    check_same_kind,
    check_shapes,
    checked_call,
    to_query_heads,
)
from twicing.ops.empty_rows import masked_softmax

ABOUT = "the dense attention matrix in plain torch, O(N^2) memory"


def refuses(_call: Call) -> str | None:
    """Never: the reference serves every call."""
    return None


def run(call: Call) -> Tensor:
    """U = A R with A dropped once, and the same dropped A in every pass."""
    attn = attention_matrix(call.query, call.key, call.attn_mask, call.is_causal, call.scale, call.enable_gqa)
    if call.dropout_p > 0.0:
        attn = F.dropout(attn, call.dropout_p)
    value = to_query_heads(call.value, call.query, call.enable_gqa)
    return boost(lambda v: attn @ v, value, call.order, call.gain)


def attention_matrix(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The attention matrix A = softmax(scale Q K^T + mask), [..., H, N, S], with the arguments of SDPA.

    Rows sum to 1; the row of a query that may attend to nothing is zero. In the query's dtype, with scores and softmax
    in fp32 for half precision; autocast casts the arguments as for SDPA.
    Raises ValueError where shapes, dtypes or the mask do not fit.
    """
    query, key = as_autocast(query), as_autocast(key)
    attn_mask = None if attn_mask is None else as_autocast(attn_mask)
    check_same_kind(query=query, key=key)
    check_shapes(query, key, key, enable_gqa)
    check_mask(query, key, attn_mask, is_causal, enable_gqa)
    key = to_query_heads(key, query, enable_gqa)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    wide = torch.promote_types(query.dtype, torch.float32)
    # A width of 0 makes every score 0, whatever the scale.
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    with autocast_off(query.device):
        scores = scale * (query.to(wide) @ key.to(wide).mT)
    return masked_softmax(scores, attn_mask).to(query.dtype)


def effective_matrix(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    order: int = 2,
    gain: float | Tensor = 1.0,
) -> Tensor:
    """The matrix that maps V to U, I - (I - A)(I - g A)^(m - 1), [..., H, N, N]; 2 A - A A for order 2 and gain 1.

    Rows sum to 1 (zero rows where nothing may be attended to); entries may be negative. It is the boosted identity.
    Arguments and errors are those of twicing_attention(), dtypes those of attention_matrix().
    Source: arXiv 2503.00687, equation 18.
    """
    check_gain_is_used(order, gain)
    call = checked_call(query, key, key, attn_mask, 0.0, is_causal, scale, enable_gqa, order, gain)
    attn = attention_matrix(call.query, call.key, call.attn_mask, is_causal, scale, enable_gqa)
    identity = torch.eye(attn.shape[-1], dtype=attn.dtype, device=attn.device)
    return boost(lambda v: attn @ v, identity, order, call.gain)
