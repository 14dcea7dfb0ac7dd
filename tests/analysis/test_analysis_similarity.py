"""The measures of similarity against naive loops, closed forms and their invariances."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twicing.analysis.similarity import distance_to_mean, effective_rank, mean_pairwise_cosine

METRICS = [mean_pairwise_cosine, distance_to_mean, effective_rank]
SHAPES = [(1, 2, 1), (2, 17, 64), (3, 5, 3), (1, 65, 16)]


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


def loop_cosine(tokens):
    pairs = itertools.combinations(tokens.double(), 2)
    return torch.stack([torch.dot(x, y) / (x.norm() * y.norm()) for x, y in pairs]).mean()


def loop_distance(tokens):
    tokens = tokens.double()
    mean = sum(tokens) / len(tokens)
    return math.sqrt(sum(float(((x - mean) ** 2).sum()) for x in tokens) / sum(float((x**2).sum()) for x in tokens))


def loop_rank(tokens):
    tokens = tokens.double()
    covariance = (tokens - tokens.mean(0)).T @ (tokens - tokens.mean(0))
    singular = [math.sqrt(max(float(value), 0)) for value in torch.linalg.eigvalsh(covariance)]
    shares = [s / sum(singular) for s in singular if s > 1e-6 * max(singular)]
    return math.exp(-sum(p * math.log(p) for p in shares))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("metric", "loop"),
    [(mean_pairwise_cosine, loop_cosine), (distance_to_mean, loop_distance), (effective_rank, loop_rank)],
    ids=lambda f: f.__name__,
)
def test_agrees_with_a_naive_loop(metric, loop, shape):
    tokens = torch.randn(shape) + 0.5 * torch.randn(shape[0], 1, shape[2])
    expected = torch.tensor([float(loop(sample)) for sample in tokens], dtype=torch.float64)
    torch.testing.assert_close(metric(tokens), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_identical_tokens_have_collapsed(dtype):
    # Drawn in float64, whose 53 bits make the mean of 17 tokens round.
    tokens = torch.randn(2, 1, 48, dtype=torch.float64).to(dtype).expand(2, 17, 48)
    torch.testing.assert_close(mean_pairwise_cosine(tokens), torch.ones(2, dtype=torch.float64))
    assert distance_to_mean(tokens).max() < 1e-12
    # Rounding of the mean must not pass for a dimension.
    assert effective_rank(tokens).tolist() == [0, 0]


def test_orthogonal_tokens_of_one_length():
    n = 12
    tokens = 3 * orthogonal(n).unsqueeze(0)
    assert mean_pairwise_cosine(tokens).abs().item() < 1e-12
    # ||X||^2 = 9 n, and the mean takes ||1 m^T||^2 = n ||m||^2 = 9 of it.
    torch.testing.assert_close(distance_to_mean(tokens).item(), math.sqrt(1 - 1 / n))
    # The centred tokens have n - 1 equal singular values.
    torch.testing.assert_close(effective_rank(tokens).item(), float(n - 1))


def test_opposite_tokens_have_a_negative_cosine():
    token = torch.randn(1, 1, 8)
    tokens = torch.cat([token, -token], dim=1)
    torch.testing.assert_close(mean_pairwise_cosine(tokens).item(), -1.0)
    torch.testing.assert_close(distance_to_mean(tokens).item(), 1.0)
    torch.testing.assert_close(effective_rank(tokens).item(), 1.0)


@pytest.mark.parametrize("r", [1, 2, 5])
def test_r_equal_directions_have_rank_r(r):
    # +-e_1, ..., +-e_r: mean zero, r equal singular values; a common mean token changes nothing.
    directions = orthogonal(9)[:r]
    tokens = torch.cat([directions, -directions]).unsqueeze(0) + 100 * torch.randn(1, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(effective_rank(tokens).item(), float(r), rtol=1e-9, atol=0)


def test_a_common_mean_token_raises_the_cosine_but_not_the_rank():
    tokens = torch.randn(1, 17, 64, dtype=torch.float64)
    shifted = tokens + 10 * torch.randn(1, 1, 64, dtype=torch.float64)
    assert mean_pairwise_cosine(tokens).item() < 0.05
    assert mean_pairwise_cosine(shifted).item() > 0.9
    torch.testing.assert_close(effective_rank(shifted), effective_rank(tokens))


def test_two_singular_values_in_closed_form():
    # +-3 e_1, +-e_2: singular values in the ratio 3 : 1, shares 3/4 and 1/4.
    tokens = torch.tensor([[[3.0, 0], [-3, 0], [0, 1], [0, -1]]])
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    torch.testing.assert_close(effective_rank(tokens).item(), expected)


def test_a_token_of_zeros_has_cosine_zero_with_every_other():
    token = torch.randn(4)
    tokens = torch.stack([token, token, torch.zeros(4)]).unsqueeze(0)
    torch.testing.assert_close(mean_pairwise_cosine(tokens).item(), 1 / 3)


def test_nothing_but_zeros():
    for metric in METRICS:
        assert metric(torch.zeros(2, 5, 3)).tolist() == [0, 0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-20, 0.1, 7.0, 1e20]))
def test_scale_rotation_and_order_do_not_matter(seed, scale):
    torch.manual_seed(seed)
    tokens = torch.randn(1, 9, 6, dtype=torch.float64) + torch.randn(6, dtype=torch.float64)
    changed = scale * tokens[:, torch.randperm(9)] @ orthogonal(6)
    for metric in METRICS:
        torch.testing.assert_close(metric(changed), metric(tokens))
    assert -1 / 8 - 1e-12 <= mean_pairwise_cosine(tokens).item() <= 1
    assert 0 <= distance_to_mean(tokens).item() <= 1
    assert 1 <= effective_rank(tokens).item() <= 6 + 1e-9


@pytest.mark.parametrize("metric", METRICS, ids=lambda f: f.__name__)
def test_samples_do_not_mix(metric):
    tokens = torch.randn(4, 7, 5)
    together = metric(tokens)
    assert together.shape == (4,)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, torch.cat([metric(sample.unsqueeze(0)) for sample in tokens]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("metric", METRICS, ids=lambda f: f.__name__)
def test_a_diverged_sample_is_nan_and_hides_no_other(metric, bad):
    tokens = torch.randn(3, 7, 5)
    expected = metric(tokens)
    tokens[1, 2, 3] = bad
    measured = metric(tokens)
    assert measured[1].isnan()
    torch.testing.assert_close(measured[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("metric", METRICS, ids=lambda f: f.__name__)
def test_half_precision_is_measured_in_double(metric):
    tokens = torch.randn(2, 33, 16).bfloat16()
    assert torch.equal(metric(tokens), metric(tokens.double()))


@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param(torch.zeros(4, 5), id="two axes"),
        pytest.param(torch.zeros(2, 1, 5), id="one token"),
        pytest.param(torch.zeros(2, 4, 5, dtype=torch.int64), id="integers"),
    ],
)
@pytest.mark.parametrize("metric", METRICS, ids=lambda f: f.__name__)
def test_what_has_no_pairs_is_refused(metric, tokens):
    with pytest.raises(ValueError, match=r"shape \[B, N, C\] with N >= 2 tokens.*got torch\."):
        metric(tokens)
