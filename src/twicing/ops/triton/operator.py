"""The operator in torch's registry: what autograd, torch.compile and vmap see. It registers without triton."""

from typing import Any

import torch
from torch import Tensor

from twicing.ops.custom_op import one_by_one
from twicing.ops.triton import launch


@torch.library.custom_op("twicing::triton_forward", mutates_args=())
def triton_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    gain: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    order: int,
    is_training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """U; and for the backward, where is_training, O = A V (with order 2) and the row terms (see forward_kernels.py).

    query [B, H, N, D]; key, value [B, H or a divisor, N, D or Dv]; key_mask [B or 1, H or 1, N], bool; gain [H or 1];
    seed [1].
    """
    problem = launch.Problem(query, key, value, key_mask, gain, seed, dropout_p, is_causal, scale, order)
    return launch.forward(problem, is_training)


@torch.library.custom_op("twicing::triton_backward", mutates_args=())
def triton_backward(
    upstream: Tensor,
    output: Tensor,
    smoothed: Tensor,
    row_terms: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    gain: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    order: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and gain."""
    problem = launch.Problem(query, key, value, key_mask, gain, seed, dropout_p, is_causal, scale, order)
    *gradients, d_gain = launch.backward(problem, upstream, output, smoothed, row_terms)
    d_gain = d_gain.sum().reshape(1) if len(gain) == 1 else d_gain.sum(0)
    return gradients[0], gradients[1], gradients[2], d_gain.to(gain.dtype)


@triton_forward.register_fake
def _fake_forward(query: Tensor, _key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*query.shape[:-1], value.shape[-1])
    order, is_training = others[-2:]
    smoothed = query.new_empty(shape if is_training and order == 2 else 0)
    terms = query.new_empty((2, *query.shape[:-1]) if is_training else 0, dtype=torch.float32)
    return query.new_empty(shape), smoothed, terms


@triton_backward.register_fake
def _fake_backward(_upstream: Tensor, _output: Tensor, _smoothed: Tensor, _terms: Tensor, *inputs: Any) -> Any:
    query, key, value, _, gain, *_ = inputs
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value, gain))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, dropout_p, is_causal, scale, order, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = dropout_p, is_causal, scale, order
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *tensors, output, smoothed, row_terms = ctx.saved_tensors
    if upstream is None:
        return (None,) * 11
    d_query, d_key, d_value, d_gain = triton_backward(upstream, output, smoothed, row_terms, *tensors, *ctx.options)
    return d_query, d_key, d_value, None, d_gain if ctx.needs_input_grad[4] else None, *(None,) * 6


def _refuse_second_derivative(_ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "backend='triton' has a first derivative only. Use backend='reference', which can be differentiated twice."
    )


triton_forward.register_autograd(_differentiate, setup_context=_save)
triton_backward.register_autograd(_refuse_second_derivative)
triton_forward.register_vmap(one_by_one(triton_forward))
triton_backward.register_vmap(one_by_one(triton_backward))
