"""Outputs and gradients of the kernels inside the fp64 budget, whatever the shapes, and wrong formulas rejected."""

from functools import partial

import pytest
import torch

from twicing import twicing_attention
from twicing.ops.triton import tuning
from twicing.testing import WRONG_FORMULAS, error_budget, make_inputs, measured_errors, relative_rms, truth

FP32, FP16 = torch.float32, torch.float16
# Odd sizes, whole tiles, widths that are no power of two, fewer tokens than a tile: shape, value width, dtype.
CASES = {
    "odd": ((1, 2, 41, 16), 24, FP32),
    "odd-half": ((1, 2, 41, 16), 24, FP16),
    "whole-tiles-half": ((1, 1, 64, 16), None, FP16),
    "widths": ((1, 2, 20, 40), 20, FP32),
    "few": ((1, 4, 5, 16), None, FP32),
}
both_orders = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


def assert_within_budget(errors):
    # The gradient of one gain sums some thousand terms of both signs: what rounding leaves of it is luck.
    error, budget = errors.pop("gain", (0.0, 0.0))
    assert error <= 10 * budget
    beyond = {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]}
    assert not beyond


@both_orders
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_within_the_budget(case, is_causal, schedule, call, generator):
    size, value_width, dtype = CASES[case]
    inputs = make_inputs(size, value_width=value_width, generator=generator, dtype=dtype, peaked=case != "few")
    gain = torch.rand(size[1], generator=generator).requires_grad_()
    errors = measured_errors(call, *inputs, is_causal=is_causal, gain=gain, generator=generator)
    assert errors.keys() == {"output", "query", "key", "value", "gain"}
    assert_within_budget(errors)


@both_orders
def test_the_vision_case_with_the_blocks_of_a_gpu(is_causal, call, generator):
    inputs = make_inputs((1, 1, 197, 64), generator=generator, dtype=FP16)
    with tuning.tried("heads"):
        assert_within_budget(measured_errors(call, *inputs, is_causal=is_causal, generator=generator))


@both_orders
@pytest.mark.parametrize("tokens", [16, 32, 33])
def test_lengths_around_the_edges_of_tiles(tokens, is_causal, schedule, call, generator):
    inputs = make_inputs((1, 1, tokens, 16), generator=generator)
    assert_within_budget(measured_errors(call, *inputs, is_causal=is_causal, gain=0.6, generator=generator))


def test_one_token_is_its_own_smoothing(schedule, call, generator):
    inputs = [x.requires_grad_() for x in make_inputs((1, 1, 1, 16), generator=generator)]
    for is_causal in (False, True):
        output = call(*inputs, is_causal=is_causal)
        assert relative_rms(output, inputs[2]) < 1e-6
        d_query, d_key, d_value = torch.autograd.grad(output.sum(), inputs)
        torch.testing.assert_close(d_value, torch.ones_like(d_value))
        assert max(d_query.abs().max(), d_key.abs().max()) < 1e-5


@both_orders
def test_order_one_is_plain_attention(is_causal, schedule, call, generator):
    inputs = make_inputs((1, 2, 20, 16), value_width=24, generator=generator)
    assert_within_budget(measured_errors(call, *inputs, is_causal=is_causal, order=1, generator=generator))


def test_the_budget_rejects_wrong_formulas_at_the_largest_size(call, generator):
    q, k, v = make_inputs((1, 1, 197, 16), generator=generator)
    expected, budget = truth(q, k, v), error_budget(q, k, v)
    for schedule in ("blocks", "heads"):
        with tuning.tried(schedule):
            assert relative_rms(call(q, k, v), expected) < budget
    smoothed = partial(twicing_attention, q, k, order=1)
    for wrong in WRONG_FORMULAS.values():
        assert relative_rms(wrong(smoothed, v), expected) > 100 * budget


@both_orders
@pytest.mark.parametrize("scale", [30.0, -30.0])
def test_scores_beyond_what_exp_can_take(scale, is_causal, schedule, call, generator):
    """Scores of some hundreds, of both signs."""
    inputs = make_inputs((1, 2, 20, 16), generator=generator)
    assert_within_budget(measured_errors(call, *inputs, is_causal=is_causal, scale=scale, generator=generator))


def test_a_scale_of_zero_averages(schedule, call, generator):
    q, k, v = (x.requires_grad_() for x in make_inputs((1, 1, 20, 16), generator=generator))
    output = call(q, k, v, scale=0.0)
    torch.testing.assert_close(output, v.mean(-2, keepdim=True).expand_as(v))
    d_query, d_key, d_value = torch.autograd.grad(output.sum(), (q, k, v))
    assert not d_query.any()
    assert not d_key.any()
    torch.testing.assert_close(d_value, torch.ones_like(v))


@both_orders
def test_all_scores_so_low_that_a_padded_column_would_outweigh_them(is_causal, schedule, call, generator):
    """A padded column has the score 0: beside scores of -200, exp(0 + 200) is infinite."""
    q, k, v = make_inputs((1, 1, 20, 16), generator=generator)
    q, k = q.abs() + 7, -k.abs() - 7
    gain = torch.tensor([0.5], requires_grad=True)
    assert_within_budget(measured_errors(call, q, k, v, is_causal=is_causal, gain=gain, generator=generator))


@both_orders
def test_gains(is_causal, schedule, call, generator):
    inputs = make_inputs((1, 3, 20, 16), generator=generator)
    gain = torch.tensor([0.0, -1.0, 2.5], requires_grad=True)
    assert_within_budget(measured_errors(call, *inputs, gain=gain, is_causal=is_causal, generator=generator))


@both_orders
def test_grouped_heads(is_causal, schedule, call, generator):
    shape, options = (1, 4, 20, 16), {"key_heads": 2, "value_width": 20, "dtype": FP16}
    inputs = make_inputs(shape, generator=generator, **options)
    gain = torch.tensor([0.0, -1.0, 0.3, 1.0], requires_grad=True)
    errors = measured_errors(call, *inputs, is_causal=is_causal, enable_gqa=True, gain=gain, generator=generator)
    assert_within_budget(errors)
