"""The Triton kernels on a GPU: what the interpreter cannot show. bf16, large shapes, races, memory, compile."""

from functools import partial

import pytest
import torch
from torch.library import opcheck

from twicing import attention_matrix, explain_backend, twicing_attention
from twicing.ops.triton import tuning
from twicing.ops.triton.operator import triton_forward
from twicing.testing import WRONG_FORMULAS, error_budget, make_inputs, measured_errors, relative_rms, truth

pytestmark = pytest.mark.gpu

call = partial(twicing_attention, backend="triton")
on_gpu = partial(make_inputs, device="cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
causal_or_not = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])

# Shape, value width.
SHAPES = {
    "vit": ((2, 3, 197, 64), None),
    "small": ((2, 2, 256, 64), None),
    "tiny": ((3, 2, 5, 16), None),
    "widths": ((2, 2, 77, 40), 24),
    "long": ((1, 2, 1000, 64), None),
    "whole-tiles": ((1, 2, 1024, 64), None),
    "wide": ((1, 2, 300, 128), None),
    "widest": ((1, 2, 130, 256), None),
    "narrow": ((1, 2, 300, 16), 32),
}
# A dtype more is as many kernels more to compile, which takes nearly all of the time here: fp16 for two shapes.
SHAPES_AND_DTYPES = [(shape, BF16) for shape in SHAPES] + [("vit", FP16), ("widths", FP16)]


@pytest.fixture(params=["blocks", "heads"])
def schedule(request):
    """One program per block of rows or columns, or one per head."""
    with tuning.tried(request.param):
        yield request.param


def assert_within_budget(errors):
    # The gradient of one gain sums many terms of both signs: what rounding leaves of it is luck.
    error, budget = errors.pop("gain", (0.0, 0.0))
    assert error <= 10 * budget
    beyond = {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]}
    assert not beyond


@causal_or_not
@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES, ids=str)
def test_outputs_and_gradients_are_within_the_budget(shape, dtype, is_causal, schedule, generator):
    size, value_width = SHAPES[shape]
    inputs = on_gpu(size, value_width=value_width, generator=generator, dtype=dtype, peaked=size[2] > 100)
    gain = torch.rand(size[1], generator=generator).cuda().requires_grad_()
    errors = measured_errors(call, *inputs, is_causal=is_causal, gain=gain, generator=generator)
    assert_within_budget(errors)


@causal_or_not
def test_fp32_is_exact_fp32(is_causal, schedule, generator):
    """TF32, Triton's default, would be a thousand times over the budget."""
    inputs = on_gpu((1, 2, 197, 64), generator=generator)
    assert_within_budget(measured_errors(call, *inputs, is_causal=is_causal, generator=generator))


@causal_or_not
def test_order_one(is_causal, schedule, generator):
    inputs = on_gpu((2, 2, 197, 64), generator=generator, dtype=BF16)
    assert_within_budget(measured_errors(call, *inputs, is_causal=is_causal, order=1, generator=generator))


@pytest.mark.parametrize("wrong", WRONG_FORMULAS)
def test_the_budget_rejects_wrong_formulas_at_the_largest_size(wrong, generator):
    q, k, v = on_gpu((1, 2, 4096, 64), generator=generator, dtype=BF16)
    expected, budget = truth(q, k, v), error_budget(q, k, v)
    assert relative_rms(call(q, k, v), expected) < budget
    smoothed = partial(twicing_attention, q, k, order=1)
    assert relative_rms(WRONG_FORMULAS[wrong](smoothed, v), expected) > 5 * budget


def test_masks_of_keys_and_empty_rows(schedule, generator):
    inputs = on_gpu((3, 2, 197, 64), generator=generator, dtype=BF16)
    mask = (torch.arange(197) < torch.tensor([[30], [197], [0]]))[:, None, None].cuda()
    assert_within_budget(measured_errors(call, *inputs, mask, gain=0.6, generator=generator))
    assert not call(*inputs, mask)[2].any()


