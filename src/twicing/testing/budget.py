"""How far a result may be from the truth: twice as far as an honest reference of the same dtype is.

Outputs of attention shrink with the number of tokens, so that a typed-in tolerance hardly sees a missing correction.
Hence relative root mean squares against fp64 on the same quantised inputs, and wrong formulas that must be rejected.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from twicing.ops.attention import twicing_attention
from twicing.ops.boost import Smoother

# The reference in fp64 is the truth and no measure of itself: 64 units of rounding instead.
FP64_BUDGET = 64 * torch.finfo(torch.float64).eps

_reference = partial(twicing_attention, backend="reference")

# A formula makes the output U from the smoother v -> A v and the values, as twicing.boost does.
Formula = Callable[[Smoother, Tensor], Tensor]


def _no_correction(smooth: Smoother, value: Tensor) -> Tensor:
    return smooth(value)


def _half_correction(smooth: Smoother, value: Tensor) -> Tensor:
    smoothed = smooth(value)
    return smoothed + 0.5 * smooth(value - smoothed)


def _wrong_sign(smooth: Smoother, value: Tensor) -> Tensor:
    smoothed = smooth(value)
    return smoothed - smooth(value - smoothed)


def _correction_of_output(smooth: Smoother, value: Tensor) -> Tensor:
    smoothed = smooth(value)
    return smoothed + smooth(smoothed - smooth(smoothed))


# With O = A V: O;  O + .5 A(V - O);  O - A(V - O);  O + A(O - A O). A test of twicing that accepts one shows nothing.
WRONG_FORMULAS: dict[str, Formula] = {
    "no_correction": _no_correction,
    "half_correction": _half_correction,
    "wrong_sign": _wrong_sign,
    "correction_of_output": _correction_of_output,
}


def make_inputs(
    shape: tuple[int, ...],
    *,
    generator: torch.Generator,
    value_width: int | None = None,
    key_heads: int | None = None,
    peaked: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal query, key and value: [..., H, N, D] of the given shape, [..., key_heads, N, D] and [..., N, value_width].

    generator: on the CPU; the numbers are drawn there in fp32 and then rounded to the dtype, so that they are the same
        for every dtype and device.
    peaked: multiplies the queries by 4, so that the logits have a standard deviation of 4 and few weights dominate.
    """
    *leading, tokens, width = shape
    if key_heads is not None:
        leading = [*leading[:-1], key_heads]
    shapes = (shape, (*leading, tokens, width), (*leading, tokens, width if value_width is None else value_width))
    query, key, value = (torch.randn(size, generator=generator) for size in shapes)
    query = 4.0 * query if peaked else query
    return query.to(device, dtype), key.to(device, dtype), value.to(device, dtype)


def relative_rms(result: Tensor, expected: Tensor) -> float:
    """||result - expected|| / ||expected||, in fp64: 0 where they agree, infinite where only the expected is zero."""
    if result.shape != expected.shape:
        raise ValueError(f"Cannot compare shape {list(result.shape)} with the expected {list(expected.shape)}.")
    result, expected = result.detach().double(), expected.detach().double()
    distance, size = float((result - expected).norm()), float(expected.norm())
    if size == 0.0:
        return 0.0 if distance == 0.0 else float("inf")
    return distance / size


def truth(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    order: int = 2,
    gain: float | Tensor = 1.0,
) -> Tensor:
    """What twicing_attention() would give without rounding: the dense reference in fp64 on the same inputs."""
    query, key, value = query.double(), key.double(), value.double()
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.double()
    gain = gain.double() if isinstance(gain, Tensor) else gain
    return _reference(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa, order=order, gain=gain)


def error_budget(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    order: int = 2,
    gain: float | Tensor = 1.0,
) -> float:
    """The relative RMS error that the output may have: twice that of the dense reference in the inputs' dtype.

    In fp64, where that reference is the truth, 64 units of rounding (1.4e-14).
    """
    honest = _reference(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa, order=order, gain=gain)
    expected = truth(query, key, value, attn_mask, is_causal, scale, enable_gqa, order=order, gain=gain)
    return _budget(honest, expected)


def measured_errors(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    order: int = 2,
    gain: float | Tensor = 1.0,
    generator: torch.Generator,
) -> dict[str, tuple[float, float]]:
    """The relative RMS error of the output and of every gradient, each with its budget: {"output": (error, budget)}.

    function: takes the arguments of twicing_attention(), as functools.partial(twicing_attention, backend="sdpa").
    attn_mask, gain: their gradients are measured where they require one; those of query, key and value always.
    generator: on the CPU, for the random upstream gradient.
    """
    named = {"query": query, "key": key, "value": value, "attn_mask": attn_mask, "gain": gain}
    tensors = {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}
    learnt = [name for name, tensor in tensors.items() if tensor.requires_grad or name in ("query", "key", "value")]
    upstream = torch.randn((*query.shape[:-1], value.shape[-1]), generator=generator).to(query)

    def output_and_gradients(function: Callable[..., Tensor], *, in_fp64: bool) -> dict[str, Tensor]:
        copies = {name: tensor.detach().clone().requires_grad_(name in learnt) for name, tensor in tensors.items()}
        if in_fp64:
            copies = {name: copy.double() if copy.is_floating_point() else copy for name, copy in copies.items()}
        q, k, v = copies["query"], copies["key"], copies["value"]
        mask, g = copies.get("attn_mask"), copies.get("gain", gain)
        output = function(q, k, v, mask, 0.0, is_causal, scale, enable_gqa, order=order, gain=g)
        gradients = torch.autograd.grad(output, [copies[name] for name in learnt], upstream.to(output.dtype))
        return {"output": output, **dict(zip(learnt, gradients, strict=True))}

    found = output_and_gradients(function, in_fp64=False)
    honest = output_and_gradients(_reference, in_fp64=False)
    expected = output_and_gradients(_reference, in_fp64=True)
    budgets = {name: _budget(honest[name], expected[name]) for name in expected}
    if "gain" in budgets:
        # One number's error can be zero by luck, which is no budget for another's.
        budgets["gain"] = max(budgets.values())
    return {name: (relative_rms(found[name], expected[name]), budgets[name]) for name in expected}


def _budget(honest: Tensor, expected: Tensor) -> float:
    return FP64_BUDGET if honest.dtype == torch.float64 else 2.0 * relative_rms(honest, expected)
