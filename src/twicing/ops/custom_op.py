"""What operators of our own in torch's registry share: four axes, a rule for vmap, and what torch.func cannot do."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from twicing.ops.call import Call

Operator = Callable[..., tuple[Tensor, ...]]


def four_axes(call: Call) -> tuple[tuple[Tensor, Tensor, Tensor], torch.Size, torch.Size]:
    """Query, key and value as [B, H, N, D] (key and value with their own heads), and the axes that are B and H."""
    query, key, value = call.query, call.key, call.value
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        # As models call it; what follows would give the same, and take longer than a small kernel.
        return (query, key, value), query.shape[:1], query.shape[1:2]
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    heads = query.shape[-3:-2]
    if not call.enable_gqa:
        heads = torch.broadcast_shapes(heads, key.shape[-3:-2], value.shape[-3:-2])
    key_heads = key.shape[-3:-2] if call.enable_gqa else heads
    inputs = (_expanded(query, batch, heads), _expanded(key, batch, key_heads), _expanded(value, batch, key_heads))
    return inputs, batch, heads


def mask_with_four_axes(mask: Tensor, batch: torch.Size) -> Tensor:
    """A mask that broadcasts to [..., H, N, N] as [B or 1, H or 1, N or 1, N or 1]."""
    last = (*(1,) * (3 - mask.dim()), *mask.shape[-3:])
    if math.prod(mask.shape[:-3]) == 1:
        return mask.reshape(1, *last)
    return mask.expand(*batch, *last).reshape(math.prod(batch), *last)


def inside_torch_func_derivative() -> bool:
    """Whether torch.func.grad, vjp, jvp or the like is at work. (Under torch.compile, torch says so itself.)"""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    derivatives = (functorch.TransformType.Grad, functorch.TransformType.Jvp)
    return any(level.key() in derivatives for level in functorch.get_interpreter_stack() or ())


def carries_tangents(call: Call) -> bool:
    """Whether torch.autograd.forward_ad is at work on the call: operators of ours would drop tangents in silence."""
    tensors = (call.query, call.key, call.value, call.attn_mask, call.gain)
    return any(isinstance(tensor, Tensor) and unpack_dual(tensor).tangent is not None for tensor in tensors)


def one_by_one(operator: Operator) -> Callable[..., Any]:
    """The vmap rule of an operator: one call after the other."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        calls = (
            [x if dim is None else x.select(dim, index) for x, dim in zip(inputs, in_dims, strict=True)]
            for index in range(info.batch_size)
        )
        stacked = tuple(torch.stack(results) for results in zip(*(operator(*call) for call in calls), strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _expanded(tensor: Tensor, batch: torch.Size, heads: torch.Size) -> Tensor:
    """[..., N, D] broadcast to its leading axes, as [B, H, N, D]."""
    last = tensor.shape[-2:]
    return tensor.expand(*batch, *heads, *last).reshape(math.prod(batch), math.prod(heads), *last)
