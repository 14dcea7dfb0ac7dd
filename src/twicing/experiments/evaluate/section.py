"""What an evaluation found, ready to be shown: tables and bar charts, for its own page or as a section of another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twicing.experiments.curves import Picture, Styles
from twicing.experiments.drawing import Panel, arm_styles, drawing_settings
from twicing.experiments.evaluate.folder import ABOUT, CORRUPTION_ERROR, PREDICTIONS, RESULTS
from twicing.experiments.evaluate.tables import FLOORED, GROUPS, Table, by_kind, tables_of
from twicing.experiments.figures import paper_compat
from twicing.experiments.metrics import ACCURACY
from twicing.experiments.results import Record, read_json, read_predictions, read_records, select

GENERATED_GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur, contrast, pixels": ("gaussian_blur", "contrast", "pixelate", "jpeg_compression"),
}


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

    Made of evaluation.json and results.jsonl, and of predictions.npz where it is there. Raises ValueError where one of
    them is broken.
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
    answers = read_predictions(folder / PREDICTIONS) if (folder / PREDICTIONS).exists() else {}
    pictures = (
        paper_compat(records, styles, about["std"]),
        _released_bars(records, styles),
        _generated_bars(records, styles),
    )
    return EvaluationSection(
        about,
        arms,
        styles,
        tables_of(records, answers, arms),
        tuple(picture for picture in pictures if picture is not None),
        any(record.conditions.get("threat") in FLOORED for record in records),
    )


@drawing_settings()
def _released_bars(records: Sequence[Record], styles: Styles) -> Picture | None:
    means = by_kind(select(records, metric=CORRUPTION_ERROR))
    caption = "Corruption error on ImageNet-C by type, as a share of AlexNet's; lower is better. Marks are seeds."
    return _bars("imagenet-c", GROUPS, means, "corruption error", caption, styles)


@drawing_settings()
def _generated_bars(records: Sequence[Record], styles: Styles) -> Picture | None:
    means = by_kind(select(records, metric=ACCURACY, conditions={"threat": "corruption"}))
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
