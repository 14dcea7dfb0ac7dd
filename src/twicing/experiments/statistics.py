"""Paired differences over seeds with Student's t interval, Holm's correction, and the words for what they show.

The unit is the seed: d_s = mechanism - standard on the same seed. Student (1908); Holm (1979).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from twicing.experiments.results import Correctness

LEVEL = 0.05
MOST_PRIMARIES = 3
FEWEST_SEEDS = 5


@dataclass(frozen=True)
class PairedDifference:
    """d_s = treatment - baseline over the seeds that both have.

    mean, sd: mean and sample standard deviation (n - 1) of d_s; sd is None for one seed.
    half_width: t(1 - alpha/2, n - 1) sd / sqrt(n), or None for one seed and where every d_s is the same. It is also
    the smallest showable difference: the smallest |mean| whose interval would exclude zero at this n and this spread,
    not corrected for several comparisons.
    p: two-sided, of the paired t test; None where half_width is.
    missing: seeds that only one of the two has.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    missing: tuple[int, ...]
    mean: float
    sd: float | None
    half_width: float | None
    p: float | None

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.half_width is None else self.mean + self.half_width

    def half_width_at(self, alpha: float) -> float | None:
        """Half width of the 1 - alpha interval."""
        if self.half_width is None or self.sd is None:
            return None
        return spread_factor(len(self.seeds), alpha) * self.sd


def spread_factor(n_seeds: int, alpha: float = LEVEL) -> float:
    """t(1 - alpha/2, n - 1) / sqrt(n): the half width of the interval in sample standard deviations."""
    return float(stats.t.ppf(1 - alpha / 2, n_seeds - 1)) / math.sqrt(n_seeds)


