"""The attention logits of the first layer as four matrices: what tokens and positions have to do with each other.

Our reading of figure 1 of arXiv 2506.10371, whose Proposition 3.2 says that the cross terms act as noise. Tokens are
x = e + p, content plus position, and reach the queries through LayerNorm, which is not linear. With the standard
deviation s of each token held at what it is, LN(x) = w (e - mean e) / s + w (p - mean p) / s + b. So a query is a part
of the token, one of the position, and a constant (b and the projection's bias); a key likewise; and the logits are the
sum of four matrices and of a rest, which the constants give. That sum is exact, and checked. Where LayerNorm comes only
after the layer (post-norm), queries are linear in e + p as it is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twicing.analysis.attention_inputs import AttentionInputs, record_attention
from twicing.analysis.capture import sites_to_look_into

PARTS = ("token-token", "token-position", "position-token", "position-position")
# Rounding of sums in fp32 is a thousandth of this; a step of the forward that is not known here misses by far more.
FITS = 1e-3


@dataclass(frozen=True, eq=False)
class LogitParts:
    """The logits of layer 1 in parts, each [B, H, N, N], float64.

    parts: by the names in PARTS, the query's side first: "token-position" is what the token of a query and the
    position of a key give. rest: what constants give. logits: what the layer was called with, the sum of all five.
    causal: whether a query sees keys up to its own only, so that the others, above the diagonal, play no part.
    """

    parts: dict[str, Tensor]
    rest: Tensor
    logits: Tensor
    causal: bool = False


def logit_parts(model: nn.Module, inputs: Tensor) -> LogitParts:
    """Take the logits of the first layer apart, for a transformer with additive absolute positions.

    Known are vision transformers that are built as timm's are: pos_embed and patch_embed beside the blocks, nothing
    between them and the first block, a LayerNorm norm1 in it, and one projection attn.qkv without a norm behind it; and
    this library's language model.
    inputs: [B, ...], what the model takes.
    Raises ValueError, one sentence, where the model is not so, or the parts do not sum to its logits.
    """
    site = sites_to_look_into(model)[0]
    holder = model.get_submodule(site.stack.rpartition(".")[0])
    first = _language_layer(holder, site.block, site.attention) or _vision_layer(holder, site.block, site.attention)
    tokens: list[Tensor] = []
    calls: list[tuple[float | None, bool]] = []

    def query_and_key(seen: AttentionInputs) -> Tensor:
        if not calls:
            calls.append((seen.scale, seen.is_causal))
        return torch.stack([seen.query, seen.key])

    handles = [
        site.block.register_forward_pre_hook(lambda _module, given: tokens.append(given[0].detach().double())),
        first.watched.register_forward_hook(first.see),
    ]
    try:
        with record_attention(model, reduce=query_and_key) as recorded, torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    query, key = recorded.forwards(site.layer)[0].double()
    scale, causal = calls[0]
    scale = 1 / math.sqrt(site.head_dim) if scale is None else scale
    of_query, of_key = _parts_of_heads(tokens[0], first.position(tokens[0]), first, site.num_heads)
    parts = {name: scale * of_query[name.split("-")[0]] @ of_key[name.split("-")[1]].mT for name in PARTS}
    without = of_query["token"] + of_query["position"]
    rest = scale * (without @ of_key["constant"].mT + of_query["constant"] @ sum_of(of_key).mT)
    found = LogitParts(parts, rest, scale * query @ key.mT, causal)
    off = float((sum_of(parts) + rest - found.logits).norm() / found.logits.norm())
    if not off < FITS:
        raise ValueError(
            f"the parts miss the logits of layer 1 by {off:.1e} of their size: its first layer has a step that is "
            "not known here, such as rotary or relative positions, so its logits are not taken apart."
        )
    return found


def centred_rows(logits: Tensor, *, causal: bool = False) -> Tensor:
    """Logits [..., N, N] without the mean of each row, which softmax does not see.

    causal: the mean is over the keys up to the query; above the diagonal there is 0.
    """
    if not causal:
        return logits - logits.mean(-1, keepdim=True)
    seen = torch.arange(1, logits.shape[-1] + 1, dtype=logits.dtype, device=logits.device)
    return (logits - logits.tril().sum(-1, keepdim=True) / seen[:, None]).tril()


def mean_square(centred: Tensor, *, causal: bool = False) -> Tensor:
    """The mean over the entries of matrices [..., N, N] that play a part: all, or those up to the diagonal."""
    n = centred.shape[-1]
    return centred.square().sum((-1, -2)) / (n * (n + 1) / 2 if causal else n * n)


def sum_of(parts: dict[str, Tensor]) -> Tensor:
    """All parts together."""
    return torch.stack(list(parts.values())).sum(0)


@dataclass(eq=False)
class _First:
    """What lies before the logits of layer 1. norm: the LayerNorm before its queries, if any. projection: to q, k, v.

    watched: the module whose forward see() is called with, as a forward hook is. position: what was added as positions
    to the tokens [B, N, C] that entered the block, [N, C].
    """

    norm: nn.LayerNorm | None
    projection: nn.Linear
    watched: nn.Module
    see: Callable[[nn.Module, Any, Any], None]
    position: Callable[[Tensor], Tensor]


def _language_layer(holder: nn.Module, block: nn.Module, attention: nn.Module) -> _First | None:
    """Of a model that says itself what words and positions enter as, as our language model does; else None."""
    tell = getattr(holder, "words_and_positions", None)
    if not callable(tell):
        return None
    ids: list[Tensor] = []

    def position(tokens: Tensor) -> Tensor:
        words, added = (one.detach().double() for one in tell(ids[0]))
        if (tokens - words - added).norm() <= FITS * tokens.norm():
            return added
        raise ValueError(f"what enters the first layer of {type(holder).__name__} is not its words and positions.")

    norm = block.attention_norm if block.norm_first else None
    projection = attention.qkv
    assert isinstance(projection, nn.Linear)
    assert norm is None or isinstance(norm, nn.LayerNorm)
    return _First(norm, projection, holder, lambda _module, given, _output: ids.append(given[0]), position)


def _vision_layer(holder: nn.Module, block: nn.Module, attention: nn.Module) -> _First:
    name = type(holder).__name__
    if not isinstance(getattr(holder, "pos_embed", None), Tensor) or not hasattr(holder, "patch_embed"):
        raise ValueError(
            f"{name} keeps no additive absolute positions where they are looked for (as timm's models and the language "
            "models of this library do), so its logits are not taken apart into tokens and positions."
        )
    norm, projection = getattr(block, "norm1", None), getattr(attention, "qkv", None)
    if not isinstance(norm, nn.LayerNorm) or not isinstance(projection, nn.Linear):
        raise ValueError(
            f"the first layer of {name} is not a LayerNorm norm1 and one projection attn.qkv, so it is not known how "
            "positions reach its queries."
        )
    between = {part: getattr(holder, part, None) for part in ("norm_pre", "patch_drop")}
    between |= {part: getattr(attention, part, None) for part in ("q_norm", "k_norm")}
    for part, module in between.items():
        if module is not None and not isinstance(module, nn.Identity):
            raise ValueError(
                f"{name} has a {part} ({type(module).__name__}) between its positions and the logits of layer 1, "
                "through which tokens and positions cannot be told apart."
            )
    patches: list[Tensor] = []
    return _First(
        norm,
        projection,
        holder.get_submodule("patch_embed"),
        lambda _module, _given, output: patches.append(output.detach().double()),
        lambda tokens: _position(holder, tokens, patches[0]),
    )


def _position(holder: nn.Module, tokens: Tensor, patches: Tensor) -> Tensor:
    """The positions that were added, [N, C]; zero for prefix tokens that have none."""
    embedded = holder.get_parameter("pos_embed").detach().double().reshape(-1, tokens.shape[-1])
    content = patches.reshape(len(patches), -1, tokens.shape[-1])
    before = tokens.shape[1] - len(embedded)
    prefix = tokens.shape[1] - content.shape[1]
    if before >= 0 and prefix >= 0:
        position = torch.cat([embedded.new_zeros(before, tokens.shape[-1]), embedded])
        added = tokens[:, prefix:] - content
        if (added - position[prefix:]).norm() <= FITS * added.norm():
            return position
    raise ValueError(
        f"{type(holder).__name__} does not add pos_embed to its patches as it is (it may be resampled), so the part of "
        "the positions is not known."
    )


def _parts_of_heads(
    tokens: Tensor, position: Tensor, first: _First, heads: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parts of the queries and of the keys, by "token", "position" and "constant", each [B, H, N, D]."""
    matrix = first.projection.weight.detach().double()
    shift = torch.zeros_like(tokens)
    parts = {"token": tokens - position, "position": position.expand_as(tokens)}
    if first.norm is not None:
        spread = (tokens.var(-1, correction=0, keepdim=True) + first.norm.eps).sqrt()
        weight = 1.0 if first.norm.weight is None else first.norm.weight.detach().double()
        parts = {name: weight * _centred(part) / spread for name, part in parts.items()}
        if first.norm.bias is not None:
            shift = first.norm.bias.detach().double().expand_as(tokens)
    linear = {name: part @ matrix.T for name, part in parts.items()} | {"constant": shift @ matrix.T}
    if first.projection.bias is not None:
        linear["constant"] = linear["constant"] + first.projection.bias.detach().double()
    split = {name: one.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4) for name, one in linear.items()}
    return {name: one[0] for name, one in split.items()}, {name: one[1] for name, one in split.items()}


def _centred(tokens: Tensor) -> Tensor:
    return tokens - tokens.mean(-1, keepdim=True)
