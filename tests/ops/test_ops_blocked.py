"""The blocked CPU backend: outputs and gradients inside the fp64 budget however a call is cut into boxes and blocks."""

from functools import partial

import pytest
import torch

from twicing import twicing_attention
from twicing.ops.blocked import plan
from twicing.testing import (
    WRONG_FORMULAS,
    error_budget,
    make_inputs,
    measured_errors,
    relative_rms,
    truth,
)
from twicing.testing.budget import FP64_BUDGET

call = partial(twicing_attention, backend="blocked")

# Odd sizes, more and fewer heads than a box takes, a value width of its own: shape and value width.
SHAPES = {
    "one-row-block": ((2, 3, 63, 16), None),
    "vit": ((2, 3, 197, 64), None),
    "power-of-two": ((1, 5, 64, 40), 24),
    "long": ((1, 2, 700, 8), None),
}


@pytest.fixture(params=["as-planned", "small-blocks"])
def cut(request, monkeypatch):
    """Small calls fit into one block: make the blocks small, of 16 rows or columns, and boxes of one to three heads.

    What is then allowed beyond the budget: scores made again for so few columns are rounded otherwise than before.
    """
    if request.param == "as-planned":
        return 1
    monkeypatch.setattr(plan, "BOX_BYTES", {"forward": 8 << 10, "backward": 8 << 10})
    monkeypatch.setattr(plan, "PART_BYTES", {"forward": 1, "backward": 1})
    monkeypatch.setattr(plan, "WHOLE_BYTES", {"forward": 0, "backward": 0})
    monkeypatch.setattr(plan, "LEAST_COLUMNS", 16)
    return 4


@pytest.fixture(params=["one-block", "blocks"])
def tokens(request, monkeypatch):
    """How many there are, cut no narrower than in earnest: where scores are huge, narrow products would be far off."""
    if request.param == "one-block":
        return 63
    monkeypatch.setattr(plan, "PART_BYTES", {"forward": 1, "backward": 1})
    monkeypatch.setattr(plan, "WHOLE_BYTES", {"forward": 0, "backward": 0})
    return 530


def gradients(function, inputs, *args, **options):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves, *args, **options).sum(), leaves)


