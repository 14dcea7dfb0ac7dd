"""Twiced linear attention is the dense (2 A - A A) V, for every feature map, mask, chunk size and dtype."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from twicing.ops.boost import boost
from twicing.ops.linear import linear_attention_matrix, linear_smoother, twicing_linear_attention
from twicing.ops.linear_features import FEATURE_MAPS
from twicing.testing import WRONG_FORMULAS, make_inputs, relative_rms
from twicing.testing.budget import FP64_BUDGET

LARGEST = 2048
LENGTHS = [1, 2, 63, 64, 65, 197, 256]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_loops(query, key, value, keys=None, is_causal=False, order=2, gain=1.0):
    """The definition for one head in Python's numbers: every weight, every row, every sum."""
    phi = [[[x + 1.0 if x > 0 else math.exp(x) for x in row] for row in tensor.tolist()] for tensor in (query, key)]
    tokens = range(len(phi[0]))
    A = []
    for i in tokens:
        seen = [j for j in tokens if (keys is None or keys[j]) and (j <= i or not is_causal)]
        weight = {j: math.fsum(a * b for a, b in zip(phi[0][i], phi[1][j], strict=True)) for j in seen}
        A.append({j: weight[j] / (math.fsum(weight.values()) + 1e-6) for j in seen})

    def smooth(rows):
        return [[math.fsum(A[i][j] * rows[j][d] for j in A[i]) for d in range(len(rows[0]))] for i in tokens]

    values = value.tolist()
    boosted = values
    for _ in range(order - 1):
        smoothed = smooth(boosted)
        boosted = [
            [r + gain * (v - s) for r, v, s in zip(*rows, strict=True)]
            for rows in zip(boosted, values, smoothed, strict=True)
        ]
    return torch.tensor(smooth(boosted), dtype=torch.float64)


def dense(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False, *, order=2, gain=1.0, **options):
    """I - (I - A)(I - g A)^(m - 1), with A formed; for half precision in fp32, else it would be no measure at all."""
    wide = torch.promote_types(query.dtype, torch.float32)
    A = linear_attention_matrix(query.to(wide), key.to(wide), attn_mask, is_causal, enable_gqa, **options)
    gain = gain.reshape(-1, 1, 1) if isinstance(gain, torch.Tensor) else gain
    value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3) if enable_gqa else value
    return boost(lambda v: (A @ v.to(wide)).to(v.dtype), value, order, gain)


def truth(query, key, value, *arguments, gain=1.0, **options):
    gain = gain.double() if isinstance(gain, torch.Tensor) else gain
    return dense(query.double(), key.double(), value.double(), *arguments, gain=gain, **options)


def budget(query, key, value, *arguments, **options):
    if query.dtype == torch.float64:
        return FP64_BUDGET
    expected = truth(query, key, value, *arguments, **options)
    honest = relative_rms(dense(query, key, value, *arguments, **options), expected)
    # Of one token the dense A is 1 to the last bit; no other way can be asked to be.
    return max(2.0 * honest, torch.finfo(query.dtype).eps)


