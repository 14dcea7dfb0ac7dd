"""What cached decoding keeps of the tokens so far: keys, values, and the residuals without which twicing goes wrong.

With only the newest rows of A at hand, V - A V cannot be formed for the tokens before. But causal rows never change, so
R = (1 + g) V - g A V is final, row by row, as soon as its token is there. arXiv 2503.00687, Definition 2.
"""

from typing import Self

import torch
from torch import Tensor

from twicing.ops.boost import check_order
from twicing.ops.call import check_gain_is_used


class DecodeState:
    """The cache of one attention layer for decode_step(): keys, values and residuals R = (1 + g) V - g A V.

    order: 2 is twicing; 1 is plain attention, which keeps no residuals.
    gain: g, as in twicing_attention(). It belongs to the state, since every cached residual was made with it.
    capacity: None grows with every step, copying what is there, and lets gradients through. A number of tokens
        allocates that much at the first step, writes in place, and never copies; it holds no graph.
    padding: [B], integers: how many tokens at the start of each sequence are padding. They are never attended to, and
        their outputs are zero. From a mask of the prompt, True where there is a token: `(~mask).sum(-1)`.

    Heads, widths, dtype and device are those of the first step. All methods change the state itself.
    Bytes per token are 1.5 times those of plain attention, and (2 + n) / 2 times where n query heads share a key head:
    R differs from query head to query head.
    Raises TypeError or ValueError where order, gain, capacity or padding are no such thing, or the order is above 2.
    """

    def __init__(
        self,
        *,
        order: int = 2,
        gain: float | Tensor = 1.0,
        capacity: int | None = None,
        padding: Tensor | None = None,
    ) -> None:
        check_order(order)
        if order > 2:
            raise ValueError(
                f"Cached decoding serves order 1 and 2: order {order} would need {order - 1} residuals for every token "
                "and head. Run the whole sequence through twicing_attention() instead."
            )
        check_gain_is_used(order, gain)
        if capacity is not None and (not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1):
            raise ValueError(f"capacity must be a positive number of tokens, or None to grow: got {capacity!r}.")
        if padding is not None and (padding.dim() != 1 or padding.is_floating_point() or padding.dtype == torch.bool):
            raise ValueError(
                "padding must be integers of shape [B], how many tokens at the start of each sequence to ignore: got "
                f"{padding.dtype} of shape {list(padding.shape)}."
            )
        self.order = order
        self.gain = gain
        self.capacity = capacity
        self.padding = padding
        self.length = 0
        # [B, heads, capacity, width], or as long as the last step made it; what lies beyond `length` means nothing.
        self._stored: dict[str, Tensor] = {}
        # What decode_step() found to fit: shapes, dtypes and devices of new tokens; None once they might no longer.
        self.checked_kind: object = None

    @property
    def keys(self) -> Tensor | None:
        """K of all tokens so far, [B, H_kv, length, D]; None before the first step."""
        return self._used("keys")

    @property
    def values(self) -> Tensor | None:
        """V of all tokens so far, [B, H_kv, length, Dv]; None before the first step."""
        return self._used("values")

    @property
    def residuals(self) -> Tensor | None:
        """R = (1 + g) V - g A V of all tokens, [B, H, length, Dv]; None before the first step, and for order 1."""
        return self._used("residuals")

    @property
    def lengths(self) -> Tensor | None:
        """How many tokens of each sequence are there, padding not counted, [B]; None before the first step."""
        keys = self.keys
        if keys is None:
            return None
        lengths = torch.full((keys.shape[0],), self.length, device=keys.device)
        return lengths if self.padding is None else (lengths - self.padding).clamp(min=0)

    @property
    def bytes_per_token(self) -> int:
        """Bytes kept for one token of one sequence, known after the first step (0 before)."""
        return sum(stored.shape[1] * stored.shape[3] * stored.element_size() for stored in self._stored.values())

    def crop(self, length: int) -> None:
        """Forget all tokens but the first `length`, padding counted: as after rejected guesses, or 0 to start again."""
        if not 0 <= length <= self.length:
            raise ValueError(f"crop() keeps between 0 and the {self.length} tokens that are there: got {length}.")
        self.length = length

    def reorder(self, index: Tensor) -> None:
        """Make sequence b a copy of what was sequence index[b], as beam search does; the batch may change its size.

        index: [any B], integers on the state's device.
        """
        check_sequences(index)
        self.checked_kind = None
        if self.padding is not None:
            self.padding = self.padding.index_select(0, index)
        for name, stored in self._stored.items():
            chosen = stored[:, :, : self.length].index_select(0, index)
            if self.capacity is None:
                self._stored[name] = chosen
                continue
            if len(index) != len(stored):
                self._stored[name] = stored.new_empty(len(index), *stored.shape[1:])
            self._stored[name][:, :, : self.length] = chosen

    def repeat(self, times: int) -> None:
        """Put `times` copies of each sequence in the place of each, side by side, as beam search starts."""
        keys = self.keys
        if keys is None:
            raise ValueError("repeat() needs sequences to copy: take the first step, the prompt, before it.")
        if times < 1:
            raise ValueError(f"repeat() makes at least 1 copy of each sequence: got {times}.")
        self.reorder(torch.arange(len(keys), device=keys.device).repeat_interleave(times))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move everything to the device, and what is kept of the tokens to the dtype; returns the state itself."""
        self.checked_kind = None
        for name, stored in self._stored.items():
            self._stored[name] = stored.to(device=device, dtype=dtype)
        if self.padding is not None:
            self.padding = self.padding.to(device=device)
        if isinstance(self.gain, Tensor):
            self.gain = self.gain.to(device=device)
        return self

    def check_fits(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raise where new tokens are of another kind than those that are there, or of another batch."""
        kind = key.dtype, key.device
        for name, like, heads in (("keys", key, key), ("values", value, value), ("residuals", value, query)):
            stored = self._stored.get(name)
            if stored is None:
                continue
            expected, got = (*stored.shape[:2], stored.shape[3]), (*heads.shape[:2], like.shape[3])
            if expected != got or (stored.dtype, stored.device) != kind:
                raise ValueError(
                    f"The state holds {name} [{expected[0]}, {expected[1]}, n, {expected[2]}] in {stored.dtype} on "
                    f"{stored.device}, and the new tokens would add [{got[0]}, {got[1]}, n, {got[2]}] in {key.dtype} "
                    f"on {key.device}: start another DecodeState for another batch, other heads or another dtype."
                )
        if self.padding is not None and (len(self.padding) != len(key) or self.padding.device != key.device):
            raise ValueError(
                f"The state's padding is for {len(self.padding)} sequences on {self.padding.device}, and the new "
                f"tokens are of {len(key)} on {key.device}."
            )

    def check_room(self, tokens: int) -> None:
        """Raise where so many new tokens are more than there is room for."""
        if self.capacity is not None and self.length + tokens > self.capacity:
            raise ValueError(
                f"The state is full: of its {self.capacity} tokens {self.length} are taken, and {tokens} more were "
                "given. Make it with a larger capacity, or with capacity=None, so that it grows."
            )

    def extended(self, name: str, new: Tensor) -> Tensor:
        """What is kept under the name with the new tokens after it; they count once keep() is called."""
        before, after = self.length, self.length + new.shape[2]
        if self.capacity is None:
            old = [self._stored[name][:, :, :before]] if name in self._stored else []
            self._stored[name] = torch.cat([*old, new], dim=2)
            return self._stored[name]
        if name not in self._stored:
            self._stored[name] = new.new_empty(*new.shape[:2], self.capacity, new.shape[3])
        stored = self._stored[name]
        # Not by slices in brackets, which take torch longer to read.
        stored.narrow(2, before, new.shape[2]).copy_(new)
        return stored.narrow(2, 0, after)

    def keep(self, tokens: int) -> None:
        """Count the newest tokens, now that all about them is stored: a step that fails midway has added none."""
        self.length += tokens

    def _used(self, name: str) -> Tensor | None:
        stored = self._stored.get(name)
        return None if stored is None else stored[:, :, : self.length]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(stored.shape)} {stored.dtype}" for name, stored in self._stored.items())
        room = "growing" if self.capacity is None else f"of {self.capacity}"
        return f"DecodeState(order {self.order}, {self.length} tokens, {room}: {shapes or 'nothing stored yet'})"


def check_sequences(index: Tensor) -> None:
    """Raise ValueError unless index holds numbers of sequences, as reorder() takes them."""
    if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "reorder() takes the numbers of the sequences to go on with, int64 or int32 of shape [B]: got "
            f"{index.dtype} of shape {list(index.shape)}."
        )
