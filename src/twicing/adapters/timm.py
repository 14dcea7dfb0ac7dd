"""timm's vision transformers of the ViT and DeiT families: where their attention is, and what it becomes.

Known is timm.layers.Attention inside Block or ResPostBlock; its forward() is mirrored here around another core.
"""

import inspect
from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

from twicing.adapters.crossing import context_of
from twicing.adapters.site import AttentionSite
from twicing.torchvision_import import mend_torchvision_import

mend_torchvision_import()

from timm.layers.attention import Attention  # noqa: E402
from timm.models.vision_transformer import Block, ResPostBlock  # noqa: E402

# timm 1.0.20 to 1.0.31; the gate came last. Another child would be a step of the forward that is not mirrored here.
_NEEDED_CHILDREN = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}
_KNOWN_CHILDREN = _NEEDED_CHILDREN | {"gate"}
_KNOWN_ARGUMENTS = {"x", "attn_mask", "is_causal"}


class ConvertedAttention(Attention):
    """timm's Attention with another mechanism in place of softmax attention. Never built: attention modules become it.

    Projections, norms, gate and dropouts are the host's own, and it honours fused_attn: where that is off, the host
    would multiply by its own `scale`, let is_causal prevail over a mask, and drop whenever attn_drop is in training.
    """

    twicing_mechanism: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: [B, N, C]; attn_mask, is_causal: as the host takes them. Returns [B, N, C]."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        drops = self.training if self.fused_attn else self.attn_drop.training
        smoothed = self.twicing_mechanism(
            q,
            k,
            v,
            attn_mask=attn_mask if self.fused_attn or not is_causal else None,
            is_causal=is_causal,
            scale=None if self.fused_attn else self.scale,
            dropout_p=self.attn_drop.p if drops else 0.0,
            context=context_of(self),
        )
        merged = self.norm(smoothed.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))
        gate = getattr(self, "gate", None)
        if gate is not None:
            merged = merged * gate(x).sigmoid()
        return self.proj_drop(self.proj(merged))


def find_sites(model: nn.Module) -> Iterator[AttentionSite]:
    """The attention layers in module order, numbered from 1, converted ones included.

    Raises ValueError where a block that is known holds attention that is not.
    """
    seen: dict[int, str] = {}
    for path, block in model.named_modules():
        if type(block) not in (Block, ResPostBlock):
            continue
        attention_path = f"{path}.attn" if path else "attn"
        attention = block.attn
        _refuse_unmirrored(attention, attention_path)
        if id(attention) in seen:
            raise ValueError(
                f"{attention_path} and {seen[id(attention)]} are one and the same module, so layers cannot be told "
                "apart: models that share attention between blocks are not supported."
            )
        seen[id(attention)] = attention_path
        yield AttentionSite(
            layer=len(seen),
            path=attention_path,
            stack=path.rpartition(".")[0],
            block=block,
            attention=attention,
            merge=attention.proj,
            num_heads=attention.num_heads,
            head_dim=attention.head_dim,
            converted_class=ConvertedAttention,
            value_source="qkv",
            read_values=partial(_values, heads=attention.num_heads, width=attention.head_dim),
        )


def no_layers(model: nn.Module) -> list[nn.Module]:
    """timm's heads that pool tokens by attention: they have queries of their own, and are no layers to convert."""
    return [module for module in model.modules() if type(module).__module__ == "timm.layers.attention_pool"]


def _values(qkv: Tensor, *, heads: int, width: int) -> Tensor:
    """Values [B, H, N, D] from the output of the common projection, [B, N, 3 * H * D]."""
    return qkv.unflatten(-1, (3, heads, width))[:, :, 2].transpose(1, 2)


def _refuse_unmirrored(attention: nn.Module, path: str) -> None:
    kind = type(attention)
    if kind not in (Attention, ConvertedAttention):
        raise ValueError(
            f"{path} is a {kind.__module__}.{kind.__name__}: in timm's blocks the library knows timm's Attention only."
        )
    where = f"{path} is timm's Attention, but "
    children = {name for name, child in attention.named_children() if child is not None} - {"twicing_mechanism"}
    unknown, missing = sorted(children - _KNOWN_CHILDREN), sorted(_NEEDED_CHILDREN - children)
    if unknown or missing:
        what = f"has the unknown children {unknown}" if unknown else f"lacks the children {missing}"
        raise ValueError(f"{where}{what}: its forward() cannot be mirrored. Known is timm 1.0.20 to 1.0.31.")
    own = [name for name, _ in [*attention.named_parameters(recurse=False), *attention.named_buffers(recurse=False)]]
    if own:
        raise ValueError(f"{where}has the unknown tensors {own}: its forward() cannot be mirrored.")
    arguments = set(inspect.signature(attention.forward).parameters)
    if "forward" in vars(attention) or not arguments <= _KNOWN_ARGUMENTS:
        raise ValueError(
            f"{where}its forward{inspect.signature(attention.forward)} is not the one that the library mirrors: undo "
            "the change, or convert before making it."
        )
