"""evaluation.html: one self-contained page of what an evaluation found, in the look of the comparisons' report."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table as RichTable

from twicing.experiments.evaluate.section import evaluation_section
from twicing.experiments.masking_verdicts import read_verdicts, verdict_on
from twicing.experiments.report import EVALUATION, report_above, typeset
from twicing.experiments.results import replace_file
from twicing.experiments.statistics import number

PAGE = "evaluation.html"


def write_page(folder: Path) -> Path:
    """Write evaluation.html into an evaluation's folder and return its path; the same files give the same bytes.

    Raises ValueError where nothing is finished in the folder.
    """
    section = evaluation_section(folder)
    if section is None:
        raise ValueError(f"{folder} holds no finished part of an evaluation.")
    environment = Environment(
        loader=PackageLoader("twicing.experiments", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "typeset": typeset}
    about, verdicts = section.about, read_verdicts(folder)
    page = environment.get_template("evaluation.html").render(
        section=section,
        report=report_above(folder, EVALUATION),
        styles=section.styles,
        verdicts=[verdict_on(verdicts, arm) for arm in section.arms],
        subjects=list(about["subjects"].values()),
        environment=[
            *about["versions"].items(),
            ("commit", about["commit"] or "unknown"),
            ("device", about["device"]),
        ],
    )
    path = folder / PAGE
    replace_file(path, lambda file: file.write(page.encode()))
    return path


def print_results(folder: Path, console: Console) -> None:
    """Print the tables of the page, as they fit the terminal."""
    section = evaluation_section(folder)
    for table in section.tables if section else ():
        screen = RichTable(title=table.title)
        screen.add_column("")
        screen.add_column("images", justify="right")
        for arm in section.arms if section else ():
            screen.add_column(arm, justify="right")
        for line in table.lines:
            screen.add_row(line.what, line.n, *(number(cell.mean) for cell in line.cells))
        console.print(screen)
