"""NeuTRENO: attention that pulls each token's output back to its value in the first layer, against over-smoothing.

"Mitigating Over-smoothing in Transformers via Regularized Nonlocal Functionals", arXiv 2312.00751.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from twicing.mechanisms.base import Mechanism
from twicing.mechanisms.context import Context
from twicing.mechanisms.registry import register
from twicing.ops.call import to_query_heads


@register("neutreno")
class Neutreno(Mechanism):
    """U = A V + lambda (V_1 - V), A = softmax(scale Q K^T + mask), V_1 the values of layer 1 of the model.

    lam: lambda. The paper has 0.6 for DeiT and Segmenter, and 0.4 for WikiText-103. 0 is standard attention.
    Layer 1 itself is standard attention, since V_1 - V is zero there. Elsewhere V_1 comes from layer 1 whether or not
    that is converted, and gradients reach its projection of values.
    Dropout drops weights of A only, never the correction. A query that may attend to nothing gets lambda (V_1 - V).
    forward() raises RuntimeError without a context of the same forward pass, ValueError where its shape differs.
    Source: arXiv 2312.00751; the released vision code has lambda = 0.6.
    """

    def __init__(self, layer: int, num_heads: int, head_dim: int, *, lam: float = 0.6) -> None:
        super().__init__(layer, num_heads, head_dim)
        if not isinstance(lam, (int, float)) or isinstance(lam, bool):
            raise TypeError(f"lam must be a number, lambda in A V + lambda (V_1 - V): got {lam!r}.")
        if not math.isfinite(lam):
            raise ValueError(f"lam must be finite (0.6 is the paper's for vision, 0 is standard attention): got {lam}.")
        self.lam = float(lam)
        self.reads_values_of = () if layer == 1 else (1,)

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
        context: Context | None = None,
    ) -> Tensor:
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        if self.layer == 1:
            return attended
        if context is None:
            raise RuntimeError(
                f"NeuTRENO in layer {self.layer} needs the values of layer 1: pass context=Context({{1: values}}), or "
                "let twicing.convert() put it into a model, which arranges that."
            )
        first = context.values(1)
        if first.shape != value.shape or attended.shape[-2] != value.shape[-2]:
            raise ValueError(
                f"NeuTRENO needs the same tokens in layer 1 and in layer {self.layer}, and as many queries as values: "
                f"got values {list(first.shape)} in layer 1, {list(value.shape)} here, and {query.shape[-2]} queries."
            )
        # As boost() does it: sums of half precision are formed in fp32 and rounded once.
        wide = torch.promote_types(value.dtype, torch.float32)
        correction = self.lam * (first.to(wide) - value.to(wide))
        return (attended.to(wide) + to_query_heads(correction, query, enable_gqa)).to(attended.dtype)

    def extra_repr(self) -> str:
        """The formula in words, for print(model) and the report of a conversion."""
        return f"lambda {self.lam:g}, standard in layer 1" if self.layer == 1 else f"lambda {self.lam:g}"
