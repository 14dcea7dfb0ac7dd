"""Cached decoding in transformers' models: residuals beside the keys and values of its own caches.

R = (1 + g) V - g A V of a token is final once its row of A is there (arXiv 2503.00687, Definition 2, causal). A layer
of transformers' Cache keeps K and V; an empty one is exchanged for one that keeps R as well, and whatever a generation
does with K and V (reordering beams, cropping rejected guesses, ...) is done with R.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer


class _Growing:
    """What layers that grow do with residuals. They hold as many as the host holds keys."""

    keys: Tensor | None
    values: Tensor | None
    device: torch.device
    is_initialized: bool
    residuals: Tensor | None
    twicing_rule: tuple[int, float | None]
    twicing_pending: bool
    twicing_unusable: str | None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the host's; until the residuals of these tokens are added, there is no next step."""
        _begin(self)
        return _host(self).update(key_states, value_states, *args, **kwargs)

    def add_residuals(self, new: Tensor, seen: int) -> Tensor:
        """Keep the residuals of the newest tokens, [B, H, n, Dv]; returns those of the last `seen`, [B, H, S, Dv]."""
        every = new if self.residuals is None else torch.cat([self.residuals, new], dim=-2)
        # A layer with a sliding window has forgotten keys by now that these tokens still saw.
        kept = new.shape[2] if self.keys is None else self.keys.shape[2]
        self.residuals = every[:, :, every.shape[2] - kept :]
        self.twicing_pending = False
        return every[:, :, every.shape[2] - seen :]

    def new_values(self, values: Tensor, tokens: int) -> Tensor:
        """Those of the values of all tokens, [B, H, S, Dv], that the newest tokens brought."""
        return values[:, :, values.shape[2] - tokens :]

    def reorder_cache(self, beam_idx: Any) -> None:
        """Let sequence b go on from what was sequence beam_idx[b]."""
        _host(self).reorder_cache(beam_idx)
        if self.residuals is not None:
            self.residuals = self.residuals.index_select(0, beam_idx.to(self.residuals.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; the host counts them as a negative number."""
        _host(self).crop(tokens_to_remove)
        if self.residuals is not None and self.keys is not None:
            end = self.residuals.shape[2] - abs(tokens_to_remove)
            self.residuals = self.residuals[:, :, end - self.keys.shape[2] : end]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put copies of each sequence in its place, side by side."""
        _host(self).batch_repeat_interleave(repeats)
        if self.residuals is not None:
            self.residuals = self.residuals.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences only."""
        _host(self).batch_select_indices(indices)
        if self.residuals is not None:
            self.residuals = self.residuals[indices, ...]

    def reset(self) -> None:
        """Forget everything."""
        # transformers 5.17 zeroes keys and values instead, and the next step would attend to these zeros.
        self.keys = self.values = None
        self.is_initialized = False
        _host(self).reset()
        prepare(self, self.twicing_rule)

    def offload(self) -> None:
        """Move everything to the CPU."""
        _host(self).offload()
        _move(self, "cpu")

    def prefetch(self) -> None:
        """Move everything back."""
        _host(self).prefetch()
        if self.is_initialized:
            _move(self, self.device)


class ResidualDynamicLayer(_Growing, DynamicLayer):
    """A layer of a Cache that keeps every token, and residuals too. Layers of a cache become it."""


class ResidualSlidingLayer(_Growing, DynamicSlidingWindowLayer):
    """A layer of a Cache that keeps the tokens of a window, and their residuals. Layers become it."""


class ResidualStaticLayer(StaticLayer):
    """A layer of a Cache of fixed size, written in place, that keeps residuals too. Layers become it."""

    residuals: Tensor | None
    twicing_rule: tuple[int, float | None]
    twicing_pending: bool
    twicing_unusable: str | None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the host's; until the residuals of these tokens are added, there is no next step."""
        _begin(self)
        return super().update(key_states, value_states, *args, **kwargs)

    def add_residuals(self, new: Tensor, seen: int) -> Tensor:
        """Keep the residuals of the newest tokens, [B, H, n, Dv]; returns the first `seen` there are, [B, H, S, Dv]."""
        if self.residuals is None:
            # Zeros, since what is not there yet is multiplied by the zeros of A.
            self.residuals = new.new_zeros(*new.shape[:2], self.max_cache_len, new.shape[3])
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.residuals)
        self.residuals.index_copy_(2, self._newest(new.shape[2]), new.to(self.residuals.dtype))
        self.twicing_pending = False
        return self.residuals[:, :, :seen]

    def new_values(self, values: Tensor, tokens: int) -> Tensor:
        """Those of the values of all tokens, [B, H, S, Dv], that the newest tokens brought."""
        return values.index_select(2, self._newest(tokens))

    def reorder_cache(self, beam_idx: Any) -> None:
        """Let sequence b go on from what was sequence beam_idx[b]."""
        super().reorder_cache(beam_idx)
        if self.residuals is not None:
            self.residuals = self.residuals.index_select(0, beam_idx.to(self.residuals.device))

    def reset(self) -> None:
        """Forget everything, and keep the memory."""
        super().reset()
        kept = self.residuals
        prepare(self, self.twicing_rule)
        self.residuals = None if kept is None else kept.zero_()

    def offload(self) -> None:
        """Move everything to the CPU."""
        super().offload()
        _move(self, "cpu")

    def prefetch(self) -> None:
        """Move everything back."""
        super().prefetch()
        if self.is_initialized:
            _move(self, self.device)

    def _newest(self, tokens: int) -> Tensor:
        # The length is a tensor, which the host has advanced already.
        return torch.arange(tokens, device=self.cumulative_length.device) + self.cumulative_length - tokens


ResidualLayer = ResidualDynamicLayer | ResidualSlidingLayer | ResidualStaticLayer
BECOMES: dict[type, Any] = {
    DynamicLayer: ResidualDynamicLayer,
    DynamicSlidingWindowLayer: ResidualSlidingLayer,
    StaticLayer: ResidualStaticLayer,
}


def _host(layer: Any) -> Any:
    """The layer as the host's own class has it."""
    return super(_Growing, layer)


def _move(layer: Any, device: torch.device | str) -> None:
    if layer.residuals is not None:
        layer.residuals = layer.residuals.to(device, non_blocking=True)


def prepare(layer: Any, rule: tuple[int, float | None]) -> None:
    """Let a layer hold no residuals yet. rule: the order and gain they will be made with, None where it is learned."""
    layer.residuals = None
    layer.twicing_rule = rule
    layer.twicing_pending = False
    layer.twicing_unusable = None


def _begin(layer: Any) -> None:
    if layer.twicing_unusable is not None:
        raise ValueError(layer.twicing_unusable)
    if layer.twicing_pending:
        raise ValueError(
            "This cache got keys and values without their residuals: it is used by a layer that is not converted any "
            "more, or a step failed midway. Start a new one."
        )
    layer.twicing_pending = True