@causal_or_not
def test_grouped_heads(is_causal, schedule, generator):
    inputs = on_gpu((2, 8, 197, 64), key_heads=2, generator=generator, dtype=BF16)
    gain = torch.linspace(-1, 2, 8).cuda().requires_grad_()
    errors = measured_errors(call, *inputs, is_causal=is_causal, enable_gqa=True, gain=gain, generator=generator)
    assert_within_budget(errors)


@causal_or_not
def test_strides(is_causal, schedule, generator):
    """Queries, keys and values of one packed projection, and an upstream gradient of stride 0."""
    packed = torch.randn(2, 197, 3, 4, 64, generator=generator).to("cuda", BF16).permute(2, 0, 3, 1, 4)
    upstream = torch.ones((), dtype=BF16, device="cuda").expand(2, 4, 197, 64)
    results = []
    for inputs in (packed.unbind(), [x.contiguous() for x in packed]):
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = call(*leaves, is_causal=is_causal)
        results.append((output, *torch.autograd.grad(output, leaves, upstream)))
        upstream = upstream.contiguous()
    # Tiles are loaded in another order, and so nothing but the bits of the loads may differ: none.
    assert all(relative_rms(one, other) < 1e-3 for one, other in zip(*results, strict=True))


def seeded(*args, **options):
    torch.manual_seed(3)
    return call(*args, **options)


@causal_or_not
def test_dropout_is_one_mask_for_both_passes_and_the_backward(is_causal, schedule, generator):
    q, k, v = (x.requires_grad_() for x in on_gpu((2, 2, 256, 64), generator=generator))
    options = {"dropout_p": 0.3, "is_causal": is_causal}
    identity = torch.eye(256, device="cuda").expand(2, 2, 256, 256)
    with torch.no_grad():
        kept = seeded(q, k, identity, gain=0.0, **options) != 0
    A = attention_matrix(q.double(), k.double(), is_causal=is_causal)
    assert abs(float(kept[A > 0].double().mean()) - 0.7) < 0.01
    dropped = A * kept / 0.7
    expected = 2 * dropped @ v.double() - dropped @ (dropped @ v.double())
    output = seeded(q, k, v, **options)
    assert relative_rms(output, expected) < 2e-6
    upstream = torch.randn(output.shape, generator=generator).cuda()
    found = torch.autograd.grad(output, (q, k, v), upstream)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, (q, k, v), upstream.double()), strict=True):
        assert relative_rms(gradient, wanted) < 4e-6


@causal_or_not
@pytest.mark.parametrize("tokens", [197, 1000, 3000])
def test_the_same_bits_every_time(tokens, is_causal, schedule, generator):
    """One program writes R, dR and dQ of its head and reads them again: a missing barrier would show here."""
    leaves = [x.requires_grad_() for x in on_gpu((4, 40, tokens, 64), generator=generator, dtype=BF16)]
    upstream = torch.randn(leaves[0].shape, generator=generator).to("cuda", BF16)

    def once():
        output = call(*leaves, is_causal=is_causal)
        return output.detach(), *torch.autograd.grad(output, leaves, upstream)

    first = once()
    assert all(result.isfinite().all() for result in first)
    for _ in range(10):
        assert all(torch.equal(one, other) for one, other in zip(once(), first, strict=True))


@causal_or_not
def test_one_program_per_head_and_one_per_block_agree(is_causal, generator):
    leaves = [x.requires_grad_() for x in on_gpu((2, 8, 2000, 64), generator=generator, dtype=BF16)]
    upstream = torch.randn(leaves[0].shape, generator=generator).to("cuda", BF16)
    results = []
    for schedule in ("blocks", "heads"):
        with tuning.tried(schedule):
            output = call(*leaves, is_causal=is_causal)
            results.append((output, *torch.autograd.grad(output, leaves, upstream)))
    assert all(relative_rms(one, other) < 1e-2 for one, other in zip(*results, strict=True))


def test_causal_rows_do_not_see_what_comes_later(schedule, generator):
    q, k, v = on_gpu((1, 4, 1000, 64), generator=generator, dtype=BF16)
    short = call(*(x[:, :, :600] for x in (q, k, v)), is_causal=True)
    assert relative_rms(call(q, k, v, is_causal=True)[:, :, :600], short) < 1e-3


