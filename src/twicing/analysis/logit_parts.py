"""The attention logits of the first layer as four matrices: what tokens and positions have to do with each other.

Our reading of figure 1 of arXiv 2506.10371, whose Proposition 3.2 says that the cross terms act as noise. Tokens are
x = e + p, content plus position, and reach the queries through LayerNorm, which is not linear. With the standard
deviation s of each token held at what it is, LN(x) = w (e - mean e) / s + w (p - mean p) / s + b. So a query is a part
of the token, one of the position, and a constant (b and the projection's bias); a key likewise; and the logits are the
sum of four matrices and of a rest, which the constants give. That sum is exact, and checked.
"""

import math
from dataclasses import dataclass

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
    """

    parts: dict[str, Tensor]
    rest: Tensor
    logits: Tensor


def logit_parts(model: nn.Module, images: Tensor) -> LogitParts:
    """Take the logits of the first layer apart, for a vision transformer with additive absolute positions.

    Known are models that are built as timm's are: pos_embed and patch_embed beside the blocks, nothing between them
    and the first block, a LayerNorm norm1 in it, and one projection attn.qkv without a norm behind it.
    images: [B, ...], what the model takes.
    Raises ValueError, one sentence, where the model is not so, or the parts do not sum to its logits.
    """
    site = sites_to_look_into(model)[0]
    holder = model.get_submodule(site.stack.rpartition(".")[0])
    norm, projection = _checked(holder, site.block, site.attention)
    tokens: list[Tensor] = []
    patches: list[Tensor] = []
    scales: list[float | None] = []

    def query_and_key(inputs: AttentionInputs) -> Tensor:
        if not scales:
            scales.append(inputs.scale)
        return torch.stack([inputs.query, inputs.key])

    handles = [
        site.block.register_forward_pre_hook(lambda _module, inputs: tokens.append(inputs[0].detach().double())),
        holder.get_submodule("patch_embed").register_forward_hook(
            lambda _module, _inputs, output: patches.append(output.detach().double())
        ),
    ]
    try:
        with record_attention(model, reduce=query_and_key) as recorded, torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    query, key = recorded.forwards(site.layer)[0].double()
    scale = 1 / math.sqrt(site.head_dim) if scales[0] is None else scales[0]
    position = _position(holder, tokens[0], patches[0])
    of_query, of_key = _parts_of_heads(tokens[0], position, norm, projection, site.num_heads)
    parts = {name: scale * of_query[name.split("-")[0]] @ of_key[name.split("-")[1]].mT for name in PARTS}
    without = of_query["token"] + of_query["position"]
    rest = scale * (without @ of_key["constant"].mT + of_query["constant"] @ sum_of(of_key).mT)
    found = LogitParts(parts, rest, scale * query @ key.mT)
    off = float((sum_of(parts) + rest - found.logits).norm() / found.logits.norm())
    if not off < FITS:
        raise ValueError(
            f"the parts miss the logits of layer 1 by {off:.1e} of their size: its first layer has a step that is "
            "not known here, such as rotary or relative positions, so its logits are not taken apart."
        )
    return found


def centred_rows(logits: Tensor) -> Tensor:
    """Logits [..., N, N] without the mean of each row, which softmax does not see."""
    return logits - logits.mean(-1, keepdim=True)


def sum_of(parts: dict[str, Tensor]) -> Tensor:
    """All parts together."""
    return torch.stack(list(parts.values())).sum(0)


def _checked(holder: nn.Module, block: nn.Module, attention: nn.Module) -> tuple[nn.LayerNorm, nn.Linear]:
    name = type(holder).__name__
    if not isinstance(getattr(holder, "pos_embed", None), Tensor) or not hasattr(holder, "patch_embed"):
        raise ValueError(
            f"{name} has no additive absolute positions (pos_embed beside patch_embed), so its logits have no part of "
            "their own for them."
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
    return norm, projection


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
    tokens: Tensor, position: Tensor, norm: nn.LayerNorm, projection: nn.Linear, heads: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parts of the queries and of the keys, by "token", "position" and "constant", each [B, H, N, D]."""
    spread = (tokens.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    weight = 1.0 if norm.weight is None else norm.weight.detach().double()
    matrix = projection.weight.detach().double()
    shift = torch.zeros_like(tokens) if norm.bias is None else norm.bias.detach().double().expand_as(tokens)
    constant = shift @ matrix.T
    if projection.bias is not None:
        constant = constant + projection.bias.detach().double()
    linear = {
        "token": weight * _centred(tokens - position) / spread @ matrix.T,
        "position": weight * _centred(position) / spread @ matrix.T,
        "constant": constant,
    }
    split = {name: one.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4) for name, one in linear.items()}
    return {name: one[0] for name, one in split.items()}, {name: one[1] for name, one in split.items()}


def _centred(tokens: Tensor) -> Tensor:
    return tokens - tokens.mean(-1, keepdim=True)
