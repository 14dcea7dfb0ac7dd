"""What cached decoding refuses, in which words, and that the state is then as it was."""

import pytest
import torch
from stepwise import GROUPED, after_prompt, cut, storage, tokens_of

from twicing.ops.decode import decode_step
from twicing.ops.decode_state import DecodeState
from twicing.testing import relative_rms, truth

FP64 = 1e-14


STATES_REFUSED = {
    "order-3": ({"order": 3}, ValueError, r"serves order 1 and 2: order 3 would need 2 residuals for every token"),
    "order-0": ({"order": 0}, ValueError, "order must be at least 1"),
    "gain-of-order-1": ({"order": 1, "gain": 0.5}, ValueError, "gain has no effect with order=1"),
    "gain-infinite": ({"gain": float("inf")}, ValueError, "gain must be finite"),
    "capacity-0": ({"capacity": 0}, ValueError, "capacity must be a positive number of tokens, or None to grow: got 0"),
    "capacity-float": ({"capacity": 8.0}, ValueError, r"capacity must be a positive number .* got 8\.0"),
    "padding-mask": (
        {"padding": torch.ones(2, 5, dtype=torch.bool)},
        ValueError,
        r"padding must be integers of shape \[B\], .*: got torch\.bool of shape \[2, 5\]",
    ),
    "padding-float": ({"padding": torch.ones(2)}, ValueError, r"got torch\.float32 of shape \[2\]"),
}


@pytest.mark.parametrize("case", STATES_REFUSED)
def test_a_state_that_makes_no_sense_is_refused(case):
    options, error, message = STATES_REFUSED[case]
    with pytest.raises(error, match=message):
        DecodeState(**options)


def broken(*changes, tokens=1, **shapes):
    """New tokens of which query, key or value is changed: ("key", lambda key: ...)."""
    inputs = dict(zip(("query", "key", "value"), tokens_of(2, tokens, seed=1, **shapes), strict=True))
    for name, change in changes:
        inputs[name] = change(inputs[name])
    return tuple(inputs.values())


STEPS_REFUSED = {
    "key-heads": (broken(key_heads=1), GROUPED, r"The state holds keys \[2, 2, n, 8\] in .* would add \[2, 1, n, 8\]"),
    "query-heads": (
        broken(("query", lambda query: query[:, :2])),
        GROUPED,
        r"The state holds residuals \[2, 4, n, 6\] .* would add \[2, 2, n, 6\] in .*: start another DecodeState",
    ),
    "value-width": (
        broken(value_width=7),
        GROUPED,
        r"The state holds values \[2, 2, n, 6\] .* would add \[2, 2, n, 7\]",
    ),
    "dtype": (
        broken(dtype=torch.float32),
        GROUPED,
        r"in torch\.float64 on cpu, and the new .* in torch\.float32 on cpu",
    ),
    "device": (
        tuple(tensor.to("meta") for tensor in broken()),
        GROUPED,
        r"in torch\.float64 on cpu, and the new .* in torch\.float64 on meta",
    ),
    "batch": (tuple(tensor[:1] for tensor in broken()), GROUPED, r"\[2, 2, n, 8\] .* would add \[1, 2, n, 8\]"),
    "all-keys": (
        (broken()[0], *tokens_of(2, 6)[1:]),
        GROUPED,
        r"the same new tokens, at least one, and not those of the tokens before, which the state holds: got query \[2",
    ),
    "no-token": (broken(tokens=0), GROUPED, r"the same new tokens, at least one"),
    "values-of-others": (broken(("value", lambda value: value.repeat(1, 1, 2, 1))), GROUPED, "same number of tokens"),
    "no-enable-gqa": (broken(), {}, r"Where keys and values have fewer heads than queries, pass enable_gqa=True"),
    "one-key-head": (broken(key_heads=1), {}, r"does not broadcast: .* the same batch and heads \(or enable_gqa=True"),
    "one-key-batch": (
        broken(("key", lambda key: key[:1])),
        GROUPED,
        r"does not broadcast: .* got query \[2, 4, 1, 8\]",
    ),
    "no-batch": (
        tuple(tensor[0] for tensor in broken()),
        GROUPED,
        r"of the layout \[B, H, n, D\]: got query \[4, 1, 8\]",
    ),
    "mixed-dtypes": (
        broken(("value", torch.Tensor.float)),
        GROUPED,
        "must have one floating-point dtype and one device",
    ),
    "mask-of-the-new": (
        broken(),
        {"attn_mask": torch.ones(2, 1, 1, 1, dtype=torch.bool), **GROUPED},
        r"must be for all 6 tokens so far, 5 in the state and 1 new: got \[2, 1, 1, 1\]",
    ),
    "mask-of-all-queries": (
        broken(),
        {"attn_mask": torch.ones(6, 6, dtype=torch.bool), **GROUPED},
        r"attn_mask must have at least 2 axes and broadcast to \[2, 4, 1, 6\]: got \[6, 6\]",
    ),
}


