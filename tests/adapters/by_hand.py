"""A small timm ViT computed by hand with explicit tensors, as the truth for mechanisms that read earlier layers.

Uses the model's parameters but none of its attention modules, so that no hook or class of the library takes part.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ResPostBlock

from twicing.mechanisms import Mechanism


def features(vit, images, formula):
    """The tokens after every block. formula(layer, A, v, earlier, memory) -> u, all [B, H, N, ...]; earlier: values by
    layer; memory: a dict for the formula."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    earlier, memory, outputs = {}, {}, []
    for layer, block in enumerate(vit.blocks, start=1):
        norm_after = isinstance(block, ResPostBlock)
        qkv = F.linear(x if norm_after else block.norm1(x), block.attn.qkv.weight, block.attn.qkv.bias)
        q, k, v = (part.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        A = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        u = formula(layer, A, v, earlier, memory)
        earlier[layer] = v
        attended = F.linear(u.transpose(1, 2).flatten(2), block.attn.proj.weight, block.attn.proj.bias)
        x = x + (block.norm1(attended) if norm_after else attended)
        x = x + (block.norm2(block.mlp(x)) if norm_after else block.mlp(block.norm2(x)))
        outputs.append(x)
    return outputs


def logits(vit, images, formula):
    return vit.head(vit.norm(features(vit, images, formula)[-1])[:, 0])


def neutreno(layers=(1, 2, 3), lam=0.6, first=lambda earlier: earlier[1], sign=1):
    """A v + lambda (v_1 - v) in these layers, A v elsewhere."""

    def formula(layer, A, v, earlier, memory):
        correct = layer in layers and layer > 1
        return A @ v + sign * lam * (first(earlier) - v) if correct else A @ v

    return formula


def mixing(layer, A, v, earlier, memory):
    """Nothing that anyone published: not linear in what it reads, from the first and the last layer, and a memory."""
    memory["integral"] = 0.3 * v + 0.7 * memory.get("integral", torch.zeros_like(v))
    if layer == 1:
        return A @ v
    mixed = (A @ v) * earlier[1].sigmoid() + (earlier[layer - 1] * v).tanh()
    return mixed + memory["integral"].square()


class Mixing(Mechanism):
    """mixing() as a mechanism."""

    remembers = True

    def __init__(self, layer, num_heads, head_dim):
        super().__init__(layer, num_heads, head_dim)
        self.reads_values_of = tuple(sorted({1, layer - 1})) if layer > 1 else ()

    def forward(self, query, key, value, *, attn_mask, is_causal, scale, dropout_p, enable_gqa=False, context=None):
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        integral = 0.3 * value + 0.7 * context.recall("integral", torch.zeros_like(value))
        context.remember("integral", integral)
        if self.layer == 1:
            return attended
        mixed = attended * context.values(1).sigmoid() + (context.values(self.layer - 1) * value).tanh()
        return mixed + integral.square()


FORMULAS = {"neutreno": neutreno(), "mixing": mixing}
MECHANISMS = {"neutreno": "neutreno", "mixing": Mixing}
