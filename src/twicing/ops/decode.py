"""Cached decoding: the outputs of new tokens from what a DecodeState keeps of the tokens before them.

For new tokens with the rows A of the attention matrix over all tokens so far: O = A V, r = (1 + g) v - g O, U = A R.
arXiv 2503.00687, Definition 2, in the causal case.
"""

import math

import torch
from torch import Tensor

from twicing.ops.autocast import as_autocast, autocast_off
from twicing.ops.boost import Smoother
from twicing.ops.call import broadcastable_gain, check_mask, check_same_kind, check_shapes, to_query_heads
from twicing.ops.decode_state import DecodeState
from twicing.ops.empty_rows import NEGATIVE_INFINITY, empty_again, masked_softmax, open_empty_rows
from twicing.ops.sdpa import fused

# Up to so many new tokens, their rows of A are formed once, and K, V and R are read once each, which is what a step
# waits for. More tokens are a prompt, where fused attention is faster though it forms the rows twice.
FEW_TOKENS = 16
# A mask of new x all tokens is made for so many new tokens at a time, so that no long prompt makes one of N x N.
TOKENS_PER_MASK = 512


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: DecodeState,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The rows of causal twicing attention for the next tokens; their keys, values and residuals go into the state.

    In whatever steps a sequence is given, one token, or chunks of any size, the outputs are those of
    twicing_attention(..., is_causal=True) of the whole sequence; order and gain are the state's.

    query: [B, H, n, D], n new tokens; key: [B, H, n, D]; value: [B, H, n, Dv]. With enable_gqa, key and value have
        fewer heads, a divisor of H.
    attn_mask: which of all S tokens so far, the new ones last, the new ones may attend to: broadcasts to [B, H, n, S],
        bool (True = attend) or float (added to the scores). Causality is added to it. A token's row is final: later
        steps do not change it. For padding at the start, DecodeState(padding=...) is simpler.
    Returns U, [B, H, n, Dv], in the query's dtype. A token that may attend to nothing gets zero.
    Gradients flow through all steps of a growing state; one with a capacity refuses them.
    Raises ValueError where the tensors do not fit together, or do not fit the state, which is then as it was.
    """
    query, key, value = (as_autocast(tensor) for tensor in (query, key, value))
    attn_mask = None if attn_mask is None else as_autocast(attn_mask)
    _check(query, key, value, state, attn_mask, enable_gqa)
    tokens = query.shape[-2]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-2], tokens, state.length + tokens)
    if tokens <= TOKENS_PER_MASK or _is_whole_prompt(state, attn_mask):
        return _step(query, key, value, state, attn_mask, scale, enable_gqa)
    outputs = []
    for first in range(0, tokens, TOKENS_PER_MASK):
        new = slice(first, first + TOKENS_PER_MASK)
        seen = state.length + min(TOKENS_PER_MASK, tokens - first)
        allowed = None if attn_mask is None else attn_mask[..., new, :seen]
        outputs.append(_step(query[:, :, new], key[:, :, new], value[:, :, new], state, allowed, scale, enable_gqa))
    return torch.cat(outputs, dim=-2)


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: DecodeState,
    attn_mask: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """O = A V, then r from the new rows of V and O, then U = A R, where V and R end with the new tokens."""
    tokens = query.shape[-2]
    few = state.order == 2 and tokens <= FEW_TOKENS
    is_causal = not few and _is_whole_prompt(state, attn_mask)
    mask = None if is_causal else _causal_mask(tokens, state, attn_mask, query.device)
    keys, values = state.extended("keys", key), state.extended("values", value)
    smooth = _by_matrix(query, keys, mask, scale) if few else _by_sdpa(query, keys, mask, is_causal, scale)
    if state.order == 2:
        new = to_query_heads(value, query, enable_gqa)
        values = state.extended("residuals", _residuals(new, smooth(values), broadcastable_gain(state.gain, query)))
    output = smooth(values)
    state.keep(tokens)
    return output


def _residuals(values: Tensor, smoothed: Tensor, gain: float | Tensor) -> Tensor:
    """r = v + g (v - o) in one kernel; in fp32 for half precision, and rounded once."""
    if not _is_half(values) and not isinstance(gain, Tensor):
        return torch.lerp(smoothed, values, 1.0 + gain)
    wide = torch.promote_types(values.dtype, torch.float32)
    if isinstance(gain, Tensor):
        gain = gain.to(values.device, wide)
    return torch.lerp(smoothed.to(wide), values.to(wide), 1.0 + gain).to(values.dtype)


def _by_matrix(query: Tensor, keys: Tensor, mask: Tensor | None, scale: float | None) -> Smoother:
    """v -> A v with the new rows of A formed once; query heads that share a key head read it together, uncopied."""
    batch, heads, tokens, width = query.shape
    key_heads, seen = keys.shape[1], keys.shape[2]
    # Not left to torch as -1, which it cannot tell where something is empty.
    together = tokens * heads // max(1, key_heads)
    if mask is not None:
        mask = mask.expand(batch, heads, tokens, seen).reshape(batch * key_heads, together, seen)
    # A width of 0 makes every score 0, whatever the scale.
    scale = 1.0 / math.sqrt(max(width, 1)) if scale is None else scale
    scores = _scores(query.reshape(batch * key_heads, together, width), keys.flatten(0, 1), scale)
    attn = masked_softmax(scores, mask)
    if _is_half(query):
        attn = attn.to(query.dtype)

    def smooth(v: Tensor) -> Tensor:
        rows = tokens * heads // max(1, v.shape[1])
        smoothed = torch.bmm(attn.view(batch * v.shape[1], rows, seen), v.flatten(0, 1))
        return smoothed.view(batch, heads, tokens, v.shape[-1])

    return smooth


def _scores(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The scores scale Q K^T, in fp32 for half precision, without a copy of all keys where torch can do that."""
    if not _is_half(query):
        return torch.bmm(scale * query, keys.mT)
    if query.is_cuda and not torch.is_grad_enabled():
        return scale * torch.bmm(query, keys.mT, out_dtype=torch.float32)
    with autocast_off(query.device):
        return torch.bmm(scale * query.float(), keys.float().mT)


