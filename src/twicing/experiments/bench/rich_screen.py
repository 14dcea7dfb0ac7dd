"""A benchmark on a terminal: a progress bar with the time left, and tables by rich."""

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
        """Show a table, its notes below it."""
        shown = rich.table.Table(title=table.title, box=box.SIMPLE, title_justify="left", caption_justify="left")
        for place, header in enumerate(table.headers):
            shown.add_column(header, justify="left" if place < table.words else "right")
        for line in table.lines:
            shown.add_row(*line)
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