def assert_within_budget(errors, times=1):
    beyond = {name: pair for name, pair in errors.items() if not pair[0] <= times * pair[1]}
    assert not beyond


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_within_the_budget(shape, is_causal, dtype, cut, generator):
    size, value_width = SHAPES[shape]
    inputs = make_inputs(size, value_width=value_width, generator=generator, dtype=dtype, peaked=True)
    gain = torch.rand(size[1], generator=generator, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    errors = measured_errors(call, *inputs, is_causal=is_causal, gain=gain, generator=generator)
    assert_within_budget(errors, cut)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_blocks_no_narrower_than_planned_add_no_error(tokens, is_causal, generator):
    """The backward sees the very weights whose sums the forward took, though it cuts A by columns and not by rows."""
    inputs = make_inputs((1, 2, tokens, 16), generator=generator, peaked=True)
    assert_within_budget(measured_errors(call, *inputs, is_causal=is_causal, generator=generator))


@pytest.mark.parametrize("wrong", WRONG_FORMULAS)
def test_the_budget_rejects_wrong_formulas_at_the_largest_size(wrong, generator):
    q, k, v = make_inputs((1, 2, 700, 8), generator=generator)
    expected, budget = truth(q, k, v), error_budget(q, k, v)
    assert relative_rms(call(q, k, v), expected) < budget
    smoothed = partial(twicing_attention, q, k, order=1)
    assert relative_rms(WRONG_FORMULAS[wrong](smoothed, v), expected) > 100 * budget


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("scale", [30.0, -30.0])
def test_scores_beyond_what_exp_can_take(scale, is_causal, tokens, generator):
    """Scores of some thousands: exp(S) overflows, and rows without a large score would vanish."""
    inputs = make_inputs((1, 2, tokens, 16), generator=generator, peaked=True)
    assert_within_budget(measured_errors(call, *inputs, is_causal=is_causal, scale=scale, generator=generator))


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_scores_that_exp_can_take_and_large_values(is_causal, generator):
    """exp(S) is finite, but its products with values and gradients would not be."""
    q, k, v = make_inputs((1, 2, 40, 8), generator=generator)
    q, k = q.clone(), k.clone()
    q[..., 0], k[..., 0] = 37.5, 2.0
    options = {"is_causal": is_causal, "scale": 1.0, "generator": generator}
    assert_within_budget(measured_errors(call, q, k, 1e4 * v, **options))


def test_rows_that_need_a_shift_beside_rows_that_need_none(tokens, generator):
    """In one block: rows of zeros among rows of scores of some thousands."""
    q, k, v = make_inputs((1, 2, tokens, 16), generator=generator, peaked=True)
    q = q.clone()
    q[:, :, ::3] = 0.0
    assert_within_budget(measured_errors(call, q, k, v, scale=30.0, generator=generator))


def test_a_scale_of_zero_averages(generator):
    q, k, v = make_inputs((2, 3, 63, 16), generator=generator)
    torch.testing.assert_close(call(q, k, v, scale=0.0), v.mean(-2, keepdim=True).expand_as(v))
    d_query, d_key, d_value = gradients(call, (q, k, v), scale=0.0)
    assert not d_query.any()
    assert not d_key.any()
    torch.testing.assert_close(d_value, torch.ones_like(v))


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_all_scores_so_low_that_a_plain_exp_would_vanish(is_causal, tokens, generator):
    q, k, v = make_inputs((1, 2, tokens, 8), generator=generator)
    q, k = q.abs() + 10, -k.abs() - 10
    assert_within_budget(measured_errors(call, q, k, v, is_causal=is_causal, generator=generator))


def test_one_token_is_its_own_smoothing(generator):
    q, k, v = make_inputs((2, 3, 1, 16), generator=generator)
    assert relative_rms(call(q, k, v), v) < 1e-6
    d_query, d_key, d_value = gradients(call, (q, k, v))
    torch.testing.assert_close(d_value, torch.ones_like(v))
    assert max(d_query.abs().max(), d_key.abs().max()) < 1e-5


def masks(generator, tokens=37):
    """Of every shape that broadcasts to [2, 3, N, N], most with a row or more that may attend to nothing."""
    allowed = torch.rand(tokens, tokens, generator=generator) > 0.4
    allowed[2] = False
    padding = torch.arange(tokens) < torch.tensor([[30], [tokens]])
    many = torch.rand(2, 3, tokens, tokens, generator=generator) > 0.3
    many[1, 2, 5] = False
    return {
        "rows": allowed,
        "padding": padding[:, None, None, :],
        "per-head": many[:1],
        "per-entry": many[:, :1],
        "full": many,
        "whole-rows": (torch.arange(tokens) % 5 > 0)[:, None],
        "three-axes": many[0],
    }


MASKS = ["rows", "padding", "per-head", "per-entry", "full", "whole-rows", "three-axes"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_and_their_gradients(name, kind, dtype, cut, generator):
    inputs = make_inputs((2, 3, 37, 16), generator=generator, dtype=dtype)
    mask = masks(generator)[name]
    if kind == "float":
        bias = torch.randn(mask.shape, generator=generator, dtype=dtype)
        mask = bias.masked_fill(~mask, float("-inf")).requires_grad_()
    errors = measured_errors(call, *inputs, mask, generator=generator)
    assert ("attn_mask" in errors) == (kind == "float")
    if name == "whole-rows":
        # What is added to a whole row changes no weight: its gradient is zero, and has no relative error.
        errors.pop("attn_mask", None)
    assert_within_budget(errors, cut)


@pytest.mark.parametrize("scale", [30.0, -30.0])
@pytest.mark.parametrize("name", ["rows", "padding"])
def test_huge_scores_that_a_mask_forbids_do_not_shift_the_allowed_ones(name, scale, tokens, generator):
    """A maximum over what is forbidden would make whole rows vanish; and the shift of an empty row is zero."""
    inputs = make_inputs((2, 3, tokens, 16), generator=generator, peaked=True)
    assert_within_budget(
        measured_errors(call, *inputs, masks(generator, tokens)[name], scale=scale, generator=generator)
    )


def test_a_float_mask_of_fp32_beside_half_precision(generator):
    q, k, v = make_inputs((2, 3, 37, 8), generator=generator, dtype=torch.bfloat16)
    bias = torch.randn(37, 37, generator=generator).requires_grad_()
    output = call(q, k, v, bias)
    assert output.dtype == torch.bfloat16
    (d_mask,) = torch.autograd.grad(output.float().square().sum(), bias)
    exact = truth(q, k, v, bias)
    (expected,) = torch.autograd.grad(exact.square().sum(), bias)
    assert d_mask.dtype == torch.float32
    assert relative_rms(d_mask, expected) < 0.02


def test_the_gradient_of_a_mask_in_half_precision_is_summed_in_fp32_and_rounded_once(cut, generator):
    """Over heads, boxes and blocks: it is that of the same mask in fp32."""
    q, k, v = make_inputs((4, 6, 37, 8), generator=generator, dtype=torch.bfloat16)
    half = torch.randn(37, 37, generator=generator).bfloat16().requires_grad_()
    wide = half.detach().float().requires_grad_()
    upstream = torch.randn(v.shape, generator=generator).bfloat16()
    (d_half,), (d_wide,) = (torch.autograd.grad(call(q, k, v, mask), mask, upstream) for mask in (half, wide))
    assert torch.equal(d_half, d_wide.bfloat16())


def test_a_row_that_may_attend_to_nothing_is_zero_and_gives_none(cut, generator):
    q, k, v = make_inputs((2, 3, 37, 8), generator=generator)
    mask = masks(generator)["rows"]
    for attn_mask in (mask, torch.zeros(37, 37).masked_fill(~mask, float("-inf"))):
        assert torch.equal(call(q, k, v, attn_mask)[:, :, 2], torch.zeros(2, 3, 8))
        d_query, *others = gradients(call, (q, k, v), attn_mask)
        assert torch.equal(d_query[:, :, 2], torch.zeros(2, 3, 8))
        assert all(gradient.isfinite().all() for gradient in others)


def test_nothing_may_be_attended_to_at_all(generator):
    q, k, v = make_inputs((1, 2, 9, 8), generator=generator)
    nothing = torch.zeros(9, 9, dtype=torch.bool)
    assert torch.equal(call(q, k, v, nothing), torch.zeros_like(v))
    assert all(torch.equal(gradient, torch.zeros_like(v)) for gradient in gradients(call, (q, k, v), nothing))


@pytest.mark.parametrize("scale", [0.3, 100.0])
def test_a_diverged_head_shows_and_spoils_no_other(scale, cut, generator):
    """Heads with scores that exp cannot take neither: a NaN beside them is neither too small nor too large a sum."""
    q, k, v = make_inputs((2, 3, 37, 8), generator=generator)
    expected = call(q, k, v, scale=scale)
    q[1, 1, 4, 0] = float("nan")
    output = call(q, k, v, scale=scale)
    assert output[1, 1].isnan().all()
    sound = torch.ones(2, 3, dtype=torch.bool)
    sound[1, 1] = False
    torch.testing.assert_close(output[sound], expected[sound])


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_grouped_heads(key_heads, is_causal, cut, generator):
    shape, options = (2, 6, 37, 8), {"key_heads": key_heads, "value_width": 5, "dtype": torch.float64}
    inputs = make_inputs(shape, generator=generator, **options)
    gain = torch.tensor([0.0, -1.0, 0.3, 1.0, 2.0, 0.7], dtype=torch.float64, requires_grad=True)
    errors = measured_errors(call, *inputs, is_causal=is_causal, enable_gqa=True, gain=gain, generator=generator)
    assert_within_budget(errors, cut)


@pytest.mark.parametrize("gain", [0.0, -1.0, 1.0, 2.5])
def test_gains(gain, cut, generator):
    inputs = make_inputs((2, 3, 63, 16), generator=generator)
    assert_within_budget(measured_errors(call, *inputs, gain=gain, generator=generator), cut)
    learnt = torch.tensor([gain], requires_grad=True)
    errors = measured_errors(call, *inputs, gain=learnt, generator=generator)
    # The gradient of one gain sums 6,000 terms of both signs: what rounding leaves of it is luck.
    error, budget = errors.pop("gain")
    assert error < 10 * budget
    assert_within_budget(errors, cut)


@pytest.mark.parametrize("layout", ["packed", "keys-of-one-head", "transposed", "every-second"])
def test_strides_of_inputs(layout, cut, generator):
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    if layout == "packed":
        q, k, v = draw(2, 37, 3, 4, 8).permute(2, 0, 3, 1, 4)
    elif layout == "keys-of-one-head":
        q, k, v = draw(2, 4, 37, 8), draw(2, 1, 37, 8).expand(2, 4, 37, 8), draw(1, 1, 37, 8).expand(2, 4, 37, 8)
    elif layout == "transposed":
        q, k, v = (draw(2, 4, 8, 37).mT for _ in range(3))
    else:
        q, k, v = (draw(2, 4, 74, 16)[:, :, ::2, ::2] for _ in range(3))
    for is_causal in (False, True):
        expected = twicing_attention(q, k, v, is_causal=is_causal, backend="reference")
        assert relative_rms(call(q, k, v, is_causal=is_causal), expected) < FP64_BUDGET


UPSTREAM = {
    "stride-0": lambda like: torch.ones((), dtype=like.dtype).expand_as(like),
    "one-row": lambda like: like[:, :, :1].expand_as(like),
    "transposed": lambda like: like.transpose(1, 2).contiguous().transpose(1, 2),
    "columns": lambda like: like.mT.contiguous().mT,
}


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("layout", UPSTREAM)
def test_strides_of_the_upstream_gradient(layout, is_causal, cut, generator):
    inputs = [x.requires_grad_() for x in make_inputs((2, 4, 37, 8), generator=generator, dtype=torch.float64)]
    upstream = UPSTREAM[layout](torch.randn(2, 4, 37, 8, generator=generator, dtype=torch.float64))
    found = torch.autograd.grad(call(*inputs, is_causal=is_causal), inputs, upstream)
    reference = twicing_attention(*inputs, is_causal=is_causal, backend="reference")
    for gradient, expected in zip(found, torch.autograd.grad(reference, inputs, upstream), strict=True):
        assert relative_rms(gradient, expected) < FP64_BUDGET


def test_two_calls_give_the_same_bits(cut, generator):
    inputs = [tensor.requires_grad_() for tensor in make_inputs((2, 4, 197, 16), generator=generator)]
    outputs = [call(*inputs) for _ in range(2)]
    assert torch.equal(*outputs)
    firsts, seconds = (torch.autograd.grad(output.sum(), inputs) for output in outputs)
    assert all(torch.equal(first, second) for first, second in zip(firsts, seconds, strict=True))


def test_with_and_without_gradients_it_gives_the_same_bits(cut, generator):
    """Where boxes are of one and of two heads too."""
    inputs = make_inputs((2, 3, 63, 16), generator=generator)
    with torch.inference_mode():
        outputs = [call(*inputs)]
    outputs.append(call(*inputs))
    outputs.append(call(*(tensor.requires_grad_() for tensor in inputs)).detach())
    assert all(torch.equal(output, outputs[0]) for output in outputs)
