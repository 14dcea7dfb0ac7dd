"""Twicing on the CPU at little more than the cost of its arithmetic: a few heads at a time, A in a buffer in the cache.

Its own backward keeps nothing of size N x N (the algebra is in forward.py and backward.py). No compiler is needed.
"""

import math

import torch
from torch import Tensor

from twicing.ops.blocked.operator import blocked_forward
from twicing.ops.call import Call
from twicing.ops.custom_op import (
    carries_tangents,
    four_axes,
    inside_torch_func_derivative,
    mask_with_four_axes,
)

ABOUT = "on the CPU: a few heads at a time, A in reused buffers of some MiB, with its own backward; O(N) memory"

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuses(call: Call) -> str | None:
    """Other devices, dtypes and orders are refused, and derivatives by torch.func and in forward mode."""
    instead = "Use backend='sdpa' or 'reference' (or 'auto')."
    if call.query.device.type != "cpu":
        return f"it works on the CPU, and the query is on {call.query.device}. {instead}"
    if call.query.dtype not in DTYPES:
        return f"it computes in {', '.join(map(str, DTYPES))}, and the query is {call.query.dtype}. {instead}"
    if call.order != 2:
        return f"it has order 2 only, and the order is {call.order}. {instead}"
    if inside_torch_func_derivative():
        return f"torch.func.grad and its kin cannot differentiate an operator with its own backward. {instead}"
    if carries_tangents(call):
        return "it has no forward-mode derivative. Use backend='reference'."
    return None


def run(call: Call) -> Tensor:
    """U = A R, A made once. Dropout draws a seed from torch's default generator, as SDPA draws its mask."""
    qkv, batch, heads = four_axes(call)
    mask = None if call.attn_mask is None else mask_with_four_axes(call.attn_mask, batch)
    gain = call.gain if isinstance(call.gain, Tensor) else torch.full((1,), call.gain, dtype=torch.float64)
    inputs = (*qkv, mask, gain.reshape(-1))
    seed = torch.randint(1 << 62, ()) if call.dropout_p > 0.0 else None
    # A width of 0 makes every score 0, whatever the scale.
    scale = 1.0 / math.sqrt(max(call.query.shape[-1], 1)) if call.scale is None else call.scale
    is_training = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    output, *_ = blocked_forward(*inputs, seed, call.dropout_p, call.is_causal, scale, is_training)
    return output.reshape(*batch, *heads, *output.shape[-2:])
