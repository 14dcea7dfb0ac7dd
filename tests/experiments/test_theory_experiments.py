"""Every experiment on the theory: its claims hold, each claim can fail, and its parts agree with other computations."""

import dataclasses
import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from twicing.experiments.theory import (
    assumptions,
    attention_as_regression,
    bias,
    cross_terms,
    denoising,
    eigencapacity,
    energy,
    least_squares,
    residual_snr,
    softmax_sensitivity,
    trained_attention,
    twicing_kernel,
)
from twicing.experiments.theory.catalogue import EXPERIMENTS, chosen
from twicing.experiments.theory.drawing import power_of_ten
from twicing.experiments.theory.experiment import slope
from twicing.experiments.theory.photographs import crops

# Smaller than what the command runs, so that the tests are quick; the claims are the same.
QUICK = {
    assumptions: {"IMAGES": 8},
    bias: {"POINTS": 401, "BANDWIDTHS": (0.008, 0.024)},
    denoising: {"SIDE": 48, "DRAWS": 1, "NOISES": (10, 25), "BANDWIDTHS": (0.4, 0.7, 1.0, 1.4, 2.0)},
    softmax_sensitivity: {"LENGTHS": (100, 1000, 10000), "SAMPLES": 100, "SPECTRAL_SAMPLES": 10},
    cross_terms: {"DRAWS": 100},
}
SEEDED = ("energy", "least-squares", "snr", "regression")


@cache
def numbers_of(name, seed=0):
    """One run, shared by the tests; the classifiers of `assumptions` are trained for fewer steps."""
    with pytest.MonkeyPatch.context() as patch:
        for module, constants in QUICK.items():
            for constant, value in constants.items():
                patch.setattr(module, constant, value)
        train = trained_attention.train_digit_classifier
        patch.setattr(assumptions, "train_digit_classifier", lambda order, seed: train(order, seed, steps=20))
        return EXPERIMENTS[name].measure(seed)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_claims_hold(name):
    failed = [claim for claim in EXPERIMENTS[name].claims(numbers_of(name)) if not claim.holds]
    assert failed == []


@pytest.mark.parametrize("name", SEEDED)
def test_they_hold_for_another_seed(name):
    failed = [claim for claim in EXPERIMENTS[name].claims(numbers_of(name, 1)) if not claim.holds]
    assert failed == []


