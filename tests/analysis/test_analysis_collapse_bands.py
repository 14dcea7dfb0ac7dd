"""Bands over inputs: they hold the truth about as often as they say, are paired, and narrow with more inputs."""

import numpy as np
import pytest

from twicing.analysis.collapse_bands import ENOUGH_INPUTS, RESAMPLES, band, resamples


def test_resamples_weigh_inputs_and_follow_the_seed():
    weights = resamples(7, 3)
    assert weights.shape == (RESAMPLES, 7)
    np.testing.assert_allclose(weights.sum(1), 1)
    assert set(np.unique(weights * 7).round(9)) <= set(range(8))
    assert np.array_equal(weights, resamples(7, 3))
    assert not np.array_equal(weights, resamples(7, 4))


def test_a_band_holds_the_truth_about_as_often_as_it_says():
    draw, hits, trials = np.random.default_rng(0), 0, 400
    weights = resamples(40, 0)
    for _ in range(trials):
        one = band(draw.exponential(2.0, size=40), weights)
        hits += int(one.low <= 2.0 <= one.high)
    # 95 % in the limit; at 40 skewed inputs the percentile bootstrap is known to fall a little short.
    assert 0.88 < hits / trials < 0.97


@pytest.mark.parametrize(("inputs", "held"), [(2, 0.5), (5, 0.83), (ENOUGH_INPUTS, 0.91), (32, 0.94)])
def test_bands_of_few_inputs_hold_it_less_often(inputs, held):
    # 1,000 means at once, of inputs of their own.
    one = band(np.random.default_rng(0).normal(size=(inputs, 1000)), resamples(inputs, 0))
    assert np.mean((one.low <= 0.0) & (one.high >= 0.0)) == pytest.approx(held, abs=0.03)


def test_it_is_as_wide_as_the_standard_error_says():
    values = np.random.default_rng(1).normal(size=400)
    one = band(values, resamples(400, 0))
    assert one.value == pytest.approx(values.mean(), abs=1e-12)
    error = values.std() / 20
    assert one.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert one.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_every_layer_has_its_own_band_of_the_same_resamples():
    values = np.random.default_rng(2).normal(size=(30, 4)) + np.arange(4)
    weights = resamples(30, 0)
    together = band(values, weights)
    assert together.value.shape == together.low.shape == (4,)
    for layer in range(4):
        alone = band(values[:, layer], weights)
        assert (alone.low, alone.high) == pytest.approx((together.low[layer], together.high[layer]))


def test_a_ratio_is_paired_by_input():
    first = np.random.default_rng(3).uniform(1, 10, size=25)
    both = np.stack([first, 2 * first], axis=1)
    ratio = band(both, resamples(25, 0), lambda means: means[..., 0] / means[..., 1])
    assert (float(ratio.value), float(ratio.low), float(ratio.high)) == pytest.approx((0.5, 0.5, 0.5))
    # Of the means, and not the mean of the ratios.
    second = np.random.default_rng(4).uniform(1, 10, size=25)
    uneven = band(np.stack([first, second], axis=1), resamples(25, 0), lambda means: means[..., 0] / means[..., 1])
    assert float(uneven.value) == pytest.approx(first.mean() / second.mean())
    assert band(first, resamples(25, 0)).high - band(first, resamples(25, 0)).low > 1


def test_one_input_has_no_band():
    with pytest.raises(ValueError, match=r"needs 2 or more: got 1\. Give more images, or a longer text"):
        resamples(1, 0)
