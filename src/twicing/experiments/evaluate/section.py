"""What an evaluation found, ready to be shown: tables and bar charts, for its own page or as a section of another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from twicing.data.shifted import IMAGENET_C_EXTRA
from twicing.experiments.attack_tables import Cell
from twicing.experiments.curves import Picture, Styles
from twicing.experiments.drawing import Panel, arm_styles, drawing_settings
from twicing.experiments.evaluate.folder import ABOUT, CORRUPTION_ERROR, EXTRA_ERROR, MCE, RESULTS
from twicing.experiments.figures import FLOOR, paper_compat
from twicing.experiments.findings import mean_and_sd
from twicing.experiments.metrics import ACCURACY, CORRUPTED, EPS50, TOP5
from twicing.experiments.results import Record, read_json, read_records, select, value_by_seed
from twicing.robustness.corruptions import CORRUPTIONS
from twicing.robustness.paper_compat import PaperCompat
from twicing.robustness.threat import as_fraction

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": IMAGENET_C_EXTRA,
}
GENERATED_GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur, contrast, pixels": ("gaussian_blur", "contrast", "pixelate", "jpeg_compression"),
}
NAMES = {
    "clean": "as they are",
    "noise": "Gaussian noise",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "spsa": "SPSA",
    "autoattack": "AutoAttack",
    "transfer": "transfer",
    PaperCompat.threat_label: "PGD as papers run it (unverified)",
}
# How lines of attacks begin.
FLOORED = ("FGSM", "PGD", "SPSA", "AutoAttack")


@dataclass(frozen=True)
class Line:
    """One line of a table: what was done, on how many images, and a mean with its spread for every arm."""

    what: str
    n: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Lines by what was done, columns by arm. note: what has to be known to read it."""

    title: str
    note: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class EvaluationSection:
    """All that is shown of an evaluation. about: what evaluation.json says."""

    about: Mapping[str, Any]
    arms: tuple[str, ...]
    styles: Styles
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]
    attacked: bool


def evaluation_section(folder: Path) -> EvaluationSection | None:
    """Read an evaluation's folder, such as RUN/evaluation; None where there is none, or nothing is finished in it.

    Made of evaluation.json and results.jsonl alone. Raises ValueError where one of them is broken.
    """
    if not (folder / ABOUT).exists() or not (folder / RESULTS).exists():
        return None
    records = read_records(folder / RESULTS)
    if not records:
        return None
    about = read_json(folder / ABOUT)
    there = {record.arm for record in records}
    subjects = [one for one in about["subjects"].values() if one["label"] in there]
    arms = tuple(dict.fromkeys(one["label"] for one in subjects))
    styles = arm_styles(arms, {one["label"] for one in subjects if one["control"]})
    tables = (_held_out(records, arms), _shifted(records, arms), _released(records, arms), _generated(records, arms))
    pictures = (
        paper_compat(records, styles, about["std"]),
        _released_bars(records, styles),
        _generated_bars(records, styles),
    )
    attacks = {"fgsm", "pgd", "spsa", "autoattack"}
    return EvaluationSection(
        about,
        arms,
        styles,
        tuple(table for table in tables if table.lines),
        tuple(picture for picture in pictures if picture is not None),
        any(record.conditions.get("threat") in attacks for record in records),
    )


def _held_out(records: Sequence[Record], arms: Sequence[str]) -> Table:
    threats = list(NAMES)
    found = [
        record
        for record in records
        if record.metric in (ACCURACY, TOP5, EPS50) and record.conditions.get("threat") in threats
    ]
    lines = _lines(found, arms, _words, lambda one: threats.index(one["threat"]))
    note = (
        "Accuracy as a share of the images, mean over seeds ± their spread (sd). Sizes are in units of the pixel "
        "range, bounded in every pixel. eps50 is the median over images of the smallest eps with which PGD succeeds. "
        "FGSM takes one step and is a weak attack. Where every arm is below 2 % the line is marked floor, and compares "
        "nothing."
    )
    return Table("Held-out images", note, tuple(_marked(line) for line in lines))


def _marked(line: Line) -> Line:
    means = [cell.mean for cell in line.cells if cell.mean is not None]
    disturbed = line.what.partition(" ")[0] in FLOORED and "top-5" not in line.what
    return replace(line, what=f"{line.what} (floor)") if disturbed and max(means) < FLOOR else line


def _shifted(records: Sequence[Record], arms: Sequence[str]) -> Table:
    names = ("ImageNet-A", "ImageNet-R", "ImageNet-V2", "ImageNet-Sketch")
    found = [record for record in records if record.conditions.get("threat") in names]
    note = "ImageNet-A and -R: the logits are cut to the set's classes before the best one is taken."
    return Table("Shifted test sets", note, _lines(found, arms, _words, lambda one: names.index(one["threat"])))


def _released(records: Sequence[Record], arms: Sequence[str]) -> Table:
    found = [record for record in records if record.metric in (CORRUPTION_ERROR, MCE, EXTRA_ERROR)]
    kinds = [kind for group in GROUPS.values() for kind in group]
    note = (
        "Error over the five severities as a share of AlexNet's: 1 is as bad as AlexNet, lower is better; papers "
        "print it times 100. mCE is the mean of the fifteen, and is there only if all "
        "of them are; the extra four stand apart."
    )
    lines = _lines(found, arms, _words, lambda one: kinds.index(one["kind"]) if "kind" in one else len(kinds))
    return Table("ImageNet-C: corruption error", note, lines)


