"""Cached decoding on a GPU: what the CPU cannot show. Scores of half-precision tokens without a copy of the keys."""

import pytest
import torch

from twicing import DecodeState, decode_step
from twicing.testing import error_budget, make_inputs, relative_rms, truth

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HEADS, TOKENS, WIDTH = 8, 96, 64


def decoded(inputs, steps, state, step=decode_step):
    outputs, done = [], 0
    for tokens in steps:
        outputs.append(step(*(tensor[:, :, done : done + tokens] for tensor in inputs), state, enable_gqa=True))
        done += tokens
    return torch.cat(outputs, dim=2)


@torch.no_grad()
@pytest.mark.parametrize("gain", [1.0, "tensor on the CPU", "per head"], ids=["number", "tensor", "heads"])
@pytest.mark.parametrize("capacity", [None, TOKENS], ids=["growing", "allocated"])
@pytest.mark.parametrize("key_heads", [8, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_steps_agree_with_the_whole_sequence(dtype, key_heads, capacity, gain, generator):
    shape = (2, HEADS, TOKENS, WIDTH)
    inputs = make_inputs(shape, key_heads=key_heads, generator=generator, dtype=dtype, device="cuda", peaked=True)
    gain = {"tensor on the CPU": torch.tensor(0.5), "per head": torch.linspace(0, 1.5, HEADS, device="cuda")}.get(
        gain, gain
    )
    options = {"is_causal": True, "enable_gqa": True, "gain": gain}
    expected, budget = truth(*inputs, **options), error_budget(*inputs, **options)
    for steps in ([1] * TOKENS, [TOKENS], [60, 1, 1, 17, 12, 5]):
        output = decoded(inputs, steps, DecodeState(gain=gain, capacity=capacity))
        assert output.dtype == dtype
        assert relative_rms(output, expected) <= budget


@torch.no_grad()
def test_stale_residuals_would_be_seen(generator):
    """The budget of half precision is not so wide that decoding as plain attention does would pass."""
    inputs = make_inputs((1, HEADS, TOKENS, WIDTH), generator=generator, dtype=BF16, device="cuda", peaked=True)
    options = {"is_causal": True, "enable_gqa": True}
    wrong = decoded(inputs, [1] * TOKENS, DecodeState(order=1, capacity=TOKENS))
    assert relative_rms(wrong, truth(*inputs, **options)) > 5 * error_budget(*inputs, **options)


def test_gradients_flow_through_half_precision(generator):
    """Autograd does not know the product that spares the copy."""
    inputs = make_inputs((1, HEADS, 12, WIDTH), generator=generator, dtype=BF16, device="cuda")
    for tensor in inputs:
        tensor.requires_grad_()
    decoded(inputs, [8, 1, 3], DecodeState()).float().square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in inputs)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_step_copies_no_keys(dtype, generator):
    tokens = 8192
    inputs = make_inputs((1, HEADS, tokens, WIDTH), generator=generator, dtype=dtype, device="cuda")
    state = DecodeState(capacity=tokens + 2)
    decode_step(*inputs, state)
    new = [tensor[:, :, :1] for tensor in inputs]
    decode_step(*new, state)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    decode_step(*new, state)
    grown = torch.cuda.max_memory_allocated() - before
    # Some rows of scores in fp32, [8, 8194]: a thirty-second of the keys each.
    assert grown < state.keys.nbytes / 2
