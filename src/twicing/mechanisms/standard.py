"""Standard softmax attention, U = A V: the baseline, in the same place as the others (arXiv 1706.03762, eq. 1).

One call of torch.nn.functional.scaled_dot_product_attention.
"""

import torch.nn.functional as F
from torch import Tensor

from twicing.mechanisms.base import Mechanism
from twicing.mechanisms.context import Context
from twicing.mechanisms.registry import register


@register("standard")
class Standard(Mechanism):
    """U = A V, A = softmax(scale Q K^T + mask). No options."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        enable_gqa: bool = False,
        context: Context | None = None,  # noqa: ARG002
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
