"""Rows as tables that people read: the same cells in the terminal, in Markdown, and in docs/performance.md."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from twicing.experiments.bench.rows import MEASURED, DecodeRow, ModelRow, OpsRow, Row, Timed


@dataclass(frozen=True)
class Table:
    """A title, the headers of the columns, and the cells; the first `words` columns are text, the others numbers."""

    title: str
    headers: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    words: int = 1

    def markdown(self) -> str:
        """The table in Markdown, numbers to the right; notes are a list below it."""
        rule = ["---" if place < self.words else "---:" for place in range(len(self.headers))]
        lines = [f"| {' | '.join(line)} |" for line in (self.headers, rule, *self.lines)]
        notes = ["", *(f"* {note}" for note in self.notes)] if self.notes else []
        return "\n".join([f"**{self.title}**", "", *lines, *notes])


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table for each shape and pass, for each kind of cached decoding, or for each job of a model."""
    return [_table(group) for group in _grouped(rows)]


def overview(rows: Sequence[OpsRow], field: str) -> Table:
    """One line for each shape and pass, one column for each contender: its `ratio` or its `peak_memory_mb`."""
    names = list(dict.fromkeys(row.contender for row in rows))
    lines = []
    for group in _grouped(rows):
        by_name = {row.contender: row for row in group if isinstance(row, OpsRow)}
        first = next(iter(by_name.values()))
        values = (getattr(by_name[name], field) if name in by_name else None for name in names)
        cells = (_number(value, 0 if field == "peak_memory_mb" else 2) for value in values)
        lines.append((first.shape, first.passes, _ratio(first.floor), *cells))
    title = "Peak memory beyond the inputs, MB" if field == "peak_memory_mb" else "Ratio to the fastest SDPA call"
    return Table(f"{title}, {rows[0].dtype}", ("shape", "pass", "floor", *names), tuple(lines), words=2)


def _grouped(rows: Sequence[Row]) -> Iterable[list[Row]]:
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_group(row), []).append(row)
    return groups.values()


def _group(row: Row) -> tuple[object, ...]:
    if isinstance(row, OpsRow):
        return row.shape, row.passes, row.dtype
    if isinstance(row, DecodeRow):
        return row.batch, row.heads, row.key_heads, row.width, row.dtype
    return row.model, row.dtype, row.job, row.batch


def _table(rows: list[Row]) -> Table:
    first = rows[0]
    notes = tuple(f"{_name(row)}: {row.status.rstrip('.')}." for row in rows if row.status != MEASURED)
    measured = [row for row in rows if row.status == MEASURED]
    headers: tuple[str, ...]
    if isinstance(first, OpsRow):
        floor = f", floor {first.floor:.2f}" if first.floor is not None else ""
        title = f"{first.shape}, {first.passes}, {first.dtype}{floor}"
        headers = ("contender", "ms", "quartiles", "ratio to SDPA", "of the floor", "peak MB")
        return Table(title, headers, tuple(_ops_line(row) for row in measured if isinstance(row, OpsRow)), notes)
    if isinstance(first, DecodeRow):
        kind = "multi-head" if first.heads == first.key_heads else f"{first.heads // first.key_heads} heads share a key"
        title = f"cached decoding, {first.batch}x{first.heads} heads of {first.width}, {kind}, {first.dtype}"
        headers = ("tokens", "contender", "ms per token", "quartiles", "ratio to order 1", "of bytes", "ratio / that")
        lines = tuple(_decode_line(row) for row in measured if isinstance(row, DecodeRow))
        return Table(title, headers, lines, notes, words=2)
    title = f"{first.model}, {first.dtype}, {first.job}, batch {first.batch}"
    headers = ("layers twiced", "backend", _unit(first), "quartiles", "mean", "ratio", "G multiply-adds", "M params")
    lines = tuple(_model_line(row) for row in measured if isinstance(row, ModelRow))
    return Table(title, headers, lines, notes, words=2)


def _ops_line(row: OpsRow) -> tuple[str, ...]:
    # Order 1 has no second product, so that the floor says nothing of it.
    share = "" if row.share_of_floor is None else f"{row.share_of_floor:.0%}"
    return row.contender, _ms(row.median_ms), _quartiles(row), _ratio(row.ratio), share, _number(row.peak_memory_mb, 0)


def _decode_line(row: DecodeRow) -> tuple[str, ...]:
    ratios = (_ratio(row.ratio), _ratio(row.byte_ratio), _ratio(row.ratio_over_bytes))
    return f"{row.tokens:,}", row.contender, _ms(row.median_ms), _quartiles(row), *ratios


def _model_line(row: ModelRow) -> tuple[str, ...]:
    cost = f"{row.multiply_adds / 1e9:.3f}", f"{row.parameters / 1e6:.2f}"
    return row.layers, row.backend, _ms(row.median_ms), _quartiles(row), _ms(row.mean_ms), _ratio(row.ratio), *cost


def _unit(row: ModelRow) -> str:
    return "ms per step" if "step" in row.job else "ms per image"


def _name(row: Row) -> str:
    if isinstance(row, ModelRow):
        return f"layers {row.layers}"
    return f"{row.contender} at {row.tokens:,} tokens" if isinstance(row, DecodeRow) else row.contender


def _quartiles(row: Timed) -> str:
    return f"{_ms(row.lower_ms)} to {_ms(row.upper_ms)}"


def _ms(value: float | None) -> str:
    # Three digits: the last one is noise already.
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return _number(value, 2)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
