import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from twicing.experiments.results import Correctness
from twicing.experiments.statistics import (
    bootstrap_over_images,
    check_primaries,
    claims_difference,
    conclusion,
    holm,
    number,
    p_text,
    paired_difference,
    seeds_caveat,
    signed,
    small,
    spread_factor,
    verdict,
)


def by_seed(values):
    return dict(enumerate(values))


@pytest.mark.parametrize("n", [2, 3, 6, 12], ids="n{}".format)
def test_agrees_with_scipy(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.5, 0.1, n), rng.normal(0.55, 0.1, n)
    found = paired_difference(by_seed(a), by_seed(b))
    theirs = stats.ttest_rel(b, a)
    low, high = stats.t.interval(0.95, n - 1, loc=np.mean(b - a), scale=stats.sem(b - a))
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    assert found.sd == pytest.approx(np.std(b - a, ddof=1))
    assert found.differences == pytest.approx(b - a)


# How often an interval covers the true difference, for the right one and for two that are easy to write by mistake.
def covered(half_width, n=6, runs=4000):
    d = np.random.default_rng(0).normal(0.3, 1.0, (runs, n))
    return np.mean(np.abs(d.mean(1) - 0.3) <= half_width(d))


def test_the_interval_covers_95_percent():
    def ours(d):
        zero = dict.fromkeys(range(d.shape[1]), 0.0)
        return np.array([paired_difference(zero, by_seed(row)).half_width for row in d])

    n = 6
    allowed = 4 * math.sqrt(0.95 * 0.05 / 4000)
    assert abs(covered(ours) - 0.95) < allowed
    wrong = {
        "normal quantile": lambda d: 1.96 * d.std(1, ddof=1) / math.sqrt(n),
        "population spread": lambda d: spread_factor(n) * d.std(1, ddof=0),
    }
    for half_width in wrong.values():
        assert abs(covered(half_width) - 0.95) > allowed


def test_pairs_by_seed_and_names_what_is_missing():
    found = paired_difference({0: 0.5, 1: 0.6, 2: 0.7, 9: 0.1}, {2: 0.9, 0: 0.6, 1: 0.6})
    assert found.seeds == (0, 1, 2)
    assert found.differences == pytest.approx((0.1, 0.0, 0.2))
    assert found.missing == (9,)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_smallest_showable_is_the_edge_of_what_is_shown():
    d = np.array([-0.03, 0.01, 0.04, -0.01, 0.02, -0.03])
    d -= d.mean()
    zero = dict.fromkeys(range(6), 0.0)
    needed = paired_difference(zero, by_seed(d)).half_width
    assert conclusion(paired_difference(zero, by_seed(d + 1.001 * needed))).startswith("difference shown")
    assert conclusion(paired_difference(zero, by_seed(d + 0.999 * needed))).startswith("no difference shown")


def test_words_for_a_difference_that_is_not_shown():
    found = paired_difference(by_seed([0.0, 0.0, 0.0]), by_seed([0.1, -0.1, 0.03]))
    half_width = stats.t.ppf(0.975, 2) * np.std([0.1, -0.1, 0.03], ddof=1) / math.sqrt(3)
    assert verdict(found) == f"no difference shown (smallest showable: +-{half_width:.3f})"


def test_words_for_a_difference_that_is_shown():
    found = paired_difference(by_seed([0.0] * 4), by_seed([0.10, 0.11, 0.09, 0.10]))
    words = verdict(found, corrected=0.03, family=3, better="lower")
    assert words.startswith("difference shown: higher (worse) by 0.100, 95 % interval [+0.087, +0.113], ")
    assert words.endswith("Holm-corrected p = 0.030")
    assert "exploratory, uncorrected p < 0.001" in verdict(found)
    assert "higher (better)" in verdict(found, better="higher")
    assert "better" not in verdict(found)
    assert "worse" not in verdict(found)


def test_correction_can_take_a_difference_back_and_says_so():
    found = paired_difference(by_seed([0.0] * 6), by_seed([0.11, 0.02, 0.05, -0.01, 0.09, 0.04]))
    assert 0.01 < found.p < 0.05
    words = verdict(found, corrected=6 * found.p, family=6)
    assert words.startswith("no difference shown (smallest showable: +-")
    assert "after correction for 6 comparisons; the uncorrected interval excludes zero" in words
    smallest = float(words.partition("+-")[2].split()[0])
    assert smallest >= abs(found.mean)


