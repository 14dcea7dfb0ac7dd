"""torch.nn.MultiheadAttention, alone and in nn.TransformerEncoder and nn.TransformerDecoder: self-attention only.

Its boolean masks mean the opposite of scaled_dot_product_attention's, a fast path of nn.TransformerEncoder goes past
the module, and is_causal is only a hint beside a mask. All three are seen to here.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twicing.adapters.crossing import context_of
from twicing.adapters.site import AttentionSite, mechanism_of
from twicing.ops.empty_rows import NEGATIVE_INFINITY
from twicing.ops.reference import attention_matrix

_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class ConvertedMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention with another mechanism in place of softmax attention. Never built: modules become it."""

    twicing_mechanism: nn.Module

    # nn.TransformerEncoderLayer reads this before it takes its fast path, which computes standard attention without
    # calling this module.
    @property
    def _qkv_same_embed_dim(self) -> bool:
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The host's arguments and result; where a mask is given, it counts, and is_causal says nothing more.

        The weights that need_weights asks for are A = softmax(scale Q K^T + mask), before any dropout.
        Raises ValueError where query, key and value are not one and the same tensor: that is no self-attention.
        """
        if query is not key or key is not value:
            raise ValueError(
                "A converted nn.MultiheadAttention serves self-attention, query, key and value the same tensor: got "
                "different ones. Cross-attention has no residual to smooth: undo the conversion of this layer."
            )
        if is_causal and attn_mask is None:
            # As the host says it.
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        nested = query if query.is_nested else None
        if nested is not None and key_padding_mask is not None:
            raise ValueError("A nested tensor has no padding: got a key_padding_mask beside it.")
        if nested is not None:
            query, key_padding_mask = _padded(nested)
        batched = query.dim() == 3
        tokens = query if self.batch_first and batched else query.transpose(0, 1) if batched else query[None]
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        _refuse_other_masks(attn_mask, key_padding_mask, tokens.shape[0] * self.num_heads, *tokens.shape[:2])
        mask = _merged(attn_mask, key_padding_mask, tokens.shape[0], tokens.dtype)
        projected = F.linear(tokens, self.in_proj_weight, self.in_proj_bias)
        q, k, v = projected.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        smoothed = mechanism_of(self)(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=False,
            scale=None,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=False,
            context=context_of(self),
        )
        output = self.out_proj(smoothed.transpose(1, 2).flatten(2))
        weights = attention_matrix(q, k, mask) if need_weights else None
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if nested is not None and key_padding_mask is not None:
            output = torch._nested_tensor_from_mask(output, key_padding_mask.logical_not(), mask_check=False)
        elif not batched:
            output, weights = output[0], None if weights is None else weights[0]
        elif not self.batch_first:
            output = output.transpose(0, 1)
        return output, weights


def find_sites(model: nn.Module) -> Iterator[AttentionSite]:
    """The self-attention layers in module order, numbered from 1, converted ones included.

    Raises ValueError where a module is of this kind but has keys of its own besides the tokens'.
    """
    modules = dict(model.named_modules())
    passed_over = no_layers(model)
    seen: dict[int, str] = {}
    for path, attention in modules.items():
        if type(attention) not in (nn.MultiheadAttention, ConvertedMultiheadAttention):
            continue
        if attention in passed_over:
            continue
        _refuse_unmirrored(attention, path)
        seen[id(attention)] = path
        block = modules[path.rpartition(".")[0]] if path else attention
        if not isinstance(block, _LAYERS):
            # A module of someone's own: what it puts out may be anything, and so the attention itself is the block.
            block = attention
        block_path = path.rpartition(".")[0] if block is not attention else path
        yield AttentionSite(
            layer=len(seen),
            path=path,
            stack=_stack(block_path, modules),
            block=block,
            attention=attention,
            merge=attention.out_proj,
            num_heads=attention.num_heads,
            head_dim=attention.head_dim,
            converted_class=ConvertedMultiheadAttention,
            value_source="",
            read_values=_no_values,
        )


def no_layers(model: nn.Module) -> list[nn.Module]:
    """Modules of this kind that attend to other tokens: those of decoder layers, and with keys of another width."""
    crossing = {layer.multihead_attn for layer in model.modules() if isinstance(layer, nn.TransformerDecoderLayer)}
    kind = nn.MultiheadAttention
    return [m for m in model.modules() if type(m) is kind and (m in crossing or not m._qkv_same_embed_dim)]


def _stack(path: str, modules: dict[str, nn.Module]) -> str:
    """The path of the innermost list around a block, or of what holds the block where there is none."""
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        around = ".".join(parts[:end])
        if isinstance(modules[around], (nn.ModuleList, nn.Sequential)):
            return around
    return path.rpartition(".")[0]


def _no_values(_output: Tensor) -> Tensor:
    raise RuntimeError("nn.MultiheadAttention has no module that puts out values.")


def _padded(nested: Tensor) -> tuple[Tensor, Tensor]:
    """A nested tensor [B, *, C] as [B, N, C], and where it is padding, [B, N], as key_padding_mask has it."""
    dense = nested.to_padded_tensor(0.0)
    lengths = torch.tensor([len(tokens) for tokens in nested.unbind()], device=dense.device)
    return dense, torch.arange(dense.shape[1], device=dense.device) >= lengths[:, None]


def _refuse_other_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, batch: int, tokens: int
) -> None:
    """Raise where a mask is none that the host takes; heads: those of all sequences together."""
    square = (tokens, tokens)
    for name, mask, shapes in (
        ("attn_mask", attn_mask, [square, (heads, *square)]),
        ("key_padding_mask", key_padding_mask, [(batch, tokens)]),
    ):
        if mask is None:
            continue
        # Integers would be added to the scores, where 1 is next to nothing.
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"{name} must be bool (True = ignore) or float (added to the scores): got {mask.dtype}.")
        if tuple(mask.shape) not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name} must have the shape {expected}: got {list(mask.shape)}.")


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
    """Both masks of the host, where True means "not", as one of SDPA, [B or 1, H or 1, N, N], where True means "yes".

    attn_mask: [N, N] or [B * H, N, N]; key_padding_mask: [B, N]; bool, or float, which is added to the scores.
    """
    if attn_mask is not None:
        attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, -1))
    padding = None if key_padding_mask is None else key_padding_mask[:, None, None]
    if attn_mask is None or padding is None:
        only = padding if attn_mask is None else attn_mask
        if only is None:
            return None
        full = only.expand(*only.shape[:-2], only.shape[-1], only.shape[-1])
        return ~full if full.dtype == torch.bool else full.to(dtype)
    if attn_mask.dtype == padding.dtype == torch.bool:
        return ~(attn_mask | padding)
    return _as_float(attn_mask, dtype) + _as_float(padding, dtype)


def _as_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, NEGATIVE_INFINITY)


def _refuse_unmirrored(attention: nn.Module, path: str) -> None:
    if attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn:
        raise ValueError(
            f"{path or 'the model'} is an nn.MultiheadAttention with a key of its own (add_bias_kv or add_zero_attn): "
            "then A is not square, and there is nothing that could be smoothed again."
        )
    if "forward" in vars(attention):
        raise ValueError(
            f"{path or 'the model'} is an nn.MultiheadAttention whose forward() was replaced: undo that, or convert "
            "before it."
        )
