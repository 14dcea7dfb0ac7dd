"""The sentences of a report, made from the statistics alone: what was found, at what cost, and what is missing.

The page and the terminal both take them from here, so they cannot say different things.
"""

from collections.abc import Sequence

from twicing.experiments.findings import (
    ACCURACY,
    EPS50,
    NOISE_FLOOR,
    ZERO_GRADIENTS,
    Cost,
    Measure,
    Row,
    Run,
    costs,
)
from twicing.experiments.results import BASELINE, Record, select, threat_key
from twicing.experiments.statistics import FEWEST_SEEDS, interval, number, seeds_caveat, signed

SIMILARITY = "mean pairwise cosine"
MOSTLY_BLIND = 0.5
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


def caveats(run: Run, rows: Sequence[Row]) -> list[str]:
    """What this run could not have shown, a sentence each."""
    found = [seeds_caveat(fewest_pairs(run, rows))]
    for row in rows:
        if not row.arm.control and row.difference is not None and row.difference.half_width is not None:
            smallest = f"a mean difference below +-{number(row.difference.half_width)}"
            found.append(f"{row.measure.title}, {row.arm.label}: {smallest} (uncorrected).")
    if run.config.get("recipe", {}).get("folds") and len(run.seeds) > 1:
        found.append(
            "Seeds hold out folds of one data set, so their training sets overlap: the differences are not "
            "independent, and a t interval tends to be too narrow."
        )
    if any(record.metric == SIMILARITY for record in run.records):
        found.append(SIMILARITY_CAVEAT)
    if any(record.conditions.get("threat") in ("fgsm", "pgd") for record in run.records):
        found.append(
            "Attacks give an upper bound of the accuracy that a stronger attack would leave; "
            "they do not prove that a model is robust."
        )
    return found + [sentence for sentence in (_blind_sentence(run), _eps50_sentence(run)) if sentence]


def _blind_sentence(run: Run) -> str:
    blind = [one for one in select(run.records, metric=ZERO_GRADIENTS) if one.value > MOSTLY_BLIND]
    where = ", ".join(dict.fromkeys(f"{_attack(one)} on {one.arm}" for one in blind))
    if not blind:
        return ""
    most = max(record.value for record in blind)
    return (
        f"The attack was blind there: {where} met gradients of which more than half of the entries are exactly zero "
        f"(up to {100 * most:.0f} %), so the accuracy that it left says nothing about robustness."
    )


def _eps50_sentence(run: Run) -> str:
    have = {(record.arm, record.seed) for record in select(run.records, metric=EPS50)}
    attacked = {
        (record.arm, record.seed) for record in select(run.records, metric=ACCURACY, conditions={"threat": "pgd"})
    }
    lacking = sorted(attacked - have)
    if not have or not lacking:
        return ""
    which = ", ".join(f"{arm} seed {seed}" for arm, seed in lacking)
    return (
        f"eps50 has no value for {which}, where more than half of the images withstood the largest eps; "
        "its comparisons leave out just these robust models."
    )


def _attack(record: Record) -> str:
    return threat_key(record.conditions).upper().replace(" EPS=", " at eps ")


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
        f"{cost.ratio:.2f} times as long with {cost.arm.label} ({_ratio_interval(cost)})"
        for cost in found
        if cost.ratio is not None and not cost.arm.control
    ]
    return f"A training step takes {', '.join(parts)}." if parts else ""


def _ratio_interval(cost: Cost) -> str:
    if cost.low is None:
        return "one seed, no interval" if cost.pairs == 1 else "the same on every seed, no interval"
    return f"95 % interval {cost.low:.2f} to {cost.high:.2f}"


def _floor_sentence(rows: Sequence[Row]) -> str:
    floors = [row for row in rows if row.arm.label == NOISE_FLOOR and row.difference is not None]
    parts = [
        f"{signed(row.difference.mean)} in {row.measure.name} ({interval(row.difference)})"
        for row in floors
        if row.difference is not None
    ]
    return f"Noise floor: standard with other seeds differs from standard by {', '.join(parts)}." if parts else ""
