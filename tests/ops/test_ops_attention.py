"""The public call: what it computes, on both backends, for all that SDPA takes."""

import pytest
import torch
import torch.nn.functional as F

from twicing import attention_matrix, boost, effective_matrix, explain_backend, twicing_attention
from twicing.ops import attention
from twicing.testing import make_inputs, relative_rms

BACKENDS = ["sdpa", "reference"]
FP64 = 1e-14

# Odd sizes, one token, more than two leading axes, none at all, a value width of its own.
SHAPES = {
    "one-token": ((2, 2, 1, 16), None),
    "odd": ((2, 3, 63, 16), None),
    "even": ((1, 2, 64, 40), None),
    "vit": ((1, 3, 197, 64), None),
    "value-width": ((2, 2, 17, 8), 5),
    "no-batch": ((3, 17, 8), None),
    "no-heads": ((17, 8), None),
    "two-batch-axes": ((2, 3, 2, 9, 8), 4),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_explicit_polynomial(shape, is_causal, backend, generator):
    size, value_width = SHAPES[shape]
    q, k, v = make_inputs(size, value_width=value_width, generator=generator, dtype=torch.float64)
    scores = q @ k.mT / size[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    A = scores.softmax(-1)
    output = twicing_attention(q, k, v, is_causal=is_causal, backend=backend)
    assert output.shape == v.shape
    assert relative_rms(output, (2 * A - A @ A) @ v) < FP64


@pytest.mark.parametrize("gain", [0.3, 1.0, -1.0])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_any_order_and_gain(order, gain, backend, generator):
    q, k, v = make_inputs((2, 2, 9, 4), generator=generator, dtype=torch.float64)
    A, identity = attention_matrix(q, k), torch.eye(9, dtype=torch.float64)
    closed = identity - (identity - A) @ torch.linalg.matrix_power(identity - gain * A, order - 1)
    output = twicing_attention(q, k, v, order=order, gain=gain, backend=backend)
    assert relative_rms(output, closed @ v) < FP64
    assert relative_rms(effective_matrix(q, k, order=order, gain=gain), closed) < FP64


def test_it_is_boost_around_sdpa(generator):
    q, k, v = make_inputs((2, 2, 9, 4), generator=generator)
    twiced = boost(lambda values: F.scaled_dot_product_attention(q, k, values), v)
    assert torch.equal(twicing_attention(q, k, v, backend="sdpa"), twiced)


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0])
def test_scale(scale, backend, generator):
    q, k, v = make_inputs((2, 2, 9, 4), generator=generator, dtype=torch.float64)
    A = (scale * q @ k.mT).softmax(-1)
    assert relative_rms(twicing_attention(q, k, v, scale=scale, backend=backend), (2 * A - A @ A) @ v) < FP64


@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_grouped_heads(key_heads, backend, generator):
    q, k, v = make_inputs((2, 6, 9, 4), key_heads=key_heads, value_width=5, generator=generator, dtype=torch.float64)
    wide_k, wide_v = (tensor.repeat_interleave(6 // key_heads, 1) for tensor in (k, v))
    gain = torch.rand(6, generator=generator, dtype=torch.float64)
    grouped = twicing_attention(q, k, v, enable_gqa=True, gain=gain, backend=backend)
    assert relative_rms(grouped, twicing_attention(q, wide_k, wide_v, gain=gain, backend="reference")) < FP64
    assert torch.equal(attention_matrix(q, k, enable_gqa=True), attention_matrix(q, wide_k))


def test_leading_axes_broadcast_as_in_sdpa(backend, generator):
    q, k, v = make_inputs((2, 3, 9, 4), generator=generator, dtype=torch.float64)
    expected = twicing_attention(q, k[:1, :1].expand_as(k), v[:, :1].expand_as(v), backend="reference")
    assert relative_rms(twicing_attention(q, k[0, 0], v[:, :1], backend=backend), expected) < FP64
    expected = twicing_attention(q[:, :1].expand_as(q), k, v, backend="reference")
    assert relative_rms(twicing_attention(q[:, :1], k, v, backend=backend), expected) < FP64


def test_strided_inputs_as_models_have_them(backend, generator):
    """[B, N, 3, H, D] from one projection, and keys expanded from one head."""
    qkv = torch.randn(2, 9, 3, 4, 8, generator=generator, dtype=torch.float64).permute(2, 0, 3, 1, 4)
    q, k, v = qkv
    k = k[:, :1].expand_as(q)
    expected = twicing_attention(q.contiguous(), k.contiguous(), v.contiguous(), backend="reference")
    assert relative_rms(twicing_attention(q, k, v, backend=backend), expected) < FP64


@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (0, 3, 5, 4)], ids=["no-tokens", "no-batch"])
def test_empty_inputs_give_what_sdpa_gives(shape, backend):
    q = torch.randn(shape, requires_grad=True)
    mask = torch.ones(shape[-2], shape[-2], dtype=torch.bool)
    for attn_mask in (None, mask):
        output = twicing_attention(q, q, q, attn_mask, backend=backend)
        assert output.shape == F.scaled_dot_product_attention(q, q, q, attn_mask).shape
        output.sum().backward()
        assert q.grad.shape == shape