def padding(batch, tokens, seed=3):
    """About a third of the keys is missing, in another place in each sequence; the first is there."""
    there = torch.rand(batch, 1, 1, tokens, generator=generator(seed)) > 0.33
    there[..., 0] = True
    return there


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "masked"])
def test_it_is_the_definition_computed_number_by_number(order, is_causal, masked):
    query, key, value = make_inputs((1, 9, 4), value_width=3, generator=generator(), dtype=torch.float64)
    keys = torch.tensor([True, False, True, True, False, True, True, True, False]) if masked else None
    gain = 1.0 if order == 1 else 0.7
    expected = by_loops(query[0], key[0], value[0], None if keys is None else keys.tolist(), is_causal, order, gain)
    mask = None if keys is None else keys[None]
    output = twicing_linear_attention(query, key, value, mask, is_causal, order=order, gain=gain, chunk_size=4)
    assert relative_rms(output[0], expected) <= FP64_BUDGET
    assert relative_rms(truth(query, key, value, mask, is_causal, order=order, gain=gain)[0], expected) <= FP64_BUDGET


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_it_stays_within_the_budget_of_the_dense_form(feature_map, is_causal, dtype):
    for tokens in LENGTHS:
        # Of one or two tokens the errors are what a few roundings happen to be.
        shape = (16 if tokens < 63 else 2, 3, tokens, 16)
        inputs = make_inputs(shape, value_width=8, generator=generator(tokens), dtype=dtype)
        for mask in (None, padding(shape[0], tokens)):
            arguments = (*inputs, mask, is_causal)
            output = twicing_linear_attention(*arguments, feature_map=feature_map)
            expected = truth(*arguments, feature_map=feature_map)
            assert output.dtype == dtype
            assert relative_rms(output, expected) <= budget(*arguments, feature_map=feature_map), (tokens, mask)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_the_budget_rejects_wrong_formulas_at_the_largest_length(feature_map, dtype, is_causal):
    query, key, value = make_inputs((1, LARGEST, 16), generator=generator(), peaked=True, dtype=dtype)
    arguments = (query, key, value, None, is_causal)
    expected, allowed = truth(*arguments, feature_map=feature_map), budget(*arguments, feature_map=feature_map)
    assert relative_rms(twicing_linear_attention(*arguments, feature_map=feature_map), expected) <= allowed
    smooth = linear_smoother(query, key, is_causal=is_causal, feature_map=feature_map)
    for name, wrong in WRONG_FORMULAS.items():
        assert relative_rms(wrong(smooth, value), expected) > 2.0 * allowed, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_chunk_size_changes_nothing_beyond_rounding(dtype):
    """One token a chunk makes so many chunks that groups of groups of them are summed."""
    inputs = make_inputs((2, 3, 300, 16), generator=generator(), dtype=dtype)
    arguments = (*inputs, padding(2, 300), True)
    expected, allowed = truth(*arguments, gain=0.7), budget(*arguments, gain=0.7)
    for chunk_size in (1, 7, 64, 299, 300, 301, 10_000):
        output = twicing_linear_attention(*arguments, gain=0.7, chunk_size=chunk_size)
        assert relative_rms(output, expected) <= allowed, chunk_size


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("key_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_grouped_heads_masks_per_head_and_gains_per_head(key_heads, is_causal):
    query, key, value = make_inputs(
        (2, 4, 70, 8), key_heads=key_heads, value_width=5, generator=generator(), dtype=torch.float64
    )
    mask = torch.rand(2, 4, 1, 70, generator=generator(1)) > 0.3
    gain = torch.tensor([1.0, 0.5, 0.0, -1.0])
    arguments = (query, key, value, mask, is_causal, True)
    output = twicing_linear_attention(*arguments, gain=gain)
    assert relative_rms(output, truth(*arguments, gain=gain)) <= FP64_BUDGET
    for head in range(4):
        alone = [tensor[:, head * tensor.shape[1] // 4] for tensor in (query, key, value, mask)]
        one = twicing_linear_attention(*alone, is_causal, gain=float(gain[head]))
        assert relative_rms(output[:, head], one) <= FP64_BUDGET


@pytest.mark.parametrize("shape", [(30, 8), (5, 30, 8), (2, 3, 4, 30, 8)], ids=str)
def test_any_number_of_axes_comes_before_the_tokens(shape):
    inputs = make_inputs(shape, generator=generator(), dtype=torch.float64)
    for is_causal in (False, True):
        output = twicing_linear_attention(*inputs, is_causal=is_causal)
        one = [tensor.reshape(-1, 30, 8)[-1] for tensor in inputs]
        assert relative_rms(output.reshape(-1, 30, 8)[-1], truth(*one, is_causal=is_causal)) <= FP64_BUDGET


def test_cross_attention_of_order_one_has_its_own_number_of_queries():
    query, _, _ = make_inputs((2, 3, 5, 8), generator=generator(), dtype=torch.float64)
    _, key, value = make_inputs((2, 3, 11, 8), generator=generator(1), dtype=torch.float64)
    mask = padding(2, 11)
    output = twicing_linear_attention(query, key, value, mask, order=1)
    expected = linear_attention_matrix(query, key, mask) @ value
    assert output.shape == (2, 3, 5, 8)
    assert relative_rms(output, expected) <= FP64_BUDGET


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_masked_keys_act_as_if_they_were_absent(is_causal):
    inputs = make_inputs((2, 3, 90, 8), generator=generator(), dtype=torch.float64)
    kept = padding(1, 90)[0, 0, 0]
    expected = twicing_linear_attention(*(tensor[:, :, kept] for tensor in inputs), is_causal=is_causal)
    for mask in (kept[None], kept.expand(1, 1, 1, 90), kept.expand(90, 90), kept.expand(2, 3, 90, 90)):
        output = twicing_linear_attention(*inputs, mask, is_causal)
        assert relative_rms(output[:, :, kept], expected) <= FP64_BUDGET


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_a_query_that_may_attend_to_nothing_gets_zero_with_finite_gradients(is_causal):
    """Causal, the first two; else a whole sequence without keys. Nobody else is disturbed."""
    inputs = [tensor.requires_grad_() for tensor in make_inputs((2, 1, 40, 8), generator=generator())]
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[0, ..., : 2 if is_causal else 40] = False
    output = twicing_linear_attention(*inputs, mask, is_causal)
    empty = output[0, :, : 2 if is_causal else 40]
    assert (empty == 0).all()
    assert (output[1] != 0).all()
    for gradient in torch.autograd.grad(output.square().sum(), inputs):
        assert gradient.isfinite().all()
        assert gradient[1].abs().max() > 0


def test_with_causality_no_token_depends_on_later_ones():
    inputs = make_inputs((1, 2, 130, 8), generator=generator(), dtype=torch.float64)
    whole = twicing_linear_attention(*inputs, is_causal=True)
    for past in (1, 64, 65, 129):
        alone = twicing_linear_attention(*(tensor[:, :, :past] for tensor in inputs), is_causal=True)
        assert relative_rms(whole[:, :, :past], alone) <= FP64_BUDGET


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_rows_of_the_matrix_sum_to_one_and_have_no_negative_weight(feature_map):
    query, key, _ = make_inputs((2, 3, 50, 8), generator=generator(), dtype=torch.float64)
    A = linear_attention_matrix(query, key, padding(2, 50), feature_map=feature_map)
    assert A.min() >= 0
    assert A.sum(-1).max() < 1.0
    assert A.sum(-1).min() > 1.0 - 1e-4
    assert (A[~padding(2, 50).expand(2, 3, 50, 50)] == 0).all()
    causal = linear_attention_matrix(query, key, is_causal=True, feature_map=feature_map)
    assert (causal.triu(1) == 0).all()


def test_the_matrix_of_half_precision_is_rounded_once():
    query, key, _ = make_inputs((2, 3, 50, 8), generator=generator(), dtype=torch.bfloat16)
    A = linear_attention_matrix(query, key, is_causal=True)
    assert torch.equal(A, linear_attention_matrix(query.float(), key.float(), is_causal=True).bfloat16())


def test_elu_plus_one_keeps_its_digits_far_below_zero():
    phi = FEATURE_MAPS["elu+1"]
    x = torch.tensor([-30.0, -20.0, -5.0, -0.5, 0.0, 0.5, 30.0])
    torch.testing.assert_close(phi(x.double()), F.elu(x.double()) + 1.0, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(phi(x), phi(x.double()).float(), rtol=1e-6, atol=0.0)
    slope = torch.zeros(1, requires_grad=True)
    phi(slope).sum().backward()
    assert slope.grad == 1.0, "both sides meet with slope 1"


def test_the_other_feature_maps_are_what_their_papers_say():
    x = torch.tensor([[2.0, -3.0, 0.5]])
    assert FEATURE_MAPS["relu"](x).tolist() == [[2.0, 0.0, 0.5]]
    # r = (2, 0, .5, 0, 3, 0), times its neighbour before, cyclic.
    assert FEATURE_MAPS["dpfp"](x).tolist() == [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    assert FEATURE_MAPS["dpfp"](torch.tensor([[2.0, 3.0, -0.5]])).tolist() == [[1.0, 6.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradients_are_the_numerical_ones_and_have_gradients_themselves(feature_map, is_causal):
    inputs = make_inputs((1, 2, 5, 3), value_width=2, generator=generator(2), dtype=torch.float64)
    gain = torch.tensor([0.5, 1.2], dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (*inputs, gain)]
    mask = torch.tensor([[True, False, True, True, True]])

    def output(q, k, v, g):
        return twicing_linear_attention(q, k, v, mask, is_causal, gain=g, feature_map=feature_map, chunk_size=2)

    assert torch.autograd.gradcheck(output, leaves)
    if feature_map == "elu+1":
        assert torch.autograd.gradgradcheck(output, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_gradients_stay_within_the_budget_of_the_dense_form(is_causal, dtype):
    inputs = make_inputs((2, 4, 150, 16), key_heads=2, generator=generator(), dtype=dtype)
    gain = torch.tensor([1.0, 0.5, 1.5, 0.1])
    upstream = torch.randn(2, 4, 150, 16, generator=generator(1))

    def gradients(function, in_dtype):
        leaves = [tensor.detach().to(in_dtype).requires_grad_() for tensor in inputs]
        g = gain.to(in_dtype if in_dtype == torch.float64 else torch.float32).requires_grad_()
        output = function(*leaves, padding(2, 150), is_causal, True, gain=g)
        return torch.autograd.grad(output, [*leaves, g], upstream.to(in_dtype))

    expected = gradients(dense, torch.float64)
    honest = [relative_rms(one, other) for one, other in zip(gradients(dense, dtype), expected, strict=True)]
    # One number per head can be right by luck, which is no budget for another's.
    honest[3] = max(honest)
    for found, wanted, error in zip(gradients(twicing_linear_attention, dtype), expected, honest, strict=True):
        assert relative_rms(found, wanted) <= 2.0 * error


def saved_bytes(tokens, is_causal):
    """What autograd keeps for the backward, each memory once."""
    inputs = [tensor.requires_grad_() for tensor in make_inputs((1, 1, tokens, 16), generator=generator())]
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = twicing_linear_attention(*inputs, is_causal=is_causal)
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_memory_grows_in_step_with_the_tokens(is_causal):
    short, long = (saved_bytes(tokens, is_causal) for tokens in (1024, 8192))
    assert math.log(long / short) / math.log(8) < 1.05
    assert long < 8192 * 8192, "less than a byte for each entry of A"


def test_the_smoother_serves_any_boosting():
    query, key, value = make_inputs((2, 3, 80, 8), generator=generator(), dtype=torch.float64)
    for is_causal in (False, True):
        smooth = linear_smoother(query, key, is_causal=is_causal, chunk_size=16)
        output = boost(smooth, value, order=4, gain=0.3)
        assert relative_rms(output, truth(query, key, value, is_causal=is_causal, order=4, gain=0.3)) <= FP64_BUDGET


def test_order_one_is_one_smoothing_and_gain_zero_gives_the_same():
    query, key, value = make_inputs((2, 3, 80, 8), generator=generator())
    plain = twicing_linear_attention(query, key, value, order=1)
    assert torch.equal(plain, linear_smoother(query, key)(value))
    assert torch.equal(plain, twicing_linear_attention(query, key, value, gain=0.0))


def test_a_scale_of_the_features_cancels():
    """Why there is no scale as in softmax attention."""
    query, key, value = (
        tensor.relu() for tensor in make_inputs((1, 2, 60, 8), generator=generator(), dtype=torch.float64)
    )
    expected = twicing_linear_attention(query, key, value, feature_map="relu")
    assert relative_rms(twicing_linear_attention(7.0 * query, key, value, feature_map="relu"), expected) < 1e-6


def test_no_tokens_give_no_output():
    empty = torch.zeros(2, 3, 0, 8)
    for is_causal in (False, True):
        assert twicing_linear_attention(empty, empty, empty, is_causal=is_causal).shape == (2, 3, 0, 8)


REFUSED = [
    ({"attn_mask": torch.zeros(10, 10)}, ValueError, r"no mask that is added to the scores.*got torch\.float32"),
    ({"attn_mask": torch.ones(10, 10, dtype=torch.bool).tril()}, ValueError, r"differ from query to query.*\[10, 10\]"),
    ({"attn_mask": torch.ones(10, dtype=torch.bool)}, ValueError, "attn_mask must have at least 2 axes"),
    ({"attn_mask": torch.ones(1, 9, dtype=torch.bool)}, ValueError, r"broadcast to \[1, 2, 10, 10\]: got \[1, 9\]"),
    ({"feature_map": "elu"}, ValueError, r"Unknown feature map 'elu': did you mean 'relu'"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be a positive number of tokens: got 0"),
    ({"chunk_size": True}, ValueError, "chunk_size must be a positive number of tokens: got True"),
    ({"chunk_size": 4.0}, ValueError, "chunk_size must be a positive number of tokens: got 4.0"),
    ({"order": 0}, ValueError, "order must be at least 1"),
    ({"order": 1, "gain": 0.5}, ValueError, "gain has no effect with order=1"),
    ({"gain": torch.ones(3)}, ValueError, "one for each of the 2 query heads"),
    ({"key": torch.zeros(1, 2, 9, 4)}, ValueError, "same number of tokens"),
    ({"key": torch.zeros(1, 2, 10, 4, dtype=torch.float64)}, ValueError, "must have one floating-point dtype"),
    ({"value": torch.zeros(1, 2, 10, 4).half()}, ValueError, "value is torch.float16"),
]


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_served_is_refused_in_a_sentence(changed, error, message):
    inputs = dict(zip(("query", "key", "value"), torch.zeros(3, 1, 2, 10, 4), strict=True))
    with pytest.raises(error, match=message):
        twicing_linear_attention(**{**inputs, **changed})


def test_what_is_not_square_is_refused():
    long, short = torch.zeros(1, 2, 10, 4), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"as many queries as keys.*got 3 and 10 tokens.*linear_decode_step\(\)"):
        twicing_linear_attention(short, long, long)
    for function in (
        partial(twicing_linear_attention, short, long, long, order=1),
        partial(linear_smoother, short, long),
    ):
        with pytest.raises(ValueError, match="is_causal=True needs as many queries as keys: got 3 and 10 tokens"):
            function(is_causal=True)