def _generated(records: Sequence[Record], arms: Sequence[str]) -> Table:
    means = _by_kind(select(records, metric=ACCURACY, conditions={"threat": "corruption"}))
    n = _count(select(records, metric=ACCURACY, conditions={"threat": "corruption"}))
    lines = [
        Line(kind.replace("_", " "), n, tuple(_cell(by_arm.get(arm, {})) for arm in arms))
        for kind, by_arm in sorted(means.items(), key=lambda one: list(CORRUPTIONS).index(one[0]))
    ]
    found = select(records, metric=CORRUPTED)
    lines += _lines(found, arms, lambda _: "mean of all", lambda _: 0)
    note = "Accuracy, mean over five severities. Made on the fly, not ImageNet-C: no mCE can be made of it."
    return Table("Generated corruptions (not ImageNet-C)", note, tuple(lines))


def _lines(
    records: Sequence[Record],
    arms: Sequence[str],
    words: Callable[[Record], str],
    order: Callable[[Mapping[str, Any]], int],
) -> tuple[Line, ...]:
    def place(record: Record) -> tuple[int, Fraction]:
        # The headline comes after the sizes that it lies between.
        last = "1" if record.metric == EPS50 else "0"
        size = record.conditions.get("eps", record.conditions.get("sd", last))
        return order(record.conditions), as_fraction(str(size).removesuffix(" normalised"))

    grouped: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(records, key=place):
        grouped.setdefault((record.metric, repr(sorted(record.conditions.items()))), []).append(record)
    return tuple(
        Line(
            words(of_one[0]),
            _count(of_one),
            tuple(_cell(value_by_seed(of_one, metric, arm, of_one[0].conditions)) for arm in arms),
        )
        for (metric, _conditions), of_one in grouped.items()
    )


def _words(record: Record) -> str:
    conditions = dict(record.conditions)
    threat = str(conditions.pop("threat"))
    if record.metric in (MCE, EXTRA_ERROR):
        return record.metric.partition(" [")[0]
    if record.metric == CORRUPTION_ERROR:
        return str(conditions["kind"]).replace("_", " ")
    details = " ".join(f"{key} {value}" for key, value in conditions.items())
    name = f"{NAMES.get(threat, threat)} {details}".strip()
    return {TOP5: f"{name}, top-5", EPS50: "eps50 under PGD"}.get(record.metric, name)


def _by_kind(records: Sequence[Record]) -> dict[str, dict[str, dict[int, float]]]:
    """Kind -> arm -> seed -> mean over the severities."""
    values: dict[str, dict[str, dict[int, list[float]]]] = {}
    for record in records:
        of_kind = values.setdefault(str(record.conditions["kind"]), {})
        of_kind.setdefault(record.arm, {}).setdefault(record.seed, []).append(record.value)
    return {
        kind: {arm: {seed: float(np.mean(all_of)) for seed, all_of in seeds.items()} for arm, seeds in by_arm.items()}
        for kind, by_arm in values.items()
    }


@drawing_settings()
def _released_bars(records: Sequence[Record], styles: Styles) -> Picture | None:
    means = _by_kind(select(records, metric=CORRUPTION_ERROR))
    caption = "Corruption error on ImageNet-C by type, as a share of AlexNet's; lower is better. Marks are seeds."
    return _bars("imagenet-c", GROUPS, means, "corruption error", caption, styles)


@drawing_settings()
def _generated_bars(records: Sequence[Record], styles: Styles) -> Picture | None:
    means = _by_kind(select(records, metric=ACCURACY, conditions={"threat": "corruption"}))
    caption = "Accuracy by type, mean over the severities; generated, not ImageNet-C. Marks are seeds."
    return _bars("generated", GENERATED_GROUPS, means, "accuracy", caption, styles)


def _bars(
    name: str,
    groups: Mapping[str, Sequence[str]],
    means: Mapping[str, Mapping[str, Mapping[int, float]]],
    axis: str,
    caption: str,
    styles: Styles,
) -> Picture | None:
    longest = max((value for arms in means.values() for seeds in arms.values() for value in seeds.values()), default=1)
    panels = []
    for place, (group, kinds) in enumerate(groups.items()):
        shown = [kind for kind in kinds if kind in means]
        if not shown:
            continue
        panel = Panel(f"{name}-{place}", group, size=(3.6, 0.9 + (0.2 + 0.16 * len(styles)) * len(shown)))
        height = 0.8 / len(styles)
        for row, kind in enumerate(shown):
            for column, (arm, style) in enumerate(styles.items()):
                values = list(means[kind].get(arm, {}).values())
                if values:
                    at = row + (column - (len(styles) - 1) / 2) * height
                    panel.axes.barh(at, float(np.mean(values)), height=0.85 * height, color=style.color, alpha=0.8)
                    panel.axes.plot(values, [at] * len(values), style.marker, color=style.color, markersize=2.5)
        panel.axes.set_yticks(range(len(shown)), [kind.replace("_", " ") for kind in shown])
        panel.axes.set_ylim(len(shown) - 0.5, -0.5)
        panel.axes.set_xlim(0, 1.03 * max(longest, 1))
        panel.axes.set_xlabel(axis)
        panels.append(panel)
    return Picture(name, panels, caption) if panels else None


def _cell(values: Mapping[int, float]) -> Cell:
    return Cell(*mean_and_sd(values)) if values else Cell(None, None)


def _count(records: Sequence[Record]) -> str:
    counts = sorted({record.n for record in records})
    return "" if not counts else " to ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1])))
