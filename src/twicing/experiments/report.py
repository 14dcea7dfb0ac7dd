"""report.html: one self-contained page made from a run folder's files alone. No JavaScript, nothing to load."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from twicing.experiments import corruption_bars, figures, training_figures
from twicing.experiments.analyze.keep import ANALYSIS
from twicing.experiments.analyze.section import report_section
from twicing.experiments.attack_tables import stronger_attacks, transfer_matrices
from twicing.experiments.costs import costs
from twicing.experiments.drawing import arm_styles
from twicing.experiments.evaluate.section import EvaluationSection, evaluation_section
from twicing.experiments.findings import (
    NOISE_FLOOR,
    Measure,
    Row,
    Run,
    exploratory_measures,
    exploratory_rows,
    family_size,
    primary_rows,
    read_run,
)
from twicing.experiments.masking_verdicts import verdict_on
from twicing.experiments.metrics import ACCURACY, is_perplexity
from twicing.experiments.published_beside import published_beside
from twicing.experiments.results import BASELINE, replace_file, select
from twicing.experiments.sentences import caveats, in_short, missing_seeds, swapped_targets_sentence, was_attacked
from twicing.experiments.statistics import number, p_text, signed
from twicing.experiments.word_swap_figure import word_swap

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


REPORT = "report.html"
# Below a run folder: what these commands found of its models, each with a page of that name.
EVALUATION, DIAGNOSIS = "evaluation", "diagnosis"
PAGES = {
    f"{DIAGNOSIS}/{DIAGNOSIS}.html": "whether they collapse",
    f"{ANALYSIS}/{ANALYSIS}.html": "what attention is like inside",
    f"{EVALUATION}/{EVALUATION}.html": "what they answer to disturbed and other images",
}


def write_report(run_folder: Path) -> Path:
    """Write report.html into a run folder that has config.json and results.jsonl; the same files give the same bytes.

    Parts that have no records are left out, and so are links to pages that are not there. Returns the path of the
    report.
    Raises FileNotFoundError where the two files are not there, ValueError where they do not fit together.
    """
    pages = {address: words for address, words in PAGES.items() if (run_folder / address).exists()}
    evaluated, analyzed = evaluation_section(run_folder / EVALUATION), report_section(run_folder)
    page = _page(read_run(run_folder), pages, evaluated, analyzed)
    path = run_folder / REPORT
    replace_file(path, lambda file: file.write(page.encode()))
    return path


def report_above(folder: Path, name: str) -> Path | None:
    """The report of the comparison whose models a page in this folder is of; None where there is none.

    name: of the folder, where it lies in the run folder.
    """
    report = folder.parent / REPORT
    return report if folder.name == name and report.exists() else None


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


def _page(run: Run, pages: Mapping[str, str], section: EvaluationSection | None, analysis: Markup | None) -> str:
    environment = Environment(
        loader=PackageLoader("twicing.experiments"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "p_text": p_text, "typeset": typeset}
    config, arms = run.config, run.arms
    styles = arm_styles([arm.label for arm in arms], [arm.label for arm in arms if arm.control])
    rows = primary_rows(run)
    made_with = _made_with(run)
    beside, protocol_differs = published_beside(run)
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
        family=family_size(run),
        has_bootstrap=any(row.bootstrap for row in rows),
        differences=figures.differences(rows, styles),
        strength=figures.accuracy_against_strength(run.records, styles),
        layers=figures.by_layer(run.records, styles),
        attacked=was_attacked(run),
        verdicts=[verdict_on(run.verdicts, arm.label) for arm in arms],
        stronger=stronger_attacks(run),
        transfers=transfer_matrices(run),
        compat=figures.paper_compat(run.records, styles, config.get("recipe", {}).get("std", ())),
        corruptions=corruption_bars.bars(run.records, styles),
        swapped=word_swap(run.records, styles),
        swapped_targets=swapped_targets_sentence(run.records, run.notes),
        corruption_table=corruption_bars.table(run),
        pages=pages,
        section=section,
        analysis=analysis,
        training=training_figures.training(run.records, styles),
        seconds=training_figures.against_seconds(run.records, styles),
        costs=costs(run),
        exploratory=_exploratory(run),
        controls=[arm for arm in arms if arm.control],
        caveats=caveats(run, rows),
        missing=missing_seeds(run),
        images=_images(run, "clean"),
        attacked_images=_images(run, "pgd"),
        beside=beside,
        protocol_differs=protocol_differs,
        initialisation=_initialisation(run),
        recipe=flatten(config.get("recipe", {})),
        mixture=_mixture(made_with),
        environment=_environment(run, made_with),
        papers=PAPERS,
    )


def _exploratory(run: Run) -> list[tuple[str, list[Row]]]:
    """The exploratory comparisons under headings. Transfer has its matrix: it compares pairs, not with standard."""
    groups: dict[str, list[Measure]] = {
        "Perplexity and time" if is_of_text(run) else "Accuracy, attacks and time": [],
        "Corruptions, generated": [],
        "Similarity and rank, by layer": [],
    }
    general, corrupted, by_layer = groups.values()
    for measure in exploratory_measures(run):
        threat = measure.conditions.get("threat")
        if threat != "transfer":
            group = by_layer if "layer" in measure.conditions else corrupted if threat == "corruption" else general
            group.append(measure)
    return [(title, exploratory_rows(run, measures)) for title, measures in groups.items()]


def is_of_text(run: Run) -> bool:
    """Whether language models were compared."""
    return any(is_perplexity(record.metric) for record in run.records)


def _images(run: Run, threat: str) -> str:
    counts = sorted({record.n for record in select(run.records, metric=ACCURACY, conditions={"threat": threat})})
    if not counts:
        return ""
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _initialisation(run: Run) -> str:
    weights = str(run.config.get("recipe", {}).get("initialisation") or "").rstrip(".")
    return f"Initialisation: {weights}." if weights else ""


def _made_with(run: Run) -> dict[str, list[str]]:
    """What the records were made with: a package's versions, the commits and devices, each in order of appearance."""
    packages = dict.fromkeys(package for record in run.records for package in record.versions)
    found = {package: [record.versions.get(package, "not recorded") for record in run.records] for package in packages}
    found["commit"] = [record.commit or "not known (installed without git)" for record in run.records]
    found["device"] = [record.device for record in run.records]
    return {name: list(dict.fromkeys(values)) for name, values in found.items() if values}


def _mixture(made_with: Mapping[str, Sequence[str]]) -> str:
    parts = [f"{name} ({' and '.join(values)})" for name, values in made_with.items() if len(values) > 1]
    if not parts:
        return ""
    return (
        f"The records differ in {'; '.join(parts)}: this run was resumed elsewhere or after a change, "
        "and a difference between arms may come from that alone."
    )


def _environment(run: Run, made_with: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    lines = [(name, ", ".join(values)) for name, values in made_with.items()]
    return lines + [(key, str(run.config[key])) for key in ("jobs", "started") if key in run.config]
