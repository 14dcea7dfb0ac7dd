"""The files of an analysis: analysis.json with every number, the same as CSV tables, and arrays.npz for the figures."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from twicing.experiments.analyze.measure import Arrays
from twicing.experiments.cases.inputs import IMAGES
from twicing.experiments.results import read_json, replace_file, write_json

# Below a run folder: what `twicing analyze` found of its models.
ANALYSIS = "analysis"
NUMBERS, ARRAYS = "analysis.json", "arrays.npz"
TABLES = ("spectrum", "products", "bandwidth", "logit_parts")

# What the bandwidth test measures, as its rows name it.
ACCURACY, AGREEMENT, LOG_PROBABILITY = "accuracy", "agreement", "log-probability"

Rows = list[dict[str, Any]]


@dataclass
class Analysis:
    """What an analysis found.

    about: what it was made of and with. models: what each model is, by name, in the order of the page.
    spectrum, products, bandwidth, logit_parts: rows of numbers, each with its model's name, label and seed.
    left_out: sentences on what is not there. arrays: of the models that are drawn, by name and kind.
    """

    about: dict[str, Any] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    spectrum: Rows = field(default_factory=list)
    products: Rows = field(default_factory=list)
    bandwidth: Rows = field(default_factory=list)
    logit_parts: Rows = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    arrays: dict[str, Arrays] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What the models were shown, "images" or "windows". All that was looked at before text was images."""
        return str(self.about.get("unit", IMAGES))

    @property
    def causal(self) -> bool:
        """Whether every model's attention is: only language models can be."""
        return bool(self.about.get("causal", False))


def write_analysis(folder: Path, analysis: Analysis) -> None:
    """Write the files of an analysis into a folder, over those of an earlier one."""
    tables: dict[str, Rows] = {name: getattr(analysis, name) for name in TABLES} | _spectra_rows(analysis)
    for name, rows in tables.items():
        path = folder / f"{name}.csv"
        if rows:
            replace_file(path, _writer(_as_csv(rows)))
        else:
            path.unlink(missing_ok=True)
    places = {name: str(place) for place, name in enumerate(analysis.models)}
    arrays = {
        f"{places[model]}/{name}": values for model, named in analysis.arrays.items() for name, values in named.items()
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    replace_file(folder / ARRAYS, _writer(buffer.getvalue()))
    kept = ("about", "models", "left_out", *TABLES)
    # Last: a folder that has it is whole.
    write_json(folder / NUMBERS, {name: getattr(analysis, name) for name in kept})


def read_analysis(folder: Path) -> Analysis | None:
    """What write_analysis() wrote; None where there is no analysis in the folder.

    Raises ValueError where one of its files is broken or missing.
    """
    if not (folder / NUMBERS).exists():
        return None
    found = read_json(folder / NUMBERS)
    arrays: dict[str, Arrays] = {}
    try:
        names = list(found["models"])
        with np.load(folder / ARRAYS) as file:
            for key in file.files:
                place, _, kind = key.partition("/")
                arrays.setdefault(names[int(place)], {})[kind] = file[key]
        return Analysis(**found, arrays=arrays)
    # A broken archive shows itself in as many ways as there are broken bytes.
    except Exception as error:
        raise ValueError(f"{folder} holds a broken analysis ({error!r}): run the same command again.") from error


def _spectra_rows(analysis: Analysis) -> dict[str, Rows]:
    """The spectra themselves, of the first input and the models that are drawn."""
    eigenvalues: Rows = []
    singular: Rows = []
    for model, arrays in analysis.arrays.items():
        for layer in range(1, analysis.models[model].get("layers", 0) + 1):
            of_a, of_p = arrays.get(f"eigenvalues/{layer}"), arrays.get(f"eigenvalues_p/{layer}")
            if of_a is None:
                continue
            singular_of_a, singular_p = arrays[f"singular/{layer}"], arrays.get(f"singular_p/{layer}")
            for head, place in np.ndindex(of_a.shape):
                where = {"model": model, "layer": layer, "head": head + 1, "place": place + 1}
                eigenvalues.append(
                    where
                    | _complex("A", of_a[head, place])
                    | _complex("p(A)", None if of_p is None else of_p[head, place])
                )
                there = None if singular_p is None else float(singular_p[head, place])
                singular.append(where | {"A": float(singular_of_a[head, place]), "p(A)": there})
    return {"eigenvalues": eigenvalues, "singular_values": singular}


def _complex(name: str, value: Any) -> dict[str, float | None]:
    real, imaginary = (None, None) if value is None else (float(value.real), float(value.imag))
    return {f"{name}_real": real, f"{name}_imaginary": imaginary}


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _writer(data: bytes) -> Any:
    return lambda file: file.write(data)
