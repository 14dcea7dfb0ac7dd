"""Tables of the benchmarks on a terminal of 80 columns, drawn from the committed records."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from twicing.experiments.bench.linear_growth import growth_tables
from twicing.experiments.bench.rich_screen import RichScreen
from twicing.experiments.bench.rows import read_rows
from twicing.experiments.bench.tables import Table, tables

RECORDS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.csv"))


def shown(table):
    console = Console(width=80, file=io.StringIO())
    RichScreen(console).show(table)
    return console.file.getvalue()


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_80_columns_hold_every_number_in_one_piece(record):
    rows, _ = read_rows(record)
    growth = growth_tables(rows) if record.stem.startswith("linear") else []
    for table in [*tables(rows), *growth]:
        printed = shown(table)
        assert "…" not in printed
        for line in table.lines:
            assert all(cell in printed for cell in line[table.words :])


def test_80_columns_hold_every_name_of_the_growth_tables_in_one_piece():
    (record,) = (path for path in RECORDS if path.stem.startswith("linear"))
    for table in growth_tables(read_rows(record)[0]):
        printed = shown(table)
        assert all(cell in printed for line in table.lines for cell in line)


def test_a_column_that_holds_nothing_is_left_out():
    printed = shown(Table("times", ("contender", "ms", "floor"), (("plain", "1.5", ""), ("twiced", "", ""))))
    assert "1.5" in printed
    assert "ms" in printed
    assert "floor" not in printed


def test_a_table_without_lines_still_has_its_title_and_notes():
    printed = shown(Table("times", ("contender", "ms"), (), notes=("plain: failed.",)))
    assert "times" in printed
    assert "plain: failed." in printed
