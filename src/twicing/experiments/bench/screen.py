"""Where a benchmark says what it does. Plain lines here, for machines with nothing but torch; see rich_screen.py."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from twicing.experiments.bench.tables import Table


class Screen(Protocol):
    """What a benchmark asks of a screen."""

    def say(self, text: str) -> None:
        """Show one line."""

    def show(self, table: Table) -> None:
        """Show a table."""

    def progress(self, total: int) -> AbstractContextManager[Callable[[str], None]]:
        """A display of `total` steps; what it gives is told the name of each step as it begins."""


class PlainScreen:
    """Lines on standard output, tables in Markdown."""

    def say(self, text: str) -> None:
        """Show one line."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def show(self, table: Table) -> None:
        """Show a table in Markdown."""
        self.say(f"\n{table.markdown()}")

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """A line for each step."""
        begun = 0

        def step(name: str) -> None:
            nonlocal begun
            begun += 1
            self.say(f"[{begun}/{total}] {name}")

        yield step
