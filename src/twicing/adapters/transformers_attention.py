"""What a converted attention module of transformers is, and the function that its attention interface leads to.

A host's forward() asks its config for the name of an attention function. A converted module's config answers with
ours, whatever the model's says; so everything else about the host's forward() stays as it is.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.utils.output_capturing import _active_collector

from twicing.adapters.crossing import context_of
from twicing.adapters.site import is_converted, mechanism_of
from twicing.adapters.transformers_cache import ResidualLayer, ResidualStaticLayer
from twicing.adapters.transformers_decoding import attend, decoding_rule, layer_with_residuals
from twicing.adapters.transformers_loading import refuse_unloadable
from twicing.adapters.transformers_record import NAME, forget, note, record_of
from twicing.ops.attention import twicing_attention
from twicing.ops.empty_rows import NEGATIVE_INFINITY

# Arguments of a host's forward() that carry the cache, and those that carry other tokens, as cross-attention has them.
CACHES = ("past_key_values", "past_key_value", "layer_past")
OTHER_TOKENS = (
    "key_value_states",
    "encoder_hidden_states",
    "cross_attention_states",
    "key_hidden_states",
    "value_hidden_states",
    "context_hidden_states",
)
# What hosts pass beside that would make another formula of it.
_OTHER_FORMULAS = ("softcap", "s_aux", "sinks", "indices", "block_indices", "head_mask")
# None is that of a layer without a model, which computes as "eager".
_MASKS_OF = ("sdpa", "eager", NAME, None)
# With these nothing but the mask holds a token back; "sdpa" leaves out the mask where a module says that it is causal.
_ALL_IN_THE_MASK = ("eager", None)
_NOT_HANDED = object()
_classes: dict[type[nn.Module], type[nn.Module]] = {}


class _Renamed:
    """A host's config, but for the name of the attention function."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self._of_the_host = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of_the_host, name)


