"""Twicing on a GPU by kernels of our own, forward and backward, with memory linear in N (see forward_kernels.py).

Triton is imported when a kernel is first needed. With TRITON_INTERPRET=1 set before that, Triton interprets the kernels
on the CPU: right, and hundreds of times slower, which is for tests only.
"""

import math
import os
from importlib.util import find_spec

import torch
from torch import Tensor

from twicing.ops.call import Call
from twicing.ops.custom_op import (
    carries_tangents,
    four_axes,
    inside_torch_func_derivative,
    mask_with_four_axes,
)
from twicing.ops.triton.operator import triton_forward

ABOUT = "on a GPU: fused kernels, forward and backward, deterministic; O(N) memory"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_WIDTH = 256


def _is_installed() -> bool:
    try:
        return find_spec("triton") is not None
    # Whoever blocks its import may raise where it is looked for.
    except ModuleNotFoundError:
        return False


# Once, and here: torch.compile cannot look into the import system.
HAS_TRITON = _is_installed()


def refuses(call: Call) -> str | None:
    """Other devices, dtypes, widths and orders are refused, all masks but those of keys, and torch.func derivatives."""
    instead = "Use backend='sdpa' or 'reference' (or 'auto')."
    query, value, mask = call.query, call.value, call.attn_mask
    if query.device.type not in ("cuda", "cpu") or (query.device.type == "cpu" and not _is_interpreting()):
        return f"it works on CUDA devices, and the query is on {query.device}. {instead}"
    if not HAS_TRITON:
        return f"it needs triton, which comes with torch for CUDA on Linux (pip install triton). {instead}"
    if query.dtype not in DTYPES:
        return f"it computes in {', '.join(map(str, DTYPES))}, and the query is {query.dtype}. {instead}"
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return f"Triton's interpreter computes torch.bfloat16 wrongly. {instead}"
    if call.order > 2:
        return f"it has orders 1 and 2 only, and the order is {call.order}. {instead}"
    if query.shape[-2] != call.key.shape[-2]:
        return f"it takes as many keys as queries, not {call.key.shape[-2]} and {query.shape[-2]}. {instead}"
    if not 1 <= min(query.shape[-1], value.shape[-1]) <= max(query.shape[-1], value.shape[-1]) <= MOST_WIDTH:
        return f"heads may be 1 to {MOST_WIDTH} wide, and these are {query.shape[-1]} and {value.shape[-1]}. {instead}"
    if mask is not None and (mask.dtype != torch.bool or (mask.shape[-2] != 1 and query.shape[-2] != 1)):
        return (
            f"it takes boolean masks of keys, [..., 1, {query.shape[-2]}], and this one is {mask.dtype} of shape "
            f"{list(mask.shape)}. {instead}"
        )
    if inside_torch_func_derivative():
        return f"torch.func.grad and its kin cannot differentiate an operator with its own backward. {instead}"
    if carries_tangents(call):
        return "it has no forward-mode derivative. Use backend='reference'."
    return None


def run(call: Call) -> Tensor:
    """U = A R; with order 1, A V. Dropout draws a seed from the default generator of the query's device."""
    (query, key, value), batch, heads = four_axes(call)
    mask = None if call.attn_mask is None else mask_with_four_axes(call.attn_mask, batch)[:, :, 0]
    if mask is not None and mask.shape[-1] == 1:
        mask = mask.expand(*mask.shape[:-1], query.shape[-2])
    gain = call.gain if isinstance(call.gain, Tensor) else query.new_full((1,), call.gain, dtype=torch.float32)
    gain = gain.to(query.device).reshape(-1)
    seed = torch.randint(1 << 62, (1,), device=query.device) if call.dropout_p > 0.0 else None
    scale = 1.0 / math.sqrt(query.shape[-1]) if call.scale is None else call.scale
    is_training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value, gain))
    output, _, _ = triton_forward(
        query, key, value, mask, gain, seed, call.dropout_p, call.is_causal, scale, call.order, is_training
    )
    return output.reshape(*batch, *heads, *output.shape[-2:])


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
