"""Linear attention, and the same smoother twiced: time O(N D^2) where softmax attention takes O(N^2 D).

"Transformers are RNNs", arXiv 2006.16236; twiced as in arXiv 2503.00687, Definition 2.
"""

from torch import Tensor

from twicing.mechanisms.base import Mechanism
from twicing.mechanisms.context import Context
from twicing.mechanisms.registry import register
from twicing.ops.call import check_gain_is_used
from twicing.ops.linear import twicing_linear_attention
from twicing.ops.linear_features import find_feature_map


@register("linear")
class Linear(Mechanism):
    """U = A V = phi(Q) (phi(K)^T V) / (phi(Q) sum phi(K) + 1e-6): see twicing.ops.linear.twicing_linear_attention().

    feature_map: phi; "elu+1" is the paper's, "relu" and "dpfp" are those of others, see twicing.ops.linear_features.
    Masks are of keys only: bool, the same for every query, also beside is_causal. `scale` is not used: a scale of the
    weights cancels, and the paper has none inside of phi.
    forward() raises ValueError for other masks, and where weights are to be dropped, since they are never formed.
    """

    # Not `order`: costs are counted by that name for softmax attention, in products of N^2 D.
    smoothings = 1
    gain = 1.0

    def __init__(self, layer: int, num_heads: int, head_dim: int, *, feature_map: str = "elu+1") -> None:
        super().__init__(layer, num_heads, head_dim)
        find_feature_map(feature_map)
        self.feature_map = feature_map

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,  # noqa: ARG002
        dropout_p: float = 0.0,
        enable_gqa: bool = False,
        context: Context | None = None,  # noqa: ARG002
    ) -> Tensor:
        if dropout_p > 0.0:
            raise ValueError(
                "Linear attention cannot drop attention weights, since it never forms them: got dropout_p="
                f"{dropout_p:g}. Set the model's attention dropout to 0."
            )
        return twicing_linear_attention(
            query,
            key,
            value,
            attn_mask,
            is_causal,
            enable_gqa,
            order=self.smoothings,
            gain=self.gain,
            feature_map=self.feature_map,
        )

    def extra_repr(self) -> str:
        """The formula in words, for print(model) and the report of a conversion."""
        return f"feature map {self.feature_map}"


@register("twicing-linear")
class TwicingLinear(Linear):
    """U = A V + g A (V - A V) with the A of linear attention, or its higher orders; A is never formed.

    order: how many times to smooth; 2 is twicing, 1 is linear attention.
    gain: g; 1 is twicing, 0 is linear attention.
    feature_map, masks, scale and dropout are those of Linear.
    Raises ValueError or TypeError where an option has no meaning.
    """

    def __init__(
        self,
        layer: int,
        num_heads: int,
        head_dim: int,
        *,
        order: int = 2,
        gain: float = 1.0,
        feature_map: str = "elu+1",
    ) -> None:
        super().__init__(layer, num_heads, head_dim, feature_map=feature_map)
        if isinstance(gain, Tensor):
            raise TypeError("gain must be a number here.")
        check_gain_is_used(order, gain)
        self.smoothings = order
        self.gain = float(gain)

    def extra_repr(self) -> str:
        """The formula in words, for print(model) and the report of a conversion."""
        return f"order {self.smoothings}, gain {self.gain:g}, {super().extra_repr()}"
