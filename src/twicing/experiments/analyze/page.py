"""analysis.html: one self-contained page of what an analysis found. No JavaScript, nothing to load."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from twicing.experiments.analyze.keep import ANALYSIS
from twicing.experiments.analyze.section import AnalysisSection, analysis_section, template_environment
from twicing.experiments.report import PAPERS, report_above
from twicing.experiments.results import replace_file
from twicing.experiments.statistics import number
from twicing.experiments.telling import tell

PAGE = "analysis.html"


def read_section(folder: Path) -> AnalysisSection:
    """What is in an analysis's folder, with its figures drawn.

    Raises ValueError where there is no analysis in the folder, or it is broken.
    """
    section = analysis_section(folder)
    if section is None:
        raise ValueError(f"{folder} holds no analysis: run twicing analyze.")
    return section


def write_page(folder: Path, section: AnalysisSection) -> Path:
    """Write analysis.html into an analysis's folder and return its path; the same files give the same bytes."""
    about = section.analysis.about
    page = (
        template_environment()
        .get_template("analysis.html")
        .render(
            section=section,
            heading="h2",
            about=about,
            report=report_above(folder, ANALYSIS),
            models=list(section.analysis.models.values()),
            made_with=[
                *about["versions"].items(),
                ("commit", about["commit"] or "unknown"),
                ("device", about["device"]),
            ],
            papers=PAPERS,
        )
    )
    path = folder / PAGE
    replace_file(path, lambda file: file.write(page.encode()))
    return path


def print_results(section: AnalysisSection, console: Console) -> None:
    """Print the tables of the page, as they fit the terminal, and the sentences on what is not there."""
    for chapter in section.chapters:
        for table in chapter.tables:
            # Brackets of a label are no markup.
            screen = RichTable(title=table.title, caption=escape(table.symbols) or None, caption_justify="left")
            screen.add_column("")
            for label in table.labels:
                screen.add_column(escape(label), justify="right")
            for line in table.lines:
                screen.add_row(escape(line.what), *(number(cell.mean) for cell in line.cells))
            console.print(screen)
    for note in section.notes:
        tell(console, f"Note: {note}")
