"""See what the attention layers of a model are called with, without changing a bit of what the model computes.

Fused kernels never form the attention matrix A. Queries, keys and masks are enough to compute it again, layer by layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from twicing.adapters.site import is_converted, mechanism_of
from twicing.adapters.surgery import AttentionSite
from twicing.analysis.capture import in_backward, sites_to_look_into
from twicing.ops.autocast import as_autocast
from twicing.ops.call import to_query_heads
from twicing.ops.reference import attention_matrix


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What one attention layer was called with, in the terms of scaled_dot_product_attention.

    query: [B, H, N, D]; key, value: [B, H or fewer, N, D]; detached, and in the dtype that the kernel sees them in.
    attn_mask: bool (True = attend) or float (added to the scores), broadcastable to [B, H, N, N], or None.
    scale: None is 1 / sqrt(D). enable_gqa: whether keys and values may have fewer heads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def matrix(self) -> Tensor:
        """A = softmax(scale Q K^T + mask), [B, H, N, N]: what standard attention would mix the values with.

        In float32, or float64 where the query is. The row of a query that may attend to nothing is zero. A converted
        layer mixes with a function of A, such as 2 A - A A for twicing: see twicing.effective_matrix().
        """
        wide = torch.promote_types(self.query.dtype, torch.float32)
        mask = self.attn_mask
        if mask is not None and mask.is_floating_point():
            mask = mask.to(wide)
        return attention_matrix(
            self.query.to(wide), self.key.to(wide), mask, self.is_causal, self.scale, self.enable_gqa
        )

    def values(self) -> Tensor:
        """V, [B, H, N, D]: repeated to the heads of the query where it has fewer."""
        return to_query_heads(self.value, self.query, self.enable_gqa)


class RecordedAttention:
    """What record_attention() recorded: for every layer one tensor per call of it, in the order of the calls.

    layers: the layer numbers, counted from 1.
    """

    def __init__(self, layers: tuple[int, ...]):
        self.layers = layers
        self._chunks: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def forwards(self, layer: int) -> list[Tensor]:
        """What `reduce` made of each call of the layer."""
        if layer not in self._chunks:
            raise KeyError(f"nothing is recorded of layer {layer}: there are the layers {list(self.layers)}.")
        return self._chunks[layer]

    def tensor(self, layer: int) -> Tensor:
        """All calls together, concatenated along the first axis."""
        return torch.cat(self.forwards(layer))

    def _check(self) -> None:
        counts = {layer: len(chunks) for layer, chunks in self._chunks.items()}
        most = max(counts.values())
        if most == 0:
            raise RuntimeError(
                "nothing was recorded: run the model itself inside `with record_attention(model, reduce=...)`. "
                "If it ran, its hooks did not fire, as in a compiled or scripted copy: run the plain one."
            )
        uneven = [f"layer {layer}: {count}" for layer, count in counts.items() if count != most]
        if uneven:
            raise RuntimeError(
                f"only a part was recorded: {most} calls of a layer were seen, but {'; '.join(uneven)}. Those did not "
                "run as modules (skipped, compiled, or replaced by a fused path): run the plain model."
            )


@contextmanager
def record_attention(model: nn.Module, *, reduce: Callable[[AttentionInputs], Tensor]) -> Iterator[RecordedAttention]:
    """Record of every attention layer's inputs what `reduce` makes of them, while the block runs.

    `with record_attention(model, reduce=lambda inputs: inputs.matrix().mean(1)) as recorded: model(images)`
    reduce: called once per layer and forward, with autocast off and without gradients; it must not write into what it
    gets. Only a copy of what it returns is kept, so memory is bounded by that.
    A converted layer is seen at its mechanism, any other at its call of scaled_dot_product_attention, which itself is
    not touched. Recomputations by activation checkpointing are not recorded. Everything is removed at the end in any
    case. The model must run in the thread that opened the block.
    Raises ValueError for a model without attention layers that the library knows, or a compiled one; RuntimeError
    where a layer does not call scaled_dot_product_attention, or where nothing, or not every layer, was recorded.
    """
    sites = sites_to_look_into(model)
    recorded = RecordedAttention(tuple(site.layer for site in sites))
    watches = [_Watch(site, recorded.forwards(site.layer), reduce) for site in sites]
    try:
        for watch in watches:
            watch.attach()
        yield recorded
    finally:
        for watch in watches:
            watch.detach()
    recorded._check()


class _Watch(TorchFunctionMode):
    """Sees the calls of scaled_dot_product_attention inside one layer, or those of its mechanism; all go through."""

    def __init__(self, site: AttentionSite, kept: list[Tensor], reduce: Callable[[AttentionInputs], Tensor]):
        super().__init__()
        self._site, self._kept, self._reduce = site, kept, reduce
        self._handles: list[RemovableHandle] = []
        self._calls: int | None = None

    def attach(self) -> None:
        attention = self._site.attention
        self._handles = [
            attention.register_forward_pre_hook(self._begin),
            attention.register_forward_hook(self._end, always_call=True),
        ]
        if is_converted(attention):
            mechanism = mechanism_of(attention)
            self._handles.append(mechanism.register_forward_pre_hook(self._before_mechanism, with_kwargs=True))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        # Ctrl-C inside the layer passes by its hooks.
        self._close()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._see(*args, **kwargs)
        return func(*args, **kwargs)

    def _begin(self, attention: nn.Module, _args: tuple[Any, ...]) -> None:
        if in_backward():
            return
        self._calls = 0
        if not is_converted(attention):
            self.__enter__()

    def _end(self, _attention: nn.Module, _args: tuple[Any, ...], output: object) -> None:
        calls = self._close()
        # After an error in the layer there is no output, and the error is to be seen.
        if calls is None or calls == 1 or output is None:
            return
        if is_converted(self._site.attention):
            raise RuntimeError(
                f"{self._site} ran its mechanism {calls or 'no'} times: expected once, so that it is known what it "
                "attends with. Run it without a cache (transformers: use_cache=False)."
            )
        raise RuntimeError(
            f"{self._site} called scaled_dot_product_attention {calls or 'no'} times: expected once, so that it is "
            "known what it attends with. Switch the host to it (timm: block.attn.fused_attn = True; transformers: "
            "attn_implementation='sdpa'), or convert the model to 'standard', which calls it."
        )

    def _close(self) -> int | None:
        calls, self._calls = self._calls, None
        if calls is not None and not is_converted(self._site.attention):
            self.__exit__(None, None, None)
        return calls

    def _before_mechanism(self, _mechanism: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._calls is not None:
            self._see(*args, **{name: value for name, value in kwargs.items() if name != "context"})

    def _see(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # noqa: ARG002
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        assert self._calls is not None
        self._calls += 1
        with torch.no_grad():
            inputs = AttentionInputs(
                as_autocast(query.detach()),
                as_autocast(key.detach()),
                as_autocast(value.detach()),
                None if attn_mask is None else as_autocast(attn_mask.detach()),
                is_causal,
                scale,
                enable_gqa,
            )
            with torch.autocast(query.device.type, enabled=False):
                # A copy: the model may write over its tensors later, and a view would keep them alive.
                self._kept.append(self._reduce(inputs).clone())
