"""The sentences of a report, made from the statistics alone: what was found, at what cost, and what is missing.

The page and the terminal both take them from here, so they cannot say different things.
"""

from collections.abc import Sequence

from twicing.experiments.findings import NOISE_FLOOR, Cost, Measure, Row, Run, costs
from twicing.experiments.results import BASELINE, select
from twicing.experiments.statistics import FEWEST_SEEDS, interval, number, seeds_caveat, signed

SIMILARITY = "mean pairwise cosine"
SIMILARITY_CAVEAT = "Lower similarity of tokens is a property of the mechanism, not by itself a benefit."


def in_short(run: Run, rows: Sequence[Row]) -> list[str]:
    """Three to five sentences that say what was found, made from the statistics alone."""
    primary = [_primary_sentence(measure, rows) for measure in run.primaries]
    cost, floor = _cost_sentence(costs(run)), _floor_sentence(rows)
    n = fewest_pairs(run, rows)
    # With few seeds what could not be shown matters most; with enough it may give way to the rest.
    first, last = ([seeds_caveat(n)], []) if n < FEWEST_SEEDS else ([], [seeds_caveat(n)])
    return [sentence for sentence in [*first, *primary, cost, floor, *last] if sentence][:5]


def fewest_pairs(run: Run, rows: Sequence[Row]) -> int:
    """The smallest number of seeds that any primary comparison rests on."""
    pairs = [
        0 if row.difference is None else len(row.difference.seeds)
        for row in rows
        if row.arm.label != BASELINE and not row.arm.control
    ]
    return min(pairs, default=len(run.seeds))


def missing_seeds(run: Run) -> list[str]:
    """One sentence for every arm that lacks seeds or results."""
    sentences = []
    for label in dict.fromkeys([BASELINE, *(str(entry["label"]) for entry in run.config.get("arms", []))]):
        have = {record.seed for record in select(run.records, arm=label)}
        lacking = [seed for seed in run.seeds if seed not in have]
        if lacking:
            which = ", ".join(str(seed) for seed in lacking)
            sentences.append(f"{label} has no results for seed {which}: comparisons use the seeds that both arms have.")
    return sentences


def _primary_sentence(measure: Measure, rows: Sequence[Row]) -> str:
    mine = [row for row in rows if row.measure == measure and row.mean is not None]
    standard = [row for row in mine if row.arm.label == BASELINE]
    others = [row for row in mine if row.arm.label != BASELINE and not row.arm.control]
    if not standard or not others:
        return f"{measure.title}: not compared, because results are missing."
    parts = [f"{row.arm.label} {number(row.mean)}, {row.verdict}" for row in others]
    caveat = f" {SIMILARITY_CAVEAT}" if measure.metric == SIMILARITY else ""
    return f"{measure.title}: standard {number(standard[0].mean)}; {'; '.join(parts)}.{caveat}"


def _cost_sentence(found: Sequence[Cost]) -> str:
    parts = [
        f"{cost.ratio:.2f} times as long with {cost.arm.label}"
        + ("" if cost.low is None else f" (95 % interval {cost.low:.2f} to {cost.high:.2f})")
        for cost in found
        if cost.ratio is not None and not cost.arm.control
    ]
    return f"A training step takes {', '.join(parts)}." if parts else ""


def _floor_sentence(rows: Sequence[Row]) -> str:
    floors = [row for row in rows if row.arm.label == NOISE_FLOOR and row.difference is not None]
    parts = [
        f"{signed(row.difference.mean)} in {row.measure.name} ({interval(row.difference)})"
        for row in floors
        if row.difference is not None
    ]
    return f"Noise floor: standard with other seeds differs from standard by {', '.join(parts)}." if parts else ""
