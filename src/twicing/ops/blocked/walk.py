"""The walk over the heads of a call, box by box, in the dtype of its sums: fp32, or fp64 for fp64."""

from collections.abc import Iterator

import torch
from torch import Tensor

from twicing.ops.blocked.plan import Box, boxes, plan
from twicing.ops.blocked.scratch import Scratch
from twicing.ops.blocked.weights import Dropout, Heads


class Walk:
    """A call of the operator, whose arguments these are, forward or backward. count: its heads, B H."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        gain: Tensor,
        seed: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float,
        direction: str,
    ):
        self.batch, self.heads, self.tokens, _ = query.shape
        self.count = self.batch * self.heads
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.query, self.key, self.value = query, key, value
        self.attn_mask = attn_mask
        gains = gain if len(gain) == 1 else gain.expand(self.batch, self.heads)
        self.gain = gains.to(self.dtype).reshape(-1, 1, 1)
        self.gain_and_one, self.minus_gain = 1.0 + self.gain, -self.gain
        self.dropout = None if seed is None else Dropout(dropout_p, int(seed.item()))
        self.is_causal, self.scale = is_causal, scale
        self.plan = plan(
            self.count,
            self.tokens,
            self.dtype.itemsize,
            is_causal=is_causal,
            direction=direction,
            has_dropout=self.dropout is not None,
        )
        self.scratch = Scratch(self.dtype)
        self.rooms: dict[str, Tensor] = {}

    def empty(self, width: int) -> Tensor:
        """Room for a result of every head, [B H, N, width]."""
        return torch.empty(self.count, self.tokens, width, dtype=self.dtype)

    def boxes(self) -> Iterator[Box]:
        """Every box of heads."""
        return boxes(self.batch, self.heads, self.plan.heads) if self.count * self.tokens else iter(())

    def heads_of(self, box: Box) -> Heads:
        """What the heads of a box are computed from."""
        gains = self.minus_gain, self.gain_and_one
        if len(self.gain) > 1:
            gains = self.minus_gain[box.flat], self.gain_and_one[box.flat]
        return Heads(
            query=self.part("query", self.query, box),
            key=self.part("key", self.key, box),
            value=self.part("value", self.value, box),
            minus_gain=gains[0],
            gain_and_one=gains[1],
            attn_mask=None if self.attn_mask is None else self.mask_part(self.attn_mask, box),
            box_shape=box.shape,
            first=box.flat.start,
            scale=self.scale,
            is_causal=self.is_causal,
            dropout=self.dropout,
        )

    def part(self, name: str, tensor: Tensor, box: Box) -> Tensor:
        """The heads of a box, [G, N, D], of [B, h, N, D], in the dtype of the sums, copied where they lie apart.

        Keys and values that serve several queries are repeated. A copy ends with the next one of the same name: it lies
        in scratch memory, since models hand over strided heads, and fresh pages cost more than the copy itself.
        """
        heads: slice | Tensor = box.heads
        if tensor.shape[1] != self.heads:
            heads = torch.arange(box.heads.start, box.heads.stop) // (self.heads // tensor.shape[1])
        part = tensor[box.batch, heads]
        if part.dtype == self.dtype and part.is_contiguous():
            return part.view(len(box), *tensor.shape[2:])
        if name not in self.rooms:
            self.rooms[name] = self.scratch.take(self.plan.heads, *tensor.shape[2:])
        room = self.rooms[name][: len(box)]
        room.view(part.shape).copy_(part)
        return room

    def mask_part(self, mask: Tensor, box: Box) -> Tensor:
        """The mask of a box, with the axes of length 1 that it has."""
        batch = box.batch if mask.shape[0] > 1 else slice(0, 1)
        heads = box.heads if mask.shape[1] > 1 else slice(0, 1)
        return mask[batch, heads]

    def to_heads_of(self, tensor: Tensor, gradient: Tensor) -> Tensor:
        """A gradient of every query head, summed over those that a head of the tensor serves, in the tensor's dtype."""
        if tensor.shape[1] != self.heads:
            served = self.heads // tensor.shape[1]
            gradient = gradient.view(self.batch, tensor.shape[1], served, *tensor.shape[2:]).sum(2)
        return gradient.view(tensor.shape).to(tensor.dtype)

    def to_gains_of(self, gain: Tensor, gradient: Tensor) -> Tensor:
        """A gradient of every head's gain, [B H, 1, 1], summed over batch entries, and heads if they share one."""
        return gradient.view(self.batch, self.heads).sum(0).sum_to_size(gain.shape).to(gain.dtype)
