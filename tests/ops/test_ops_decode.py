"""Cached decoding gives what the full causal forward gives, in whatever steps the sequence comes."""

import copy
import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwise import causal_mask, decode_in_steps
from torch._dynamo.testing import CompileCounter

from twicing import attention_matrix, twicing_attention
from twicing.ops import decode
from twicing.ops.decode import FEW_TOKENS, TOKENS_PER_MASK, decode_step
from twicing.ops.decode_state import DecodeState
from twicing.testing import error_budget, make_inputs, relative_rms, truth

HEADS = 4
FP32_LIMIT = 2e-6
FP64 = 1e-14
property_test = settings(derandomize=True, deadline=None, max_examples=40, database=None)
planted_test = settings(property_test, max_examples=10)


@dataclass
class Sequence:
    inputs: tuple = field(repr=False)
    steps: list
    order: int = 2
    gain: float | torch.Tensor = 1.0
    padding: torch.Tensor | None = None
    capacity: int | None = None
    options: dict = field(default_factory=lambda: {"enable_gqa": True})

    def state(self):
        return DecodeState(order=self.order, gain=self.gain, capacity=self.capacity, padding=self.padding)


@st.composite
def sequences(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # Among fewer tokens the errors of two right ways differ by a factor of up to 1.7, by luck.
    batch, tokens = draw(st.integers(1, 2)), draw(st.integers(16, 48))
    query, key, value = make_inputs(
        (batch, HEADS, tokens, draw(st.sampled_from([8, 10]))),
        key_heads=draw(st.sampled_from([HEADS, 2, 1])),
        value_width=draw(st.sampled_from([8, 10])),
        peaked=draw(st.booleans()),
        generator=generator,
    )
    cuts = sorted(draw(st.sets(st.integers(1, tokens - 1))))
    steps = [end - start for start, end in itertools.pairwise([0, *cuts, tokens])]
    sequence = Sequence((query, key, draw(st.sampled_from([1.0, 1000.0])) * value), steps)
    sequence.order = draw(st.sampled_from([2, 2, 1]))
    if sequence.order == 2:
        per_head = torch.rand(HEADS, generator=generator) + 0.25
        sequence.gain = per_head if draw(st.booleans()) else draw(st.sampled_from([1.0, 0.3, 1.5, -1.0]))
    if draw(st.booleans()):
        sequence.padding = torch.randint(0, tokens // 2, (batch,), generator=generator)
    sequence.capacity = draw(st.sampled_from([None, tokens, tokens + 7]))
    sequence.options["scale"] = draw(st.sampled_from([None, 0.2]))
    return sequence


def assert_agrees(sequence, step=decode_step):
    """In fp32 at most 2e-6 from the truth, and at most twice as far as the full forward is."""
    options = {"order": sequence.order, "gain": sequence.gain, **sequence.options}
    mask = causal_mask(sequence.inputs[0].shape[2], sequence.padding)
    expected = truth(*sequence.inputs, mask, **options)
    allowed = 2 * relative_rms(twicing_attention(*sequence.inputs, mask, **options), expected)
    output = decode_in_steps(sequence.inputs, sequence.steps, sequence.state(), step, **sequence.options)
    assert output.isfinite().all()
    assert relative_rms(output, expected) <= min(FP32_LIMIT, allowed)


@property_test
@given(sequences())
def test_any_split_of_a_sequence_agrees_with_the_full_forward(sequence):
    assert_agrees(sequence)


@pytest.mark.parametrize("order", [1, 2])
def test_every_split_of_a_short_sequence_agrees(order):
    """All 32 of them, one token at a time and all at once among them."""
    tokens = 6
    inputs = make_inputs((1, HEADS, tokens, 4), key_heads=2, generator=torch.Generator().manual_seed(0))
    inputs = [tensor.double() for tensor in inputs]
    expected = truth(*inputs, is_causal=True, enable_gqa=True, order=order)
    for cut in itertools.product([False, True], repeat=tokens - 1):
        ends = [token for token, is_cut in enumerate(cut, start=1) if is_cut] + [tokens]
        steps = [end - start for start, end in itertools.pairwise([0, *ends])]
        output = decode_in_steps(inputs, steps, DecodeState(order=order, capacity=tokens), enable_gqa=True)
        assert relative_rms(output, expected) <= FP64


def broadcast_row(query, key, value, state, **options):
    """The first trap: one row of A, so that V - A V is the values of all tokens less the newest's output."""
    output = decode_step(query, key, value, state, **options)
    if query.shape[2] > 1:
        return output
    padded = None if state.padding is None else torch.arange(state.length) >= state.padding[:, None, None, None]
    A = attention_matrix(query, state.keys, padded, **options)
    V = state.values.repeat_interleave(HEADS // state.values.shape[1], dim=1)
    gain = state.gain.reshape(-1, 1, 1) if isinstance(state.gain, torch.Tensor) else state.gain
    return A @ V + gain * (A @ (V - A @ V))


def residual_not_updated(query, key, value, state, **options):
    output = decode_step(query, key, value, state, **options)
    state.residuals[:, :, -query.shape[2] :] = value.repeat_interleave(HEADS // value.shape[1], dim=1)
    return output


def residual_of_another_gain(query, key, value, state, **options):
    other = copy.deepcopy(state)
    other.gain = other.gain + 0.5
    decode_step(query, key, value, other, **options)
    output = decode_step(query, key, value, state, **options)
    state.residuals.copy_(other.residuals)
    return output


def residual_of_the_newest_left_out(query, key, value, state, **options):
    """U = A [R of the tokens before; v], as if only the past had residuals."""
    output = decode_step(query, key, value, state, **options)
    tokens = query.shape[2]
    left_out = state.residuals[:, :, -tokens:] - value.repeat_interleave(HEADS // value.shape[1], dim=1)
    mask = causal_mask(state.length, state.padding)[..., -tokens:, :]
    A = attention_matrix(query, state.keys, mask, **options)
    return output - A[..., -tokens:] @ left_out


WRONG_STEPS = [broadcast_row, residual_not_updated, residual_of_another_gain, residual_of_the_newest_left_out]


@pytest.mark.parametrize("wrong", WRONG_STEPS)
@planted_test
@given(sequence=sequences())
def test_a_wrong_step_does_not_agree(wrong, sequence):
    tokens = sequence.inputs[0].shape[2]
    if sequence.order == 1:
        sequence.order, sequence.gain = 2, 1.0
    sequence.steps = [tokens - 4, 1, 1, 1, 1]
    assert_agrees(sequence)
    with pytest.raises(AssertionError):
        assert_agrees(sequence, wrong)


@pytest.mark.parametrize("capacity", [None, 1300], ids=["growing", "allocated"])
@pytest.mark.parametrize("padded", [False, True], ids=["no-padding", "padded"])
def test_long_prompts_in_few_large_steps_agree(padded, capacity):
    """Beyond the number of tokens for which a mask is made at once, after a whole prompt and after none."""
    tokens = 1200
    assert tokens - 200 > TOKENS_PER_MASK + FEW_TOKENS
    inputs = make_inputs((2, HEADS, tokens, 8), key_heads=2, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([0, 700]) if padded else None
    for steps in ([tokens], [200, tokens - 201, 1]):
        assert_agrees(Sequence(inputs, steps, padding=padding, capacity=capacity))


@pytest.mark.parametrize("key_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_stay_within_the_budget_of_the_dense_reference(dtype, key_heads):
    """Residuals are kept in the dtype of the tokens, rounded once."""
    generator = torch.Generator().manual_seed(0)
    inputs = make_inputs((2, HEADS, 64, 16), key_heads=key_heads, peaked=True, generator=generator, dtype=dtype)
    options = {"is_causal": True, "enable_gqa": True, "gain": torch.tensor([1.0, 0.5, 1.5, 0.1])}
    expected, budget = truth(*inputs, **options), error_budget(*inputs, **options)
    for steps in ([1] * 64, [64], [30, 1, 1, 20, 12]):
        state = DecodeState(gain=options["gain"], capacity=64)
        output = decode_in_steps(inputs, steps, state, enable_gqa=True)
        assert output.dtype == state.keys.dtype == state.values.dtype == state.residuals.dtype == dtype
        assert relative_rms(output, expected) <= budget


def window(tokens):
    """Every token attends to itself and the three before; tokens 5 and 20 attend to nothing."""
    position = torch.arange(tokens)
    allowed = (position[:, None] - position < 4).expand(2, 1, tokens, tokens).clone()
    allowed[0, :, 5] = False
    allowed[1, :, 20] = False
    return allowed


def distances(tokens):
    """A float mask that differs from head to head and does not know causality."""
    position = torch.arange(tokens)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])[:, None, None]
    return -slopes * (position[:, None] - position).abs()


def windowed_distances(tokens):
    return torch.where(window(tokens), distances(tokens), float("-inf"))


def masked_keys(tokens):
    return (torch.arange(tokens) % 5 != 3).expand(2, 1, 1, tokens)


@pytest.mark.parametrize("key_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("padded", [False, True], ids=["no-padding", "padded"])
@pytest.mark.parametrize("make_mask", [window, distances, windowed_distances, masked_keys])
def test_masks_mean_what_they_mean_in_the_full_forward(make_mask, padded, key_heads):
    """The rows of the new tokens, with causality and padding added; rows with nothing to attend to give zero."""
    tokens = 40
    generator = torch.Generator().manual_seed(0)
    inputs = make_inputs((2, HEADS, tokens, 8), key_heads=key_heads, generator=generator, dtype=torch.float64)
    padding = torch.tensor([2, 9]) if padded else None
    mask = make_mask(tokens)
    mask = mask.double() if mask.is_floating_point() else mask
    allowed = causal_mask(tokens, padding)
    full = mask & allowed if mask.dtype == torch.bool else torch.where(allowed, mask, float("-inf"))
    expected = truth(*inputs, full, enable_gqa=True)

    def masked_step(query, key, value, state, **options):
        seen = slice(state.length, state.length + query.shape[2])
        rows = mask if mask.shape[-2] == 1 else mask[..., seen, :]
        return decode_step(query, key, value, state, rows[..., : seen.stop], **options)

    for steps in ([tokens], [1] * tokens, [25, 1, 3, 11]):
        output = decode_in_steps(inputs, steps, DecodeState(padding=padding), masked_step, enable_gqa=True)
        assert relative_rms(output, expected) <= FP64
        if make_mask in (window, windowed_distances):
            assert (output[1, :, 20] == 0).all()


@pytest.mark.parametrize("make_mask", [windowed_distances, masked_keys])
def test_a_mask_of_a_long_prompt_is_cut_as_its_tokens_are(make_mask, monkeypatch):
    """As where more tokens are given than a mask is made for at a time."""
    monkeypatch.setattr(decode, "TOKENS_PER_MASK", 17)
    inputs = make_inputs((2, HEADS, 40, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask, allowed = make_mask(40), causal_mask(40)
    mask = mask.double() if mask.is_floating_point() else mask
    full = mask & allowed if mask.dtype == torch.bool else torch.where(allowed, mask, float("-inf"))
    assert relative_rms(decode_step(*inputs, DecodeState(), mask), truth(*inputs, full)) <= FP64


@pytest.mark.parametrize("steps", [[30], [1] * 30, [3, 7, 20]], ids=["prompt", "single", "chunks"])
def test_padding_is_never_looked_at_and_comes_out_as_zero(steps):
    inputs = make_inputs((2, HEADS, 30, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padding = torch.tensor([4, 17])
    output = decode_in_steps(inputs, steps, DecodeState(padding=padding))
    garbage = [tensor.clone() for tensor in inputs]
    for sequence, padded in enumerate(padding):
        for tensor in garbage:
            tensor[sequence, :, :padded] = 1e5
        alone = [tensor[sequence : sequence + 1, :, padded:] for tensor in inputs]
        assert relative_rms(output[sequence : sequence + 1, :, padded:], truth(*alone, is_causal=True)) <= FP64
        assert (output[sequence, :, :padded] == 0).all()
    assert torch.equal(decode_in_steps(garbage, steps, DecodeState(padding=padding)), output)


def test_order_one_is_sdpa_on_the_cache_bit_for_bit():
    query, key, value = make_inputs((2, HEADS, 12, 8), key_heads=2, generator=torch.Generator().manual_seed(0))
    state = DecodeState(order=1, capacity=12)
    prompt = [tensor[:, :, :11] for tensor in (query, key, value)]
    assert torch.equal(
        decode_step(*prompt, state, enable_gqa=True),
        F.scaled_dot_product_attention(*prompt, is_causal=True, enable_gqa=True),
    )
    last = [tensor[:, :, 11:] for tensor in (query, key, value)]
    expected = F.scaled_dot_product_attention(last[0], key, value, enable_gqa=True)
    assert torch.equal(decode_step(*last, state, enable_gqa=True), expected)
    assert state.residuals is None


@pytest.mark.parametrize("steps", [[24], [20, 1, 1, 2], [2, 22]], ids=["prompt", "prompt-and-tokens", "chunks"])
def test_gradients_through_all_steps_are_those_of_the_full_forward(steps):
    generator = torch.Generator().manual_seed(0)
    inputs = make_inputs((2, HEADS, 24, 6), key_heads=2, generator=generator, dtype=torch.float64)
    mask = 0.1 * torch.randn(HEADS, 24, 24, generator=generator, dtype=torch.float64)
    gain = torch.tensor([1.0, 0.5, 1.5, 0.1], dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (*inputs, mask, gain)]
    full_mask = torch.where(causal_mask(24), mask, float("-inf"))
    expected = twicing_attention(*inputs, full_mask, enable_gqa=True, gain=gain, backend="reference")
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)

    def masked_step(query, key, value, state, **options):
        rows = slice(state.length, state.length + query.shape[2])
        return decode_step(query, key, value, state, mask[:, rows, : rows.stop], **options)

    output = decode_in_steps(inputs, steps, DecodeState(gain=gain), masked_step, enable_gqa=True)
    found = torch.autograd.grad(output, leaves, upstream)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, leaves, upstream), strict=True):
        assert relative_rms(gradient, wanted) <= 10 * FP64


@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_decodes_and_keeps_its_dtype(autocast, given):
    """That of autocast, but for tokens in fp64, which it leaves alone."""
    inputs = make_inputs((1, HEADS, 20, 8), generator=torch.Generator().manual_seed(0), dtype=given)
    dtype = given if given == torch.float64 else autocast
    state, expected_state = DecodeState(), DecodeState()
    with torch.autocast("cpu", dtype=autocast):
        output = decode_in_steps(inputs, [17, 1, 2], state)
    expected = decode_in_steps([tensor.to(dtype) for tensor in inputs], [17, 1, 2], expected_state)
    assert torch.equal(output, expected)
    assert torch.equal(state.residuals, expected_state.residuals)


@pytest.mark.parametrize("capacity", [None, 48], ids=["growing", "allocated"])
def test_compiled_steps_are_one_graph_that_serves_every_length(capacity):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(decode_step, fullgraph=True, backend=counter)
    inputs = make_inputs((2, HEADS, 40, 8), key_heads=2, generator=torch.Generator().manual_seed(0))
    prompt, rest = [tensor[:, :, :30] for tensor in inputs], [tensor[:, :, 30:] for tensor in inputs]
    padding = torch.tensor([0, 5])
    state, plain = (DecodeState(capacity=capacity, padding=padding) for _ in range(2))
    for each in (state, plain):
        decode_step(*prompt, each, enable_gqa=True)
    output = decode_in_steps(rest, [1] * 10, state, compiled, enable_gqa=True)
    torch.testing.assert_close(output, decode_in_steps(rest, [1] * 10, plain, enable_gqa=True))
    assert state.length == plain.length == 40
    # The first length is compiled as a number, the second as a symbol.
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("scale", [-1.3, 0.0])
def test_a_scale_that_is_not_positive_in_steps_and_whole_prompts(scale):
    inputs = make_inputs((1, HEADS, 40, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = twicing_attention(*inputs, is_causal=True, scale=scale, backend="reference")
    for steps in ([40], [1] * 40, [20, 20]):
        output = decode_in_steps(inputs, steps, DecodeState(), scale=scale)
        assert relative_rms(output, expected) <= 1e-14


def test_an_fp32_mask_beside_fp64_tokens():
    inputs = make_inputs((1, HEADS, 40, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.randn(40, 40, generator=torch.Generator().manual_seed(1))
    forbidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    wide = mask.double().masked_fill(forbidden, -math.inf)
    for order in (1, 2):
        expected = twicing_attention(*inputs, wide, order=order, backend="reference")
        state = DecodeState(order=order)
        output = decode_step(*(tensor[:, :, :30] for tensor in inputs), state, mask[:30, :30])
        assert relative_rms(output, expected[:, :, :30]) <= 1e-14
        last = decode_step(*(tensor[:, :, 30:] for tensor in inputs), state, mask[30:])
        assert relative_rms(last, expected[:, :, 30:]) <= 1e-14


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (2, 0, 4, 4), (2, 2, 0, 4), (2, 2, 4, 0)], ids=str)
def test_empty_batches_heads_and_widths(shape, tokens):
    """Without a width of query and key every score is zero, and a token averages what it sees."""
    batch, heads, width, value_width = shape
    query, value = torch.randn(batch, heads, tokens, width), torch.randn(batch, heads, tokens, value_width)
    output = decode_step(query, query, value, DecodeState())
    assert output.shape == value.shape
    if width == 0:
        expected = twicing_attention(query, query, value, is_causal=True, backend="reference")
        torch.testing.assert_close(output, expected)