def converted_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that attention modules of this kind become: a direct subclass, one for each kind."""
    if kind not in _classes:
        names = list(inspect.signature(kind.forward).parameters)[1:]
        takes_cache = not set(CACHES).isdisjoint(names)
        members = {
            "__module__": __name__,
            "__doc__": f"{kind.__name__} with another mechanism in place of softmax attention.",
            "config": property(_config, _set_config),
            "forward": _forward(kind, names, takes_cache),
            "twicing_takes_cache": takes_cache,
            "twicing_refusal": staticmethod(_refusal),
            "twicing_installed": note,
            "twicing_restored": forget,
            "_save_to_state_dict": _save_to_state_dict,
            "__reduce_ex__": _reduce,
        }
        _classes[kind] = type(f"Converted{kind.__name__}", (kind,), members)
    return _classes[kind]


def _refusal(attention: nn.Module) -> str | None:
    """Why a module cannot be converted as its model is set now, or None."""
    name = vars(attention)["config"]._attn_implementation
    if name in _MASKS_OF and name != NAME:
        return None
    what = "which twices every layer already" if name == NAME else "whose masks a converted layer cannot read"
    return (
        f"The model's attention implementation is {name!r}, {what}: model.set_attn_implementation('sdpa') before that."
    )


def _config(attention: nn.Module) -> _Renamed:
    config = vars(attention)["config"]
    if config._attn_implementation not in _MASKS_OF:
        raise ValueError(
            f"The model's attention implementation is {config._attn_implementation!r} now, whose masks a converted "
            "layer cannot read: model.set_attn_implementation('sdpa') (or 'eager') brings back those it can."
        )
    return _Renamed(config)


def _set_config(attention: nn.Module, config: Any) -> None:
    vars(attention)["config"] = config


def _reduce(attention: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # The class is made at run time, so that a pickle names the host's and makes it again.
    reduced: Any = object.__reduce_ex__(attention, protocol)
    return _blank, (type(attention).__mro__[1],), *reduced[2:]


def _blank(kind: type[nn.Module]) -> nn.Module:
    made = converted_class(kind)
    blank: nn.Module = made.__new__(made)
    return blank


def _save_to_state_dict(attention: nn.Module, *args: Any, **kwargs: Any) -> None:
    refuse_unloadable()
    host: Any = type(attention).__mro__[1]
    host._save_to_state_dict(attention, *args, **kwargs)


def _forward(kind: type[nn.Module], names: list[str], takes_cache: bool) -> Callable[..., Any]:
    caches = [(names.index(name), name) for name in CACHES if name in names]
    others = [(names.index(name), name) for name in OTHER_TOKENS if name in names]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The host's, with the layer of the cache handed on to the attention function."""
        for index, name in others:
            if kwargs.get(name, args[index] if index < len(args) else None) is not None:
                raise ValueError(
                    f"A converted attention layer serves self-attention only, and got {name}: cross-attention has no "
                    "residual to smooth. Undo the conversion of this layer."
                )
        if not takes_cache:
            return kind.forward(self, *args, **kwargs)
        given = [kwargs.get(name, args[index] if index < len(args) else None) for index, name in caches]
        cache = next((cache for cache in given if cache is not None), None)
        residuals = None if cache is None else layer_with_residuals(cache, self, mechanism_of(self))
        return kind.forward(self, *args, twicing_cache=(cache is not None, residuals), **kwargs)

    return forward


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    twicing_cache: Any = _NOT_HANDED,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for attention under our name: query [B, H, N, D] in, output [B, N, H, D] out.

    A module that is converted computes its mechanism. One that is not, in a model that was loaded with
    attn_implementation="twicing" and never converted, computes twicing attention of order 2 and gain 1, without a
    cache. Raises ValueError for whatever would be another formula, another kind of attention, or another cache.
    """
    _refuse_others(module, attention_mask, options)
    causal = _is_causal(module, is_causal, attention_mask, query.shape[2])
    # As in the host: no mask is needed where all tokens are new and nothing but causality holds them back.
    is_causal = causal and attention_mask is None and query.shape[2] > 1
    if position_bias is not None:
        attention_mask, is_causal = _biased(position_bias, attention_mask, is_causal, key.shape[2]), False
    if not is_converted(module):
        output = _by_name(module, query, key, value, attention_mask, is_causal, dropout, scaling)
    else:
        if twicing_cache is _NOT_HANDED and getattr(type(module), "twicing_takes_cache", True):
            raise ValueError(
                f"The forward() of a converted {type(module).__mro__[1].__name__} was replaced, or does not hand its "
                "keyword arguments on, so that its cache cannot be known: undo the conversion of this layer."
            )
        cached, residuals = (False, None) if twicing_cache is _NOT_HANDED else twicing_cache
        mechanism = mechanism_of(module)
        if residuals is not None and _can_go_on(residuals, query, key, causal, dropout):
            _refuse_a_gap(query, key, attention_mask, is_causal, residuals)
            _, gain = decoding_rule(mechanism) or (2, 1.0)
            output = attend(residuals, query, key, value, attention_mask, is_causal, scaling, gain)
        else:
            if not cached or decoding_rule(mechanism) is None:
                _refuse_other_lengths(module, query, key)
            output = mechanism(
                query,
                key,
                value,
                attn_mask=attention_mask,
                is_causal=is_causal,
                scale=scaling,
                dropout_p=dropout,
                enable_gqa=key.shape[1] != query.shape[1],
                context=context_of(module),
            )
    return output.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make our name known to transformers, with the masks of "sdpa"; without them a function gets none at all."""
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _by_name(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """Twicing attention with its defaults, for a model that has our name in its config and was not converted."""
    from twicing.adapters.transformers_sites import is_self_attention

    if record_of(vars(module).get("config")) is not None:
        raise ValueError(
            "The config of this model says that it was converted, but the model was made from it without that: load it "
            "by from_pretrained(), or twicing.convert(model, spec=model.config.twicing['spec'])."
        )
    if not is_self_attention(module):
        raise ValueError(
            f"attn_implementation={NAME!r} serves self-attention only, and {type(module).__name__} is, or may be, "
            "cross-attention: load the model with 'sdpa', and twicing.convert() the part that is meant."
        )
    _refuse_other_lengths(module, query, key)
    enable_gqa = key.shape[1] != query.shape[1]
    return twicing_attention(query, key, value, attn_mask, dropout, is_causal, scale, enable_gqa)


def _refuse_others(module: nn.Module, attention_mask: object, options: dict[str, Any]) -> None:
    given = [name for name in _OTHER_FORMULAS if options.get(name) is not None]
    if given:
        raise ValueError(
            f"{type(module).__name__} computes its attention with {', '.join(given)}, which is another formula than "
            "softmax(scale Q K^T + mask) V: such layers cannot be converted."
        )
    if options.get("cache") is not None:
        raise ValueError(
            f"{type(module).__name__} got a paged cache, as continuous batching has it, which keeps no residuals: "
            "model.generate() makes one that does."
        )
    # Some hosts hand it on, others collect what modules put out, and would leave out the layers that put out none.
    collected = _active_collector.get() or {}
    if options.get("output_attentions") or "attentions" in collected:
        raise ValueError(
            "A converted layer puts out no attention weights (output_attentions=True): twicing.attention_matrix() and "
            "twicing.effective_matrix() compute them from queries and keys."
        )
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4):
        raise ValueError(
            "A converted layer needs a mask of the kind of 'sdpa' or 'eager', [B, 1 or H, N, S]: got a "
            f"{type(attention_mask).__name__}"
            f"{f' {list(attention_mask.shape)}' if isinstance(attention_mask, Tensor) else ''}."
        )


