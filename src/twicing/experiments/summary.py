"""What `compare` says in the terminal: the primary metrics as a table, the same sentences as the report, its path."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twicing.experiments.findings import Row, primary_rows, read_run
from twicing.experiments.metrics import is_perplexity
from twicing.experiments.results import BASELINE
from twicing.experiments.sentences import in_short, remarks
from twicing.experiments.statistics import number, signed


def print_summary(run_folder: Path, console: Console) -> None:
    """Print the summary of a finished run folder; it reads well at 80 columns and says nothing by colour alone."""
    run = read_run(run_folder)
    rows = primary_rows(run)
    console.print()
    console.print(escape(run.title), style="bold")
    console.print(escape(run.limits))
    for measure in run.primaries:
        # A perplexity means nothing without its unit and its way.
        unit = f" ({measure.metric.partition(' perplexity ')[2]})" if is_perplexity(measure.metric) else ""
        title = escape(f"{measure.title}{unit}")
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for heading in ("arm", "mean", "sd", "difference", "95 % interval"):
            table.add_column(heading, justify="left" if heading == "arm" else "right", overflow="fold")
        for row in rows:
            if row.measure != measure or row.mean is None:
                continue
            name = f"{row.arm.label} (control)" if row.arm.control else row.arm.label
            table.add_row(escape(name), measure.text(row.mean), number(row.sd), *_difference(row))
        console.print()
        console.print(table)
    console.print()
    for sentence in [*in_short(run, rows), *remarks(run.records, run.notes)]:
        console.print(f"- {escape(sentence)}", highlight=False)
    console.print()
    # soft_wrap: a path that is broken over lines can neither be clicked nor copied.
    console.print(f"Report: {escape(str(run_folder / 'report.html'))}", soft_wrap=True, highlight=False)


def _difference(row: Row) -> tuple[str, str]:
    if row.arm.label == BASELINE or row.difference is None:
        return "", ""
    ends = row.difference
    return signed(ends.mean), "none" if ends.low is None else escape(f"[{signed(ends.low)}, {signed(ends.high)}]")
