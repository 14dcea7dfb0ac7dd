"""What is true of every input, tried on random ones."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from twicing import attention_matrix, effective_matrix, twicing_attention
from twicing.testing import make_inputs, relative_rms

SAME = 1e-12
property_test = settings(derandomize=True, deadline=None, max_examples=25, database=None)


@st.composite
def problems(draw, *, square=True):
    """Query, key and value in fp64, order and gain, a backend, and the generator for anything else."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 9)))
    inputs = make_inputs(
        shape,
        value_width=draw(st.integers(1, 9)),
        peaked=draw(st.booleans()),
        generator=generator,
        dtype=torch.float64,
    )
    options = {
        "order": draw(st.integers(2, 4)),
        "gain": draw(st.floats(-1, 2)),
        "backend": draw(st.sampled_from(["sdpa", "reference"])),
    }
    return inputs, options, generator


@property_test
@given(problems(), st.booleans())
def test_any_order_equals_its_closed_form(problem, is_causal):
    (q, k, v), options, _ = problem
    A, identity = attention_matrix(q, k, is_causal=is_causal), torch.eye(q.shape[-2], dtype=torch.float64)
    power = torch.linalg.matrix_power(identity - options["gain"] * A, options["order"] - 1)
    closed = identity - (identity - A) @ power
    assert relative_rms(twicing_attention(q, k, v, is_causal=is_causal, **options), closed @ v) < SAME


@property_test
@given(problems(), st.booleans())
def test_rows_sum_to_one(problem, is_causal):
    """So constant values come out as they are; rows of queries that may attend to nothing sum to zero."""
    (q, k, _), options, generator = problem
    tokens = q.shape[-2]
    allowed = torch.rand(tokens, tokens, generator=generator) > 0.3
    allowed = allowed & torch.ones_like(allowed).tril() if is_causal else allowed
    matrix = effective_matrix(q, k, allowed, order=options["order"], gain=options["gain"])
    expected = allowed.any(-1).double().expand(matrix.shape[:-1])
    if allowed.any(-1).all():
        torch.testing.assert_close(matrix.sum(-1), expected, rtol=0, atol=1e-12)
    ones = torch.ones(*q.shape[:-1], 1, dtype=torch.float64)
    torch.testing.assert_close(twicing_attention(q, k, ones, is_causal=is_causal, **options), ones, rtol=0, atol=1e-12)
    assert (matrix.sum(-1)[expected == 0] == 0).all()


@property_test
@given(problems())
def test_permuting_tokens_permutes_outputs(problem):
    inputs, options, generator = problem
    order = torch.randperm(inputs[0].shape[-2], generator=generator)
    permuted = twicing_attention(*(tensor[..., order, :] for tensor in inputs), **options)
    assert relative_rms(permuted, twicing_attention(*inputs, **options)[..., order, :]) < SAME


@property_test
@given(problems(), st.data())
def test_causal_outputs_do_not_see_the_future(problem, data):
    inputs, options, generator = problem
    past = data.draw(st.integers(1, inputs[0].shape[-2]))
    changed = [tensor.clone() for tensor in inputs]
    for tensor in changed:
        future = tensor[..., past:, :]
        future.copy_(torch.randn(future.shape, generator=generator))
    output = twicing_attention(*changed, is_causal=True, **options)[..., :past, :]
    assert relative_rms(output, twicing_attention(*inputs, is_causal=True, **options)[..., :past, :]) < SAME
    alone = twicing_attention(*(tensor[..., :past, :] for tensor in inputs), is_causal=True, **options)
    assert relative_rms(output, alone) < SAME


@property_test
@given(problems(), st.data())
def test_masked_tokens_are_as_if_absent(problem, data):
    inputs, options, generator = problem
    tokens = inputs[0].shape[-2]
    kept = torch.rand(tokens, generator=generator) > 0.4
    kept[data.draw(st.integers(0, tokens - 1))] = True
    output = twicing_attention(*inputs, kept.expand(1, 1, 1, tokens), **options)[..., kept, :]
    assert relative_rms(output, twicing_attention(*(tensor[..., kept, :] for tensor in inputs), **options)) < SAME


@property_test
@given(problems(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(1, 7), st.booleans())
def test_order_one_is_sdpa_bit_for_bit(problem, dtype, queries, is_causal):
    (q, k, v), _, _ = problem
    q, k, v = (tensor.to(dtype) for tensor in (q[..., :queries, :], k, v))
    output = twicing_attention(q, k, v, is_causal=is_causal, order=1)
    assert torch.equal(output, F.scaled_dot_product_attention(q, k, v, is_causal=is_causal))


@property_test
@given(problems())
def test_it_is_linear_in_the_values(problem):
    (q, k, v), options, generator = problem
    other = torch.randn(v.shape, generator=generator, dtype=torch.float64)
    both = twicing_attention(q, k, v + 3 * other, **options)
    alone = [twicing_attention(q, k, values, **options) for values in (v, other)]
    torch.testing.assert_close(both, alone[0] + 3 * alone[1], rtol=0, atol=1e-10)


@property_test
@given(problems(), st.floats(0, 1))
def test_gains_up_to_one_keep_eigenvalues_in_the_unit_interval(problem, gain):
    """Causal matrices have their eigenvalues on the diagonal, in (0, 1]: x + g x (1 - x) keeps them there."""
    (q, k, _), _, _ = problem
    before = attention_matrix(q, k, is_causal=True).diagonal(dim1=-2, dim2=-1)
    after = effective_matrix(q, k, is_causal=True, gain=gain).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(after, before + gain * before * (1 - before), rtol=0, atol=1e-14)
    assert (after <= 1 + 1e-14).all()
    assert (after >= before - 1e-14).all()
