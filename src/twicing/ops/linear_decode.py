"""Linear attention as a recurrent network: new tokens from sums over the tokens before, with constant memory.

For a new token: Z <- Z + phi(k) v^T, o = phi(q) Z / w, r = (1 + g) v - g o, Z' <- Z' + phi(k) r^T, u = phi(q) Z' / w,
with w = phi(q) . sum phi(k) + 1e-6. arXiv 2006.16236, section 3.4, boosted as in arXiv 2503.00687, Definition 2.
"""

from typing import Self

import torch
from torch import Tensor

from twicing.ops.autocast import as_autocast, autocast_off
from twicing.ops.boost import boost
from twicing.ops.call import (
    broadcastable_gain,
    check_gain_is_used,
    check_mask,
    check_same_kind,
    check_shapes,
    to_query_heads,
)
from twicing.ops.decode_state import check_sequences
from twicing.ops.linear import CHUNK_SIZE, check_key_mask
from twicing.ops.linear_chunks import ChunkedRows, sum_after
from twicing.ops.linear_features import features_of, find_feature_map


class LinearDecodeState:
    """What linear_decode_step() keeps of all tokens so far: one sum phi(k) r^T for each smoothing, and sum phi(k).

    order, gain, feature_map: as in twicing_linear_attention(). They belong to the state, since its sums were made with
        them. Order 2, which is twicing, keeps two sums: of values and of residuals.
    sums: one [B, H, F, Dv] for each smoothing; weights: [B, H, 1, F]; before the first step () and None. H are the
        query's heads and F is the width of the features. In fp32 for half precision.
    length: how many tokens were taken.
    Its size does not depend on that. What is summed cannot be forgotten again: to go back, keep a copy.deepcopy().
    Raises TypeError or ValueError where an option is no such thing.
    """

    def __init__(self, *, order: int = 2, gain: float | Tensor = 1.0, feature_map: str = "elu+1") -> None:
        check_gain_is_used(order, gain)
        find_feature_map(feature_map)
        self.order = order
        self.gain = gain
        self.feature_map = feature_map
        self.length = 0
        self.sums: tuple[Tensor, ...] = ()
        self.weights: Tensor | None = None

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes kept for one sequence, whatever its length; known after the first step (0 before)."""
        return sum(kept.shape[1:].numel() * kept.element_size() for kept in self._kept())

    def reorder(self, index: Tensor) -> None:
        """Make sequence b a copy of what was sequence index[b], as beam search does; the batch may change its size.

        index: [any B], integers on the state's device.
        """
        check_sequences(index)
        self._keep([tensor.index_select(0, index) for tensor in self._kept()])

    def to(self, device: torch.device | str) -> Self:
        """Move everything to the device; returns the state itself."""
        self._keep([tensor.to(device) for tensor in self._kept()])
        if isinstance(self.gain, Tensor):
            self.gain = self.gain.to(device)
        return self

    def keep(self, sums: tuple[Tensor, ...], weights: Tensor, tokens: int) -> None:
        """Take the sums that include so many new tokens: all at once, so that a step that fails has added none."""
        self.sums, self.weights = sums, weights
        self.length += tokens

    def _kept(self) -> list[Tensor]:
        return [] if self.weights is None else [self.weights, *self.sums]

    def _keep(self, kept: list[Tensor]) -> None:
        if kept:
            self.weights, *sums = kept
            self.sums = tuple(sums)

    def __repr__(self) -> str:
        kept = f"{len(self.sums)} sums {list(self.sums[0].shape)}" if self.sums else "nothing kept yet"
        return f"LinearDecodeState(order {self.order}, {self.feature_map}, {self.length} tokens: {kept})"


def linear_decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LinearDecodeState,
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The rows of causal twiced linear attention for the next tokens, which become part of the state's sums.

    In whatever steps a sequence is given, one token, or chunks of any size, the outputs are those of
    twicing_linear_attention(..., is_causal=True) of the whole sequence; order, gain and feature map are the state's.

    query: [B, H, n, D], n new tokens; key: [B, H, n, D]; value: [B, H, n, Dv]. With enable_gqa, key and value have
        fewer heads, a divisor of H.
    attn_mask: which of the n new tokens may be attended to, now and later, bool, broadcasts to [B, H, 1, n]: padding.
    Returns U, [B, H, n, Dv], in the query's dtype. A token that may attend to nothing gets zero.
    Time and memory of a step do not grow with the tokens before. Gradients flow through all steps.
    Raises ValueError where the tensors do not fit together, or do not fit the state, which is then as it was.
    """
    query, key, value = (as_autocast(tensor) for tensor in (query, key, value))
    _check(query, key, value, state, attn_mask, enable_gqa)
    gain = broadcastable_gain(state.gain, query)
    sums: list[Tensor] = []
    with autocast_off(query.device):
        phi_q, phi_k = features_of(query, key, attn_mask, enable_gqa, state.feature_map)
        rows = ChunkedRows(phi_q, phi_k, CHUNK_SIZE, state.weights)

        def smooth(v: Tensor) -> Tensor:
            # Each smoothing of boost() has other values behind it, and so a sum of its own.
            before = state.sums[len(sums)] if state.sums else None
            smoothed, added = rows.smooth(v.to(phi_k.dtype), before)
            sums.append(sum_after(added, before))
            return smoothed.to(v.dtype)

        output = boost(smooth, to_query_heads(value, query, enable_gqa), state.order, gain)
    state.keep(tuple(sums), sum_after(rows.weights, state.weights), query.shape[2])
    return output


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LinearDecodeState,
    attn_mask: Tensor | None,
    enable_gqa: bool,
) -> None:
    """Raise where the new tokens do not fit together, or do not fit what the state holds."""
    check_same_kind(query=query, key=key, value=value)
    listed = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(f"linear_decode_step() needs query, key and value of the layout [B, H, n, D]: got {listed}.")
    check_shapes(query, key, value, enable_gqa)
    shared = 1 if enable_gqa else 2
    if not query.shape[:shared] == key.shape[:shared] == value.shape[:shared]:
        raise ValueError(
            "linear_decode_step() does not broadcast: query, key and value must have the same batch and heads (or "
            f"enable_gqa=True for fewer heads of keys and values): got {listed}."
        )
    if query.shape[2] != key.shape[2] or query.shape[2] == 0:
        raise ValueError(
            "linear_decode_step() takes the query, key and value of the same new tokens, at least one, and not those "
            f"of the tokens before, which the state has summed: got {listed}."
        )
    if attn_mask is not None:
        check_key_mask(attn_mask)
        check_mask(query, key, attn_mask, False, enable_gqa)
    if state.weights is None:
        return
    width = find_feature_map(state.feature_map)(query[:1, :1, :1]).shape[-1]
    wide = torch.promote_types(query.dtype, torch.float32)
    expected = (*state.sums[0].shape, state.weights.dtype, state.weights.device)
    got = (*query.shape[:2], width, value.shape[-1], wide, query.device)
    if expected != got:
        raise ValueError(
            f"The state holds sums {list(expected[:4])} in {expected[4]} on {expected[5]}, and the new tokens make "
            f"{list(got[:4])} in {got[4]} on {got[5]}: start another LinearDecodeState for another batch, other heads "
            "or another dtype."
        )
