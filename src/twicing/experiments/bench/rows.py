"""The lines of a benchmark's record, and the CSV that they become: one line per measurement, complete in itself."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twicing.experiments.bench.cases import Case
from twicing.experiments.bench.contenders import Contender
from twicing.experiments.bench.machine import Machine
from twicing.experiments.bench.timing import Spread
from twicing.experiments.results import replace_file

MEASURED = "measured"


@dataclass(frozen=True)
class Timed:
    """What was measured of one contender, in milliseconds; nothing where status says why there is none.

    status: "measured", or "skipped: ...", "wrong: ...", "failed: ...". samples: how many calls were timed.
    """

    status: str
    median_ms: float | None = None
    lower_ms: float | None = None
    upper_ms: float | None = None
    mean_ms: float | None = None
    samples: int = 0


def timed(spread: Spread, *, per: int = 1) -> Timed:
    """The row's part for a spread, divided by the number of tokens or images of one call."""
    parts = (spread.median, spread.lower, spread.upper, spread.mean)
    median, lower, upper, mean = (part / per for part in parts)
    return Timed(MEASURED, median, lower, upper, mean, spread.samples)


@dataclass(frozen=True)
class OpsRow(Timed):
    """One contender in one pass of one shape.

    ratio: of medians, to the fastest SDPA call. floor: the least that ratio could be for twicing. share_of_floor:
    floor / ratio. peak_memory_mb: beyond the inputs, in 10^6 bytes.
    """

    shape: str = ""
    tokens: int = 0
    is_causal: bool = False
    passes: str = ""
    dtype: str = ""
    contender: str = ""
    order: int = 2
    ratio: float | None = None
    floor: float | None = None
    share_of_floor: float | None = None
    peak_memory_mb: float | None = None


def ops_row(
    case: Case, passes: str, contender: Contender, time: Timed, *, sdpa: float | None, peak: int | None
) -> OpsRow:
    """The row of one contender, without its floor. sdpa: the median to hold it against; peak: its memory, in bytes."""
    return OpsRow(
        **vars(time),
        shape=str(case),
        tokens=case.tokens,
        is_causal=case.is_causal,
        passes=passes,
        dtype=str(case.dtype).removeprefix("torch."),
        contender=contender.name,
        order=contender.order,
        ratio=None if sdpa is None or time.median_ms is None else time.median_ms / sdpa,
        peak_memory_mb=None if peak is None else peak / 1e6,
    )


@dataclass(frozen=True)
class DecodeRow(Timed):
    """One contender with so many tokens in the cache; times are per new token of all sequences of the batch.

    ratio: of medians, to plain attention with a cache. byte_ratio: of the bytes that a step reads, to plain attention.
    """

    tokens: int = 0
    batch: int = 0
    heads: int = 0
    key_heads: int = 0
    width: int = 0
    dtype: str = ""
    contender: str = ""
    order: int = 2
    ratio: float | None = None
    byte_ratio: float | None = None
    ratio_over_bytes: float | None = None


@dataclass(frozen=True)
class ModelRow(Timed):
    """One model in one job; times are per image, or per training step.

    ratio: of medians, to the standard model. multiply_adds: of one image's forward, counted analytically.
    """

    model: str = ""
    dtype: str = ""
    layers: str = ""
    backend: str = ""
    job: str = ""
    batch: int = 0
    ratio: float | None = None
    multiply_adds: int = 0
    parameters: int = 0


Row = OpsRow | DecodeRow | ModelRow


def write_rows(path: Path, rows: Sequence[Row], machine: Machine) -> None:
    """Write the record: a header, then every row with its machine; the file is replaced whole or not at all."""
    fields = [field.name for kind in (type(rows[0]), Machine) for field in dataclasses.fields(kind)]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        entry = {**dataclasses.asdict(row), **dataclasses.asdict(machine)}
        writer.writerow({name: _cell(value) for name, value in entry.items()})
    replace_file(path, lambda file: file.write(text.getvalue().encode()))


def read_rows(path: Path) -> tuple[list[Row], Machine]:
    """The rows of a record and their machine; which benchmark it was is seen from its columns.

    Raises ValueError where the file is no such record.
    """
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    columns = set(lines[0]) if lines else set()
    machine_fields = dataclasses.fields(Machine)
    for kind in (OpsRow, DecodeRow, ModelRow):
        fields = dataclasses.fields(kind)
        if columns == {field.name for field in (*fields, *machine_fields)}:
            return [kind(**_values(fields, line)) for line in lines], Machine(**_values(machine_fields, lines[0]))
    raise ValueError(f"{path} is no record of twicing bench, or one of another version: measure it again.")


def _cell(value: object) -> object:
    # Six digits are far more than a time has.
    return f"{value:.6g}" if isinstance(value, float) else value


def _values(fields: tuple[dataclasses.Field[Any], ...], line: dict[str, str]) -> dict[str, Any]:
    return {field.name: _value(line[field.name], str(field.type)) for field in fields}


def _value(text: str, kind: str) -> object:
    if "float" in kind:
        return float(text) if text else None
    if "bool" in kind:
        return text == "True"
    return int(text) if "int" in kind else text
