"""The cache itself: storage that grows or is written in place, beams, cropping, copies, bytes per token."""

import copy
import pickle

import pytest
import torch
from stepwise import (
    GROUPED,
    HEADS,
    KEY_HEADS,
    WIDTH,
    after_prompt,
    causal_mask,
    cut,
    decode_in_steps,
    storage,
    tokens_of,
)
from torch.utils._python_dispatch import TorchDispatchMode

from twicing.ops.decode import TOKENS_PER_MASK, decode_step
from twicing.ops.decode_state import DecodeState
from twicing.testing import make_inputs, relative_rms, truth

FP64 = 1e-14


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that any operation made; views of what was there before do not count."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("steps", [[2048], [600, 1448]], ids=["prompt", "chunks"])
def test_a_prompt_allocates_no_square_of_its_length(steps):
    tokens = 2048
    inputs = make_inputs((1, 1, tokens, 8), generator=torch.Generator().manual_seed(0))
    with Allocations(*inputs) as seen:
        decode_in_steps(inputs, steps, DecodeState(capacity=tokens))
    assert seen.largest <= (tokens * 8 if len(steps) == 1 else TOKENS_PER_MASK * tokens)


def test_a_step_on_an_allocated_state_writes_in_place_and_copies_nothing():
    tokens = 500
    inputs = tokens_of(2, tokens + 3)
    state = after_prompt(cut(inputs, 0, tokens), capacity=tokens + 3)
    stored = (state.keys, state.values, state.residuals)
    addresses = [tensor.data_ptr() for tensor in stored]
    new = cut(inputs, tokens, tokens + 3)
    with Allocations(*stored, *new) as seen:
        decode_step(*new, state, **GROUPED)
    assert [tensor.data_ptr() for tensor in (state.keys, state.values, state.residuals)] == addresses
    assert state.length == tokens + 3
    # The new rows of A, in fewer elements than the keys of one head pair would be.
    assert seen.largest == 2 * HEADS * 3 * (tokens + 3)


def test_the_allocations_of_a_wrong_way_would_be_seen():
    keys = torch.zeros(2, KEY_HEADS, 500, WIDTH)
    with Allocations(keys) as seen:
        keys.transpose(-1, -2)[..., 3:]
        assert seen.largest == 0
        keys.repeat_interleave(2, dim=1)
    assert seen.largest == 2 * keys.numel()


@storage
def test_a_state_keeps_its_own_copy_of_the_tokens(capacity):
    inputs = tokens_of(1, 20)
    expected = truth(*inputs, is_causal=True, **GROUPED)
    buffer = [tensor.clone() for tensor in cut(inputs, 0, 10)]
    state = after_prompt(buffer, capacity=capacity)
    for tensor in buffer:
        tensor.fill_(7)
    output = decode_step(*cut(inputs, 10, 20), state, **GROUPED)
    assert relative_rms(output, expected[:, :, 10:]) <= FP64


def test_a_full_state_is_usable_to_its_last_token_and_refuses_the_next():
    inputs = tokens_of(1, 11)
    state = after_prompt(cut(inputs, 0, 9), capacity=10)
    last = decode_step(*cut(inputs, 9, 10), state, **GROUPED)
    assert relative_rms(last, truth(*cut(inputs, 0, 10), is_causal=True, **GROUPED)[:, :, 9:]) <= FP64
    before = copy.deepcopy(state)
    with pytest.raises(
        ValueError, match=r"full: of its 10 tokens 10 are taken, and 1 more were given\. Make it with a"
    ):
        decode_step(*cut(inputs, 10, 11), state, **GROUPED)
    assert state.length == 10
    assert torch.equal(state.residuals, before.residuals)


@storage
def test_residuals_are_those_of_the_definition(capacity):
    """R = (1 + g) V - g A V, per query head; nothing of the unused capacity shows."""
    query, key, value = tokens_of(2, 12)
    gain = torch.tensor([1.0, 0.5, 0.0, 1.5])
    state = DecodeState(gain=gain, capacity=capacity)
    decode_in_steps((query, key, value), [7, 1, 4], state, **GROUPED)
    O = truth(query, key, value, is_causal=True, order=1, **GROUPED)  # noqa: E741 - the papers' name
    V, g = value.repeat_interleave(2, dim=1), gain[:, None, None]
    assert relative_rms(state.residuals, (1 + g) * V - g * O) <= FP64
    assert torch.equal(state.keys, key)
    assert torch.equal(state.values, value)