def test_a_mean_of_rounding_errors_is_no_difference():
    a = [0.1, 0.7, 0.3]
    found = paired_difference(by_seed(a), by_seed([a[0] + 0.1, a[1] - 0.3, a[2] + 0.2]))
    assert found.mean == 0
    assert found.half_width > 0


CLAIMS = {
    "shown": ([0.10, 0.11, 0.09], {}, True),
    "corrected away": ([0.10, 0.11, 0.09], {"corrected": 0.06, "family": 3}, False),
    "not shown": ([0.10, -0.11, 0.09], {}, False),
    "the same on every seed": ([0.1, 0.1, 0.1], {}, True),
    "none at all": ([0.0, 0.0, 0.0], {}, False),
    "one seed": ([0.5], {}, False),
}


@pytest.mark.parametrize(("d", "options", "claims"), CLAIMS.values(), ids=CLAIMS.keys())
def test_a_claim_is_what_the_words_call_a_difference(d, options, claims):
    found = paired_difference(by_seed([0.0] * len(d)), by_seed(d))
    words = conclusion(found, **options)
    assert claims_difference(found, **options) is claims
    assert words.startswith(("difference shown", "the same difference")) is claims


def test_one_seed_shows_nothing():
    found = paired_difference({3: 0.5}, {3: 0.9})
    assert (found.sd, found.half_width, found.low, found.high, found.p) == (None,) * 5
    assert verdict(found) == "nothing can be shown with one seed: no interval"


@pytest.mark.parametrize("shift", [0.0, 0.1], ids=["no-difference", "the-same-difference"])
def test_without_spread_there_is_no_interval_and_no_not_a_number(shift):
    # 0.1 + 0.1 - 0.1 and 0.7 + 0.1 - 0.7 differ in their last bits.
    values = [0.1, 0.7, 0.3, 0.9]
    found = paired_difference(by_seed(values), by_seed([value + shift for value in values]))
    assert found.sd == 0
    assert found.half_width is None
    assert found.p is None
    words = verdict(found, corrected=None, family=2)
    assert "nan" not in words
    expected = (
        "the same difference of +0.100 on all 4 seeds" if shift else "no difference shown (smallest showable: not known"
    )
    assert words.startswith(expected)


def test_no_wording_says_equal():
    some = ([0.1, 0.2, 0.3], [0.3, 0.3, 0.4], [0.1, 0.2, 0.3], [9.0, 9.1, 8.9])
    for a, b in itertools.product(some, repeat=2):
        words = verdict(paired_difference(by_seed(a), by_seed(b)))
        assert "equal" not in words
        assert "same" not in words or "on all 3 seeds" in words


