"""What a training step costs: seconds, and the ratio to standard on the same seed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from twicing.experiments.findings import ReportedArm, Run, mean_and_sd
from twicing.experiments.metrics import STEP_TIME
from twicing.experiments.results import BASELINE, value_by_seed
from twicing.experiments.statistics import paired_difference


@dataclass(frozen=True)
class Cost:
    """Seconds per training step.

    ratio: geometric mean of arm / standard over the seeds that both have, of which there are `pairs`.
    low, high: its 95 % interval; None with one pair and where every ratio is the same.
    """

    arm: ReportedArm
    mean: float
    sd: float | None
    pairs: int
    ratio: float | None
    low: float | None
    high: float | None


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
        ends = (None, None, None) if logs is None else (logs.mean, logs.low, logs.high)
        ratio, low, high = (None if end is None else math.exp(end) for end in ends)
        pairs = 0 if logs is None else len(logs.seeds)
        found.append(Cost(arm, mean, sd, pairs, ratio, low, high))
    return found


def _logs(values: Mapping[int, float]) -> dict[int, float]:
    return {seed: math.log(value) for seed, value in values.items() if value > 0}
