"""The sentences of a report, made from the statistics alone: what was found, at what cost, and what is missing.

The page and the terminal both take them from here, so they cannot say different things.
"""

from collections.abc import Sequence

from twicing.data.text_vocabulary import UNKNOWN
from twicing.experiments.costs import Cost, costs
from twicing.experiments.findings import ATTACKS, NOISE_FLOOR, PAPER_COMPAT, Measure, Row, Run
from twicing.experiments.masking_verdicts import NO_SIGN, NOT_ESTABLISHED, NOT_LOOKED_FOR, verdict_on
from twicing.experiments.metrics import ACCURACY, CORRUPTED, EPS50, ZERO_GRADIENTS
from twicing.experiments.results import BASELINE, Record, select, threat_key
from twicing.experiments.statistics import FEWEST_SEEDS, interval, number, seeds_caveat, signed, small

SIMILARITY = "mean pairwise cosine"
MOSTLY_BLIND = 0.5
SIMILARITY_CAVEAT = "Lower similarity of tokens is a property of the mechanism, not by itself a benefit."
MOST_SENTENCES = 6


def in_short(run: Run, rows: Sequence[Row]) -> list[str]:
    """Three to six sentences that say what was found, made from the statistics alone."""
    primary = [_primary_sentence(measure, rows) for measure in run.primaries]
    masking, cost, floor = masking_sentence(run), _cost_sentence(costs(run)), _floor_sentence(rows)
    n = fewest_pairs(run, rows)
    # With few seeds what could not be shown matters most; with enough it may give way to the rest.
    first, last = ([seeds_caveat(n)], []) if n < FEWEST_SEEDS else ([], [seeds_caveat(n)])
    return [sentence for sentence in [*first, *primary, masking, cost, floor, *last] if sentence][:MOST_SENTENCES]


def was_attacked(run: Run) -> bool:
    """Whether the run holds any attack, so that gradient masking has to be spoken of."""
    return any(record.conditions.get("threat") in ATTACKS for record in run.records)


def masking_sentence(run: Run) -> str:
    """Whether the attacks of this run are to be believed, arm by arm; empty where nothing was attacked."""
    if not was_attacked(run):
        return ""
    found = [verdict_on(run.verdicts, arm.label) for arm in run.arms]
    passed = [one.arm for one in found if one.passed]
    failed = [one for one in found if one.passed is False]
    unknown = [one.arm for one in found if one.passed is None]
    parts = [f"{NOT_ESTABLISHED} for {one.arm}: {one.reason}" for one in failed]
    if unknown:
        where = f" in {', '.join(unknown)}" if len(unknown) < len(found) else f", so {NOT_ESTABLISHED}"
        parts.append(f"{NOT_LOOKED_FOR}{where}")
    if passed:
        others = f"the other arms ({', '.join(passed)})" if parts else "any arm"
        parts.append(f"{NO_SIGN} in {others}")
    words = "; ".join(parts)
    return f"{words[0].upper()}{words[1:]}."


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
    if was_attacked(run):
        found.append(
            "Attacks give an upper bound of the accuracy that a stronger attack would leave; "
            "they do not prove that a model is robust."
        )
    if select(run.records, metric=EPS50):
        found.append(
            "eps50 is the eps at which PGD fools half of the images, the ones that are wrong from the start included "
            "(0 where these alone are half): an upper bound, which says nothing about larger eps."
        )
    if select(run.records, conditions={"threat": "corruption"}) or select(run.records, metric=CORRUPTED):
        found.append("The corruptions were generated here and are not ImageNet-C: no mCE can be made of them.")
    if select(run.records, conditions={"threat": PAPER_COMPAT}):
        found.append("The paper_compat attack is unverified: the attack code of the twicing paper is not released.")
    found += remarks(run.records, run.notes)
    more = (_verdict_sentence(run), _probes_sentence(run), _blind_sentence(run), _eps50_sentence(run))
    return found + [sentence for sentence in more if sentence]


def remarks(records: Sequence[Record], notes: Sequence[str]) -> list[str]:
    """What has to be known to read single numbers of a run: the notes of its parts, and what its records show."""
    return [*notes, *(one for one in (swapped_targets_sentence(records, notes), _no_eps50_sentence(records)) if one)]


