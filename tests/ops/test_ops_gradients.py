"""Gradients for every input: against numerical ones in fp64, and against budgets in the dtypes that people train in."""

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from twicing import twicing_attention
from twicing.ops.reference import attention_matrix
from twicing.testing import make_inputs, measured_errors, relative_rms


@pytest.fixture(params=["sdpa", "reference"])
def backend(request):
    return request.param


def small_inputs(generator, **options):
    tensors = make_inputs((1, 2, 4, 3), generator=generator, dtype=torch.float64, **options)
    return tuple(tensor.requires_grad_() for tensor in tensors)


def empty_row_mask():
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[2] = False
    return mask


GRADCHECKED = {
    "plain": {},
    "value-width": {"inputs": {"value_width": 5}},
    "causal": {"is_causal": True},
    "order-3": {"order": 3, "gain": 0.6},
    "scale": {"scale": 0.4},
    "grouped": {"inputs": {"key_heads": 1}, "enable_gqa": True},
    "empty-row": {"attn_mask": empty_row_mask()},
}


@pytest.mark.parametrize("case", GRADCHECKED)
def test_derivatives_of_query_key_and_value(case, backend, generator):
    options = dict(GRADCHECKED[case])
    inputs = small_inputs(generator, **options.pop("inputs", {}))
    assert gradcheck(partial(twicing_attention, backend=backend, **options), inputs)


@pytest.mark.parametrize("shape", [(), (1,), (2,)], ids=["[]", "[1]", "[H]"])
@pytest.mark.parametrize("order", [2, 3])
def test_derivatives_of_the_gain(order, shape, backend, generator):
    gain = torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_()
    q, k, v = small_inputs(generator)

    def output(q, v, gain):
        return twicing_attention(q, k, v, order=order, gain=gain, backend=backend)

    assert gradcheck(output, (q, v, gain))


