"""The public call. (First sketch: two SDPA calls, no checks.)"""

import torch.nn.functional as F
from torch import Tensor

from twicing.ops.boost import boost


def twicing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    order: int = 2,
    gain: float | Tensor = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Sketch."""

    def smooth(v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    return boost(smooth, value, order, gain)