def swapped_targets_sentence(records: Sequence[Record], notes: Sequence[str]) -> str:
    """Which word swaps are no stress test, as their targets are easy to predict; empty where there are none such.

    notes: one of them says what the word that is put in became.
    """
    if not any(note.endswith(f"became {UNKNOWN}.") for note in notes):
        return ""
    modes = [str(record.conditions["mode"]) for record in select(records, conditions={"threat": "word swap"})]
    targets = [mode for mode in dict.fromkeys(modes) if mode != "inputs only"]
    if not targets:
        return ""
    named = " and ".join(f'"{mode}"' for mode in targets)
    return (
        f"{UNKNOWN} is common and easy to predict, so that swapping targets too ({named}) can lower perplexity: "
        'of the word swaps only "inputs only" is a stress test here.'
    )


def _no_eps50_sentence(records: Sequence[Record]) -> str:
    found = select(records, metric=EPS50)
    zero = [record for record in found if record.value == 0]
    if not zero:
        return ""
    where = "" if len(zero) == len(found) else f" for {', '.join(f'{one.arm} seed {one.seed}' for one in zero)}"
    return f"eps50 is 0{where}: half of the attacked images or more are wrong before any change."


def _verdict_sentence(run: Run) -> str:
    have = [verdict_on(run.verdicts, arm.label) for arm in run.arms]
    examined = [one for verdict in have for one in verdict.seeds]
    lacking = [one.arm for one in have if one.seeds and {seed.seed for seed in one.seeds} < set(run.seeds)]
    if not examined or not lacking:
        return ""
    images = sorted({one.images for one in examined})
    of_arms = "" if len(lacking) == len(run.arms) else f" of {', '.join(lacking)}"
    return (
        f"Gradient masking was looked for in some seeds only{of_arms}, on "
        f"{' to '.join(str(n) for n in dict.fromkeys((images[0], images[-1])))} images each: the other models may "
        "behave otherwise."
    )


def _probes_sentence(run: Run) -> str:
    clean = {record.n for record in select(run.records, metric=ACCURACY, conditions={"threat": "clean"})}
    attacked = {record.n for record in select(run.records, metric=ACCURACY, conditions={"threat": "pgd"})}
    if not clean or not attacked or max(attacked) >= min(clean):
        return ""
    return (
        f"Attacks worked on {max(attacked)} of the {max(clean)} held-out images, the same ones for every arm: "
        "accuracies under attack have the larger error for it."
    )


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
    asked_for = bool(have) or any(measure.metric == EPS50 for measure in run.primaries)
    lacking = sorted(attacked - have)
    if not asked_for or not lacking:
        return ""
    which = ", ".join(f"{arm} seed {seed}" for arm, seed in lacking)
    return (
        f"eps50 has no value for {which}, where more than half of the images withstood a change of the whole pixel "
        "range, as only masked gradients let them; its comparisons leave out these models."
    )


def _attack(record: Record) -> str:
    return threat_key(record.conditions).upper().replace(" EPS=", " at eps ")


def _primary_sentence(measure: Measure, rows: Sequence[Row]) -> str:
    mine = [row for row in rows if row.measure == measure and row.mean is not None]
    standard = [row for row in mine if row.arm.label == BASELINE]
    others = [row for row in mine if row.arm.label != BASELINE and not row.arm.control]
    if not standard or not others:
        return f"{measure.title}: not compared, because results are missing."
    parts = [f"{row.arm.label} {_value(measure, row.mean)}, {row.verdict}" for row in others]
    caveat = f" {SIMILARITY_CAVEAT}" if measure.metric == SIMILARITY else ""
    return f"{measure.title}: standard {_value(measure, standard[0].mean)}; {'; '.join(parts)}.{caveat}"


def _value(measure: Measure, mean: float | None) -> str:
    if measure.metric != EPS50 or mean is None:
        return measure.text(mean)
    # The field counts eps in steps of 8-bit pixels.
    return f"{measure.text(mean)} ({small(255 * mean, digits=3)}/255)"


def _cost_sentence(found: Sequence[Cost]) -> str:
    parts = [
        f"{cost.ratio:.2f} times as long with {cost.arm.label} ({_ratio_interval(cost)})"
        for cost in found
        if cost.ratio is not None and not cost.arm.control
    ]
    return f"A training step takes {', '.join(parts)}." if parts else ""


def _ratio_interval(cost: Cost) -> str:
    return cost.no_interval or f"95 % interval {cost.low:.2f} to {cost.high:.2f}"


def _floor_sentence(rows: Sequence[Row]) -> str:
    floors = [row for row in rows if row.arm.label == NOISE_FLOOR and row.difference is not None]
    parts = [
        f"{signed(row.difference.mean)} in {row.measure.name} ({interval(row.difference)})"
        for row in floors
        if row.difference is not None
    ]
    return f"Noise floor: standard with other seeds differs from standard by {', '.join(parts)}." if parts else ""
