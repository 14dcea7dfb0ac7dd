"""The section of docs/results.md that a run folder becomes: what was run, how far it came, and a table of its arms."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from twicing.experiments.costs import Cost, costs
from twicing.experiments.findings import Measure, Row, Run, exploratory_rows, mean_and_sd, primary_rows, read_run
from twicing.experiments.masking_verdicts import verdict_on
from twicing.experiments.metrics import ACCURACY, EPS50, HELD_OUT_ACCURACY, is_perplexity
from twicing.experiments.results import BASELINE, Record, select
from twicing.experiments.sentences import SIMILARITY, caveats, fewest_pairs, missing_seeds, was_attacked
from twicing.experiments.statistics import claims_difference, number, seeds_caveat, signed
from twicing.robustness.threat import as_fraction

# A gain in accuracy over the last fifth of the epochs that says that training was not at its end.
STILL_RISING = 0.005
# The same for a fall of perplexity, as a share of it.
STILL_FALLING = 0.01
# Of the shares of swapped words the table shows the papers' alone, and what paper_compat was run at.
SHOWN_SHARE = "0.04"


def results_markdown(folder: Path) -> str:
    """Markdown made from a run folder alone: a heading, what was run and how far it came, a table, and its limits.

    Each cell of the table is the mean, the mean difference to standard on the same seed with its 95 % interval, and
    what that shows in words; Holm's correction is over the primary metrics, everything else is uncorrected and says so.
    Raises what `read_run` raises.
    """
    run = read_run(folder)
    measures = _measures(run)
    primary = primary_rows(run)
    others = exploratory_rows(run, [measure for measure in measures if measure not in run.primaries])
    rows = {(row.measure.name, row.arm.label): row for row in [*primary, *others]}
    prices = {cost.arm.label: cost for cost in costs(run)}
    masked = was_attacked(run)
    heads = ["arm", *(_head(run, measure) for measure in measures)]
    heads += (["training step, ratio"] if prices else []) + (["gradient masking"] if masked else [])
    lines = []
    for arm in run.arms:
        cells = [f"{arm.label}{' (control)' if arm.control else ''}"]
        cells += [_cell(run, rows, measure, arm.label) for measure in measures]
        cells += [_price(prices.get(arm.label))] if prices else []
        cells += [verdict_on(run.verdicts, arm.label).words] if masked else []
        lines.append(cells)
    parts = [f"## {run.title}", _title_line(run), _table(heads, lines)]
    # What each comparison could have shown stands in its cell already.
    notes = [f"{arm.label}: {arm.meaning}" for arm in run.arms if arm.control and arm.meaning]
    notes += [*missing_seeds(run), seeds_caveat(fewest_pairs(run, primary)), *caveats(run, [])[1:]]
    parts.append("\n".join(f"- {sentence}" for sentence in notes))
    return "\n\n".join(parts)


def accuracy_reached(run: Run) -> str:
    """How far training came with standard attention, and whether it was still getting better, in words."""
    found = (one.metric for one in run.records if "epoch" in one.conditions and is_perplexity(one.metric))
    metric = next(found, HELD_OUT_ACCURACY)
    curve: dict[int, dict[int, float]] = {}
    for record in select(run.records, metric=metric, arm=BASELINE):
        if "epoch" in record.conditions:
            curve.setdefault(record.seed, {})[int(record.conditions["epoch"])] = record.value
    if not curve:
        return "accuracy by epoch not recorded"
    if metric != HELD_OUT_ACCURACY:
        return _perplexity_reached(metric, curve)
    ends = {seed: values[max(values)] for seed, values in curve.items()}
    last = max(max(values) for values in curve.values())
    reached = f"standard reaches {number(mean_and_sd(ends)[0])} held-out accuracy"
    earlier = last - max(1, last // 5)
    gains = {seed: ends[seed] - values[earlier] for seed, values in curve.items() if earlier in values}
    if not gains:
        return f"{reached} after its only epoch, so it is undertrained"
    gain = mean_and_sd(gains)[0]
    if gain > STILL_RISING:
        return f"{reached} and is undertrained: it still rose by {number(gain)} over the last fifth of the epochs"
    return f"{reached}, and gained {number(gain)} over the last fifth of the epochs"


def _perplexity_reached(metric: str, curve: Mapping[int, Mapping[int, float]]) -> str:
    ends = {seed: values[max(values)] for seed, values in curve.items()}
    last = max(max(values) for values in curve.values())
    reached = f"standard reaches a {metric} of {number(mean_and_sd(ends)[0])}"
    earlier = last - max(1, last // 5)
    falls = {seed: 1 - ends[seed] / values[earlier] for seed, values in curve.items() if earlier in values}
    if not falls:
        return f"{reached} after its only epoch, so it is undertrained"
    fall = 100 * mean_and_sd(falls)[0]
    verdict = " and is undertrained" if fall > 100 * STILL_FALLING else ""
    return f"{reached}{verdict}: it changed by {signed(-fall)} % over the last fifth of the epochs"


def shown_eps(run: Run) -> str | None:
    """The eps whose PGD accuracy the table shows: a declared one, else the one that leaves standard nearest to half.

    Where nearly all or nearly no image stands, two models cannot be told apart.
    """
    declared = [one.conditions for one in run.primaries if one.metric == ACCURACY]
    for conditions in declared:
        if conditions.get("threat") == "pgd":
            return str(conditions["eps"])
    values: dict[str, dict[int, float]] = {}
    for record in select(run.records, metric=ACCURACY, arm=BASELINE, conditions={"threat": "pgd"}):
        values.setdefault(str(record.conditions["eps"]), {})[record.seed] = record.value
    sizes: dict[str, Fraction] = {eps: as_fraction(eps, "eps") for eps in values}
    clean = run.values(Measure("clean accuracy", ACCURACY, {"threat": "clean"}, "higher"), BASELINE)
    half = mean_and_sd(clean)[0] / 2 if clean else 0.5
    return min(values, key=lambda eps: (abs(mean_and_sd(values[eps])[0] - half), sizes[eps]), default=None)


def _measures(run: Run) -> list[Measure]:
    """What the table shows, of what was measured, similarity after the last block among it.

    Of images: clean accuracy, eps50, PGD at one eps. Of text: every perplexity, and with swapped words at two shares.
    """
    eps = shown_eps(run)
    perplexities = {
        (one.metric, *one.conditions.items()): Measure(_name(one), one.metric, one.conditions, "lower")
        for one in run.records
        if is_perplexity(one.metric) and _is_shown(one)
    }
    layers = [
        int(record.conditions["layer"])
        for record in select(run.records, metric=SIMILARITY, conditions={"where": "block output", "when": "trained"})
    ]
    wanted = [
        *perplexities.values(),
        Measure("clean accuracy", ACCURACY, {"threat": "clean"}, "higher"),
        Measure("eps50", EPS50, {"threat": "pgd"}, "higher"),
        Measure(f"PGD accuracy at eps {eps}", ACCURACY, {"threat": "pgd", "eps": eps}, "higher"),
        Measure(
            "token similarity after the last block",
            SIMILARITY,
            {"layer": max(layers, default=0), "where": "block output", "when": "trained"},
            "neither",
        ),
    ]
    # A declared one keeps its name: it is the one that the correction is over.
    declared = {(one.metric, tuple(sorted(one.conditions.items()))): one for one in run.primaries}
    named = [declared.get((one.metric, tuple(sorted(one.conditions.items(), key=str))), one) for one in wanted]
    return [one for one in named if any(run.values(one, arm.label) for arm in run.arms)]


def _is_shown(record: Record) -> bool:
    conditions = record.conditions
    if conditions.get("threat") == "clean":
        return True
    return conditions.get("mode") == "paper_compat" or conditions.get("share") == SHOWN_SHARE


def _name(record: Record) -> str:
    conditions = record.conditions
    if conditions.get("threat") == "clean":
        return record.metric
    return f"{record.metric}, word swap {conditions['share']} ({conditions['mode']})"


def _title_line(run: Run) -> str:
    epochs = run.config.get("recipe", {}).get("epochs")
    facts = [
        f"{len(run.seeds)} seed{'' if len(run.seeds) == 1 else 's'}",
        f"{epochs} epoch{'' if epochs == 1 else 's'}" if epochs else "epochs not recorded",
        accuracy_reached(run),
    ]
    command = run.config.get("command") or "not recorded"
    return f"`{command}`\n\n{'; '.join(facts)}. {run.limits}"


def _head(run: Run, measure: Measure) -> str:
    if measure in run.primaries:
        return f"{measure.name} (primary)"
    return measure.name


def _cell(run: Run, rows: Mapping[tuple[str, str], Row], measure: Measure, arm: str) -> str:
    values = run.values(measure, arm)
    if not values:
        return "–"  # noqa: RUF001
    mean, sd = mean_and_sd(values)
    level = measure.text(mean) + (f" ± {number(sd)}" if sd is not None else "")
    row = rows.get((measure.name, arm))
    if row is None or arm == BASELINE:
        return level
    difference = row.difference
    if difference is None:
        return f"{level}<br>{row.conclusion}"
    ends = "" if difference.low is None else f" [{signed(difference.low)}, {signed(difference.high)}]"
    bare = row.corrected is None and claims_difference(difference)
    words = f"{row.conclusion}{' (uncorrected)' if bare else ''}"
    return f"{level}<br>{signed(difference.mean)}{ends}<br>{words}"


def _price(cost: Cost | None) -> str:
    if cost is None or cost.ratio is None:
        return "–"  # noqa: RUF001
    ends = f"({cost.no_interval})" if cost.no_interval else f"[{cost.low:.2f}, {cost.high:.2f}]"
    return f"{cost.ratio:.2f} {ends}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    # A bar would end the cell.
    made = [[cell.replace("|", "\\|").replace("+-", "±").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(
        [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *(f"| {' | '.join(line)} |" for line in made)]
    )
