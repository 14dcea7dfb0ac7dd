"""What an analysis found, ready to be shown: for its own page, or as a section of the comparison's report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from twicing.experiments.analyze import figures, spectrum_figures
from twicing.experiments.analyze.formulas import unbroken
from twicing.experiments.analyze.keep import AGREEMENT, ANALYSIS, Analysis, Rows, read_analysis
from twicing.experiments.analyze.maps import Grid, map_grids, part_grids
from twicing.experiments.attack_tables import Cell
from twicing.experiments.curves import Picture, Styles
from twicing.experiments.drawing import arm_styles
from twicing.experiments.findings import mean_and_sd
from twicing.experiments.results import BASELINE
from twicing.experiments.statistics import number, paired_difference, verdict

BySeed = dict[int, float]
CAUSAL = (
    "Attention is causal here: A is triangular, and its eigenvalues are its diagonal, what each token takes from "
    "itself. They are real and in [0, 1] whatever the weights are; that A is not symmetric shows in singular values "
    "alone."
)
EFFECTIVE = (
    "p(A) is the effective matrix, which the layer multiplies its values by; where that is A itself, 2A - A^2 of the "
    "same A stands there, what twicing would make of it."
)


@dataclass(frozen=True)
class Line:
    """One line of a table: what was measured, and a mean with its spread for every label."""

    what: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Lines by what was measured, columns by label. note: what has to be known to read it.

    symbols: of the note, what says what the lines speak of: there is no room for all of it on a terminal.
    """

    title: str
    labels: tuple[str, ...]
    lines: tuple[Line, ...]
    note: str
    symbols: str = ""


@dataclass(frozen=True)
class Chapter:
    """One question. figures: each with the styles of its key, if it has one. verdicts: differences, in words."""

    title: str
    about: str
    tables: tuple[Table, ...]
    figures: tuple[tuple[Picture, Styles], ...]
    grids: tuple[Grid, ...]
    verdicts: tuple[str, ...] = ()


@dataclass(frozen=True)
class AnalysisSection:
    """All that is shown of an analysis."""

    analysis: Analysis
    styles: Styles
    chapters: tuple[Chapter, ...]
    notes: tuple[str, ...]


def report_section(run_folder: Path) -> Markup | None:
    """What `twicing analyze` found for a run folder, as HTML for its report; None where it was not analysed.

    Raises ValueError where what it left there is broken.
    """
    section = analysis_section(run_folder / ANALYSIS)
    if section is None:
        return None
    html = template_environment().get_template("analyzed.html").render(section=section, heading="h3")
    return Markup(html)


def analysis_section(folder: Path) -> AnalysisSection | None:
    """Read an analysis's folder, such as RUN/analysis; None where there is none in it.

    Raises ValueError where one of its files is broken.
    """
    analysis = read_analysis(folder)
    if analysis is None:
        return None
    labels = tuple(dict.fromkeys(one["label"] for one in analysis.models.values()))
    controls = {one["label"] for one in analysis.models.values() if one["control"]}
    styles = arm_styles(labels, controls)
    chapters = [
        _spectra(analysis, labels, styles),
        _products(analysis, labels),
        _maps(analysis),
        _parts(analysis, labels),
        _bandwidth(analysis, controls),
    ]
    shown = tuple(one for one in chapters if one is not None and (one.tables or one.figures or one.grids))
    return AnalysisSection(analysis, styles, shown, _notes(analysis))


