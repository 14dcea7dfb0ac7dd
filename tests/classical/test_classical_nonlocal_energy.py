"""The functional written out as loops, its gradient by autograd, and its steps against attention."""

import pytest
import torch

from twicing.classical.nonlocal_energy import (
    gradient_step,
    minimiser,
    nonlocal_energy,
    nonlocal_gradient,
    similarity_matrix,
)
from twicing.ops.reference import attention_matrix


@pytest.fixture
def parts():
    draw = torch.Generator().manual_seed(0)
    values, data = (torch.randn(6, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    return values, torch.rand(6, 6, generator=draw, dtype=torch.float64), data


def test_the_energy_is_the_double_sum(parts):
    values, weights, data = parts
    smooth = sum(weights[i, j] * (values[i] - values[j]).square().sum() for i in range(6) for j in range(6))
    near = sum((values[i] - data[i]).square().sum() for i in range(6))
    assert nonlocal_energy(values, weights, data, 0.7) == pytest.approx(float(smooth / 2 + 0.7 * near / 2))
    assert nonlocal_energy(values, weights, data) == pytest.approx(float(smooth / 2))


@pytest.mark.parametrize("fidelity", [0.0, 0.7])
def test_the_gradient_is_autograds(parts, fidelity):
    values, weights, data = parts
    values.requires_grad_()
    (expected,) = torch.autograd.grad(nonlocal_energy(values, weights, data, fidelity), values)
    torch.testing.assert_close(nonlocal_gradient(values.detach(), weights, data, fidelity), expected)


def test_a_step_without_fidelity_is_attention_and_with_it_is_pulled_back(parts):
    values, _, data = parts
    weights = torch.exp(values @ values.T / 3**0.5)
    A = attention_matrix(values, values)
    torch.testing.assert_close(similarity_matrix(weights), A)
    torch.testing.assert_close(gradient_step(values, weights, data), A @ values)
    pull = 0.3 * (data - values) / (2 * weights.sum(1, keepdim=True))
    torch.testing.assert_close(gradient_step(values, weights, data, 0.3), A @ values + pull)


def test_the_minimiser_has_no_gradient_and_less_energy_than_its_neighbours(parts):
    values, weights, data = parts
    found = minimiser(weights, data, 0.4)
    assert nonlocal_gradient(found, weights, data, 0.4).abs().max() < 1e-12
    lowest = nonlocal_energy(found, weights, data, 0.4)
    assert all(nonlocal_energy(found + 0.01 * values[[k]], weights, data, 0.4) > lowest for k in range(6))


def test_without_fidelity_there_is_no_single_minimiser(parts):
    _, weights, data = parts
    with pytest.raises(ValueError, match="fidelity must be positive"):
        minimiser(weights, data, 0.0)


@pytest.mark.parametrize(("pull", "converges"), [(0.95, True), (1.05, False)])
def test_steps_converge_where_the_pull_is_weaker_than_the_smoothing(parts, pull, converges):
    _, _, data = parts
    # A is the mean: its eigenvalues are 1 and 0, so that the bound is sharp. 1 / (w + w^T).sum(1) is 1.
    weights = torch.full((6, 6), 1 / 12, dtype=torch.float64)
    values = data
    for _ in range(1000):
        values = gradient_step(values, weights, data, pull)
    apart = (values - minimiser(weights, data, pull)).norm()
    assert apart < 1e-9 if converges else apart > 1e9
