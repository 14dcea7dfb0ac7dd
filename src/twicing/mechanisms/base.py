"""What every mechanism is: a module that makes attention outputs from queries, keys and values, one instance a layer.

The arguments are those of torch.nn.functional.scaled_dot_product_attention; hosts call it in that one's place.
"""

from torch import Tensor, nn

from twicing.mechanisms.context import Context


class Mechanism(nn.Module):
    """The base class of the mechanisms. A subclass adds keyword-only options and writes forward().

    layer: which layer of the model this instance serves, counted from 1.
    num_heads, head_dim: H and D of that layer's queries.
    Options must be JSON values, so that a checkpoint can hold them. Anything that is called as
    `factory(layer, num_heads, head_dim, **options)` and returns a module with this forward() serves as well.
    What crosses layers goes through `context` and never through an attribute, and is asked for by two declarations, on
    the class or in the constructor:
    reads_values_of: the layers whose values the instance reads, counted from 1, none of them later than its own.
    remembers: whether it leaves something to later layers, or takes what earlier ones left.
    """

    reads_values_of: tuple[int, ...] = ()
    remembers: bool = False

    def __init__(self, layer: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = num_heads
        self.head_dim = head_dim

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
        """The attention output, [B, H, N, D], before heads are concatenated and projected.

        query [B, H, N, D]; key, value [B, H, N, D], fewer heads with enable_gqa; the rest as in SDPA.
        context: what crosses layers within one forward pass; None unless the mechanism declared that it needs one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(query, key, value, *, attn_mask, ...).")