def template_environment() -> Environment:
    """Of our templates; macros and the style sheet are the report's."""
    # Imported here: the report imports this file for its section.
    from twicing.experiments.report import typeset

    environment = Environment(
        loader=ChoiceLoader([PackageLoader("twicing.experiments.analyze"), PackageLoader("twicing.experiments")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "typeset": lambda text: unbroken(typeset(text))}
    return environment


def _spectra(analysis: Analysis, labels: Sequence[str], styles: Styles) -> Chapter:
    def line(what: str, name: str, over: Callable[[Sequence[float]], float] = _mean) -> Line:
        return Line(what, _cells(analysis.spectrum, labels, lambda row: row[name], over))

    lines = (
        line("eigenvalues real and in [0, 1], share", "fits_theory"),
        line("complex eigenvalues, share", "complex"),
        line("real and negative eigenvalues, share", "negative"),
        line("largest imaginary part in any head", "largest_imaginary", max),
        line("largest singular value of A", "largest_singular"),
        line("effective rank of A", "effective_rank"),
        line("eigenvalues of p(A) real and in [0, 1], share", "fits_theory_p"),
        line("largest modulus of an eigenvalue of p(A) in any head", "largest_modulus_p", max),
        line("largest singular value of p(A)", "largest_singular_p"),
        line("effective rank of p(A)", "effective_rank_p"),
        line("singular values of p(A) miss p of those of A by, share of the largest", "singular_miss"),
    )
    tolerance = analysis.about["tolerance"]
    note = (
        f"Means over layers, heads and {analysis.unit}. Real: the imaginary part is at most {tolerance:g}; in [0, 1] "
        f"up to the same. {EFFECTIVE}"
    )
    note += f" {CAUSAL}" if analysis.causal else ""
    note += "" if analysis.causal else " Of a negative eigenvalue x of A, 2 x - x^2 is up to three times as large."
    note += " Spread (±): standard deviation over seeds." if _several_seeds(analysis) else ""
    drawn = [spectrum_figures.shares(analysis, styles)]
    planes = [
        picture for picture in (spectrum_figures.eigenvalues(analysis), spectrum_figures.singular(analysis)) if picture
    ]
    return Chapter(
        "Spectra of the attention matrices",
        "Softmax attention is computed again from queries and keys, and each head's matrix taken apart in float64.",
        (Table("Spectra", tuple(labels), tuple(one for one in lines if _any(one)), note, EFFECTIVE),),
        (*((one, styles) for one in drawn), *((one, {}) for one in planes)),
        (),
    )


def _products(analysis: Analysis, labels: Sequence[str]) -> Chapter | None:
    picture = figures.products(analysis)
    if picture is None:
        return None
    kinds = list(dict.fromkeys(row["kind"] for row in analysis.products))
    deepest = {name: one["layers"] for name, one in analysis.models.items() if "layers" in one}
    last = [row for row in analysis.products if row["depth"] == deepest[row["model"]]]
    lines = tuple(
        Line(kind, _cells([row for row in last if row["kind"] == kind], labels, lambda row: row["effective_rank"]))
        for kind in kinds
    )
    table = Table(
        "Effective rank of the product of all layers",
        tuple(labels),
        lines,
        f"Means over {analysis.unit}{_spread(analysis)}.",
    )
    about = "If attention were all there is, what would be left of the differences between tokens?"
    if analysis.causal:
        about += (
            " In causal attention the first token takes from itself alone, so that products tend to a matrix in which "
            "every token takes from the first one alone, which has rank 1."
        )
    return Chapter("Products of attention matrices", about, (table,), ((picture, {}),), ())


def _maps(analysis: Analysis) -> Chapter:
    about = "Fused kernels never form the attention matrix; it is computed again from queries and keys."
    return Chapter("Heat maps", about, (), (), tuple(map_grids(analysis)))


def _parts(analysis: Analysis, labels: Sequence[str]) -> Chapter:
    names = list(dict.fromkeys(row["part"] for row in analysis.logit_parts))
    lines = tuple(
        Line(name, _cells([row for row in analysis.logit_parts if row["part"] == name], labels, lambda row: row["sd"]))
        for name in names
    )
    note = (
        f"Root mean square over queries, keys and {analysis.unit}, without each row's mean; means over heads"
        f"{_spread(analysis)}. “rest” is what LayerNorm's shift and the biases give; “all” are the logits."
    )
    tables = (Table("How much the parts vary", tuple(labels), lines, note),) if lines else ()
    about = (
        "Proposition 3.2 of arXiv 2506.10371 says that the cross terms, token-position and position-token, are noise."
    )
    return Chapter("Logits of tokens and positions", about, tables, (), tuple(part_grids(analysis)))


def _bandwidth(analysis: Analysis, controls: set[str]) -> Chapter | None:
    labels = tuple(dict.fromkeys(row["label"] for row in analysis.bandwidth))
    styles = arm_styles(labels, controls)
    picture = figures.bandwidth(analysis, styles)
    if picture is None:
        return None
    measure, n = analysis.bandwidth[0]["measure"], analysis.bandwidth[0]["n"]
    lines = [
        Line(
            f"{figures.MEASURES[measure]}, factor {factor:g}",
            _cells([row for row in analysis.bandwidth if row["factor"] == factor], labels, lambda row: row["value"]),
        )
        for factor in (0.5, 1.0, 2.0)
    ]
    lost = {label: lost_by_seed(analysis.bandwidth, label) for label in labels}
    lines.append(Line("lost on average over the other factors", tuple(Cell(*mean_and_sd(lost[one])) for one in labels)))
    spread = " ± is the standard deviation over seeds." if _several_seeds(analysis) else ""
    table = Table("Scaled logits", labels, tuple(lines), f"On {n} {analysis.unit}.{spread}")
    verdicts: tuple[str, ...] = ()
    if BASELINE in lost and measure != AGREEMENT:
        verdicts = tuple(
            f"{label}: {verdict(paired_difference(lost[BASELINE], lost[label]), better='lower')}"
            for label in labels
            if label != BASELINE
        )
    about = (
        "A kernel's bandwidth is the temperature of its softmax. A model that is less sensitive to it loses less when "
        "its logits are scaled."
    )
    return Chapter("Bandwidth test", about, (table,), ((picture, styles),), (), verdicts)


def lost_by_seed(rows: Rows, label: str) -> BySeed:
    """By seed: the value with unscaled logits minus the mean of the values with every other factor."""
    values: dict[int, dict[float, float]] = {}
    for row in rows:
        if row["label"] == label:
            values.setdefault(row["seed"], {})[row["factor"]] = row["value"]
    return {
        seed: of_seed[1.0] - float(np.mean([value for factor, value in of_seed.items() if factor != 1.0]))
        for seed, of_seed in values.items()
    }


def _notes(analysis: Analysis) -> tuple[str, ...]:
    """What is left out, each sentence once, with the models that it is said of."""
    by_note: dict[str, list[str]] = {}
    for one in analysis.models.values():
        for note in one["notes"]:
            of_note = by_note.setdefault(note, [])
            if one["label"] not in of_note:
                of_note.append(one["label"])
    every = len({one["label"] for one in analysis.models.values()})
    noted = [note if len(of) == every else f"{', '.join(of)}: {note}" for note, of in by_note.items()]
    return (*analysis.left_out, *noted)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _cells(
    rows: Rows,
    labels: Sequence[str],
    value: Callable[[Mapping[str, Any]], float | None],
    over: Callable[[Sequence[float]], float] = _mean,
) -> tuple[Cell, ...]:
    """For each label the mean and spread over seeds of what the rows of a seed come to."""
    cells = []
    for label in labels:
        by_seed: dict[int, list[float]] = {}
        for row in rows:
            found = value(row)
            if row["label"] == label and found is not None:
                by_seed.setdefault(row["seed"], []).append(found)
        cells.append(Cell(*mean_and_sd({seed: over(ones) for seed, ones in by_seed.items()})) if by_seed else NOTHING)
    return tuple(cells)


def _spread(analysis: Analysis) -> str:
    return "; ±\u00a0over seeds" if _several_seeds(analysis) else ""


def _several_seeds(analysis: Analysis) -> bool:
    return len({one["seed"] for one in analysis.models.values()}) > 1


NOTHING = Cell(None, None)


def _any(line: Line) -> bool:
    return any(cell.mean is not None for cell in line.cells)
