"""Accuracy on corrupted images, by kind: mean over severities. Generated corruptions are not ImageNet-C."""

from collections.abc import Mapping, Sequence

import numpy as np

from twicing.experiments.attack_tables import ArmTable, Cell
from twicing.experiments.curves import Picture, Styles
from twicing.experiments.drawing import Panel, drawing_settings
from twicing.experiments.findings import Run, mean_and_sd
from twicing.experiments.metrics import ACCURACY, CORRUPTED
from twicing.experiments.results import Record, select, value_by_seed

# kind -> arm -> seed -> accuracy, mean over severities
ByKind = dict[str, dict[str, dict[int, float]]]


def by_kind(records: Sequence[Record]) -> ByKind:
    """Accuracy by kind of corruption, arm and seed: mean over the severities.

    A seed that lacks a severity which another one has is left out of its kind: its mean would be of easier images.
    """
    found = select(records, metric=ACCURACY, conditions={"threat": "corruption"})
    values: dict[str, dict[str, dict[int, dict[int, float]]]] = {}
    for one in found:
        of_kind = values.setdefault(str(one.conditions["kind"]), {})
        of_kind.setdefault(one.arm, {}).setdefault(one.seed, {})[int(one.conditions["severity"])] = one.value
    return {kind: _means(arms) for kind, arms in values.items()}


def severities(records: Sequence[Record]) -> list[int]:
    """The severities that were tried."""
    found = select(records, metric=ACCURACY, conditions={"threat": "corruption"})
    return sorted({int(one.conditions["severity"]) for one in found})


@drawing_settings()
def bars(records: Sequence[Record], styles: Styles) -> Picture | None:
    """One panel per kind of corruption with one bar per arm, and its seeds as marks."""
    found = by_kind(records)
    panels = [_panel(f"corruption-{place}", kind, arms, styles) for place, (kind, arms) in enumerate(found.items())]
    caption = (
        "Generated, not ImageNet-C. Bars are means over seeds of the accuracy, which is itself a mean over severities "
        f"{', '.join(str(one) for one in severities(records))}; marks are seeds."
    )
    return Picture("corruptions", panels, caption) if panels else None


def table(run: Run) -> ArmTable | None:
    """Accuracy of every arm by kind of corruption, and the mean over all kinds and severities where it is recorded."""
    found = by_kind(run.records)
    if not found:
        return None
    totals = {arm.label: value_by_seed(run.records, CORRUPTED, arm.label, {}) for arm in run.arms}
    columns = [kind.replace("_", " ") for kind in found] + (["mean of all"] if any(totals.values()) else [])
    lines = []
    for arm in run.arms:
        values = [arms.get(arm.label, {}) for arms in found.values()]
        values += [totals[arm.label]] if any(totals.values()) else []
        lines.append((arm.label, tuple(Cell(*mean_and_sd(one)) if one else Cell(None, None) for one in values)))
    counts = sorted({one.n for one in select(run.records, metric=ACCURACY, conditions={"threat": "corruption"})})
    images = f"{' to '.join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))} images a severity"
    return ArmTable("corruptions", images, tuple(columns), tuple(lines))


def _means(arms: Mapping[str, Mapping[int, Mapping[int, float]]]) -> dict[str, dict[int, float]]:
    all_of = {severity for seeds in arms.values() for values in seeds.values() for severity in values}
    complete = {
        arm: {
            seed: float(np.mean(list(values.values())))
            for seed, values in sorted(seeds.items())
            if values.keys() == all_of
        }
        for arm, seeds in arms.items()
    }
    return {arm: seeds for arm, seeds in complete.items() if seeds}


def _panel(name: str, kind: str, arms: Mapping[str, Mapping[int, float]], styles: Styles) -> Panel:
    shown = [arm for arm in styles if arm in arms]
    panel = Panel(name, kind.replace("_", " "), size=(2.6, 0.75 + 0.2 * len(shown)))
    axes = panel.axes
    for place, arm in enumerate(shown):
        style, values = styles[arm], list(arms[arm].values())
        axes.barh(
            place,
            float(np.mean(values)),
            height=0.45 if style.control else 0.7,
            color=style.color,
            alpha=0.55 if style.control else 0.8,
        )
        axes.plot(values, [place] * len(values), style.marker, color=style.color, markersize=3, alpha=0.9)
    axes.set_yticks([])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 1.03)
    axes.set_xlabel("accuracy")
    return panel