@storage
@pytest.mark.parametrize("case", STEPS_REFUSED)
def test_a_step_that_does_not_fit_is_refused_and_leaves_the_state_as_it_was(case, capacity):
    """Again and again, and after a token that fitted too."""
    new, options, message = STEPS_REFUSED[case]
    inputs = tokens_of(2, 7)
    state = after_prompt(cut(inputs, 0, 4), capacity=capacity)
    decode_step(*cut(inputs, 4, 5), state, **GROUPED)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            decode_step(*new, state, **options)
    assert state.length == 5
    output = decode_step(*cut(inputs, 5, 7), state, **GROUPED)
    assert relative_rms(output, truth(*inputs, is_causal=True, **GROUPED)[:, :, 5:]) <= FP64


def test_a_first_step_that_is_refused_leaves_the_state_new():
    state = DecodeState(gain=torch.ones(3), padding=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"one for each of the 4 query heads: got shape \[3\]"):
        decode_step(*tokens_of(2, 5), state, **GROUPED)
    with pytest.raises(ValueError, match=r"padding is for 2 sequences on cpu, and the new tokens are of 3 on cpu"):
        decode_step(*tokens_of(3, 5), state, **GROUPED)
    assert state.keys is None
    assert state.length == 0


CHANGES = {
    "reordered": lambda state: state.reorder(torch.tensor([0, 1, 1])),
    "repeated": lambda state: state.repeat(2),
    "of-another-dtype": lambda state: state.to(dtype=torch.float32),
    "elsewhere": lambda state: state.to("meta"),
}


@storage
@pytest.mark.parametrize("change", CHANGES)
def test_tokens_that_fitted_are_checked_again_once_the_state_is_another(change, capacity):
    inputs = tokens_of(2, 7)
    state = after_prompt(cut(inputs, 0, 5), capacity=capacity)
    decode_step(*cut(inputs, 5, 6), state, **GROUPED)
    CHANGES[change](state)
    with pytest.raises(ValueError, match="start another DecodeState for another batch, other heads or another dtype"):
        decode_step(*cut(inputs, 6, 7), state, **GROUPED)
    assert state.length == 6


def test_tokens_that_fitted_as_grouped_heads_are_refused_as_others():
    inputs = tokens_of(2, 7)
    state = after_prompt(cut(inputs, 0, 5))
    decode_step(*cut(inputs, 5, 6), state, **GROUPED)
    with pytest.raises(ValueError, match="pass enable_gqa=True"):
        decode_step(*cut(inputs, 6, 7), state)


def test_beams_and_crops_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"repeat\(\) needs sequences to copy: take the first step"):
        DecodeState().repeat(2)
    state = after_prompt(tokens_of(2, 5))
    with pytest.raises(ValueError, match=r"repeat\(\) makes at least 1 copy of each sequence: got 0"):
        state.repeat(0)
    with pytest.raises(ValueError, match=r"int64 or int32 of shape \[B\]: got torch\.bool of shape \[2\]"):
        state.reorder(torch.tensor([True, False]))
    for length in (6, -1):
        with pytest.raises(ValueError, match=rf"keeps between 0 and the 5 tokens that are there: got {length}"):
            state.crop(length)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tokens_are_refused_in_a_sentence():
    nested = torch.nested.nested_tensor([torch.randn(4, 1, 8)] * 2)
    with pytest.raises(ValueError, match="Nested tensors are not supported"):
        decode_step(nested, nested, nested, DecodeState())


@pytest.mark.parametrize("padding", [torch.tensor([1]), torch.tensor([0, 1, 1])], ids=["one", "three"])
def test_padding_that_is_replaced_is_checked_again(padding):
    inputs = tokens_of(2, 7)
    state = after_prompt(cut(inputs, 0, 5), padding=torch.tensor([0, 1]))
    decode_step(*cut(inputs, 5, 6), state, **GROUPED)
    state.padding = padding
    with pytest.raises(
        ValueError, match=f"padding is for {len(padding)} sequences on cpu, and the new tokens are of 2"
    ):
        decode_step(*cut(inputs, 6, 7), state, **GROUPED)
