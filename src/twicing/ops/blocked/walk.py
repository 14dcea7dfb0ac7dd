"""The walk over the heads of a call, box by box, in the dtype of its sums: fp32, or fp64 for fp64."""

from collections.abc import Iterator

import torch
from torch import Tensor

from twicing.ops.blocked.plan import KEPT_BYTES, Box, boxes, plan
from twicing.ops.blocked.weights import Dropout, Heads

# Numbers in all of A, below which waking threads costs more than they save.
WORTH_THREADS = 1 << 19


class Walk:
    """A call of the operator, whose arguments these are. count: its heads, B H."""

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
    ):
        self.query, self.key, self.value, self.attn_mask = query, key, value, attn_mask
        self.batch, self.heads, self.tokens, _ = query.shape
        self.count = self.batch * self.heads
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.gain = gain.to(self.dtype).expand(self.batch, self.heads).reshape(self.count, 1, 1)
        self.gain_and_one = 1.0 + self.gain
        self.dropout = None if seed is None else Dropout(dropout_p, int(seed.item()))
        self.is_causal, self.scale = is_causal, scale
        self.plan = plan(self.count, self.tokens, self.dtype.itemsize, is_causal=is_causal)

    def empty(self, width: int) -> Tensor:
        """Room for a result of every head, [B H, N, width]."""
        return torch.empty(self.count, self.tokens, width, dtype=self.dtype)

    def threads(self) -> int:
        """How many threads share the boxes: all that torch uses, if that is worth it and what they keep has room."""
        most = min(torch.get_num_threads(), self.count)
        if self.count * self.tokens**2 < WORTH_THREADS or most * self.plan.kept_size * self.dtype.itemsize > KEPT_BYTES:
            return 1
        return most

    def boxes(self, threads: int) -> Iterator[Box]:
        """Every box of heads, small enough that each thread gets some."""
        if self.count * self.tokens == 0:
            return iter(())
        return boxes(self.batch, self.heads, min(self.plan.heads, -(-self.count // threads)))

    def heads_of(self, box: Box) -> Heads:
        """What the heads of a box are computed from."""
        return Heads(
            query=self.part(self.query, box),
            key=self.part(self.key, box),
            value=self.part(self.value, box),
            gain=self.gain[box.flat],
            gain_and_one=self.gain_and_one[box.flat],
            attn_mask=None if self.attn_mask is None else self.mask_part(self.attn_mask, box),
            box_shape=box.shape,
            first=box.flat.start,
            scale=self.scale,
            is_causal=self.is_causal,
            dropout=self.dropout,
        )

    def part(self, tensor: Tensor, box: Box) -> Tensor:
        """The heads of a box, [G, N, D]; keys and values that serve several queries are repeated."""
        repeats = self.heads // tensor.shape[1]
        part = tensor[box.batch]
        if repeats > 1:
            part = part[:, torch.arange(box.heads.start, box.heads.stop) // repeats]
        elif box.shape[1] < self.heads:
            part = part[:, box.heads]
        return part.reshape(-1, *tensor.shape[2:]).to(self.dtype)

    def mask_part(self, mask: Tensor, box: Box) -> Tensor:
        """The mask of a box, with the axes of length 1 that it has."""
        batch = box.batch if mask.shape[0] > 1 else slice(0, 1)
        heads = box.heads if mask.shape[1] > 1 else slice(0, 1)
        return mask[batch, heads]

    def to_heads_of(self, tensor: Tensor, gradient: Tensor) -> Tensor:
        """A gradient of every query head, summed over those that a head of the tensor serves, in the tensor's dtype."""
        if tensor.shape[1] != self.heads:
            gradient = gradient.view(self.batch, tensor.shape[1], -1, *tensor.shape[2:]).sum(2)
        return gradient.view(tensor.shape).to(tensor.dtype)

    def to_gains_of(self, gain: Tensor, gradient: Tensor) -> Tensor:
        """A gradient of every head's gain, [B H, 1, 1], summed over batch entries, and heads if they share one."""
        return gradient.view(self.batch, self.heads).sum(0).sum_to_size(gain.shape).to(gain.dtype)
