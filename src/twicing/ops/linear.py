"""Linear attention, twiced: the attention matrix is a product of features and is never formed, so time is O(N D^2).

    S v = phi(Q) (phi(K)^T v) / (phi(Q) sum phi(K) + 1e-6),    phi = elu + 1

S is from "Transformers are RNNs", arXiv 2006.16236, equations 4-7, boosted as in arXiv 2503.00687, Definition 2.
"""

import torch
from torch import Tensor

from twicing.ops.autocast import as_autocast, autocast_off
from twicing.ops.boost import Smoother, boost
from twicing.ops.call import (
    broadcastable_gain,
    check_gain_is_used,
    check_mask,
    check_same_kind,
    check_shapes,
    to_query_heads,
)
from twicing.ops.linear_chunks import EPSILON, ChunkedRows
from twicing.ops.linear_features import features_of, find_feature_map

# Chunks as long as heads are wide balance what grows with the chunk against what each chunk costs.
CHUNK_SIZE = 64


def twicing_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    *,
    order: int = 2,
    gain: float | Tensor = 1.0,
    feature_map: str = "elu+1",
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Twiced linear attention, U = A V + g A (V - A V), A = phi(Q) phi(K)^T with its rows divided by their sums + 1e-6.

    Time O(N D^2) and memory O(N D), causal or not: each smoothing is a pass over the tokens, and A is never formed.

    query, key: [..., H, N, D]; value: [..., H, N, Dv]. N is the same for all three unless order is 1.
    attn_mask: which keys there are, bool (True = attend), broadcasts to [..., H, 1, N]: key padding. May be given
        together with is_causal. A query that may attend to nothing gets zero.
    enable_gqa: key and value have fewer heads, a divisor of H.
    order: how many times to smooth; 1 is linear attention as published, 2 is twicing.
    gain: g, as in twicing_attention().
    feature_map: phi, "elu+1", "relu" or "dpfp": see ops/linear_features.py. A scale of the logits, as softmax has it,
        would cancel, and so there is none.
    chunk_size: tokens per chunk where causal: how, never what.
    Returns U, [..., H, N, Dv], in the query's dtype (autocast's under autocast); half precision accumulates in fp32.
    Gradients, second ones too, reach query, key, value and gain.
    Raises ValueError or TypeError; for masks that differ from query to query, and additive ones, since they need A.
    Source: arXiv 2006.16236, equations 4-7 (order 1); arXiv 2503.00687, Definition 2 (twicing).
    """
    check_gain_is_used(order, gain)
    query, key, value = (as_autocast(tensor) for tensor in (query, key, value))
    check_same_kind(query=query, key=key, value=value)
    check_shapes(query, key, value, enable_gqa)
    if order > 1 and query.shape[-2] != key.shape[-2]:
        raise ValueError(
            "Twicing needs as many queries as keys, since it smooths what smoothing left of the values: got "
            f"{query.shape[-2]} and {key.shape[-2]} tokens. For cross-attention use order=1; to decode token by token, "
            "use linear_decode_step()."
        )
    gain = broadcastable_gain(gain, query)
    smooth = linear_smoother(
        query, key, attn_mask, is_causal, enable_gqa, feature_map=feature_map, chunk_size=chunk_size
    )
    return boost(smooth, to_query_heads(value, query, enable_gqa), order, gain)


def linear_smoother(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    *,
    feature_map: str = "elu+1",
    chunk_size: int = CHUNK_SIZE,
) -> Smoother:
    """The smoother v -> A v of linear attention, for twicing.boost() or anything else that smooths.

    Features and their sums are made here, once for all values. It takes values [..., H, S, Dv] of the query's heads
    and returns [..., H, N, Dv] in their dtype.
    Arguments and errors are those of twicing_linear_attention().
    """
    phi_q, phi_k = _checked_features(query, key, attn_mask, is_causal, enable_gqa, feature_map)
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive number of tokens: got {chunk_size!r}.")
    device = query.device
    with autocast_off(device):
        if is_causal:
            rows = ChunkedRows(phi_q, phi_k, chunk_size)
        else:
            shares = phi_q / (phi_q @ phi_k.sum(-2, keepdim=True).mT + EPSILON)

    def smooth(v: Tensor) -> Tensor:
        with autocast_off(device):
            wide = v.to(phi_k.dtype)
            smoothed = rows.smooth(wide)[0] if is_causal else shares @ (phi_k.mT @ wide)
        return smoothed.to(v.dtype)

    return smooth


def linear_attention_matrix(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    *,
    feature_map: str = "elu+1",
) -> Tensor:
    """The matrix A that linear attention never forms, [..., H, N, S]: the specification of this file, and for looking.

    Rows sum to 1 but for the 1e-6 in the denominator; the row of a query that may attend to nothing is zero. In the
    query's dtype, made in fp32 for half precision. O(N^2) memory.
    Arguments and errors are those of twicing_linear_attention().
    """
    phi_q, phi_k = _checked_features(query, key, attn_mask, is_causal, enable_gqa, feature_map)
    with autocast_off(query.device):
        similar = phi_q @ phi_k.mT
        similar = similar.tril() if is_causal else similar
        attn = similar / (similar.sum(-1, keepdim=True) + EPSILON)
    return attn.to(as_autocast(query).dtype)


def check_key_mask(attn_mask: Tensor) -> None:
    """Raise where the mask is not one of keys: bool, the same for every query."""
    if attn_mask.dtype != torch.bool:
        raise ValueError(
            "Linear attention takes no mask that is added to the scores, since it never forms them: pass a bool mask "
            f"of the keys, True = attend, and causality as is_causal=True: got {attn_mask.dtype}."
        )
    # A mask that was expanded over the queries is still one of the keys.
    if attn_mask.dim() >= 2 and attn_mask.shape[-2] != 1 and attn_mask.stride(-2) != 0:
        raise ValueError(
            "Linear attention takes no mask that may differ from query to query, since it never forms the attention "
            f"matrix: pass [..., 1, N] for the keys, and causality as is_causal=True: got {list(attn_mask.shape)}."
        )


def _checked_features(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool, feature_map: str
) -> tuple[Tensor, Tensor]:
    """phi(Q) and phi(K), or an error that says what does not fit."""
    find_feature_map(feature_map)
    query, key = as_autocast(query), as_autocast(key)
    check_same_kind(query=query, key=key)
    check_shapes(query, key, key, enable_gqa)
    if is_causal and query.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"is_causal=True needs as many queries as keys: got {query.shape[-2]} and {key.shape[-2]} tokens. For new "
            "tokens after those of before use linear_decode_step()."
        )
    if attn_mask is not None:
        check_key_mask(attn_mask)
        check_mask(query, key, attn_mask, False, enable_gqa)
    with autocast_off(query.device):
        return features_of(query, key, attn_mask, enable_gqa, feature_map)
