"""What a training step costs: seconds, and the ratio to standard on the same seed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from twicing.experiments.findings import ReportedArm, Run, mean_and_sd
from twicing.experiments.metrics import STEP_TIME
from twicing.experiments.results import BASELINE, value_by_seed
from twicing.experiments.statistics import PairedDifference, paired_difference

# Two seeds on a busy machine give intervals such as 0.03 to 28, which tell nothing.
FEWEST_PAIRS = 3
WIDEST = 4.0


@dataclass(frozen=True)
class Cost:
    """Seconds per training step.

    ratio: geometric mean of arm / standard over the seeds that both have.
    low, high: its 95 % interval; None with fewer than three such seeds, where every ratio is the same, and where the
    interval spans more than a factor of four. no_interval: then the reason, in words.
    """

    arm: ReportedArm
    mean: float
    sd: float | None
    ratio: float | None
    low: float | None
    high: float | None
    no_interval: str


def costs(run: Run) -> list[Cost]:
    """Seconds per training step of every arm, and its ratio to standard on the same seed."""
    baseline = value_by_seed(run.records, STEP_TIME, BASELINE, {})
    found = []
    for arm in run.arms:
        values = value_by_seed(run.records, STEP_TIME, arm.label, {})
        if not values:
            continue
        mean, sd = mean_and_sd(values)
        logs = None if arm.label == BASELINE else paired_difference(_logs(baseline), _logs(values))
        reason = "" if logs is None else _no_interval(logs)
        ends = (None, None, None) if logs is None else (logs.mean, logs.low, logs.high)
        ratio, low, high = (None if end is None else math.exp(end) for end in ends)
        found.append(Cost(arm, mean, sd, ratio, None if reason else low, None if reason else high, reason))
    return found


def _no_interval(logs: PairedDifference) -> str:
    """Why the ratio has no interval that is worth showing; empty where it has one. logs: differences of logarithms."""
    pairs = len(logs.seeds)
    if pairs == 1:
        return "one seed, no interval"
    if logs.half_width is None:
        return "the same on every seed, no interval"
    if pairs < FEWEST_PAIRS or 2 * logs.half_width > math.log(WIDEST):
        return f"interval not known from {pairs} seeds"
    return ""


def _logs(values: Mapping[int, float]) -> dict[int, float]:
    return {seed: math.log(value) for seed, value in values.items() if value > 0}