def test_holm_by_hand():
    # Sorted: .005 x 4 = .02, .01 x 3 = .03, .03 x 2 = .06, .04 x 1 = .04 -> .06 (never below the one before).
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_planned_comparison_that_is_missing_still_counts():
    assert holm([0.01, None, None]) == [pytest.approx(0.03), None, None]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_properties(p_values):
    adjusted = holm(p_values)
    m = len(p_values)
    assert all(p <= a <= min(1.0, m * p) + 1e-12 for p, a in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert all(np.diff(np.array(adjusted)[order]) >= 0)
    # It rejects exactly what stepping down does: from the smallest on, while p <= alpha / (m - rank).
    rejected = list(itertools.takewhile(lambda pair: p_values[pair[1]] * (m - pair[0]) <= 0.05, enumerate(order)))
    assert {place for place, a in enumerate(adjusted) if a <= 0.05} == {place for _, place in rejected}


def test_more_than_three_primaries_are_refused():
    check_primaries([{"name": name} for name in "abc"])
    with pytest.raises(ValueError, match=r"at most 3 primary metrics, got 4: a, b, c, d\. Leave the others"):
        check_primaries([{"name": name} for name in "abcd"])


def test_what_few_seeds_could_not_have_shown():
    assert "could not have been shown" in seeds_caveat(6)
    assert "fewer than" not in seeds_caveat(6)
    assert "With 3 seeds, which is fewer than the 5" in seeds_caveat(3)
    assert "2.5 times the spread" in seeds_caveat(3)
    assert "no difference of any size could be shown" in seeds_caveat(1)
    assert "nothing was compared" in seeds_caveat(0)


def correctness(arm, seed, right, start=0):
    return Correctness(arm, seed, np.arange(start, start + len(right)), {"clean": np.array(right, dtype=bool)})


def test_bootstrap_agrees_with_resampling_image_by_image():
    rng = np.random.default_rng(1)
    a = [rng.random(200) < 0.8 for _ in range(3)]
    # The second model answers mostly as the first does: pairing matters.
    b = [np.where(rng.random(200) < 0.1, rng.random(200) < 0.9, right) for right in a]
    ours = bootstrap_over_images(
        [correctness("standard", seed, right) for seed, right in enumerate(a)],
        [correctness("twicing", seed, right) for seed, right in enumerate(b)],
        "clean",
        generator=np.random.default_rng(2),
    )
    drawn = rng.integers(0, 200, (4000, 3, 200))
    d = np.stack([right.astype(float) - wrong for wrong, right in zip(a, b, strict=True)])
    by_hand = np.take_along_axis(d[None], drawn, axis=2).mean(axis=(1, 2))
    expected = np.quantile(by_hand, [0.025, 0.975])
    assert ours == pytest.approx(expected, abs=0.1 * np.ptp(expected))
    unpaired = np.stack([b[0][i] for i in drawn[:, 0]]).mean(1) - np.stack([a[0][i] for i in drawn[:, 1]]).mean(1)
    assert np.ptp(np.quantile(unpaired, [0.025, 0.975])) > 1.5 * np.ptp(ours)


def test_bootstrap_pairs_by_image_whatever_the_order():
    right = np.arange(50) % 3 > 0
    shuffled = np.random.default_rng(0).permutation(50)
    one = Correctness("standard", 0, np.arange(50), {"clean": right})
    other = Correctness("twicing", 0, shuffled, {"clean": right[shuffled]})
    assert bootstrap_over_images([one], [other], "clean", generator=np.random.default_rng(0)) == (0.0, 0.0)


def test_bootstrap_pairs_probes_by_where_they_lie_in_the_data():
    # Images 10 to 19; one model was attacked on the probes 0, 2, 4 of them, the other on 2, 4, 6.
    index = np.arange(10, 20)
    clean = np.ones(10, dtype=bool)
    one = Correctness("standard", 0, index, {"clean": clean, "pgd": np.array([0, 1, 0], bool)}, np.array([0, 2, 4]))
    other = Correctness("twicing", 0, index, {"clean": clean, "pgd": np.array([1, 0, 0], bool)}, np.array([2, 4, 6]))
    found = bootstrap_over_images([one], [other], "pgd", generator=np.random.default_rng(0))
    # In common are 12 and 14, on which both say right, wrong.
    assert found == (0.0, 0.0)


def test_bootstrap_without_common_images_or_threat_is_none():
    one = correctness("standard", 0, [True, False])
    generator = np.random.default_rng(0)
    assert bootstrap_over_images([one], [correctness("t", 1, [True, True])], "clean", generator=generator) is None
    assert bootstrap_over_images([one], [correctness("t", 0, [True], start=9)], "clean", generator=generator) is None
    assert bootstrap_over_images([one], [correctness("t", 0, [True, True])], "pgd", generator=generator) is None


def test_numbers_never_round_to_zero_nor_across_the_level():
    assert [number(value) for value in (0, 0.0004, 0.25, -7.0, 1234.5)] == ["0", "0.00040", "0.250", "-7.000", "1234.5"]
    assert [number(value) for value in (0.0099, 0.00999, 0.01, -0.000079, 1e-9)] == [
        "0.0099",
        "0.010",
        "0.010",
        "-0.000079",
        "1e-09",
    ]
    assert [small(value, digits=3) for value in (0.03117, 7.9, 12.75, 0.09999, 0)] == [
        "0.0312",
        "7.90",
        "12.8",
        "0.100",
        "0",
    ]
    assert [signed(value) for value in (0.25, -0.25, 0)] == ["+0.250", "-0.250", "0"]
    assert [p_text(p) for p in (0.0001, 0.0312, 0.0503, None)] == ["< 0.001", "= 0.031", "= 0.0503", "not known"]
