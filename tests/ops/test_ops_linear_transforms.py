"""Linear attention under torch.compile, torch.export, autocast and functorch, and without data."""

from functools import partial

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from twicing.ops.linear import linear_attention_matrix, twicing_linear_attention
from twicing.testing import make_inputs, relative_rms

CALLS = {
    "plain": {},
    "causal": {"is_causal": True, "chunk_size": 8},
    "masked": {"attn_mask": torch.arange(20)[None] % 3 != 1},
    "causal-masked": {"attn_mask": torch.arange(20)[None] % 3 != 1, "is_causal": True, "feature_map": "dpfp"},
    "gain-per-head": {"gain": torch.linspace(0, 1, 4), "feature_map": "relu"},
}


@pytest.fixture
def inputs():
    return make_inputs((2, 4, 20, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("call", ["plain", "causal-masked", "gain-per-head"])
def test_it_compiles_to_one_graph_with_the_same_output_and_gradients(call, inputs):
    torch._dynamo.reset()
    options = CALLS[call]
    compiled = torch.compile(twicing_linear_attention, fullgraph=True, backend="aot_eager")
    leaves = [tensor.requires_grad_() for tensor in inputs]
    output, expected = compiled(*leaves, **options), twicing_linear_attention(*leaves, **options)
    torch.testing.assert_close(output, expected)
    upstream = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    for gradient, wanted in zip(
        torch.autograd.grad(output, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, wanted)
    torch._dynamo.reset()


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_another_length_compiles_few_times(is_causal):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(twicing_linear_attention, fullgraph=True, backend=counter)
    for tokens in (70, 90, 200):
        inputs = make_inputs((2, 4, tokens, 8), generator=torch.Generator().manual_seed(tokens))
        expected = twicing_linear_attention(*inputs, is_causal=is_causal)
        torch.testing.assert_close(compiled(*inputs, is_causal=is_causal), expected)
    # Causal, a length that is a multiple of the chunk size needs no padding, and is a graph of its own.
    assert counter.frame_count <= 3
    torch._dynamo.reset()


class Attention(nn.Module):
    def forward(self, query, key, value, there):
        return twicing_linear_attention(query, key, value, there[:, None, None, :], is_causal=True)


def test_it_exports():
    inputs = make_inputs((2, 4, 100, 8), generator=torch.Generator().manual_seed(0))
    there = torch.arange(100) >= torch.tensor([[0], [17]])
    exported = torch.export.export(Attention(), (*inputs, there)).module()
    torch.testing.assert_close(exported(*inputs, there), Attention()(*inputs, there))


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_what_sdpa_casts_and_sums_in_fp32(dtype, is_causal, inputs):
    q, k, v = inputs
    with torch.autocast("cpu", dtype):
        output = twicing_linear_attention(q, k.to(dtype), v, is_causal=is_causal)
        A = linear_attention_matrix(q, k.to(dtype), is_causal=is_causal)
    cast = [tensor.to(dtype) for tensor in inputs]
    assert output.dtype == A.dtype == dtype
    assert torch.equal(output, twicing_linear_attention(*cast, is_causal=is_causal))
    assert torch.equal(A, linear_attention_matrix(*cast[:2], is_causal=is_causal))
    wide = [tensor.double() for tensor in inputs]
    with torch.autocast("cpu", dtype):
        assert twicing_linear_attention(*wide, is_causal=is_causal).dtype == torch.float64


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_gradients_under_autocast_reach_fp32_parameters(is_causal, inputs):
    gain = torch.full((4,), 0.5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = twicing_linear_attention(*inputs, is_causal=is_causal, gain=gain)
    output.float().square().sum().backward()
    loss = twicing_linear_attention(*inputs, is_causal=is_causal, gain=gain).square().sum()
    assert gain.grad.dtype == torch.float32
    assert relative_rms(gain.grad, torch.autograd.grad(loss, gain)[0]) < 0.02


@pytest.mark.parametrize("call", ["plain", "causal", "masked"])
def test_vmap_is_a_loop_and_functional_gradients_are_those_of_autograd(call, inputs):
    attend = partial(twicing_linear_attention, **CALLS[call])
    looped = torch.stack([attend(*one) for one in zip(*inputs, strict=True)])
    torch.testing.assert_close(vmap(attend)(*inputs), looped)

    def loss(*tensors):
        return attend(*tensors).square().sum()

    found = grad(loss, argnums=(0, 1, 2))(*inputs)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    for gradient, wanted in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_shapes_can_be_inferred_without_data():
    q = torch.empty(2, 4, 100, 8, device="meta")
    for options in ({}, {"is_causal": True}, {"feature_map": "dpfp"}):
        assert twicing_linear_attention(q, q, q, **options).shape == q.shape


def test_two_calls_give_the_same_bits(inputs):
    for is_causal in (False, True):
        assert torch.equal(*(twicing_linear_attention(*inputs, is_causal=is_causal) for _ in range(2)))


@pytest.mark.parametrize("order", [1, 2])
def test_operations_grow_in_step_with_the_tokens_and_the_order(order):
    """Two products of N D^2 for each smoothing, and the weights; nothing of N^2."""
    counted = []
    for tokens in (256, 1024):
        inputs = make_inputs((1, 2, tokens, 16), generator=torch.Generator().manual_seed(0))
        with FlopCounterMode(display=False) as counter:
            twicing_linear_attention(*inputs, order=order)
        counted.append(counter.get_total_flops())
    assert counted[1] == 4 * counted[0]
    assert counted[0] == 2 * 2 * 256 * 16 * (2 * 16 * order + 1)