@pytest.mark.parametrize("options", [{"is_causal": True}, {"gain": 0.5}], ids=str)
def test_it_compiles_to_one_graph(options, generator):
    torch._dynamo.reset()
    leaves = [x.requires_grad_() for x in on_gpu((2, 4, 197, 64), generator=generator, dtype=BF16)]
    upstream = torch.randn(leaves[0].shape, generator=generator).to("cuda", BF16)
    expected = call(*leaves, **options)
    output = torch.compile(call, fullgraph=True)(*leaves, **options)
    assert torch.equal(output, expected)
    found, wanted = (torch.autograd.grad(x, leaves, upstream) for x in (output, expected))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_opcheck(generator):
    leaves = [x.requires_grad_() for x in on_gpu((2, 2, 40, 16), generator=generator)]
    gain = torch.ones(1, device="cuda", requires_grad=True)
    opcheck(triton_forward, (*leaves, None, gain, None, 0.0, True, 0.3, 2, True))


def test_a_cuda_graph_replays_it_with_new_dropout(generator):
    q, k, v = on_gpu((2, 2, 197, 64), generator=generator, dtype=BF16)
    with torch.no_grad():
        call(q, k, v, dropout_p=0.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call(q, k, v, dropout_p=0.5)
        graph.replay()
        first = output.clone()
        graph.replay()
    assert first.isfinite().all()
    assert not torch.equal(output, first)


@causal_or_not
def test_memory_is_linear_in_the_tokens(is_causal, generator):
    """B H = 8: at N = 65,536 one matrix A of one head alone would be 8 GiB."""
    peaks = {}
    for tokens in (32_768, 65_536):
        leaves = [x.requires_grad_() for x in on_gpu((1, 8, tokens, 64), generator=generator, dtype=BF16)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = call(*leaves, is_causal=is_causal)
        gradients = torch.autograd.grad(output.sum(), leaves)
        torch.cuda.synchronize()
        peaks[tokens] = (torch.cuda.max_memory_allocated() - before) / (leaves[0].numel() * 2)
        assert all(x.isfinite().all() for x in (output, *gradients))
        if is_causal:
            short = call(*(x[:, :, :512] for x in leaves), is_causal=True)
            assert relative_rms(output[:, :, :512], short) < 1e-3
        del leaves, output, gradients
    # In tensors of [B, H, N, D]: output, O, three gradients, R, dR and what is smaller.
    assert peaks[65_536] < 12
    assert peaks[65_536] < 1.1 * peaks[32_768]


def test_more_than_two_to_the_31_numbers(generator):
    """Addresses of the last heads do not fit into 32 bits."""
    shape = (66, 64, 8192, 64)
    head = [torch.randn(1, 1, 8192, 64, generator=generator).to("cuda", BF16) for _ in range(3)]
    leaves = []
    for one in head:
        tensor = torch.zeros(shape, dtype=BF16, device="cuda")
        tensor[-1:, -1:] = one
        leaves.append(tensor.requires_grad_())
    assert leaves[0].numel() > 2**31
    alone = [one.requires_grad_() for one in head]
    with tuning.tried("blocks"):
        output, expected = call(*leaves, is_causal=True), call(*alone, is_causal=True)
        assert torch.equal(output[-1:, -1:], expected)
        found = torch.autograd.grad(output, leaves, torch.ones((), dtype=BF16, device="cuda").expand(shape))
        wanted = torch.autograd.grad(expected, alone, torch.ones_like(expected))
    assert all(torch.equal(one[-1:, -1:], other) for one, other in zip(found, wanted, strict=True))


def test_it_is_taken_by_name_only(generator):
    lines = explain_backend(*on_gpu((1, 2, 64, 16), generator=generator, dtype=BF16)).split("\n")
    assert lines[0].startswith("backend='auto' takes 'sdpa'")
    assert lines[-1].startswith("not 'triton': it would serve too: on a GPU: fused kernels")