@pytest.mark.parametrize("shape", [(4, 4), (1, 2, 4, 4), (1, 1, 1, 4), (2, 4, 1)], ids=str)
def test_derivatives_of_a_float_mask_are_summed_over_its_broadcast_axes(shape, backend, generator):
    mask = torch.randn(shape, generator=generator, dtype=torch.float64)
    if shape == (4, 4):
        mask[1, 0] = mask[2, :] = float("-inf")
    mask.requires_grad_()
    q, k, v = small_inputs(generator)
    output = twicing_attention(q, k, v, mask, backend=backend)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(output, mask, upstream)
    assert gradient.shape == shape
    assert gradient[mask == float("-inf")].abs().sum() == 0
    # gradcheck cannot move an infinite entry: numerical derivatives of the finite ones, by hand.
    step = 1e-6
    for index in mask.isfinite().nonzero():
        moved = [mask.detach().clone() for _ in range(2)]
        moved[0][tuple(index)] += step
        moved[1][tuple(index)] -= step
        plus, minus = (twicing_attention(q, k, v, m, backend=backend) for m in moved)
        numerical = ((plus - minus) * upstream).sum() / (2 * step)
        assert abs(numerical - gradient[tuple(index)]) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("peaked", [False, True], ids=["normal", "peaked"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_sdpa_stays_in_the_budgets_of_all_gradients(is_causal, peaked, dtype, generator):
    inputs = make_inputs((2, 2, 197, 16), peaked=peaked, generator=generator, dtype=dtype)
    gain = torch.rand(2, generator=generator).requires_grad_()
    call = partial(twicing_attention, backend="sdpa")
    errors = measured_errors(call, *inputs, is_causal=is_causal, gain=gain, generator=generator)
    assert errors.keys() == {"output", "query", "key", "value", "gain"}
    assert all(error <= budget for error, budget in errors.values()), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sdpa_stays_in_the_budgets_with_a_learnt_bias_grouped_heads_and_order_three(dtype, generator):
    inputs = make_inputs((2, 4, 63, 16), key_heads=2, value_width=24, generator=generator, dtype=dtype)
    bias = torch.randn(4, 63, 63, generator=generator).to(dtype).requires_grad_()
    call = partial(twicing_attention, backend="sdpa")
    errors = measured_errors(call, *inputs, bias, enable_gqa=True, order=3, gain=0.7, generator=generator)
    assert errors.keys() == {"output", "query", "key", "value", "attn_mask"}
    assert all(error <= budget for error, budget in errors.values()), errors


def detached_correction(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, *, order, gain):
    """The right output with wrong gradients: the correction is held constant."""
    once = twicing_attention(q, k, v, attn_mask, 0.0, is_causal, scale, enable_gqa, order=1, backend="reference")
    twice = twicing_attention(q, k, v, attn_mask, 0.0, is_causal, scale, enable_gqa, backend="reference")
    return once + (twice - once).detach()


def unscaled_gradient(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, *, order, gain):
    """Gradients that are one percent too large."""
    output = twicing_attention(q, k, v, attn_mask, 0.0, is_causal, scale, enable_gqa, backend="reference")
    return output * 1.01 - output.detach() * 0.01


@pytest.mark.parametrize("wrong", [detached_correction, unscaled_gradient], ids=lambda function: function.__name__)
def test_the_budgets_of_gradients_reject_wrong_ones(wrong, generator):
    errors = measured_errors(wrong, *make_inputs((2, 2, 64, 16), generator=generator), generator=generator)
    for name in ("query", "key", "value"):
        error, budget = errors[name]
        assert error > 100 * budget


def test_the_gradients_are_the_written_ones(generator):
    """The closed form of the backward, with every part of it: a bias, a gain per head, a random upstream gradient."""
    q, k, v = make_inputs((2, 3, 7, 4), generator=generator, dtype=torch.float64)
    bias = torch.randn(3, 7, 7, generator=generator, dtype=torch.float64)
    g = torch.rand(3, generator=generator, dtype=torch.float64)
    G = torch.randn(2, 3, 7, 4, generator=generator, dtype=torch.float64)
    learnt = [tensor.requires_grad_() for tensor in (q, k, v, bias, g)]
    found = torch.autograd.grad(twicing_attention(q, k, v, bias, gain=g), learnt, G)
    with torch.no_grad():
        A, gain, scale = attention_matrix(q, k, bias), g[:, None, None], 4**-0.5
        smoothed = A @ v
        R = (1 + gain) * v - gain * smoothed
        U = A @ R
        dR = A.mT @ G
        dV = (1 + gain) * dR - gain * A.mT @ dR
        dA = G @ R.mT - gain * dR @ v.mT
        delta = (G * U).sum(-1, keepdim=True) - gain * (dR * smoothed).sum(-1, keepdim=True)
        dS = A * (dA - delta)
        written = (scale * dS @ k, scale * dS.mT @ q, dV, dS.sum(0), (dR * (v - smoothed)).sum((0, 2, 3)))
    for name, gradient, wanted in zip(("query", "key", "value", "mask", "gain"), found, written, strict=True):
        assert relative_rms(gradient, wanted) < 1e-13, name


def test_second_derivatives_of_the_reference(generator):
    gain = torch.rand(2, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(4, 4, generator=generator, dtype=torch.float64).requires_grad_()

    def output(q, k, v, bias, gain):
        return twicing_attention(q, k, v, bias, gain=gain, backend="reference")

    assert gradgradcheck(output, (*small_inputs(generator), bias, gain))


def test_second_derivatives_of_sdpa_under_its_math_kernel(generator):
    with sdpa_kernel(SDPBackend.MATH):
        assert gradgradcheck(partial(twicing_attention, backend="sdpa"), small_inputs(generator))


def test_gradients_through_shared_dropout(generator):
    """The dropped A is one matrix: with the same seed the output is a smooth function of the inputs."""

    def output(q, k, v):
        torch.manual_seed(11)
        return twicing_attention(q, k, v, dropout_p=0.3)

    assert gradcheck(output, small_inputs(generator))


def test_an_upstream_gradient_of_stride_zero(backend, generator):
    q, k, v = small_inputs(generator)
    output = twicing_attention(q, k, v, backend=backend)
    expanded = torch.autograd.grad(output.sum(), (q, k, v), retain_graph=True)
    dense = torch.autograd.grad(output, (q, k, v), torch.ones_like(output).contiguous())
    for gradient, wanted in zip(expanded, dense, strict=True):
        torch.testing.assert_close(gradient, wanted)
