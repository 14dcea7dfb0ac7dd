"""kappa_n against exact fractions and known limits, and the polynomial against matrices."""

import math
from fractions import Fraction

import pytest
import torch

from twicing.classical.eigencapacity import (
    admissible,
    asymptote,
    boosted_eigenvalue,
    eigencapacity,
    eigencapacity_by_quadrature,
)


def exact(n, order):
    """The integral of (1 - y^m)^n over [0, 1], term by term, in exact fractions."""
    return sum(Fraction((-1) ** k * math.comb(n, k), order * k + 1) for k in range(n + 1))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 6, 12, 40])
def test_closed_form_and_quadrature_are_the_integral(n, order):
    truth = float(exact(n, order))
    assert eigencapacity(n, order) == pytest.approx(truth, rel=1e-12)
    assert eigencapacity_by_quadrature(n, order) == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("n", [1, 3, 10])
def test_the_formulas_of_the_paper(n):
    assert eigencapacity(n, 1) == pytest.approx(1 / (n + 1))
    assert eigencapacity(n) == pytest.approx(4**n * math.factorial(n) ** 2 / math.factorial(2 * n + 1))
    assert asymptote(n, 1) == pytest.approx(1 / n)
    assert asymptote(n) == pytest.approx(math.sqrt(math.pi) / (2 * math.sqrt(n)))


def test_quadrature_of_other_gains_is_the_polynomial_integral():
    # g = 1/2: p = 3/2 x - 1/2 x^2, p^2 = 9/4 x^2 - 3/2 x^3 + 1/4 x^4
    assert eigencapacity_by_quadrature(2, 2, 0.5) == pytest.approx(9 / 12 - 3 / 8 + 1 / 20, rel=1e-13)


def test_quadrature_is_fine_enough_for_deep_stacks():
    assert eigencapacity_by_quadrature(10_000, 1) == pytest.approx(1 / 10_001, rel=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_asymptote_is_approached(order):
    off = [abs(eigencapacity(n, order) / asymptote(n, order) - 1) for n in (10, 100, 1000)]
    assert off[0] > 5 * off[1] > 25 * off[2]


@pytest.mark.parametrize(("order", "gain"), [(1, 1.0), (2, 1.0), (2, 0.3), (3, -1.0)])
def test_the_polynomial_maps_the_eigenvalues_of_a_boosted_matrix(order, gain):
    A = torch.rand(7, 7, dtype=torch.float64).softmax(1)
    identity = torch.eye(7, dtype=torch.float64)
    boosted = identity - (identity - A) @ torch.linalg.matrix_power(identity - gain * A, order - 1)
    found = torch.linalg.eigvals(boosted)
    mapped = boosted_eigenvalue(torch.linalg.eigvals(A), order, gain)
    assert (found[:, None] - mapped).abs().min(0).values.max() < 1e-10


def test_admissible_quadratics_are_those_between_one_and_two():
    assert [admissible(a) for a in (0.5, 0.999, 1.0, 1.5, 2.0, 2.001, 4.0)] == [
        False,
        False,
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_n_must_be_a_positive_integer(n):
    for function in (eigencapacity, asymptote, eigencapacity_by_quadrature):
        with pytest.raises((TypeError, ValueError), match="n must be"):
            function(n)


def test_the_order_must_be_one():
    with pytest.raises(ValueError, match="order must be at least 1"):
        eigencapacity(3, 0)
    with pytest.raises(ValueError, match="order must be at least 1"):
        asymptote(3, 0)