@pytest.mark.parametrize("gain", [0.0035, torch.tensor([0.0035, 0.1, 0.0, 1.7])], ids=["number", "per-head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_residuals_in_half_precision_are_rounded_once_and_gains_never(dtype, gain):
    """Two tokens with the same key and opposite values: the second's A V is zero, and its R is (1 + g) V."""
    value = torch.randn(1, HEADS, 1, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    same = torch.zeros(1, HEADS, 2, 4, dtype=dtype)
    state = DecodeState(gain=gain)
    decode_step(same, same, torch.cat([-value, value], dim=2), state)
    g = gain[:, None, None].double() if isinstance(gain, torch.Tensor) else gain
    expected = (1 + g) * value.double()
    # Half a unit in the last place, and the little that fp32 adds.
    limit = 0.501 * torch.finfo(dtype).eps * expected.abs()
    assert ((state.residuals[:, :, 1:] - expected).abs() <= limit).all()


@storage
def test_cropped_tokens_are_as_if_never_given(capacity):
    """As in speculative decoding: guesses are rejected, others take their place."""
    inputs, guesses = tokens_of(2, 20), tokens_of(2, 6, seed=1)
    state = after_prompt(cut(inputs, 0, 15), capacity=capacity)
    decode_step(*guesses, state, **GROUPED)
    state.crop(15)
    assert state.keys.shape[2] == state.length == 15
    output = decode_step(*cut(inputs, 15, 20), state, **GROUPED)
    assert relative_rms(output, truth(*inputs, is_causal=True, **GROUPED)[:, :, 15:]) <= FP64
    state.crop(0)
    again = decode_in_steps(inputs, [12, 8], state, **GROUPED)
    assert relative_rms(again, truth(*inputs, is_causal=True, **GROUPED)) <= FP64


@storage
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("index", [[1, 1, 0], [2, 0], [0, 0, 1, 1, 2, 2, 2]], ids=["same", "fewer", "more"])
def test_beams_go_on_from_the_sequences_they_were_given(index, dtype, capacity):
    index = torch.tensor(index, dtype=dtype)
    inputs, padding = tokens_of(3, 10), torch.tensor([0, 4, 1])
    state = after_prompt(inputs, capacity=capacity, padding=padding)
    state.reorder(index)
    more = tokens_of(len(index), 3, seed=1)
    output = decode_in_steps(more, [1, 2], state, **GROUPED)
    whole = [torch.cat([old[index], new], dim=2) for old, new in zip(inputs, more, strict=True)]
    expected = truth(*whole, causal_mask(13, padding[index]), **GROUPED)
    assert relative_rms(output, expected[:, :, 10:]) <= FP64
    assert torch.equal(state.lengths, 13 - padding[index])


def test_reordering_an_allocated_state_of_the_same_batch_stays_in_place():
    state = after_prompt(tokens_of(3, 10), capacity=16)
    addresses = [state.keys.data_ptr(), state.residuals.data_ptr()]
    state.reorder(torch.tensor([2, 2, 0]))
    assert [state.keys.data_ptr(), state.residuals.data_ptr()] == addresses


@storage
def test_repeating_puts_copies_side_by_side(capacity):
    inputs = tokens_of(2, 5)
    state = after_prompt(inputs, capacity=capacity, padding=torch.tensor([0, 2]))
    state.repeat(3)
    assert torch.equal(state.keys, inputs[1].repeat_interleave(3, dim=0))
    assert state.lengths.tolist() == [5, 5, 5, 3, 3, 3]


def test_lengths_do_not_count_padding():
    inputs = tokens_of(3, 5)
    state = DecodeState(padding=torch.tensor([0, 2, 4]))
    assert state.lengths is None
    decode_step(*cut(inputs, 0, 3), state, **GROUPED)
    assert state.lengths.tolist() == [3, 1, 0]
    decode_step(*cut(inputs, 3, 5), state, **GROUPED)
    assert state.lengths.tolist() == [5, 3, 1]
    assert after_prompt(inputs).lengths.tolist() == [5, 5, 5]


@storage
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_bytes_per_token_are_those_of_the_documentation(key_heads, capacity):
    """1.5 times those of plain attention, and (2 + n) / 2 times with n query heads to a key head."""
    inputs = tokens_of(2, 3, dtype=torch.bfloat16, key_heads=key_heads, value_width=WIDTH)
    plain, twiced = DecodeState(order=1, capacity=capacity), DecodeState(capacity=capacity)
    assert plain.bytes_per_token == twiced.bytes_per_token == 0
    for state in (plain, twiced):
        decode_step(*inputs, state, **GROUPED)
    assert plain.bytes_per_token == 2 * key_heads * WIDTH * 2
    assert twiced.bytes_per_token == plain.bytes_per_token * (2 + HEADS // key_heads) / 2


@storage
def test_a_state_moves_to_another_dtype_and_device(capacity):
    inputs = tokens_of(2, 12, dtype=torch.float32)
    state = after_prompt(cut(inputs, 0, 9), capacity=capacity, gain=torch.ones(HEADS), padding=torch.tensor([0, 3]))
    assert state.to(dtype=torch.float64) is state
    new = [tensor.double() for tensor in cut(inputs, 9, 12)]
    output = decode_step(*new, state, **GROUPED)
    expected = truth(*inputs, causal_mask(12, torch.tensor([0, 3])), **GROUPED)
    assert output.dtype == torch.float64
    assert relative_rms(output, expected[:, :, 9:]) <= 1e-6
    assert state.padding.dtype == torch.int64
    state.to("meta")
    tensors = (state.keys, state.values, state.residuals, state.padding, state.gain)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@storage
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))], ids=["deep", "pickle"]
)
def test_copies_go_on_by_themselves(copied, capacity):
    inputs = tokens_of(2, 12)
    state = after_prompt(cut(inputs, 0, 9), capacity=capacity)
    other = copied(state)
    decode_step(*tokens_of(2, 3, seed=1), state, **GROUPED)
    output = decode_step(*cut(inputs, 9, 12), other, **GROUPED)
    assert relative_rms(output, truth(*inputs, is_causal=True, **GROUPED)[:, :, 9:]) <= FP64


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_allocated_state_refuses_gradients_but_not_their_absence(context):
    query, key, value = tokens_of(1, 3)
    gain = torch.ones(HEADS, requires_grad=True)
    mask = torch.zeros(3, 3, requires_grad=True)
    message = "written in place and takes no gradients: decode under torch.no_grad"
    with pytest.raises(ValueError, match=message):
        decode_step(query, key, value, DecodeState(capacity=3, gain=gain), **GROUPED)
    with pytest.raises(ValueError, match=message):
        decode_step(query, key, value, DecodeState(capacity=3), mask, **GROUPED)
    for learnt in range(3):
        new = [tensor.clone().requires_grad_(number == learnt) for number, tensor in enumerate((query, key, value))]
        state = DecodeState(capacity=3)
        with pytest.raises(ValueError, match=message):
            decode_step(*new, state, **GROUPED)
        assert state.keys is None
    state = DecodeState(capacity=3, gain=gain)
    with context():
        output = decode_in_steps((query, key, value), [2, 1], state, **GROUPED)
    assert relative_rms(output, truth(query, key, value, is_causal=True, **GROUPED)) <= FP64


def test_it_prints_what_it_holds():
    assert repr(DecodeState()) == "DecodeState(order 2, 0 tokens, growing: nothing stored yet)"
    state = after_prompt(tokens_of(1, 3), order=1, capacity=5)
    assert repr(state) == (
        "DecodeState(order 1, 3 tokens, of 5: keys [1, 2, 5, 8] torch.float64, values [1, 2, 5, 6] torch.float64)"
    )
