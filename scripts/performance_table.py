"""Put the tables of the committed records into docs/performance.md, between its two marks.

Run it after a record in benchmarks/results changed: python scripts/performance_table.py
"""

from pathlib import Path

from twicing.experiments.bench.linear_growth import LINEAR, growth_tables
from twicing.experiments.bench.rows import MEASURED, OpsRow, read_rows
from twicing.experiments.bench.tables import overview, tables

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RECORDS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- records: begin -->", "<!-- records: end -->"
NO_RECORD = "No record is committed yet."


def sections(folder: Path) -> str:
    """A section for each record in the folder: its machine, its tables, and what was left out."""
    found = [_section(path) for path in sorted(folder.glob("*.csv"))]
    return "\n\n".join(found) or NO_RECORD


def with_sections(page: str, text: str) -> str:
    """The page with the text between its marks."""
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"{PAGE} must hold the marks {BEGIN} and {END}: the tables go between them.")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _section(path: Path) -> str:
    rows, machine = read_rows(path)
    calls = [row for row in rows if isinstance(row, OpsRow)]
    shown = [overview(calls, "ratio"), overview(calls, "peak_memory_mb")] if calls else tables(rows)
    if any(row.contender == LINEAR for row in calls):
        shown = growth_tables(calls) + shown
    missing = dict.fromkeys(f"{row.contender}: {row.status}" for row in calls if row.status != MEASURED)
    parts = [
        f"### {path.name}",
        f"{machine.device}, {machine.cores} cores, {machine.threads} threads, allocator {machine.allocator}, "
        f"threading {machine.threading}; {machine.system}; {machine.versions}; commit {machine.commit}; "
        f"{machine.measured}.",
        *(table.markdown() for table in shown),
    ]
    if missing:
        parts.append("\n".join(f"* {line}" for line in missing))
    return "\n\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(with_sections(PAGE.read_text(encoding="utf-8"), sections(RECORDS)), encoding="utf-8")
