"""What the papers report, read from published.toml, and which of it stands beside a number of ours.

A published number stands beside ours only where recipe, mechanism, layers, metric and conditions are the same; where
the recipe's settings were changed it does not, and the report says which.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from twicing.experiments.results import Conditions

STATUSES = ("reproduced", "not reproduced", "impossible")


@dataclass(frozen=True)
class Published:
    """One printed number. value: as printed, in unit; scale x value is in the unit of metric, where we measure it.

    layers: as "10-12"; "all" where they are all of the model's. metric, recipe: None where this library has none like
    it. settings: what a run of the recipe must have to be of the same protocol.
    """

    table: str
    model: str
    mechanism: str
    layers: str
    says: str
    value: float
    unit: str
    printed: str
    note: str
    protocol: str
    source: str
    status: str
    metric: str | None = None
    conditions: Conditions = field(default_factory=dict)
    scale: float = 1.0
    recipe: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    depth: int = 0

    @property
    def ours(self) -> float:
        """The value in the unit of our metric."""
        return self.value * self.scale

    @property
    def words(self) -> str:
        """The number as it was printed, with its unit and any doubt about it."""
        return f"{self.printed} {self.unit}{f' ({self.note})' if self.note else ''}"


def read_published(path: Path | None = None) -> tuple[Published, ...]:
    """Every number of a file of published values; the one that comes with the package where path is None.

    Raises ValueError, naming file and table, where the file is not of the form that its head describes.
    """
    return _packaged() if path is None else _parse(path.read_text(encoding="utf-8"), str(path))


def published_of(
    recipe: str, mechanism: str, layers: str, *, among: Sequence[Published] | None = None
) -> list[Published]:
    """The numbers of this mechanism under this recipe that this library measures too; none for recipes of our own."""
    found = read_published() if among is None else among
    return [
        one
        for one in found
        if (one.recipe, one.mechanism, one.layers) == (recipe, mechanism, _all_or(layers, one.depth)) and one.metric
    ]


def published_for(
    recipe: str,
    mechanism: str,
    layers: str,
    metric: str,
    conditions: Conditions,
    *,
    among: Sequence[Published] | None = None,
) -> list[Published]:
    """The published numbers of this very quantity, in the order of the file."""
    found = published_of(recipe, mechanism, layers, among=among)
    return [one for one in found if one.metric == metric and dict(one.conditions) == dict(conditions)]


def protocol_differences(one: Published, recipe: Mapping[str, Any]) -> list[str]:
    """In what the settings of a run differ from the protocol of a published number, in words."""
    return _differences(one.settings, recipe)


def _differences(wanted: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> list[str]:
    differences = []
    for name, value in wanted.items():
        here = found.get(name, "not recorded")
        if isinstance(value, Mapping) and isinstance(here, Mapping):
            differences += _differences(value, here, f"{prefix}{name}.")
        elif here != value:
            differences.append(f"{prefix}{name} is {value} there and {here} here")
    return differences


@cache
def _packaged() -> tuple[Published, ...]:
    file = resources.files("twicing.experiments") / "published.toml"
    return _parse(file.read_text(encoding="utf-8"), "published.toml")


def _parse(text: str, file: str) -> tuple[Published, ...]:
    try:
        tables = tomllib.loads(text).get("table", [])
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file}: expected TOML, got a broken file ({error}).") from error
    found: list[Published] = []
    for place, table in enumerate(tables, start=1):
        where = f"{file}, table {table.get('name', place)!r}"
        _keys(table, ("name", "source", "protocol", "status", "columns", "rows"), _OF_TABLE, where)
        for name, column in table["columns"].items():
            _keys(column, ("says", "unit"), _OF_COLUMN, f"{where}, column {name!r}")
        for row in table["rows"]:
            found += _row(table, row, f"{where}, row {row.get('model')!r}")
    if not found:
        raise ValueError(f"{file}: expected tables of published values, got none.")
    return tuple(found)


def _row(table: Mapping[str, Any], row: Mapping[str, Any], where: str) -> list[Published]:
    _keys(row, ("model", "mechanism", "layers", "values"), (), where)
    depth = int(table.get("depth", 0))
    found = []
    for name, given in row["values"].items():
        if name not in table["columns"]:
            known = ", ".join(table["columns"])
            raise ValueError(f"{where}: the value {name!r} belongs to no column: expected one of {known}.")
        column = table["columns"][name]
        entry = given if isinstance(given, Mapping) else {"value": given}
        _keys(entry, ("value",), ("printed", "note"), f"{where}, value {name!r}")
        value = entry["value"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise ValueError(f"{where}, value {name!r}: expected a number from 0 to a million, got {value!r}.")
        found.append(
            Published(
                table=table["name"],
                model=row["model"],
                mechanism=row["mechanism"],
                layers=_all_or(row["layers"], depth),
                says=column["says"],
                value=float(value),
                unit=column["unit"],
                printed=entry.get("printed", f"{value:.2f}" if column["unit"] == "%" else str(value)),
                note=entry.get("note", ""),
                protocol=column.get("protocol", table["protocol"]),
                source=table["source"],
                status=_status(column.get("status", table["status"]), where),
                metric=column.get("metric"),
                conditions=column.get("conditions", {}),
                scale=float(column.get("scale", 1.0)),
                recipe=table.get("recipe"),
                settings=table.get("settings", {}),
                depth=depth,
            )
        )
    return found


_OF_TABLE = ("recipe", "depth", "settings")
_OF_COLUMN = ("metric", "conditions", "scale", "protocol", "status")


def _keys(entry: Mapping[str, Any], needed: Sequence[str], allowed: Sequence[str], where: str) -> None:
    missing = [key for key in needed if key not in entry]
    unknown = [key for key in entry if key not in (*needed, *allowed)]
    if missing or unknown:
        raise ValueError(
            f"{where}: its keys do not fit (missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(unknown) or 'none'})."
        )


def _status(status: str, where: str) -> str:
    kind, _, why = status.partition(": ")
    if kind not in STATUSES or (kind != "reproduced" and not why):
        raise ValueError(
            f"{where}: expected a status, 'reproduced', 'not reproduced: why' or 'impossible: why', got {status!r}."
        )
    return status


def _all_or(layers: str, depth: int) -> str:
    return "all" if layers == f"1-{depth}" else layers
