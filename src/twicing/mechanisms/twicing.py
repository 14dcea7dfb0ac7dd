"""Twicing Attention, U = A V + g A (V - A V), as a mechanism that hosts can hold (arXiv 2503.00687, Definition 2).

The paper has order 2 and gain 1; other orders, other gains and a gain that is learned per head are ours.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from twicing.mechanisms.base import Mechanism
from twicing.mechanisms.context import Context
from twicing.mechanisms.registry import register
from twicing.names import listed
from twicing.ops.attention import BACKENDS, twicing_attention
from twicing.ops.boost import check_number
from twicing.ops.call import check_gain_is_used

# torch.fx, as in feature extractors, is to trace the call as one node, and not to look inside.
torch.fx.wrap("twicing_attention")


@register("twicing")
class Twicing(Mechanism):
    """U = A V + g A (V - A V), or its higher orders: see twicing.twicing_attention().

    order: how many times to smooth; 2 is twicing, 1 is standard attention.
    gain: g; 1 is the paper's, 0 is standard attention.
    learn_gain: g becomes a parameter, `gain` [H] in fp32, one for each head, initialised to the given number. It stays
        fp32 when the model is cast to another dtype.
    backend: how it is computed, never what.
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
        learn_gain: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(layer, num_heads, head_dim)
        if not isinstance(learn_gain, bool):
            raise TypeError(f"learn_gain must be True or False: got {learn_gain!r}.")
        if isinstance(gain, Tensor):
            raise TypeError("gain must be a number here: with learn_gain=True it becomes a parameter for each head.")
        check_number(gain)
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"Unknown backend {backend!r}: {listed(backend, ['auto', *BACKENDS])}")
        self.order = order
        self.backend = backend
        self.gain: float | nn.Parameter = float(gain)
        if learn_gain:
            self.gain = nn.Parameter(torch.full((num_heads,), float(gain), dtype=torch.float32))
        check_gain_is_used(order, self.gain)

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
        return twicing_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            order=self.order,
            gain=self.gain,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The formula in words, for print(model) and the report of a conversion."""
        gain = f"gain {self.gain:g}" if isinstance(self.gain, float) else "gain learned per head"
        how = "" if self.backend == "auto" else f", backend {self.backend}"
        return f"order {self.order}, {gain}{how}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.half() would leave a learned gain with three digits, too few for small steps to change it.
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)
