"""The recurrent form gives what the whole causal sequence gives, in whatever steps, and does not grow."""

import copy
import itertools

import pytest
import torch

from twicing.ops.linear import linear_attention_matrix, twicing_linear_attention
from twicing.ops.linear_decode import LinearDecodeState, linear_decode_step
from twicing.ops.linear_features import FEATURE_MAPS
from twicing.testing import make_inputs, relative_rms
from twicing.testing.budget import FP64_BUDGET

HEADS, TOKENS = 4, 150
SPLITS = {"tokens": [1] * TOKENS, "prompt": [TOKENS], "prompt-and-tokens": [100, 1, 1, 48], "chunks": [64, 65, 21]}


def drawn(dtype=torch.float64, key_heads=HEADS, tokens=TOKENS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return make_inputs((2, HEADS, tokens, 8), key_heads=key_heads, value_width=6, generator=generator, dtype=dtype)


def in_steps(inputs, steps, state, step=linear_decode_step, mask=None, **options):
    outputs, first = [], 0
    for tokens in steps:
        new = [tensor[:, :, first : first + tokens] for tensor in inputs]
        allowed = None if mask is None else mask[..., first : first + tokens]
        outputs.append(step(*new, state, allowed, **options))
        first += tokens
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_every_split_gives_the_whole_sequence(feature_map, order, split):
    inputs = drawn(key_heads=2)
    mask = torch.rand(2, 1, 1, TOKENS, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[1, ..., :70] = False
    gain = 1.0 if order == 1 else torch.tensor([1.0, 0.5, 1.5, -1.0])
    options = {"order": order, "gain": gain, "feature_map": feature_map}
    expected = twicing_linear_attention(*inputs, mask, True, True, **options)
    state = LinearDecodeState(**options)
    output = in_steps(inputs, SPLITS[split], state, mask=mask, enable_gqa=True)
    assert relative_rms(output, expected) <= FP64_BUDGET
    assert (output[1, :, :70] == 0).all()
    assert state.length == TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_within_the_budget_of_the_dense_form(dtype):
    """The sums are kept in fp32, so that a long sequence loses nothing."""
    query, key, value = drawn(dtype, tokens=1000)
    A = linear_attention_matrix(query.double(), key.double(), is_causal=True)
    expected = A @ (2.0 * value.double() - A @ value.double())
    wide = A.float()
    residual = (2.0 * value.float() - (wide @ value.float()).to(dtype)).to(dtype)
    honest = (wide @ residual.float()).to(dtype)
    state = LinearDecodeState()
    output = in_steps((query, key, value), [400, *[1] * 600], state)
    assert output.dtype == dtype
    assert {kept.dtype for kept in (state.weights, *state.sums)} == {torch.float32}
    assert relative_rms(output, expected) <= 2.0 * relative_rms(honest, expected)


def correction_of_the_newest_only(query, key, value, state, mask, **options):
    """What comes of decoding with one state: the residuals of the tokens before are taken for their values."""
    plain = LinearDecodeState()
    if state.length:
        plain.keep((state.sums[0], state.sums[0]), state.weights, state.length)
    output = linear_decode_step(query, key, value, plain, mask, **options)
    linear_decode_step(query, key, value, state, mask, **options)
    return output


def no_correction(query, key, value, state, mask, **options):
    plain = LinearDecodeState(order=1)
    if state.length:
        plain.keep(state.sums[:1], state.weights, state.length)
    output = linear_decode_step(query, key, value, plain, mask, **options)
    linear_decode_step(query, key, value, state, mask, **options)
    return output


@pytest.mark.parametrize("wrong", [correction_of_the_newest_only, no_correction])
def test_a_wrong_step_is_far_off(wrong):
    inputs = drawn()
    expected = twicing_linear_attention(*inputs, is_causal=True)
    assert relative_rms(in_steps(inputs, [140, *[1] * 10], LinearDecodeState()), expected) <= FP64_BUDGET
    output = in_steps(inputs, [140, *[1] * 10], LinearDecodeState(), wrong)
    assert relative_rms(output[:, :, 140:], expected[:, :, 140:]) > 1e-2


def test_the_state_does_not_grow():
    state, sizes = LinearDecodeState(), []
    assert state.bytes_per_sequence == 0
    for seed, tokens in enumerate((1, 10, 300, 1)):
        linear_decode_step(*drawn(torch.float32, tokens=tokens, seed=seed), state)
        sizes.append(state.bytes_per_sequence)
    assert len(state.sums) == 2
    assert sizes == [4 * HEADS * (8 + 2 * 8 * 6)] * 4
    assert state.length == 312
    assert repr(state) == "LinearDecodeState(order 2, elu+1, 312 tokens: 2 sums [2, 4, 8, 6])"
    assert "0 tokens: nothing kept yet" in repr(LinearDecodeState())


def test_gradients_flow_through_all_steps():
    inputs = drawn(tokens=20)
    gain = torch.tensor([1.0, 0.5, 1.5, 0.1], dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (*inputs, gain)]
    expected = twicing_linear_attention(*inputs, is_causal=True, gain=gain)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    output = in_steps(inputs, [7, 1, 1, 11], LinearDecodeState(gain=gain))
    for found, other in zip(torch.autograd.grad(output, leaves, upstream), wanted, strict=True):
        assert relative_rms(found, other) <= 10 * FP64_BUDGET


def test_beams_go_on_from_the_sequences_that_were_chosen():
    inputs = drawn(tokens=30)
    state = LinearDecodeState()
    prompt, rest = ([tensor[:, :, part] for tensor in inputs] for part in (slice(0, 20), slice(20, 30)))
    linear_decode_step(*prompt, state)
    state.reorder(torch.tensor([1, 1, 0]))
    beams = [torch.cat([one[[1, 1, 0]], two[[0, 1, 0]]], dim=2) for one, two in zip(prompt, rest, strict=True)]
    output = linear_decode_step(*(tensor[[0, 1, 0]] for tensor in rest), state)
    expected = twicing_linear_attention(*beams, is_causal=True)[:, :, 20:]
    assert relative_rms(output, expected) <= FP64_BUDGET
    for index in (torch.tensor([[0]]), torch.tensor([0.0]), torch.tensor([True])):
        with pytest.raises(ValueError, match=r"reorder\(\) takes the numbers of the sequences to go on with"):
            state.reorder(index)
    assert LinearDecodeState().reorder(torch.tensor([0])) is None


def test_a_copy_goes_its_own_way():
    inputs = drawn(tokens=12)
    state = LinearDecodeState()
    linear_decode_step(*(tensor[:, :, :10] for tensor in inputs), state)
    kept = copy.deepcopy(state)
    linear_decode_step(*drawn(tokens=5, seed=9), state)
    output = linear_decode_step(*(tensor[:, :, 10:] for tensor in inputs), kept)
    expected = twicing_linear_attention(*inputs, is_causal=True)[:, :, 10:]
    assert relative_rms(output, expected) <= FP64_BUDGET


def test_a_state_moves_with_all_that_is_in_it():
    state = LinearDecodeState(gain=torch.ones(HEADS))
    assert state.to("cpu") is state
    linear_decode_step(*drawn(torch.float32), state)
    moved = state.to("meta")
    assert {tensor.device.type for tensor in (moved.weights, *moved.sums, moved.gain)} == {"meta"}
    assert len(moved.sums) == 2


@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)
def test_autocast_decodes_in_its_dtype_and_sums_in_fp32(given):
    inputs = drawn(given, tokens=20)
    state, expected_state = LinearDecodeState(), LinearDecodeState()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = in_steps(inputs, [17, 1, 2], state)
    cast = inputs if given == torch.float64 else [tensor.bfloat16() for tensor in inputs]
    assert torch.equal(output, in_steps(cast, [17, 1, 2], expected_state))
    assert state.weights.dtype == given


def test_compiled_steps_are_one_graph_each():
    torch._dynamo.reset()
    inputs = drawn(torch.float32, tokens=20)
    compiled = torch.compile(linear_decode_step, fullgraph=True, backend="eager")
    output = in_steps(inputs, [10, *[1] * 10], LinearDecodeState(), compiled)
    expected = in_steps(inputs, [10, *[1] * 10], LinearDecodeState())
    torch.testing.assert_close(output, expected)
    torch._dynamo.reset()


def changed(**tensors):
    query, key, value = drawn(torch.float32, tokens=3)
    return {"query": query, "key": key, "value": value, **tensors}


REFUSED = [
    (changed(query=torch.zeros(HEADS, 3, 8)), r"of the layout \[B, H, n, D\]"),
    (changed(query=torch.zeros(1, HEADS, 3, 8)), "does not broadcast"),
    (changed(query=torch.zeros(2, HEADS, 2, 8)), r"of the same new tokens, at least one.*query \[2, 4, 2, 8\]"),
    (changed(query=torch.zeros(2, HEADS, 3, 8).half()), "must have one floating-point dtype"),
    (dict(zip(("query", "key", "value"), torch.zeros(3, 2, HEADS, 0, 8), strict=True)), "at least one"),
    (changed(attn_mask=torch.zeros(3, 3)), "no mask that is added"),
    (changed(attn_mask=torch.ones(3, 3, dtype=torch.bool).tril()), "differ from query to query"),
    (changed(attn_mask=torch.ones(1, 2, dtype=torch.bool)), r"broadcast to \[2, 4, 3, 3\]: got \[1, 2\]"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_tokens_that_do_not_fit_are_refused_and_leave_the_state_as_it_was(given, message):
    state = LinearDecodeState()
    with pytest.raises(ValueError, match=message):
        linear_decode_step(**given, state=state)
    assert (state.length, state.sums, state.weights) == (0, (), None)


@pytest.mark.parametrize(
    "other",
    [
        [tensor[:1] for tensor in drawn(torch.float32)],
        [tensor[:, :2] for tensor in drawn(torch.float32)],
        [tensor[..., :5] for tensor in drawn(torch.float32)],
        drawn(torch.float64),
    ],
    ids=["batch", "heads", "width", "dtype"],
)
def test_tokens_of_another_kind_are_refused(other):
    state = LinearDecodeState()
    linear_decode_step(*drawn(torch.float32), state)
    before = [kept.clone() for kept in (state.weights, *state.sums)]
    with pytest.raises(ValueError, match=r"The state holds sums \[2, 4, 8, 6\] in torch.float32 on cpu"):
        linear_decode_step(*other, state)
    assert all(itertools.starmap(torch.equal, zip(before, (state.weights, *state.sums), strict=True)))
    assert state.length == TOKENS


def test_a_gain_for_other_heads_is_refused_before_anything_is_summed():
    state = LinearDecodeState(gain=torch.ones(3))
    with pytest.raises(ValueError, match="one for each of the 4 query heads"):
        linear_decode_step(*drawn(torch.float32), state)
    assert state.weights is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"order": 0}, ValueError, "order must be at least 1"),
        ({"order": 1, "gain": 0.5}, ValueError, "gain has no effect with order=1"),
        ({"gain": float("nan")}, ValueError, "gain must be finite"),
        ({"feature_map": "relus"}, ValueError, "did you mean 'relu'"),
    ],
    ids=str,
)
def test_options_without_meaning_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        LinearDecodeState(**options)
