"""report.html: one self-contained page made from a run folder's files alone. No JavaScript, nothing to load."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from twicing.experiments import figures
from twicing.experiments.drawing import arm_styles
from twicing.experiments.findings import (
    NOISE_FLOOR,
    Row,
    Run,
    costs,
    exploratory_measures,
    exploratory_rows,
    primary_rows,
    read_run,
)
from twicing.experiments.results import BASELINE, replace_file
from twicing.experiments.sentences import SIMILARITY, SIMILARITY_CAVEAT, fewest_pairs, in_short, missing_seeds
from twicing.experiments.statistics import number, p_text, seeds_caveat, signed

PAPERS = (
    (
        "2503.00687",
        "L. U. Abdullaev and T. M. Nguyen: Transformer Meets Twicing: Harnessing Unattended Residual Information",
    ),
    (
        "2506.10371",
        "L. U. Abdullaev, M. Tkachenko and T. M. Nguyen: Revisiting Transformers with Insights from Image Filtering",
    ),
)


def write_report(run_folder: Path) -> Path:
    """Write report.html into a run folder that has config.json and results.jsonl; the same files give the same bytes.

    Parts that have no records are left out. Returns the path of the report.
    Raises FileNotFoundError where the two files are not there, ValueError where they do not fit together.
    """
    page = _page(read_run(run_folder))
    path = run_folder / "report.html"
    replace_file(path, lambda file: file.write(page.encode()))
    return path


def typeset(text: object) -> Markup:
    """Escaped text with true minus and plus-minus signs, which statements keep as ASCII."""
    escaped = str(escape(text)).replace("+-", "±")
    return Markup(re.sub(r"(^|[\s\[(])-(?=[\d.])", "\\1−", escaped))  # noqa: RUF001


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text)."""
    lines: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            lines += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            lines.append((f"{prefix}{key}", ", ".join(_in_words(one) for one in value) or "none"))
        else:
            lines.append((f"{prefix}{key}", _in_words(value)))
    return lines


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_in_words(one)}" for key, one in value.items()) or "none"
    return "none" if value is None else str(value)


def _page(run: Run) -> str:
    environment = Environment(
        loader=PackageLoader("twicing.experiments"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "p_text": p_text, "typeset": typeset}
    config, arms = run.config, run.arms
    styles = arm_styles([arm.label for arm in arms])
    rows = primary_rows(run)
    measures = exploratory_measures(run)
    by_layer = [measure for measure in measures if "layer" in measure.conditions]
    return environment.get_template("report.html").render(
        run=run,
        config=config,
        baseline=BASELINE,
        noise_floor=NOISE_FLOOR,
        arms=arms,
        styles=styles,
        sentences=in_short(run, rows),
        measures=run.primaries,
        rows=rows,
        family=sum(row.arm.label != BASELINE and not row.arm.control for row in rows),
        has_bootstrap=any(row.bootstrap for row in rows),
        differences=figures.differences(rows, styles),
        strength=figures.accuracy_against_strength(run.records, styles),
        layers=figures.by_layer(run.records, styles),
        training=figures.training(run.records, styles),
        seconds=figures.against_seconds(run.records, styles),
        costs=costs(run),
        exploratory=[
            ("Accuracy and time", exploratory_rows(run, [one for one in measures if one not in by_layer])),
            ("Similarity and rank, by layer", exploratory_rows(run, by_layer)),
        ],
        controls=[arm for arm in arms if arm.control],
        caveats=_caveats(run, rows),
        missing=missing_seeds(run),
        images=_images(run),
        published=_published(run),
        recipe=flatten(config.get("recipe", {})),
        environment=_environment(run),
        papers=PAPERS,
    )


def _caveats(run: Run, rows: Sequence[Row]) -> list[str]:
    caveats = [seeds_caveat(fewest_pairs(run, rows))]
    for row in rows:
        if not row.arm.control and row.difference is not None and row.difference.half_width is not None:
            smallest = f"a mean difference below +-{number(row.difference.half_width)}"
            caveats.append(f"{row.measure.title}, {row.arm.label}: {smallest} (uncorrected).")
    if any(record.metric == SIMILARITY for record in run.records):
        caveats.append(SIMILARITY_CAVEAT)
    if any(record.conditions.get("threat") in ("fgsm", "pgd") for record in run.records):
        caveats.append(
            "Attacks give an upper bound of the accuracy that a stronger attack would leave; "
            "they do not prove that a model is robust."
        )
    return caveats


def _images(run: Run) -> str:
    counts = sorted({record.n for record in run.records if record.conditions.get("threat") == "clean"})
    if not counts:
        return ""
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _published(run: Run) -> list[tuple[str, Mapping[str, Any]]]:
    found = {f"{record.arm}, {record.metric}": record.published for record in run.records if record.published}
    return list(found.items())


def _environment(run: Run) -> list[tuple[str, str]]:
    config = run.config
    lines = [(name, str(version)) for name, version in dict(config.get("versions", {})).items()]
    lines.append(("commit", str(config.get("commit") or "not known (installed without git)")))
    lines += [(key, str(config[key])) for key in ("device", "jobs", "started") if key in config]
    return lines