def spoilt(value):
    """The same structure with other numbers, several ways."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            for other in spoilt(getattr(value, field.name)):
                yield dataclasses.replace(value, **{field.name: other})
    elif isinstance(value, dict):
        for key, inner in value.items():
            for other in spoilt(inner):
                yield value | {key: other}
    elif isinstance(value, tuple) and value and isinstance(value[0], (int, float)):
        yield tuple(-3 * one for one in value)
        yield (*value[:-1], 1e6 * abs(value[-1]) + 1)
        yield (1e6 * abs(value[0]) + 1, *value[1:])
        yield tuple(0 * one for one in value)
        if isinstance(value[0], bool):
            yield tuple(not one for one in value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from (-3.0 * value - 1, 1e6 * abs(value) + 1, 0.0)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_claim_can_fail(name):
    """For every claim there is one number that, changed, makes it fail: none is true whatever was measured."""
    can_fail = set()
    for changed in spoilt(numbers_of(name)):
        try:
            found = EXPERIMENTS[name].claims(changed)
        except (ValueError, LookupError, ZeroDivisionError, RuntimeWarning):
            continue
        can_fail |= {place for place, claim in enumerate(found) if not claim.holds}
    assert set(can_fail) == set(range(len(EXPERIMENTS[name].claims(numbers_of(name)))))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_figure_has_something_on_every_panel(name):
    picture = EXPERIMENTS[name].picture(numbers_of(name))
    assert all(panel.axes.has_data() and panel.axes.get_xlabel() for panel in picture.panels)
    assert len({panel.name for panel in picture.panels}) == len(picture.panels)


def test_logarithmic_axes_are_drawn_as_plain_text():
    first = EXPERIMENTS["eigencapacity"].picture(numbers_of("eigencapacity")).panels[0].svg()
    assert "10⁻⁴" in first
    assert "mathdefault" not in first


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_numbers_are_finite_and_the_same_again(name):
    def leaves(value):
        if isinstance(value, dict):
            return [leaf for inner in value.values() for leaf in leaves(inner)]
        return [leaf for inner in value for leaf in leaves(inner)] if isinstance(value, (tuple, list)) else [value]

    numbers = numbers_of(name)
    assert all(math.isfinite(leaf) for leaf in leaves(dataclasses.asdict(numbers)))
    if name in SEEDED:
        assert EXPERIMENTS[name].measure(0) == numbers
        assert numbers_of(name, 1) != numbers


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"no experiment 'bais': did you mean 'bias'\? Known are 'eigencapacity'"):
        chosen(["bais"])
    assert [one.name for one in chosen(["snr", "bias"])] == ["bias", "snr"], "in the order of the page"
    assert len(chosen([])) == len(EXPERIMENTS)


def test_slopes_are_exponents():
    assert slope((1, 10, 100), (5.0, 0.5, 0.05)) == pytest.approx(-1)


@pytest.mark.parametrize(("value", "text"), [(1e-4, "10⁻⁴"), (0.01, "0.01"), (1, "1"), (1000, "1000"), (1e12, "10¹²")])
def test_powers_of_ten_are_plain_text(value, text):
    assert power_of_ten(value) == text


@pytest.mark.parametrize("n", [2, 3, 40])
@pytest.mark.parametrize("spread", [0.3, 1.0, 6.0])
def test_the_jacobian_norm_is_the_largest_eigenvalue(n, spread):
    p = (spread * torch.randn(5, n, dtype=torch.float64)).softmax(1)
    dense = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(
        softmax_sensitivity.jacobian_norm(p), torch.linalg.matrix_norm(dense, 2), rtol=1e-8, atol=1e-12
    )


def test_the_jacobian_norm_is_that_of_autograd():
    logits = torch.randn(6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda s: s.softmax(0), logits)
    expected = torch.linalg.matrix_norm(jacobian, 2)
    torch.testing.assert_close(softmax_sensitivity.jacobian_norm(logits.softmax(0)[None])[0], expected)


def test_the_law_of_the_softmax_change_is_its_second_moment():
    s, n = torch.randn(2, 2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    change = (s + n).exp() / math.e - s.exp() / math.sqrt(math.e)
    assert float(change.square().mean()) == pytest.approx(softmax_sensitivity.LAW**2, rel=0.05)


def test_positions_are_those_of_the_original_transformer():
    found = cross_terms.sinusoidal(5, 8)
    for place in range(5):
        for k in range(4):
            angle = place / 10000 ** (2 * k / 8)
            assert found[place, 2 * k] == pytest.approx(math.sin(angle))
            assert found[place, 2 * k + 1] == pytest.approx(math.cos(angle))


def test_the_four_terms_are_the_logits_in_their_order():
    e, p = torch.randn(2, 5, 16, dtype=torch.float64)
    parts = cross_terms.terms(e, p)
    torch.testing.assert_close(sum(parts.values()), (e + p) @ (e + p).T / 4)
    torch.testing.assert_close(parts["token-position"], e @ p.T / 4)
    torch.testing.assert_close(parts["position-token"], p @ e.T / 4)


def test_gains_of_the_noise_ratio_are_those_of_loops():
    signal, noise = torch.randn(2, 8, 4, dtype=torch.float64)
    x = signal + noise
    A = (x @ x.T / 2).softmax(1)
    ratio = signal.norm() / noise.norm()
    layers = (torch.eye(8) + A, A, torch.eye(8) + 2 * A - A @ A)
    expected = [float((layer @ signal).norm() / (layer @ noise).norm() / ratio) for layer in layers]
    alpha, beta, *found, predicted = residual_snr._gains(signal, noise, 1.0)
    assert found == pytest.approx(expected)
    assert alpha == pytest.approx(float((A @ signal).norm() / signal.norm()))
    assert predicted == pytest.approx((1 + alpha) / (1 + beta))


def test_the_solver_of_least_squares_finds_weighted_means():
    kernel, values = torch.rand(5, 5, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    expected = (kernel @ values) / kernel.sum(1, keepdim=True)
    torch.testing.assert_close(least_squares._solved(kernel, values), expected)


def test_least_squares_notices_another_kernel(monkeypatch):
    """Attention with another temperature is no estimate of this kernel, and the experiment says so."""
    plain = least_squares.twicing_attention
    monkeypatch.setattr(least_squares, "twicing_attention", lambda q, k, v, order: plain(1.01 * q, k, v, order=order))
    holds = [claim.holds for claim in least_squares.claims(least_squares.measure(0))]
    assert holds[0] is False


def test_bias_has_its_exact_form_for_a_cosine():
    """Smoothing a wave of the circle multiplies it by exp(-2 pi^2 h^2): written out here with a sum over copies."""
    h, n = 0.02, 400
    x = np.arange(n) / n
    kernel = sum(np.exp(-(((x[:, None] - x + k) / h) ** 2) / 2) for k in (-1, 0, 1))
    S = kernel / kernel.sum(1, keepdims=True)
    wave = np.cos(2 * np.pi * x)
    left = wave - (2 * S - S @ S) @ wave
    np.testing.assert_allclose(left, (1 - math.exp(-2 * math.pi**2 * h**2)) ** 2 * wave, atol=1e-9)
    np.testing.assert_allclose(-bias._errors(x, wave, h, 2, 1.0), left, atol=1e-9)


def test_variance_ratio_is_the_integral():
    t = np.linspace(-12, 12, 20001)
    K, wide = np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi), np.exp(-(t**2) / 4) / math.sqrt(4 * math.pi)
    assert ((2 * K - wide) ** 2).sum() / (K**2).sum() == pytest.approx(bias.VARIANCE_RATIO, rel=1e-6)


def test_where_the_twicing_kernel_changes_sign():
    x = twicing_kernel.SIGN_CHANGE
    K, wide = math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi), math.exp(-(x**2) / 4) / math.sqrt(4 * math.pi)
    assert 2 * K - wide == pytest.approx(0, abs=1e-12)


def test_uneven_keys_are_uneven_in_the_experiment():
    numbers = numbers_of("regression")
    assert numbers.uneven[0] < 1e-12
    assert list(numbers.uneven) == sorted(numbers.uneven)
    assert list(numbers.neighbours) == sorted(numbers.neighbours, reverse=True)


def test_energy_notices_a_wrong_gradient(monkeypatch):
    monkeypatch.setattr(energy, "nonlocal_gradient", lambda u, w, f, fidelity: (w + w.T) @ u)
    assert energy.claims(energy.measure(0))[0].holds is False


@pytest.mark.parametrize("seed", [3, 9])
def test_steps_of_any_draw_converge_or_diverge_as_the_pull_says(seed):
    """Row sums of random tokens differ by far: with pulls of a fixed size some draws did neither as claimed."""
    assert all(claim.holds for claim in energy.claims(energy.measure(seed)))


def test_a_diverging_step_is_noticed(monkeypatch):
    monkeypatch.setattr(energy, "MOST_STEPS", 1000)
    monkeypatch.setattr(energy, "FIDELITIES", (0.0, 0.05, 0.2, 5.0))
    assert not energy.claims(energy.measure(0))[2].holds


def test_kappa_notices_another_polynomial():
    numbers = numbers_of("eigencapacity")
    lower = dataclasses.replace(numbers, numeric=numbers.numeric | {2: numbers.numeric[1]})
    assert eigencapacity.claims(lower)[0].holds is False


def test_eigenvalues_are_compared_both_ways():
    one, two = torch.tensor([0.0, 1.0 + 0j]), torch.tensor([0.0, 1.0, 5.0 + 0j])
    assert assumptions._farthest(one, two) == pytest.approx(4)
    assert assumptions._farthest(two, one) == pytest.approx(4)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("largest", [0.6, 0.93, 0.99, 0.998])
def test_late_slopes_are_of_depths_at_which_the_gap_shows(largest, order):
    spectrum = torch.linspace(0, largest, 63, dtype=torch.float64)
    depth, steepness = assumptions._late(spectrum, order)
    left = largest if order == 1 else 2 * largest - largest**2
    assert left**depth <= assumptions.SLOWEST_LEFT < left ** (depth - 1)
    first, second = ((1 - (1 - spectrum) ** order) ** n for n in (depth, 2 * depth))
    assert steepness == pytest.approx(float((second.mean() / first.mean()).log2()))
    assert steepness < -4 / math.log(2)


def test_spectra_count_what_is_real_and_in_range():
    rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    diagonal = torch.diag(torch.tensor([0.05, 1.5], dtype=torch.float64))
    spectrum = assumptions._spectrum(torch.stack([rotation, diagonal]))
    assert spectrum.in_range == 0.25
    assert spectrum.small == 0.25
    assert spectrum.singular == pytest.approx(1.5)


def test_photographs_are_in_color_and_in_range():
    both = crops(32)
    assert [one.shape for one in both] == [(3, 32, 32)] * 2
    assert all(one.min() >= 0 and one.max() <= 1 and one.std() > 0.05 for one in both)


@pytest.mark.parametrize("order", [1, 2])
def test_the_classifier_uses_the_matrices_that_it_shows(order):
    """Its first layer, from the matrices and the values, is what its block computes."""
    model, _ = trained_attention.train_digit_classifier(order, 0, steps=2)
    images = trained_attention.held_out_images(0, 3)
    with torch.no_grad():
        A = model.matrices(images)[0]
        torch.testing.assert_close(A.sum(-1), torch.ones(A.shape[:-1]))
        tokens = model._embedded(images)
        value = model._heads(0, tokens)[2]
        layer = A if order == 1 else 2 * A - A @ A
        after = tokens + model.outs[0]((layer @ value).transpose(1, 2).flatten(2))
        expected = after + model.forwards[0](model.norms[1](after))
        torch.testing.assert_close(model._block(0, tokens), expected, rtol=1e-4, atol=1e-5)


def test_patches_are_the_pixels_in_place():
    image = torch.arange(64.0).view(1, 1, 8, 8)
    patches = F.unfold(image, trained_attention.PATCH, stride=trained_attention.PATCH).mT[0]
    assert patches[0].tolist() == [0, 1, 8, 9]
    assert patches[5].tolist() == [18, 19, 26, 27]


def test_training_is_a_function_of_its_seed_and_leaves_the_state_alone():
    before = torch.get_rng_state()
    first = trained_attention.train_digit_classifier(2, 0, steps=3)[0].state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    again = trained_attention.train_digit_classifier(2, 0, steps=3)[0].state_dict()
    other = trained_attention.train_digit_classifier(2, 1, steps=3)[0].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_regression_notices_another_bandwidth(monkeypatch):
    weights = attention_as_regression.nadaraya_watson_weights
    monkeypatch.setattr(
        attention_as_regression,
        "nadaraya_watson_weights",
        lambda query, key, bandwidth: weights(query, key, bandwidth=1.1 * bandwidth),
    )
    assert attention_as_regression.claims(attention_as_regression.measure(0))[0].holds is False
