"""The tables of an evaluation: accuracy by what was done to the images, with the sentences that each needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from twicing.data.shifted import IMAGENET_C_EXTRA
from twicing.experiments.attack_tables import Cell
from twicing.experiments.evaluate.folder import CORRUPTION_ERROR, EXTRA_ERROR, MCE
from twicing.experiments.figures import FLOOR
from twicing.experiments.findings import mean_and_sd
from twicing.experiments.metrics import ACCURACY, CORRUPTED, EPS50, TOP5
from twicing.experiments.results import Correctness, Record, select, value_by_seed
from twicing.experiments.sentences import remarks
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
# Where nearly no image is left, attacks compare nothing.
FLOORED = ("fgsm", "pgd", "spsa", "autoattack")
MARK = " (floor)"
Answers = Mapping[tuple[str, int], Correctness]


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


def tables_of(records: Sequence[Record], answers: Answers, arms: Sequence[str]) -> tuple[Table, ...]:
    """The tables that have lines. answers: which held-out images each model had right, as predictions.npz holds it."""
    all_of = (
        _held_out(records, answers, arms),
        _shifted(records, arms),
        _released(records, arms),
        _generated(records, arms),
    )
    return tuple(table for table in all_of if table.lines)


def _held_out(records: Sequence[Record], answers: Answers, arms: Sequence[str]) -> Table:
    threats = list(NAMES)
    found = [
        record
        for record in records
        if record.metric in (ACCURACY, TOP5, EPS50) and record.conditions.get("threat") in threats
    ]
    lines = [_marked(line) for line in _lines(found, arms, _words, lambda one: threats.index(one["threat"]))]
    chosen = _chosen_as_they_are(answers, arms)
    if chosen is not None:
        undisturbed = [one for one in lines if one.what.startswith(NAMES["clean"])]
        lines.insert(len(undisturbed), chosen)
    return Table("Held-out images", _note(found, lines, chosen), tuple(lines))


def _chosen_as_they_are(answers: Answers, arms: Sequence[str]) -> Line | None:
    """Clean accuracy on the images that were chosen to be disturbed; None where these are all, or it is not known."""
    values: dict[str, dict[int, float]] = {}
    counts: set[int] = set()
    for (arm, seed), one in answers.items():
        if "clean" in one.correct and one.probes is not None and len(one.probes) < len(one.index):
            values.setdefault(arm, {})[seed] = float(one.correct["clean"][one.probes].mean())
            counts.add(len(one.probes))
    cells = tuple(_cell(values.get(arm, {})) for arm in arms)
    return Line(f"{NAMES['clean']}, the images disturbed below", _range(counts), cells) if values else None


def _note(found: Sequence[Record], lines: Sequence[Line], chosen: Line | None) -> str:
    """What has to be known to read the table, of what it holds."""
    threats = {str(record.conditions["threat"]) for record in found}
    eps50 = [record for record in found if record.metric == EPS50]
    spread = any(cell.sd is not None for line in lines for cell in line.cells)
    said = {
        "Accuracy as a share of the images, of which each line says how many"
        f"{', mean over seeds ± their spread (sd)' if spread else ''}.": True,
        "Only some of the images were disturbed: what that did is told by the line of the same images as they are, not "
        "by the one of all.": chosen is not None,
        "Sizes are in units of the pixel range, bounded in every pixel.": bool(threats & set(FLOORED)),
        "eps50 is the median over images of the smallest eps with which PGD succeeds.": bool(eps50),
        "FGSM takes one step and is a weak attack.": "fgsm" in threats,
        f"Where every arm is below {100 * FLOOR:.0f} % the line is marked floor, and compares nothing.": any(
            line.what.endswith(MARK) for line in lines
        ),
    }
    return " ".join([*(sentence for sentence, holds in said.items() if holds), *remarks(eps50, [])])


def _marked(line: Line) -> Line:
    means = [cell.mean for cell in line.cells if cell.mean is not None]
    attacked = line.what.partition(" ")[0] in [NAMES[threat] for threat in FLOORED] and "top-5" not in line.what
    return replace(line, what=f"{line.what}{MARK}") if attacked and max(means) < FLOOR else line


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
    means = by_kind(select(records, metric=ACCURACY, conditions={"threat": "corruption"}))
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


def by_kind(records: Sequence[Record]) -> dict[str, dict[str, dict[int, float]]]:
    """Kind -> arm -> seed -> mean over the severities."""
    values: dict[str, dict[str, dict[int, list[float]]]] = {}
    for record in records:
        of_kind = values.setdefault(str(record.conditions["kind"]), {})
        of_kind.setdefault(record.arm, {}).setdefault(record.seed, []).append(record.value)
    return {
        kind: {arm: {seed: float(np.mean(all_of)) for seed, all_of in seeds.items()} for arm, seeds in by_arm.items()}
        for kind, by_arm in values.items()
    }


def _cell(values: Mapping[int, float]) -> Cell:
    return Cell(*mean_and_sd(values)) if values else Cell(None, None)


def _count(records: Sequence[Record]) -> str:
    return _range({record.n for record in records})


def _range(counts: set[int]) -> str:
    return " to ".join(f"{n:,}" for n in dict.fromkeys((min(counts), max(counts)))) if counts else ""
