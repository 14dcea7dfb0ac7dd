"""The budget: honest implementations stay inside, wrong formulas do not, at the largest number of tokens used."""

from functools import partial

import pytest
import torch

from twicing import attention_matrix, twicing_attention
from twicing.testing import WRONG_FORMULAS, error_budget, make_inputs, measured_errors, relative_rms, truth

LARGEST = 4096


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def largest(request):
    """Inputs of the largest N, their truth, and the budget: computed once, as the truth costs a second."""
    inputs = make_inputs((1, 1, LARGEST, 16), generator=torch.Generator().manual_seed(0), dtype=request.param)
    return inputs, truth(*inputs), error_budget(*inputs)


def test_sdpa_stays_in_the_budget_at_the_largest_n(largest):
    inputs, exact, budget = largest
    assert relative_rms(twicing_attention(*inputs, backend="sdpa"), exact) <= budget


@pytest.mark.parametrize("wrong", WRONG_FORMULAS)
def test_the_budget_rejects_wrong_formulas_at_the_largest_n(wrong, largest):
    (q, k, v), exact, budget = largest

    def smooth(values):
        return torch.nn.functional.scaled_dot_product_attention(q, k, values)

    assert relative_rms(WRONG_FORMULAS[wrong](smooth, v), exact) > 10 * budget


def test_a_typed_in_tolerance_would_hardly_see_a_missing_correction(largest):
    """Why there are budgets: at N = 4096 plain attention passes for twicing nearly everywhere with atol = rtol = .1."""
    inputs, exact, _ = largest
    plain = twicing_attention(*inputs, order=1).double()
    assert ((plain - exact).abs() > 0.1 + 0.1 * exact.abs()).double().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("peaked", [False, True], ids=["normal", "peaked"])
@pytest.mark.parametrize("shape", [(2, 2, 1, 16), (1, 2, 63, 40), (2, 1, 64, 64), (1, 1, 256, 16)], ids=str)
def test_sdpa_stays_in_the_budget(shape, peaked, dtype):
    inputs = make_inputs(shape, peaked=peaked, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for is_causal in (False, True):
        output = twicing_attention(*inputs, is_causal=is_causal, backend="sdpa")
        exact = truth(*inputs, is_causal=is_causal)
        assert relative_rms(output, exact) <= error_budget(*inputs, is_causal=is_causal)


def test_the_budget_is_twice_the_error_of_the_reference():
    inputs = make_inputs((1, 2, 64, 16), generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    honest = relative_rms(twicing_attention(*inputs, backend="reference"), truth(*inputs))
    assert error_budget(*inputs) == 2 * honest
    assert 1e-3 < honest < 1e-2


def test_the_truth_is_in_fp64_and_of_the_quantised_inputs():
    q, k, v = make_inputs((1, 2, 9, 4), generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    mask = torch.randn(9, 9).bfloat16()
    A = attention_matrix(q.double(), k.double(), mask.double())
    exact = truth(q, k, v, mask, gain=torch.tensor([0.5, 0.25]))
    g = torch.tensor([0.5, 0.25]).double()[:, None, None]
    assert exact.dtype == torch.float64
    assert relative_rms(exact, A @ v.double() + g * (A @ (v.double() - A @ v.double()))) < 1e-14


def test_the_wrong_formulas_are_what_they_are_called():
    """With A = 1/2 and v = 1: O = 1/2, twicing 3/4."""
    results = {name: formula(lambda v: 0.5 * v, torch.ones(1)).item() for name, formula in WRONG_FORMULAS.items()}
    assert results == {
        "no_correction": 0.5,
        "half_correction": 0.625,
        "wrong_sign": 0.25,
        "correction_of_output": 0.625,
    }


def test_inputs_are_the_same_numbers_for_every_dtype():
    drawn = [
        make_inputs((1, 2, 5, 4), generator=torch.Generator().manual_seed(3), dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    for fp32, bf16, fp64 in zip(*drawn, strict=True):
        assert torch.equal(fp32.bfloat16(), bf16)
        assert torch.equal(fp32.double(), fp64)
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_inputs_have_the_shapes_asked_for():
    generator = torch.Generator().manual_seed(0)
    q, k, v = make_inputs((2, 6, 5, 4), key_heads=3, value_width=7, generator=generator)
    assert (q.shape, k.shape, v.shape) == ((2, 6, 5, 4), (2, 3, 5, 4), (2, 3, 5, 7))
    flat, peaked = (make_inputs((1, 1, 256, 16), peaked=p, generator=generator)[:2] for p in (False, True))
    deviations = [(q @ k.mT / 4).std().item() for q, k in (flat, peaked)]
    assert deviations == pytest.approx([1, 4], rel=0.1)


def test_relative_rms():
    assert relative_rms(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])) == 0
    assert relative_rms(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert relative_rms(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_rms(torch.ones(2), torch.zeros(2)) == float("inf")
    assert not relative_rms(torch.tensor([float("nan")]), torch.ones(1)) <= 1e9
    with pytest.raises(ValueError, match=r"Cannot compare shape \[2\] with the expected \[2, 1\]"):
        relative_rms(torch.ones(2), torch.ones(2, 1))


def test_measured_errors_of_the_reference_are_half_their_budgets():
    generator = torch.Generator().manual_seed(0)
    inputs = make_inputs((1, 2, 17, 4), generator=generator)
    call = partial(twicing_attention, backend="reference")
    for error, budget in measured_errors(call, *inputs, generator=generator).values():
        assert 0 < error == budget / 2