def sdpa_cases():
    """Name -> keyword arguments of SDPA, with the shapes of query and of key and value."""
    square, cross = (2, 4, 9, 8), (2, 4, 13, 8)
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[2] = False
    return {
        "plain": (square, square, {}),
        "causal": (square, square, {"is_causal": True}),
        "scale": (square, square, {"scale": 0.7}),
        "bool-mask-with-empty-row": (square, square, {"attn_mask": mask}),
        "float-mask": (square, square, {"attn_mask": torch.randn(2, 1, 9, 9)}),
        "cross": (square, cross, {}),
        "cross-causal": (square, cross, {"is_causal": True}),
        "cross-mask": (square, cross, {"attn_mask": torch.randn(9, 13)}),
        "grouped": (square, (2, 2, 9, 8), {"enable_gqa": True}),
        "dropout": (square, square, {"dropout_p": 0.3}),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", sdpa_cases())
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_order_one_is_the_sdpa_call_bit_for_bit(backend, case, dtype, generator):
    q_shape, k_shape, options = sdpa_cases()[case]
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(dtype)
    q = torch.randn(q_shape, generator=generator).to(dtype).requires_grad_()
    k, v = (torch.randn(k_shape, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    torch.manual_seed(5)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    torch.manual_seed(5)
    output = twicing_attention(q, k, v, order=1, backend=backend, **options)
    assert torch.equal(output, expected)
    upstream = torch.randn(expected.shape, generator=generator).to(dtype)
    for gradient, wanted in zip(
        torch.autograd.grad(output, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        assert torch.equal(gradient, wanted)


def test_order_one_of_the_reference_is_attention_and_takes_cross_attention(generator):
    q = torch.randn(2, 2, 5, 4, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 7, 4, generator=generator, dtype=torch.float64)
    for is_causal in (False, True):
        output = twicing_attention(q, k, v, is_causal=is_causal, order=1, backend="reference")
        assert relative_rms(output, F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)) < FP64


@pytest.mark.parametrize("gain", [0.0, 0, torch.tensor(0.0), torch.zeros(4), torch.zeros(1)], ids=repr)
@pytest.mark.parametrize("case", [name for name in sdpa_cases() if "cross" not in name and name != "dropout"])
def test_gain_zero_is_off_bit_for_bit(case, gain, generator):
    q_shape, k_shape, options = sdpa_cases()[case]
    q = torch.randn(q_shape, generator=generator)
    k, v = (torch.randn(k_shape, generator=generator) for _ in range(2))
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [tensor.to(dtype) for tensor in (q, k, v)]
        if "attn_mask" in options and options["attn_mask"].is_floating_point():
            options["attn_mask"] = options["attn_mask"].to(dtype)
        expected = F.scaled_dot_product_attention(*tensors, **options)
        assert torch.equal(twicing_attention(*tensors, gain=gain, backend="sdpa", **options), expected)


def test_a_gain_in_fp32_is_not_rounded_to_half_precision(generator):
    q, k, v = make_inputs((2, 3, 40, 16), generator=generator, dtype=torch.bfloat16)
    # In bfloat16 it would be 1.
    gain = torch.full((3,), 1.003)
    output = twicing_attention(q, k, v, gain=gain)
    assert torch.equal(output, twicing_attention(q, k, v, gain=float(gain[0])))
    assert not torch.equal(output, twicing_attention(q, k, v, gain=1.0))


def test_a_gain_per_head_is_each_head_with_its_gain(backend, generator):
    q, k, v = make_inputs((2, 3, 9, 4), generator=generator, dtype=torch.float64)
    gains = [0.0, 0.5, 1.5]
    output = twicing_attention(q, k, v, gain=torch.tensor(gains, dtype=torch.float64), backend=backend)
    for head, gain in enumerate(gains):
        alone = twicing_attention(q[:, head], k[:, head], v[:, head], gain=gain, backend=backend)
        assert relative_rms(output[:, head], alone) < FP64


@pytest.mark.parametrize("gain", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])], ids=repr)
def test_a_gain_of_one_element_is_that_number(gain, backend, generator):
    q, k, v = make_inputs((2, 3, 9, 4), generator=generator)
    assert torch.equal(
        twicing_attention(q, k, v, gain=gain, backend=backend), twicing_attention(q, k, v, gain=0.5, backend=backend)
    )
    assert twicing_attention(q[0, 0], k[0, 0], v[0, 0], gain=gain, backend=backend).shape == (9, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_output_has_the_dtype_of_the_query_whatever_the_gain_has(dtype, gain_dtype, backend, generator):
    q, k, v = make_inputs((1, 2, 9, 4), generator=generator, dtype=dtype)
    exact = twicing_attention(q, k, v, gain=0.5, backend=backend)
    for gain in (torch.tensor(0.5, dtype=gain_dtype), torch.full((2,), 0.5, dtype=gain_dtype)):
        output = twicing_attention(q, k, v, gain=gain, backend=backend)
        assert output.dtype == dtype
        assert torch.equal(output, exact)


def test_dropout_drops_one_attention_matrix_and_uses_it_in_both_passes():
    """With V = I the outputs are the matrices: order 1 gives the dropped A, and twicing must be 2 A - A A of it."""
    q, k = torch.randn(2, 2, 8, 8, dtype=torch.float64), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    identity = torch.eye(8, dtype=torch.float64).expand_as(q)
    torch.manual_seed(3)
    dropped = twicing_attention(q, k, identity, dropout_p=0.4, order=1, backend="reference")
    torch.manual_seed(3)
    output = twicing_attention(q, k, identity, dropout_p=0.4)
    assert 0.2 < (dropped == 0).double().mean() < 0.6
    assert relative_rms(output, 2 * dropped - dropped @ dropped) < FP64
    assert relative_rms(dropped.sum(-1).mean(), torch.tensor(1.0)) < 0.1
    other = twicing_attention(q, k, identity, dropout_p=0.4)
    assert not torch.equal(other, output)


def test_dropout_of_everything_gives_zero():
    q = torch.randn(2, 2, 8, 4)
    assert torch.equal(twicing_attention(q, q, q, dropout_p=1.0), torch.zeros_like(q))


def test_a_backend_is_one_object_and_one_entry(monkeypatch):
    """What the next one has to bring: ABOUT, refuses(call), run(call). It is asked first where it stands first."""

    class OnlySmall:
        ABOUT = "small calls only"

        def refuses(self, call):
            return None if call.query.shape[-2] <= 4 else f"{call.query.shape[-2]} tokens are more than 4."

        def run(self, call):
            return torch.full_like(call.value, 7.0)

    monkeypatch.setattr(attention, "BACKENDS", {"small": OnlySmall(), **attention.BACKENDS})
    small, large = torch.randn(2, 4, 3), torch.randn(2, 5, 3)
    assert (twicing_attention(small, small, small) == 7.0).all()
    assert torch.equal(twicing_attention(large, large, large), twicing_attention(large, large, large, backend="sdpa"))
    assert "not 'small': 5 tokens are more than 4." in explain_backend(large, large, large)
    with pytest.raises(ValueError, match=r"backend='small' cannot serve this call: 5 tokens are more than 4\."):
        twicing_attention(large, large, large, backend="small")


def test_explain_backend_says_what_auto_takes_and_why_not_the_others():
    q = torch.randn(1, 2, 5, 4)
    taken, other, third, fourth = explain_backend(q, q, q).split("\n")
    assert taken.startswith("backend='auto' takes 'sdpa', the first that serves this call: one call of scaled_dot")
    assert other.startswith("not 'reference': it would serve too: the dense attention matrix")
    assert third.startswith("not 'blocked': it would serve too: on the CPU")
    assert fourth.startswith("not 'triton': it works on CUDA devices, and the query is on cpu. Use backend='sdpa'")
    taken, other, *_ = explain_backend(q, q, q, dropout_p=0.1).split("\n")
    assert taken.startswith("backend='auto' takes 'reference'")
    assert "would drop other weights" in other
    assert explain_backend(q, q, q, backend="reference").startswith("backend='reference' takes 'reference', as asked")
    assert explain_backend(q, q, q, order=1) == (
        "backend='auto' with order=1 is torch.nn.functional.scaled_dot_product_attention itself."
    )
    with pytest.raises(ValueError, match="cannot serve this call"):
        explain_backend(q, q, q, dropout_p=0.1, backend="sdpa")
    with pytest.raises(ValueError, match="as many queries as keys"):
        explain_backend(q, q[:, :, :3], q[:, :, :3])
