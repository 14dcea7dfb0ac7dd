"""Masks: their meaning, and queries that may attend to nothing."""

import pytest
import torch
import torch.nn.functional as F

from twicing import attention_matrix, effective_matrix, twicing_attention
from twicing.ops import sdpa
from twicing.ops.empty_rows import open_empty_rows
from twicing.testing import make_inputs, relative_rms

FP64 = 1e-14
INF = float("inf")
N = 9


@pytest.fixture(params=["sdpa", "reference"])
def backend(request):
    return request.param


@pytest.fixture
def inputs():
    return make_inputs((2, 3, N, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def as_float(mask, dtype=torch.float64):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -INF)


def random_mask(*shape):
    """Some of everything, token 2 attending to nothing and being attended to by none."""
    mask = torch.rand(*shape, N, N, generator=torch.Generator().manual_seed(1)) > 0.4
    mask |= torch.eye(N, dtype=torch.bool)
    mask[..., 2, :] = False
    mask[..., :, 2] = False
    return mask


MASKS = {
    "tokens": random_mask(),
    "batch": random_mask(2, 1),
    "heads": random_mask(3),
    "full": random_mask(2, 3),
    "padded-keys": torch.tensor([True] * 6 + [False] * 3).expand(2, 1, 1, N),
    "queries-only": torch.tensor([True] * 6 + [False] * 3)[:, None],
    "everything": torch.ones(N, N, dtype=torch.bool),
    "nothing": torch.zeros(N, N, dtype=torch.bool),
}


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_mean_what_they_mean_in_sdpa(mask, kind, backend, inputs):
    """A from SDPA itself, with V = I; its rows of masked queries are zero."""
    q, k, v = inputs
    given = MASKS[mask] if kind == "bool" else as_float(MASKS[mask])
    A = F.scaled_dot_product_attention(q, k, torch.eye(N, dtype=torch.float64).expand(2, 3, N, N), given)
    assert relative_rms(attention_matrix(q, k, given), A) < FP64
    output = twicing_attention(q, k, v, given, backend=backend)
    assert relative_rms(output, (2 * A - A @ A) @ v) < FP64
    assert relative_rms(effective_matrix(q, k, given), 2 * A - A @ A) < FP64
    empty = ~MASKS[mask].any(-1).expand(2, 3, N)
    assert torch.equal(output[empty], torch.zeros_like(output[empty]))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("order", [2, 3])
def test_a_token_that_attends_to_nothing_poisons_no_other(order, kind, backend, inputs):
    """0 x NaN: the others must get exactly what they get in its absence, and all gradients must stay finite."""
    q, k, v = (tensor.requires_grad_() for tensor in inputs)
    mask = torch.ones(N, N, dtype=torch.bool)
    mask[2] = False
    mask[:, 2] = False
    others = torch.arange(N) != 2
    given = mask if kind == "bool" else as_float(mask)
    output = twicing_attention(q, k, v, given, order=order, backend=backend)
    without = twicing_attention(*(tensor[:, :, others] for tensor in (q, k, v)), order=order, backend="reference")
    assert relative_rms(output[:, :, others], without) < FP64
    assert (output[:, :, 2] == 0).all()
    upstream = torch.randn_like(output)
    gradients = torch.autograd.grad(output, (q, k, v), upstream)
    expected = torch.autograd.grad(without, (q, k, v), upstream[:, :, others])
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert relative_rms(gradient, wanted) < 1e-13
        assert (gradient[:, :, 2] == 0).all()


def test_a_naive_softmax_would_be_poisoned(inputs):
    """What the two tests above guard against, so that they are known to be able to fail."""
    q, k, v = inputs
    mask = torch.ones(N, N, dtype=torch.bool)
    mask[2] = False
    A = (q @ k.mT / 2).masked_fill(~mask, -INF).softmax(-1)
    once = A @ v
    assert once.isfinite().all(-1).sum() == 2 * 3 * (N - 1)
    assert not (once + A @ (v - once)).isfinite().any()


def like_an_older_kernel(query, key, value, attn_mask=None, scale=None, **_):
    """SDPA as it was, and as other kernels are: an empty row is 0 / 0, in the output and in the gradients."""
    bias = attn_mask if attn_mask.is_floating_point() else as_float(attn_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return (scale * query @ key.mT + bias).softmax(-1) @ value


@pytest.mark.parametrize("mask", [random_mask(), as_float(random_mask())], ids=["bool", "float"])
def test_no_kernel_of_sdpa_is_ever_shown_an_empty_row(mask, inputs, monkeypatch):
    q, k, v = (tensor.requires_grad_() for tensor in inputs)
    upstream = torch.randn_like(v)
    expected = twicing_attention(q, k, v, mask, backend="reference")
    expected_gradients = torch.autograd.grad(expected, (q, k, v), upstream)
    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", like_an_older_kernel)
    assert like_an_older_kernel(q, k, v, mask).isnan().any()
    output = twicing_attention(q, k, v, mask, backend="sdpa")
    assert relative_rms(output, expected) < FP64
    for gradient, wanted in zip(torch.autograd.grad(output, (q, k, v), upstream), expected_gradients, strict=True):
        assert relative_rms(gradient, wanted) < 1e-13


def test_a_mask_with_a_scale(backend, inputs):
    q, k, v = inputs
    A = (0.3 * q @ k.mT + as_float(MASKS["padded-keys"])).softmax(-1)
    output = twicing_attention(q, k, v, MASKS["padded-keys"], scale=0.3, backend=backend)
    assert relative_rms(output, (2 * A - A @ A) @ v) < FP64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_huge_finite_masks_keep_the_meaning_of_sdpa(dtype, backend, inputs):
    """finfo.min everywhere in a row is no empty row: it is attended to uniformly."""
    q, k, v = (tensor.to(dtype) for tensor in inputs)
    mask = torch.zeros(N, N, dtype=dtype)
    mask[:, 5:] = torch.finfo(dtype).min
    mask[1] = torch.finfo(dtype).min
    if dtype == torch.float32:
        torch.testing.assert_close(
            attention_matrix(q, k, mask), F.scaled_dot_product_attention(q, k, torch.eye(N).expand(2, 3, N, N), mask)
        )
        torch.testing.assert_close(attention_matrix(q, k, mask)[..., 1, :], torch.full((2, 3, N), 1 / N))
    output = twicing_attention(q, k, v, mask, backend=backend)
    assert output.isfinite().all()
    assert (output[:, :, 1] != 0).any()


def test_double_precision_queries_take_an_fp32_mask(backend, inputs):
    """Which SDPA on the CPU reads as if it were in fp64."""
    mask = torch.randn(N, N, generator=torch.Generator().manual_seed(2))
    expected = twicing_attention(*inputs, mask.double(), backend="reference")
    assert relative_rms(twicing_attention(*inputs, mask, backend=backend), expected) < FP64


@pytest.mark.parametrize("scale", [-1.3, 0.0])
def test_a_scale_that_is_not_positive_in_causal_order(scale, backend, inputs):
    """SDPA on the CPU multiplies the -inf of what is forbidden by it."""
    future = torch.ones(N, N, dtype=torch.bool).triu(1)
    scores = (scale * inputs[0] @ inputs[1].mT).masked_fill(future, -INF)
    A, v = scores.softmax(-1), inputs[2]
    output = twicing_attention(*inputs, is_causal=True, scale=scale, backend=backend)
    assert relative_rms(output, A @ (2 * v - A @ v)) < FP64


def test_half_precision_queries_take_an_fp32_mask(backend, inputs):
    q, k, v = (tensor.bfloat16() for tensor in inputs)
    mask = as_float(random_mask(), torch.float32)
    output = twicing_attention(q, k, v, mask, backend=backend)
    assert output.dtype == torch.bfloat16
    assert relative_rms(output, twicing_attention(q, k, v, random_mask(), backend=backend)) < 1e-2


def test_a_diverged_run_stays_visible(backend, inputs):
    """NaN must come out as NaN, with a mask too: nothing may clean it away."""
    q, k, v = inputs
    v[0, 0, 4, 0] = float("nan")
    assert twicing_attention(q, k, v, backend=backend)[0, 0].isnan().any()
    mask = torch.zeros(N, N, dtype=torch.float64)
    mask[3] = float("nan")
    assert twicing_attention(q, k, inputs[1], mask, backend=backend)[:, :, 3].isnan().all()


def test_opening_empty_rows_touches_no_other_row():
    for mask in (random_mask(2, 1), as_float(random_mask(2, 1))):
        opened, occupied = open_empty_rows(mask)
        assert opened.shape == mask.shape
        assert opened.dtype == mask.dtype
        rows = occupied.squeeze(-1)
        assert torch.equal(opened[rows], mask[rows])
        assert torch.equal(rows[0, 0], torch.arange(N) != 2)
    broadcast = torch.ones(2, 1, 1, N, dtype=torch.bool)
    assert open_empty_rows(broadcast)[0].shape == broadcast.shape
