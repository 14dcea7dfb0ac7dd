"""One call of attention, checked once for all backends: shapes, dtypes, devices, the mask, the gain.

Autocast comes first, so that every check sees the dtypes that SDPA would see.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from twicing.ops.autocast import as_autocast
from twicing.ops.boost import check_number, check_order


@dataclass(frozen=True)
class Call:
    """What a backend is asked for. The shapes fit, A is square where order > 1, and the gain broadcasts to the output.

    query [..., H, N, D], key [..., H or fewer, N, D], value [..., as key, N, Dv]; gain: a float, [] or [H, 1, 1].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    order: int
    gain: float | Tensor


def checked_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    order: int,
    gain: float | Tensor,
) -> Call:
    """The call with autocast applied and the gain ready to broadcast, or an error that says what does not fit.

    Order and gain alone are checked before, by check_gain_is_used(): order 1 may never come here.
    """
    query, key, value = (as_autocast(tensor) for tensor in (query, key, value))
    attn_mask = None if attn_mask is None else as_autocast(attn_mask)
    check_same_kind(query=query, key=key, value=value)
    check_shapes(query, key, value, enable_gqa)
    n_q, n_k = query.shape[-2], key.shape[-2]
    if order > 1 and n_q != n_k:
        raise ValueError(
            "Twicing needs as many queries as keys, since it smooths what smoothing left of the values: got "
            f"{n_q} and {n_k} tokens. Cross-attention leaves nothing that could be smoothed again: use order=1. "
            "To decode with a cache, which has to keep the boosted values beside the keys, use decode_step()."
        )
    check_mask(query, key, attn_mask, is_causal, enable_gqa)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is a probability, between 0 and 1: got {dropout_p}.")
    gain = broadcastable_gain(gain, query)
    return Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, order, gain)


def check_gain_is_used(order: int, gain: float | Tensor) -> None:
    """Raise where order or gain are no such thing, or where a gain is given that order 1 would never use."""
    check_order(order)
    check_number(gain)
    if order == 1 and (isinstance(gain, Tensor) or gain != 1.0):
        raise ValueError("gain has no effect with order=1, which is plain attention: leave it out, or use order=2.")


def check_same_kind(**tensors: Tensor) -> None:
    """Raise where the named tensors are not dense floating-point tensors of one dtype on one device."""
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values()}
    if any(tensor.is_nested for tensor in tensors.values()):
        raise ValueError("Nested tensors are not supported: pad them, and mask the padding with attn_mask.")
    if len(kinds) == 1 and next(iter(kinds))[0].is_floating_point:
        return
    listed = ", ".join(f"{name} is {tensor.dtype} on {tensor.device}" for name, tensor in tensors.items())
    raise ValueError(f"{', '.join(tensors)} must have one floating-point dtype and one device: {listed}.")


def check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raise where query [..., H, N, D], key [..., H, S, D] and value [..., H, S, Dv] do not fit together."""

    def listed() -> str:
        return f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"

    least = 3 if enable_gqa else 2
    if min(query.dim(), key.dim(), value.dim()) < least:
        layout = "[..., heads, tokens, width]" if enable_gqa else "[..., tokens, width]"
        raise ValueError(f"query, key and value must have the layout {layout}: got {listed()}.")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same width (last axis): got {listed()}.")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"key and value must have the same number of tokens (axis -2): got {listed()}.")
    if not enable_gqa:
        if _broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2]) is None:
            raise ValueError(
                f"The axes before tokens and width must be equal or broadcast: got {listed()}. "
                "Where keys and values have fewer heads than queries, pass enable_gqa=True."
            )
        return
    if key.shape[-3] != value.shape[-3] or key.shape[-3] == 0 or query.shape[-3] % key.shape[-3] != 0:
        raise ValueError(
            "With enable_gqa, key and value must have the same number of heads (axis -3), a divisor of the query's: "
            f"got {listed()}."
        )
    if _broadcast(query.shape[:-3], key.shape[:-3], value.shape[:-3]) is None:
        raise ValueError(f"The axes before heads, tokens and width must be equal or broadcast: got {listed()}.")


def check_mask(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> None:
    """Raise where the mask is not bool or float, on another device, or not broadcastable to [..., H, N, S]."""
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError(
            "attn_mask and is_causal=True cannot be given together: put the causal part into the mask, "
            "as in attn_mask & torch.ones(N, N, dtype=torch.bool).tril()."
        )
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise ValueError(
            f"attn_mask must be bool (True = attend), torch.float32 or of the query's dtype {query.dtype} (added to "
            f"the scores): got {attn_mask.dtype}."
        )
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on the query's device {query.device}: it is on {attn_mask.device}.")
    key_leading = query.shape[:-2] if enable_gqa else key.shape[:-2]
    scores = [*(_broadcast(query.shape[:-2], key_leading) or []), query.shape[-2], key.shape[-2]]
    if attn_mask.dim() < 2 or _broadcast(attn_mask.shape, torch.Size(scores)) != scores:
        raise ValueError(f"attn_mask must have at least 2 axes and broadcast to {scores}: got {list(attn_mask.shape)}.")


def broadcastable_gain(gain: float | Tensor, query: Tensor) -> float | Tensor:
    """The gain as it multiplies [..., H, N, D]: a number, a tensor of one element as [], one of [H] as [H, 1, 1]."""
    if not isinstance(gain, Tensor):
        return gain
    if not gain.is_floating_point():
        raise ValueError(f"A gain given as a tensor must be of a floating-point dtype: got {gain.dtype}.")
    if gain.numel() == 1:
        return gain.reshape(())
    if query.dim() < 3:
        raise ValueError(
            f"A gain per head needs queries with heads, [..., H, N, D]: got a gain of shape {list(gain.shape)} and "
            f"a query of shape {list(query.shape)}."
        )
    heads = query.shape[-3]
    if gain.dim() != 1 or gain.shape[0] != heads:
        raise ValueError(
            f"A gain given as a tensor must have one element, or one for each of the {heads} query heads: "
            f"got shape {list(gain.shape)}."
        )
    if gain.device != query.device:
        raise ValueError(f"A gain per head must be on the query's device {query.device}: it is on {gain.device}.")
    return gain.reshape(heads, 1, 1)


def to_query_heads(tensor: Tensor, query: Tensor, enable_gqa: bool) -> Tensor:
    """Keys or values [..., H_kv, N, D] repeated for the query heads they serve, [..., H, N, D]."""
    if not enable_gqa:
        return tensor
    return tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], dim=-3)


def _broadcast(*shapes: torch.Size) -> list[int] | None:
    """The shape to which all of these broadcast, or None. (torch.broadcast_shapes raises, which graphs do not like.)"""
    longest = max(len(shape) for shape in shapes)
    result = []
    for axis in range(-longest, 0):
        sizes = [shape[axis] for shape in shapes if len(shape) >= -axis and shape[axis] != 1]
        if any(size != sizes[0] for size in sizes):
            return None
        result.append(sizes[0] if sizes else 1)
    return result