def _is_causal(module: nn.Module, is_causal: bool | None, attention_mask: Tensor | None, tokens: int) -> bool:
    """Whether no token attends to a later one, as the host's own attention function would have it."""
    implementation = vars(module)["config"]._attn_implementation
    if attention_mask is None and tokens > 1 and implementation in _ALL_IN_THE_MASK:
        return False
    said = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if said is None and attention_mask is None and tokens > 1 and implementation == NAME:
        # Hosts without "sdpa" rely on "eager", and its masks were not asked for.
        raise ValueError(
            f"{type(module).__name__} does not say whether it is causal, and got no mask that does: load the model "
            "with 'eager', and twicing.convert() it."
        )
    return said is None or bool(said)


def _biased(bias: Tensor, attn_mask: Tensor | None, is_causal: bool, seen: int) -> Tensor:
    """A bias of positions, [1 or B, H, N, S], and the mask, in one float mask."""
    if is_causal:
        tokens = torch.arange(seen, device=bias.device)
        attn_mask = tokens <= tokens[: bias.shape[2], None]
    if attn_mask is None:
        return bias
    return torch.where(attn_mask, bias, NEGATIVE_INFINITY) if attn_mask.dtype == torch.bool else bias + attn_mask


def _can_go_on(residuals: ResidualLayer, query: Tensor, key: Tensor, causal: bool, dropout: float) -> bool:
    """Whether cached decoding can follow; where it cannot, the first step is still right, and the next is refused."""
    if causal and dropout == 0.0:
        return True
    why = "with dropout, which dropped other weights for each token" if dropout else "by attention that is not causal"
    residuals.twicing_unusable = (
        f"This cache was filled {why}, and so keeps no residuals to go on with: start a new one."
    )
    if query.shape[2] != key.shape[2]:
        raise ValueError(residuals.twicing_unusable)
    return False


def _refuse_a_gap(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, residuals: ResidualLayer
) -> None:
    """Raise where tokens that the new ones would have to be kept from, or to see, are not told by a mask."""
    if attn_mask is not None:
        return
    earlier = key.shape[2] - query.shape[2]
    if not isinstance(residuals, ResidualStaticLayer):
        if is_causal and earlier:
            raise ValueError(f"{query.shape[2]} new tokens after {earlier} cached ones need a mask, and none came.")
        return
    # Reading a length that is a tensor would break a graph; there the host always makes a mask.
    if not is_causal or (not torch.compiler.is_compiling() and int(residuals.cumulative_length) != query.shape[2]):
        raise ValueError("A cache of fixed size needs a mask that hides what is not filled yet, and none came.")


def _refuse_other_lengths(module: nn.Module, query: Tensor, key: Tensor) -> None:
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{type(module).__name__} got {query.shape[2]} queries for {key.shape[2]} keys without residuals for the "
            "earlier tokens, where twicing would be wrong: twicing.convert(model, 'twicing') keeps them in the cache, "
            "and use_cache=False does without."
        )
