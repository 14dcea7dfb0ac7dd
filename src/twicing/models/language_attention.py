"""Causal self-attention of the language model, and what it becomes when it is converted.

Vaswani et al., arXiv 1706.03762, section 3.2.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from twicing.adapters.crossing import context_of


class CausalSelfAttention(nn.Module):
    """Softmax attention over the tokens up to each one, [B, N, C] to [B, N, C], with one projection for q, k and v."""

    def __init__(self, width: int, heads: int, *, bias: bool = False, dropout: float = 0.0):
        super().__init__()
        self.num_heads, self.head_dim, self.dropout = heads, width // heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, C]. Returns [B, N, C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        merged: Tensor = self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return merged

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: [B, H, N, D]. Returns the attention output, [B, H, N, D]."""
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self._dropout_p(), is_causal=True)

    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0


class ConvertedCausalSelfAttention(CausalSelfAttention):
    """The same with a mechanism in place of softmax attention. Never built: attention modules become it."""

    twicing_mechanism: nn.Module

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: [B, H, N, D]. Returns the mechanism's output, [B, H, N, D]."""
        attended: Tensor = self.twicing_mechanism(
            q,
            k,
            v,
            attn_mask=None,
            is_causal=True,
            scale=None,
            dropout_p=self._dropout_p(),
            context=context_of(self),
        )
        return attended


def values_of(qkv: Tensor, *, heads: int) -> Tensor:
    """Values [B, H, N, D] from the output of the common projection, [B, N, 3 * H * D]."""
    return qkv.unflatten(-1, (3, heads, -1))[:, :, 2].transpose(1, 2)