def _is_half(tensor: Tensor) -> bool:
    """Whether sums need more precision than the dtype has. Casts to the same dtype would do nothing but take time."""
    return tensor.dtype.itemsize < 4


def _by_sdpa(query: Tensor, keys: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Smoother:
    """v -> A v by scaled_dot_product_attention. Residuals have the query's heads, and so the keys are repeated."""
    occupied = None
    if mask is not None:
        mask, occupied = open_empty_rows(mask)

    def smooth(v: Tensor) -> Tensor:
        key = to_query_heads(keys, query, enable_gqa=v.shape[1] != keys.shape[1])
        enable_gqa = key.shape[1] != query.shape[1]
        rows = fused(query, key, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        return rows if occupied is None else empty_again(rows, occupied)

    return smooth


def _is_whole_prompt(state: DecodeState, attn_mask: Tensor | None) -> bool:
    """Whether the new tokens are all there are, with nothing but causality to hold them back: no mask is needed."""
    return state.length == 0 and state.padding is None and attn_mask is None


def _causal_mask(tokens: int, state: DecodeState, attn_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Which of all tokens the newest may attend to: none after itself, no padding, and what attn_mask says.

    Two new tokens after three, one of them padding:    0 1 1 1 0
                                                        0 1 1 1 1
    Returns a mask as attn_mask is, bool [..., n, S] without one, and None where one new token sees everything.
    """
    if tokens == 1 and state.padding is None:
        return attn_mask
    column = torch.arange(state.length + tokens, device=device)
    allowed = column <= column[state.length :, None]
    if state.padding is not None:
        allowed = allowed & (column >= state.padding[:, None, None, None])
    if attn_mask is None:
        return allowed
    return attn_mask & allowed if attn_mask.dtype == torch.bool else torch.where(allowed, attn_mask, NEGATIVE_INFINITY)


def _check(
    query: Tensor, key: Tensor, value: Tensor, state: DecodeState, attn_mask: Tensor | None, enable_gqa: bool
) -> None:
    """Raise where the new tokens do not fit together, or do not fit what the state holds."""
    if query.is_nested or key.is_nested or value.is_nested:
        # Refused before their shapes are looked at, which they do not have.
        check_same_kind(query=query, key=key, value=value)
    padding = None if state.padding is None else (state.padding.shape, state.padding.device)
    # Token after token is of the same kind, and a step of one token takes about as long as checking it.
    kind = *((tensor.shape, tensor.dtype, tensor.device) for tensor in (query, key, value)), padding, enable_gqa
    if kind != state.checked_kind:
        _check_kind(query, key, value, enable_gqa)
        state.check_fits(query, key, value)
        state.checked_kind = kind
    state.check_room(key.shape[2])
    broadcastable_gain(state.gain, query)
    if attn_mask is not None:
        seen = state.length + key.shape[2]
        if attn_mask.dim() == 0 or attn_mask.shape[-1] != seen:
            raise ValueError(
                f"The last axis of attn_mask must be for all {seen} tokens so far, {state.length} in the state and "
                f"{key.shape[2]} new: got {list(attn_mask.shape)}."
            )
        check_mask(query, key[:, :, :1].expand(-1, -1, seen, -1), attn_mask, False, enable_gqa)
    given = (query, key, value, attn_mask, state.gain)
    learning = torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in given)
    if state.capacity is not None and learning:
        raise ValueError(
            "A DecodeState with a capacity is written in place and takes no gradients: decode under torch.no_grad(), "
            "or leave out capacity, so that the state grows."
        )


def _check_kind(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raise where the new tokens do not fit together."""
    check_same_kind(query=query, key=key, value=value)
    listed = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(f"decode_step() needs query, key and value of the layout [B, H, n, D]: got {listed}.")
    check_shapes(query, key, value, enable_gqa)
    shared = 1 if enable_gqa else 2
    if not query.shape[:shared] == key.shape[:shared] == value.shape[:shared]:
        raise ValueError(
            f"decode_step() does not broadcast: query, key and value must have the same batch and heads (or "
            f"enable_gqa=True for fewer heads of keys and values): got {listed}."
        )
    if query.shape[2] != key.shape[2] or query.shape[2] == 0:
        raise ValueError(
            "decode_step() takes the query, key and value of the same new tokens, at least one, and not those of the "
            f"tokens before, which the state holds: got {listed}."
        )
