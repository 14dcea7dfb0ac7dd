"""Cached decoding in transformers' models: the newest rows of twicing attention, from what a layer of a cache keeps.

For new tokens with the rows A over all tokens so far: O = A V, r = (1 + g) v - g O, U = A R (arXiv 2503.00687,
Definition 2, in the causal case). It is decode_step() around keys and values that the host keeps.
"""

from typing import Any, NoReturn

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from twicing.adapters.transformers_cache import BECOMES, ResidualLayer, prepare
from twicing.mechanisms.standard import Standard
from twicing.mechanisms.twicing import Twicing
from twicing.ops.autocast import as_autocast
from twicing.ops.boost import Smoother, boosted_values
from twicing.ops.call import broadcastable_gain, to_query_heads
from twicing.ops.decode import FEW_TOKENS
from twicing.ops.empty_rows import empty_again, open_empty_rows
from twicing.ops.reference import attention_matrix

_OTHER_CACHE = "Pass past_key_values=twicing.adapters.transformers.twicing_cache(model), or use_cache=False."


def decoding_rule(mechanism: nn.Module) -> tuple[int, float | Tensor] | None:
    """Order and gain by which cached decoding goes on, or None where the mechanism is none whose rows are known."""
    # A subclass may compute anything.
    if type(mechanism) is Standard:
        return 1, 1.0
    if type(mechanism) is Twicing and mechanism.order <= 2:
        return mechanism.order, mechanism.gain
    return None


def layer_with_residuals(cache: object, attention: nn.Module, mechanism: nn.Module) -> ResidualLayer | None:
    """The layer of the cache that serves the attention, made to keep residuals; None where none are to be kept.

    cache: what the host hands its attention module.
    Raises ValueError where the cache cannot serve a converted layer: it would be wrong without an error.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    index = getattr(attention, "layer_idx", None)
    if not isinstance(cache, Cache) or not isinstance(index, int):
        _refuse(f"a {type(cache).__name__} as its cache, or does not know which layer of a cache is its own.", index)
    rule = decoding_rule(mechanism)
    if rule is not None and rule[0] == 1:
        return None
    layer = _layer(cache, index)
    if rule is None:
        if _length(layer) > 0:
            _refuse(
                f"a cache with earlier tokens, but {type(mechanism).__name__} ({mechanism.extra_repr()}) has no rule "
                "for cached decoding: use_cache=False runs the whole sequence each time.",
                index,
            )
        return None
    kept = (rule[0], rule[1] if isinstance(rule[1], float) else None)
    if type(layer) not in BECOMES.values():
        layer = _become_residual(cache, index, kept)
    residual: ResidualLayer = layer
    if residual.twicing_rule != kept:
        _refuse(
            f"a cache whose residuals were made with order and gain {residual.twicing_rule}, and is to go on with "
            f"{kept}: start a new one.",
            index,
        )
    return residual


def _become_residual(cache: Cache, index: int, rule: tuple[int, float | None]) -> Any:
    """Let an empty layer of a cache keep residuals from now on. Raises ValueError where it cannot, or is not empty."""
    layer = cache.layers[index]
    kind = type(layer)
    if kind not in BECOMES:
        _refuse(f"a cache whose layer is a {kind.__name__}, which keeps no residuals. {_OTHER_CACHE}", index)
    if _length(layer) > 0:
        _refuse(
            f"a cache that holds {_length(layer)} tokens without their residuals, since it was not filled by this "
            "model as it is converted now: start a new one.",
            index,
        )
    residual = BECOMES[kind].__new__(BECOMES[kind])
    vars(residual).update(vars(layer))
    prepare(residual, rule)
    cache.layers[index] = residual
    return residual


def attend(
    layer: ResidualLayer,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    gain: float | Tensor,
) -> Tensor:
    """The newest rows of twicing attention, U = A R, R ending with r = (1 + g) v - g A V; r goes into the layer.

    query: [B, H, n, D], the n newest tokens; keys, values: [B, H or fewer, S, D], all tokens as update() of the layer
        returned them; attn_mask: [B, 1 or H, n, S], or None, where is_causal or a single token needs none.
    is_causal: the newest tokens are all there are. A layer of fixed size holds nothing behind them.
    Returns U, [B, H, n, Dv].
    """
    if not layer.twicing_pending:
        raise ValueError(
            "The host did not put keys and values of these tokens into its cache, as where layers share them: its "
            "cached decoding cannot be twiced. use_cache=False does without."
        )
    tokens = query.shape[2]
    if is_causal:
        keys, values = keys[:, :, :tokens], values[:, :, :tokens]
    query, keys, values = as_autocast(query), as_autocast(keys), as_autocast(values)
    attn_mask = None if attn_mask is None else as_autocast(attn_mask)
    whole_prompt = keys.shape[2] == tokens
    by = _by_matrix if tokens <= FEW_TOKENS and not whole_prompt else _by_sdpa
    smooth = by(query, keys, attn_mask, is_causal, scale)
    smoothed = smooth(values)
    new = values if whole_prompt else layer.new_values(values, tokens)
    new = to_query_heads(new, query, enable_gqa=new.shape[1] != query.shape[1])
    boosted = boosted_values(lambda _: smoothed, new, 2, broadcastable_gain(gain, query))
    return smooth(as_autocast(layer.add_residuals(boosted, keys.shape[2])))


def _by_matrix(
    query: Tensor, keys: Tensor, attn_mask: Tensor | None, _is_causal: bool, scale: float | None
) -> Smoother:
    """v -> A v with the new rows of A formed once; query heads that share a key head read it together, uncopied."""
    batch, heads, tokens, _ = query.shape
    key_heads, seen = keys.shape[1], keys.shape[2]
    if attn_mask is not None and key_heads != heads:
        attn_mask = attn_mask.expand(batch, heads, tokens, seen).reshape(batch, key_heads, -1, seen)
    attn = attention_matrix(query.reshape(batch, key_heads, -1, query.shape[-1]), keys, attn_mask, scale=scale)

    def smooth(v: Tensor) -> Tensor:
        return (attn.reshape(batch, v.shape[1], -1, seen) @ v).reshape(batch, heads, tokens, -1)

    return smooth


def _by_sdpa(query: Tensor, keys: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None) -> Smoother:
    """v -> A v by scaled_dot_product_attention. Residuals have the query's heads, and so keys and values get them."""
    keys = to_query_heads(keys, query, enable_gqa=keys.shape[1] != query.shape[1])
    occupied = None
    if attn_mask is not None:
        attn_mask, occupied = open_empty_rows(attn_mask)

    def smooth(v: Tensor) -> Tensor:
        v = to_query_heads(v, query, enable_gqa=v.shape[1] != query.shape[1])
        rows = F.scaled_dot_product_attention(query, keys, v, attn_mask, is_causal=is_causal, scale=scale)
        return rows if occupied is None else empty_again(rows, occupied)

    return smooth


def _layer(cache: Cache, index: int) -> Any:
    """The layer of the cache, made as the cache makes its layers where it does so only when they are used."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


def _length(layer: Any) -> int:
    return int(layer.get_seq_length())


def _refuse(what: str, index: object) -> NoReturn:
    where = f" of layer {index + 1}" if isinstance(index, int) else ""
    raise ValueError(f"The converted attention{where} got {what}")
