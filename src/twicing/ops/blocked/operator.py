"""The operator in torch's registry: what autograd, torch.compile and vmap see."""

from typing import Any

import torch
from torch import Tensor

from twicing.ops.blocked.backward import Backward, Gradients, Saved
from twicing.ops.blocked.forward import Forward, Result
from twicing.ops.blocked.walk import Walk
from twicing.ops.custom_op import one_by_one


@torch.library.custom_op("twicing::blocked_forward", mutates_args=(), device_types="cpu")
def blocked_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    gain: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    is_training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U; and for the backward, where is_training, O = A V, and shift and c (see forward.py), [B, H, N, 1].

    query [B, H, N, D]; key, value [B, H or a divisor, N, D]; attn_mask [B or 1, H or 1, N or 1, N or 1]; gain [H or 1].
    """
    walk = Walk(query, key, value, attn_mask, gain, seed, dropout_p, is_causal, scale, "forward")
    width = value.shape[-1]
    output = _output_of(query, width)
    kept = (walk.empty(width), walk.empty(1), walk.empty(1)) if is_training else None
    scratch = walk.scratch
    forward = Forward(walk.plan, width, scratch, is_causal=is_causal, has_dropout=seed is not None)
    forgotten = [scratch.take(walk.plan.heads, walk.tokens, columns) for columns in (width, 1, 1)]
    for box in walk.boxes():
        rest = [room[: len(box)] for room in forgotten] if kept is None else [part[box.flat] for part in kept]
        forward.run(walk.heads_of(box), Result(output[box.batch, box.heads], *rest))
    smoothed, shift, inverse = (
        query.new_empty(0) if kept is None else kept[part].view(*query.shape[:-1], columns)
        for part, columns in enumerate((width, 1, 1))
    )
    return output, smoothed, shift, inverse


def _output_of(query: Tensor, width: int) -> Tensor:
    """Room for U, [B, H, N, Dv]; as SDPA has it, with the heads of a token side by side where the query has them so."""
    batch, heads, tokens, _ = query.shape
    if query.is_contiguous():
        return query.new_empty(batch, heads, tokens, width)
    return query.new_empty(batch, tokens, heads, width).transpose(1, 2)


@torch.library.custom_op("twicing::blocked_backward", mutates_args=(), device_types="cpu")
def blocked_backward(
    upstream: Tensor,
    output: Tensor,
    smoothed: Tensor,
    shift: Tensor,
    inverse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    gain: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    needs_d_gain: bool,
    needs_d_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value, gain and attn_mask; of the last two where needed, otherwise empty tensors."""
    walk = Walk(query, key, value, attn_mask, gain, seed, dropout_p, is_causal, scale, "backward")
    d_query, d_key, d_value = (walk.empty(tensor.shape[-1]) for tensor in (query, query, value))
    d_gain = torch.zeros(walk.count, 1, 1, dtype=walk.dtype) if needs_d_gain else None
    d_mask = None
    if attn_mask is not None and needs_d_mask:
        d_mask = torch.zeros(attn_mask.shape, dtype=walk.dtype)
    is_shifted = bool(shift.any())
    widths = query.shape[-1], value.shape[-1]
    backward = Backward(walk.plan, *widths, walk.scratch, has_dropout=seed is not None)
    for box in walk.boxes():
        gradients = Gradients(
            query=d_query[box.flat],
            key=d_key[box.flat],
            value=d_value[box.flat],
            gain=None if d_gain is None else d_gain[box.flat],
            attn_mask=None if d_mask is None else walk.mask_part(d_mask, box),
        )
        saved = Saved(
            upstream=walk.part("upstream", upstream, box),
            output=walk.part("output", output, box),
            smoothed=walk.part("smoothed", smoothed, box),
            shift=walk.part("shift", shift, box) if is_shifted else None,
            inverse=walk.part("inverse", inverse, box),
        )
        backward.run(walk.heads_of(box), saved, gradients)
    return (
        walk.to_heads_of(query, d_query),
        walk.to_heads_of(key, d_key),
        walk.to_heads_of(value, d_value),
        gain.new_empty(0) if d_gain is None else walk.to_gains_of(gain, d_gain),
        query.new_empty(0) if attn_mask is None or d_mask is None else d_mask.to(attn_mask.dtype),
    )


@blocked_forward.register_fake
def _fake_forward(query: Tensor, _key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, of_rows = ((*query.shape[:-1], width) for width in (value.shape[-1], 1))
    is_training = others[-1]
    if not is_training:
        return _output_of(query, value.shape[-1]), query.new_empty(0), query.new_empty(0), query.new_empty(0)
    wide = torch.promote_types(query.dtype, torch.float32)
    smoothed, shift, inverse = (query.new_empty(size, dtype=wide) for size in (shape, of_rows, of_rows))
    return _output_of(query, value.shape[-1]), smoothed, shift, inverse


@blocked_backward.register_fake
def _fake_backward(*inputs: Any) -> Any:
    *_, query, key, value, attn_mask, gain, _, _, _, _, needs_d_gain, needs_d_mask = inputs
    d_gain = gain.new_empty(gain.shape if needs_d_gain else 0)
    d_mask = attn_mask.new_empty(attn_mask.shape) if needs_d_mask else query.new_empty(0)
    return *(tensor.new_empty(tensor.shape) for tensor in (query, key, value)), d_gain, d_mask


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, dropout_p, is_causal, scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = dropout_p, is_causal, scale
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *inputs, output, smoothed, shift, inverse = ctx.saved_tensors
    if upstream is None:
        return (None,) * 10
    _, _, _, needs_d_mask, needs_d_gain, *_ = ctx.needs_input_grad
    needs = needs_d_gain, needs_d_mask
    gradients = blocked_backward(upstream, output, smoothed, shift, inverse, *inputs, *ctx.options, *needs)
    d_query, d_key, d_value, d_gain, d_mask = gradients
    return d_query, d_key, d_value, d_mask if needs_d_mask else None, d_gain if needs_d_gain else None, *(None,) * 5


def _refuse_second_derivative(_ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "backend='blocked' has a first derivative only ('auto' takes it where it is faster). Use backend='reference', "
        "which can be differentiated twice."
    )


blocked_forward.register_autograd(_differentiate, setup_context=_save)
blocked_backward.register_autograd(_refuse_second_derivative)
blocked_forward.register_vmap(one_by_one(blocked_forward))
blocked_backward.register_vmap(one_by_one(blocked_backward))