def paired_difference(baseline: Mapping[int, float], treatment: Mapping[int, float]) -> PairedDifference | None:
    """Compare seed by seed; None where the two have no seed in common."""
    seeds = tuple(sorted(baseline.keys() & treatment.keys()))
    missing = tuple(sorted(baseline.keys() ^ treatment.keys()))
    if not seeds:
        return None
    d = np.array([treatment[seed] - baseline[seed] for seed in seeds], dtype=np.float64)
    # Differences of equal decimals differ in the last bits; that is no difference, and no spread between seeds.
    rounding = 1e-12 * max(abs(values[seed]) for values in (baseline, treatment) for seed in seeds)
    mean = float(d.mean())
    mean = 0.0 if abs(mean) <= rounding else mean
    differences = tuple(float(one) for one in d)
    if len(seeds) == 1:
        return PairedDifference(seeds, differences, missing, mean, None, None, None)
    sd = float(d.std(ddof=1))
    if sd <= rounding:
        return PairedDifference(seeds, differences, missing, mean, 0.0, None, None)
    half_width = spread_factor(len(seeds)) * sd
    t = mean / (sd / math.sqrt(len(seeds)))
    p = float(2 * stats.t.sf(abs(t), len(seeds) - 1))
    return PairedDifference(seeds, differences, missing, mean, sd, half_width, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjusted p values, in the order given.

    Sorted upwards, the i-th of m becomes the largest (m - j + 1) p_(j) over j <= i, at most 1. A comparison that was
    planned but could not be made (None) counts in m and stays None.
    """
    m = len(p_values)
    made = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * m
    largest = 0.0
    for rank, (p, place) in enumerate(made):
        largest = max(largest, (m - rank) * p)
        adjusted[place] = min(1.0, largest)
    return adjusted


def check_primaries(primaries: Sequence[Mapping[str, Any]]) -> None:
    """Refuse more primary metrics than can be corrected for with a handful of seeds."""
    if len(primaries) > MOST_PRIMARIES:
        names = ", ".join(str(primary["name"]) for primary in primaries)
        raise ValueError(
            f"a recipe declares at most {MOST_PRIMARIES} primary metrics, got {len(primaries)}: {names}. "
            "Leave the others to the exploratory table, where nothing needs to be declared."
        )


def is_shown(p: float | None) -> bool:
    """Whether p (corrected, where there is a correction) shows a difference at the 5 % level."""
    return p is not None and p <= LEVEL


def claims_difference(difference: PairedDifference | None, *, corrected: float | None = None, family: int = 0) -> bool:
    """Whether `conclusion` says that the two differ: a shown difference, or the same one on every seed."""
    if difference is None or difference.sd is None:
        return False
    if difference.half_width is None:
        return difference.mean != 0
    return is_shown(corrected if family else difference.p)


def conclusion(
    difference: PairedDifference | None, *, corrected: float | None = None, family: int = 0, better: str = "neither"
) -> str:
    """What a paired comparison shows, in words.

    corrected: Holm's p over a family of that many comparisons; a family of 0 means exploratory and uncorrected.
    better: "higher", "lower" or "neither": which direction is to be called better.
    """
    if difference is None:
        return "not compared: no seed in common"
    if difference.sd is None:
        return "nothing can be shown with one seed: no interval"
    if difference.half_width is None:
        return _without_spread(difference)
    if is_shown(corrected if family else difference.p):
        return f"difference shown: {_direction(difference.mean, better)} by {number(abs(difference.mean))}"
    if family and is_shown(difference.p):
        # Holm's p is at most family x p: what it leaves unshown, Bonferroni's wider interval leaves unshown too.
        needed = difference.half_width_at(LEVEL / family)
        return (
            f"no difference shown (smallest showable: +-{number(needed)} after correction for {family} comparisons; "
            f"the uncorrected interval excludes zero)"
        )
    return f"no difference shown (smallest showable: +-{number(difference.half_width)})"


def verdict(
    difference: PairedDifference | None, *, corrected: float | None = None, family: int = 0, better: str = "neither"
) -> str:
    """`conclusion` with the evidence for a difference that is shown: interval, p, and whether it is corrected."""
    words = conclusion(difference, corrected=corrected, family=family, better=better)
    p = None if difference is None else difference.p
    if not is_shown(corrected if family else p):
        return words
    evidence = f"Holm-corrected p {p_text(corrected)}" if family else f"exploratory, uncorrected p {p_text(p)}"
    return f"{words}, {interval(difference)}, {evidence}"


def seeds_caveat(n_seeds: int) -> str:
    """What so many seeds could not have shown, in units of the spread of the paired differences."""
    if n_seeds == 0:
        return "No seed is shared by the arms, so nothing was compared."
    if n_seeds == 1:
        return "With one seed there is no spread to judge a difference by, so no difference of any size could be shown."
    factor = spread_factor(n_seeds)
    few = f", which is fewer than the {FEWEST_SEEDS} this library asks for" if n_seeds < FEWEST_SEEDS else ""
    return (
        f"With {n_seeds} seeds{few}, a mean difference smaller than {factor:.1f} times the spread between seeds "
        f"(the standard deviation of the paired differences) could not have been shown, even if it is real."
    )


def bootstrap_over_images(
    baseline: Sequence[Correctness],
    treatment: Sequence[Correctness],
    threat: str,
    *,
    generator: np.random.Generator,
    resamples: int = 10_000,
) -> tuple[float, float] | None:
    """95 % percentile interval of the mean accuracy difference, "bootstrap over images, seeds fixed".

    Images are resampled in pairs (both models answer the same image) and inside each seed; the trained models stay as
    they are, so it says how much the choice of images matters, nothing about other seeds. None without common images.
    """
    draws = []
    answers = {one.seed: one for one in treatment}
    for one in baseline:
        other = answers.get(one.seed)
        if other is None or threat not in one.correct or threat not in other.correct:
            continue
        d = _image_differences(one, other, threat)
        if len(d) == 0:
            continue
        # Drawing n images with replacement is one multinomial draw over the three values that d can take.
        share = [(d == value).mean() for value in (-1, 0, 1)]
        counts = generator.multinomial(len(d), share, size=resamples)
        draws.append((counts[:, 2] - counts[:, 0]) / len(d))
    if not draws:
        return None
    low, high = np.quantile(np.mean(draws, axis=0), [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def number(value: float | None) -> str:
    """Three decimals for ordinary sizes, two significant digits for small ones; an en dash for nothing."""
    if value is None:
        return "–"  # noqa: RUF001
    size = abs(value)
    # An eps50 differs by this much: one digit of it would compare nothing.
    if size < 0.01:
        return small(value, digits=2)
    return f"{value:.3f}" if size < 10 else f"{value:.1f}"


def small(value: float, *, digits: int) -> str:
    """So many significant digits, without an exponent down to a millionth."""
    if value == 0:
        return "0"
    if abs(value) < 1e-6:
        return f"{value:.{digits}g}"
    # Rounded first, so that 0.0999 with two digits is 0.10 and not 0.100.
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def signed(value: float | None) -> str:
    """`number` with its sign."""
    return f"+{number(value)}" if value is not None and value > 0 else number(value)


def interval(difference: PairedDifference | None) -> str:
    """The 95 % interval, as "95 % interval [+0.003, +0.129]"."""
    if difference is None or difference.half_width is None:
        return "no interval"
    return f"95 % interval [{signed(difference.low)}, {signed(difference.high)}]"


def p_text(p: float | None) -> str:
    """A p value with its sign: "= 0.031" or "< 0.001"."""
    if p is None:
        return "not known"
    if p < 0.001:
        return "< 0.001"
    # Close to the level, three decimals could read as the other side of it.
    return f"= {p:.4f}" if round(p, 3) == LEVEL else f"= {p:.3f}"


def _image_differences(one: Correctness, other: Correctness, threat: str) -> NDArray[np.int8]:
    _, at_one, at_other = np.intersect1d(one.positions(threat), other.positions(threat), return_indices=True)
    return other.correct[threat][at_other].astype(np.int8) - one.correct[threat][at_one].astype(np.int8)


def _without_spread(difference: PairedDifference) -> str:
    n = len(difference.seeds)
    if difference.mean == 0:
        return f"no difference shown (smallest showable: not known, all {n} seeds have no difference at all)"
    return (
        f"the same difference of {signed(difference.mean)} on all {n} seeds; without spread between seeds there is "
        "no interval: check that the seeds are independent"
    )


def _direction(mean: float, better: str) -> str:
    direction = "higher" if mean > 0 else "lower"
    if better == "neither":
        return direction
    return f"{direction} (better)" if direction == better else f"{direction} (worse)"
