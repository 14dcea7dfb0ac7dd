"""A benchmark on a terminal: a progress bar with the time left, and tables by rich."""

import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.table
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from twicing.experiments.bench.tables import Table


class RichScreen:
    """A Screen on a console of rich."""

    def __init__(self, console: Console):
        self._console = console

    def say(self, text: str) -> None:
        """Show one line."""
        self._console.print(text, markup=False, highlight=False)

    def show(self, table: Table) -> None:
        """Show a table, its notes below it: without columns that hold nothing, and with every number in one piece."""
        shown = rich.table.Table(
            title=table.title, box=box.SIMPLE, title_justify="left", pad_edge=False, collapse_padding=True
        )
        filled = [place for place, cells in enumerate(zip(*table.lines, strict=True)) if any(cells)]
        # rich shows no title where there is no column.
        columns = filled or range(len(table.headers))
        for place in columns:
            if place < table.words:
                shown.add_column(table.headers[place], overflow="fold")
            else:
                width = max((len(line[place]) for line in table.lines), default=0)
                shown.add_column(_broken(table.headers[place], width), justify="right", no_wrap=True)
        for line in table.lines:
            shown.add_row(*(line[place] for place in columns))
        self._console.print(shown, markup=False)
        for note in table.notes:
            self.say(f"  {note}")

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """A bar on a terminal; nothing where nobody watches one."""
        columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        hidden = not self._console.is_terminal
        with Progress(*columns, *times, console=self._console, transient=True, disable=hidden) as bar:
            task = bar.add_task("", total=total)
            begun = 0

            def step(name: str) -> None:
                nonlocal begun
                bar.update(task, completed=begun, description=name)
                begun += 1

            yield step


def _broken(header: str, width: int) -> str:
    """The header in lines of the width of the column's numbers, or of its own longest part."""
    longest = max(map(len, re.findall(r"[^\s-]+-?", header)))
    return textwrap.fill(header, max(width, longest))
