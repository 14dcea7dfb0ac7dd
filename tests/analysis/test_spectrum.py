"""Spectra of matrices whose eigenvalues and singular values are known, and the polynomial that a layer applies."""

import math

import pytest
import torch

from twicing.adapters.surgery import convert
from twicing.analysis.products import mean_of_heads, product_ranks
from twicing.analysis.spectrum import (
    ROUNDING,
    eigenvalues,
    fits_theory,
    is_causal,
    is_real,
    rank_of,
    singular_values,
)
from twicing.analysis.spectrum_filter import STANDARD, TWICED, Filter, filters_of
from twicing.mechanisms import Twicing
from twicing.ops.reference import attention_matrix, effective_matrix


def exact(rows):
    return torch.tensor(rows, dtype=torch.float64)


def sorted_by_value(values):
    ordered = sorted(values.tolist(), key=lambda one: (round(one.real, 9), round(one.imag, 9)))
    return torch.tensor(ordered, dtype=torch.complex128)


def random_attention(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    query, key = (3 * torch.randn(*shape, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    return attention_matrix(query, key)


def cycle(n):
    return torch.roll(torch.eye(n, dtype=torch.float64), 1, 0)


def test_causal_matrices_have_their_diagonals_as_eigenvalues_exactly():
    draw = torch.Generator().manual_seed(0)
    query, key = (3 * torch.randn(2, 3, 9, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    causal, free = attention_matrix(query, key, is_causal=True), attention_matrix(query, key)
    assert is_causal(causal)
    assert not is_causal(free)
    assert not is_causal(torch.eye(3) + torch.diag(torch.ones(2), 1))
    # One free matrix among them, and they are no longer taken as causal.
    assert not is_causal(torch.stack([causal, free]))
    found = eigenvalues(causal)
    assert torch.equal(found.real, causal.diagonal(dim1=-2, dim2=-1).sort(-1, descending=True).values)
    assert not found.imag.any()
    assert fits_theory(found).all()
    # Characteristic polynomials agree: det(A - x I) is zero at each.
    x = found.real[..., None, None] * torch.eye(9, dtype=torch.float64)
    assert torch.linalg.det(causal[..., None, :, :] - x).abs().max() < 1e-12


def test_a_symmetric_matrix_has_its_moduli_as_singular_values():
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    x = x + x.mT
    spectrum = eigenvalues(x)
    assert spectrum.dtype == torch.complex128
    assert is_real(spectrum).all()
    torch.testing.assert_close(spectrum.abs(), singular_values(x))


def test_uniform_attention_keeps_the_constant_vector_only():
    uniform = torch.full((9, 9), 1 / 9)
    expected = exact([1.0, *[0.0] * 8])
    torch.testing.assert_close(eigenvalues(uniform).real, expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(singular_values(uniform), expected, atol=1e-7, rtol=0)
    assert fits_theory(eigenvalues(uniform)).all()
    assert rank_of(singular_values(uniform.double())).item() == pytest.approx(1)


def test_a_causal_matrix_has_its_diagonal_for_eigenvalues():
    query, key = torch.randn(2, 6, 4, dtype=torch.float64).unbind(0)
    causal = attention_matrix(query, key, is_causal=True)
    diagonal = causal.diagonal().to(torch.complex128)
    torch.testing.assert_close(sorted_by_value(eigenvalues(causal)), sorted_by_value(diagonal))
    assert fits_theory(eigenvalues(causal)).all()
    # They say nothing of singular values, the largest of which is above 1.
    assert singular_values(causal)[0] > 1.01


def test_a_permutation_has_the_roots_of_one():
    spectrum = eigenvalues(cycle(5))
    roots = [complex(math.cos(angle), math.sin(angle)) for angle in (2 * math.pi * k / 5 for k in range(5))]
    expected = sorted_by_value(torch.tensor(roots, dtype=torch.complex128))
    torch.testing.assert_close(sorted_by_value(spectrum), expected)
    assert fits_theory(spectrum).sum() == 1
    assert is_real(spectrum).sum() == 1
    assert rank_of(singular_values(cycle(5))).item() == pytest.approx(5)


def test_doubly_stochastic_matrices_have_no_singular_value_above_one():
    mixed = 0.5 * cycle(6) + 0.3 * torch.eye(6, dtype=torch.float64) + 0.2 / 6
    assert singular_values(mixed)[0].item() == pytest.approx(1)
    assert not is_real(eigenvalues(mixed)).all()


def test_the_share_counts_what_is_real_and_in_range():
    values = torch.tensor(
        [0.0, 1.0, 0.5, -ROUNDING / 2, 1 + ROUNDING / 2, -0.1, 1.1, 0.5 + 1e-5j, 0.5 + ROUNDING / 2 * 1j]
    )
    assert fits_theory(values).tolist() == [True] * 5 + [False] * 3 + [True]
    assert fits_theory(values, tolerance=0.2).all()
    assert is_real(values).tolist() == [True] * 7 + [False, True]


def test_the_largest_moduli_come_first():
    moduli = eigenvalues(random_attention(3, 12)).abs()
    assert (moduli.diff(dim=-1) <= 1e-12).all()


def test_the_rank_is_the_exponential_of_the_entropy():
    assert rank_of(exact([2.0, 2.0, 2.0, 0.0])).item() == pytest.approx(3)
    assert rank_of(exact([0.0, 0.0])).item() == 0
    p = [0.7, 0.2, 0.1]
    by_hand = math.exp(-sum(one * math.log(one) for one in p))
    assert rank_of(exact([7.0, 2.0, 1.0])).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("of", [eigenvalues, singular_values])
def test_what_is_no_matrix_is_refused(of):
    with pytest.raises(ValueError, match=r"square matrices.*\[3, 4\]"):
        of(torch.ones(3, 4))
    with pytest.raises(ValueError, match="not finite: the model has diverged"):
        of(torch.full((2, 2), torch.nan))


def test_products_of_one_matrix_are_its_powers():
    matrix = random_attention(8)
    ranks = product_ranks([matrix] * 4)
    powers = [torch.linalg.matrix_power(matrix, n) for n in range(1, 5)]
    torch.testing.assert_close(ranks, torch.stack([rank_of(singular_values(one)) for one in powers]))
    assert ranks[0] > ranks[-1] > 1


def test_later_layers_are_multiplied_from_the_left():
    first, second = random_attention(8), random_attention(8, seed=1)
    forward, other_way = product_ranks([first, second])[-1], product_ranks([second, first])[-1]
    torch.testing.assert_close(forward, rank_of(singular_values(second @ first)))
    assert abs(forward - other_way) > 1e-3


def test_a_product_of_permutations_loses_nothing_and_uniform_attention_everything():
    uniform = torch.full((5, 5), 0.2, dtype=torch.float64)
    assert product_ranks([cycle(5)] * 3).tolist() == pytest.approx([5] * 3)
    assert product_ranks([cycle(5), uniform, cycle(5)]).tolist() == pytest.approx([5, 1, 1])


def test_heads_are_averaged_or_go_in_chains():
    layers = [random_attention(3, 6, seed=seed) for seed in range(2)]
    chains = product_ranks(layers)
    assert chains.shape == (2, 3)
    torch.testing.assert_close(chains[1, 2], product_ranks([layer[2] for layer in layers])[1])
    (mean, _) = mean_of_heads(layers)
    torch.testing.assert_close(mean, (layers[0][0] + layers[0][1] + layers[0][2]) / 3)
    with pytest.raises(ValueError, match="one matrix or more"):
        product_ranks([])


@pytest.mark.parametrize(
    ("filter_", "formula"),
    [
        (Filter(), "2A - A^2"),
        (Filter(order=1), "A"),
        (Filter(gain=(-1.0,)), "A^2"),
        (Filter(gain=(0.0, 0.0)), "A"),
        (Filter(gain=(0.5,)), "I - (I - A)(I - gA), g = 0.5"),
        (Filter(3), "I - (I - A)(I - gA)^2, g = 1"),
        (Filter(2, (0.25, 1.0)), "I - (I - A)(I - gA), g = 0.25 to 1, by head"),
    ],
)
def test_formulas_in_words(filter_, formula):
    assert filter_.formula == formula


@pytest.mark.parametrize("filter_", [Filter(), Filter(3, (0.5,)), Filter(2, (0.5, 1.0)), STANDARD])
def test_the_filter_is_the_effective_matrix_and_moves_eigenvalues_exactly(filter_):
    query, key = torch.randn(2, 4, 2, 9, 5, dtype=torch.float64).unbind(0)
    matrix = attention_matrix(query, key)
    gain = {} if filter_.order == 1 else {"gain": torch.tensor(filter_.gain, dtype=torch.float64)}
    expected = effective_matrix(query, key, order=filter_.order, **gain)
    torch.testing.assert_close(filter_.of(matrix), expected)
    moved, direct = filter_.of_eigenvalues(eigenvalues(matrix)), eigenvalues(expected)
    # The same set: each has a partner in the other.
    distance = (moved.unsqueeze(-1) - direct.unsqueeze(-2)).abs()
    assert distance.amin(-1).max() < 1e-9
    assert distance.amin(-2).max() < 1e-9
    assert moved.shape == (4, 2, 9)


def test_the_filter_of_each_layer_is_read_from_its_mechanism(make_vit):
    model = make_vit()
    assert filters_of(model) == dict.fromkeys((1, 2, 3), STANDARD)
    convert(model, "twicing", layers=[2])
    convert(model, "twicing", layers=[3], options={"order": 3, "gain": 0.5})
    assert filters_of(model) == {1: STANDARD, 2: TWICED, 3: Filter(3, (0.5,))}


def test_a_learned_gain_is_read_by_head(make_vit):
    model = make_vit()
    convert(model, "twicing", layers=[1], options={"learn_gain": True})
    with torch.no_grad():
        model.blocks[0].attn.twicing_mechanism.gain.copy_(torch.tensor([0.25, 0.5, 1.0]))
    assert filters_of(model)[1] == Filter(2, (0.25, 0.5, 1.0))


class Ours(Twicing):
    """A subclass, which may compute anything."""


def test_what_another_mechanism_multiplies_by_is_not_known(make_vit):
    model = make_vit()
    convert(model, "standard", layers=[1])
    convert(model, Ours, layers=[2])
    convert(model, "neutreno", layers=[3])
    assert filters_of(model) == {1: STANDARD, 2: None, 3: None}
    assert filters_of(make_vit())[1] is not None
