"""The record that every number travels with, and the files of a run folder: results.jsonl and predictions.npz.

One number is one `Record` is one line of JSON. A report is made from these files alone.
"""

import dataclasses
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

BASELINE = "standard"

Conditions = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """One number and all that is needed to say where it came from.

    metric: its name with the unit, such as "accuracy [share of images]".
    n: how many images (or tokens) the value is over.
    seconds: how long the whole part took that the number belongs to, such as its training or its evaluation; where
    that was interrupted and resumed, its last stretch alone.
    conditions: what the metric alone does not say, such as {"threat": "pgd", "eps": "1/16"}.
    published: the paper's value, {"value", "protocol", "source", "status"}, or None.
    Raises ValueError where value or seconds is not finite: a diverged run must say so, not enter a mean.
    """

    metric: str
    value: float
    n: int
    seed: int
    arm: str
    recipe: str
    mechanism: str
    layers: str
    spec: list[Any]
    conditions: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    device: str
    seconds: float
    published: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("value", "seconds"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError(
                    f"a record's {name} is to be a finite number: got {number!r} for {self.metric!r} "
                    f"(arm {self.arm!r}, seed {self.seed}). If the run diverged, record how many runs did instead."
                )
        for name in ("n", "seed"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int):
                raise ValueError(f"a record's {name} is to be a whole number: got {number!r} for {self.metric!r}.")


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: into a temporary file beside it, then in its place."""
    # The temporary file is in the same folder: os.replace is atomic only inside one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, indented for people; the file is replaced whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(path, lambda file: file.write(f"{text}\n".encode()))


def read_json(path: Path, *, remedy: str = "delete it and run the same command again") -> Any:
    """Read one JSON value, such as `write_json` wrote. remedy: what to do where the file is broken.

    Raises ValueError, naming the file and the remedy, where it is no JSON; FileNotFoundError where it is not there.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got a broken file ({error}): {remedy}.") from error


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines; the file is replaced whole or not at all."""
    lines = [json.dumps(dataclasses.asdict(record), ensure_ascii=False, allow_nan=False) for record in records]
    text = "".join(f"{line}\n" for line in lines)
    replace_file(path, lambda file: file.write(text.encode()))


def read_records(path: Path) -> list[Record]:
    """Read the records of a JSON-lines file.

    Raises ValueError, naming file and line, for a broken line and for unknown or missing keys.
    """
    return [_record(entry, where) for where, entry in read_rows(path)]


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each behind where it stands, as in "results.jsonl, line 3".

    Raises ValueError, naming file and line, where a line is not one.
    """
    # Not splitlines(): it also splits at line separators that JSON allows inside a string.
    lines = path.read_text(encoding="utf-8").split("\n")
    places = [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [(where, _object(line, where)) for where, line in places]


def select(
    records: Iterable[Record],
    *,
    metric: str | None = None,
    arm: str | None = None,
    seed: int | None = None,
    conditions: Conditions | None = None,
) -> list[Record]:
    """Records that match all that is given; `conditions` asks for these entries and allows others beside them."""
    wanted = dict(conditions or {})
    return [
        record
        for record in records
        if (metric is None or record.metric == metric)
        and (arm is None or record.arm == arm)
        and (seed is None or record.seed == seed)
        and all(key in record.conditions and record.conditions[key] == value for key, value in wanted.items())
    ]


def value_by_seed(records: Iterable[Record], metric: str, arm: str, conditions: Conditions) -> dict[int, float]:
    """The one value that each seed has for a metric, an arm and conditions, in the order of the seeds.

    Raises ValueError where a seed has more than one: the conditions are then not complete.
    """
    values: dict[int, float] = {}
    for record in select(records, metric=metric, arm=arm, conditions=conditions):
        if record.seed in values:
            raise ValueError(
                f"expected one value of {metric!r} for arm {arm!r} and seed {record.seed}, got several: "
                f"the conditions {dict(conditions)} do not tell them apart. Name every condition that differs."
            )
        values[record.seed] = record.value
    return dict(sorted(values.items()))


@dataclass(frozen=True)
class Correctness:
    """Which images one trained model got right, under each threat.

    index: [n], positions of the held-out images in the whole data set. correct: threat key -> booleans, [n], or [m]
    where only the probes were disturbed. probes: [m], which of the n they are; None where all of them were.
    """

    arm: str
    seed: int
    index: NDArray[np.int64]
    correct: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    probes: NDArray[np.int64] | None = None

    def positions(self, threat: str) -> NDArray[np.int64]:
        """Positions in the whole data set of the images behind correct[threat].

        With as many probes as images, both orders are the same: probes are kept in ascending order.
        """
        answers = self.correct[threat]
        if len(answers) == len(self.index) or self.probes is None:
            return self.index
        return self.index[self.probes]


def threat_key(conditions: Conditions) -> str:
    """Name of a threat in predictions.npz: {"threat": "pgd", "eps": "1/16"} -> "pgd eps=1/16"."""
    parts = [f"{key}={value}" for key, value in sorted(conditions.items()) if key != "threat"]
    return " ".join([str(conditions["threat"]), *parts])


def write_predictions(path: Path, predictions: Iterable[Correctness]) -> None:
    """Write predictions.npz: "<arm>|seed<k>|index", "...|probes" where there are any, and "...|<threat key>"."""
    arrays: dict[str, NDArray[Any]] = {}
    for one in predictions:
        named = {"index": np.asarray(one.index, dtype=np.int64)}
        lengths = {len(one.index)}
        if one.probes is not None:
            named["probes"] = np.asarray(one.probes, dtype=np.int64)
            lengths.add(len(one.probes))
        named |= {key: np.asarray(values, dtype=np.bool_) for key, values in one.correct.items()}
        for name, values in named.items():
            if "|" in one.arm or "|" in name:
                raise ValueError(
                    f"arm and threat must not contain '|', which separates them in {path.name}: "
                    f"got {one.arm!r}, {name!r}. Rename the arm."
                )
            if values.ndim != 1 or len(values) not in lengths:
                wanted = " or ".join(str((length,)) for length in sorted(lengths))
                raise ValueError(
                    f"expected one answer per image, {wanted}, got {values.shape} "
                    f"for {one.arm!r}, seed {one.seed}, {name!r}."
                )
            arrays[f"{one.arm}|seed{one.seed}|{name}"] = values
    # A mapping of names is numpy's interface here; no name can collide with its own argument `file`, which has no '|'.
    replace_file(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def read_predictions(path: Path) -> dict[tuple[str, int], Correctness]:
    """Read predictions.npz: (arm, seed) -> Correctness."""
    found: dict[tuple[str, int], dict[str, NDArray[Any]]] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            parts = key.split("|")
            if len(parts) != 3 or not parts[1].removeprefix("seed").lstrip("-").isdigit():
                raise ValueError(f"{path}: expected keys '<arm>|seed<k>|<threat>', got {key!r}. Is it another file?")
            found.setdefault((parts[0], int(parts[1].removeprefix("seed"))), {})[parts[2]] = arrays[key]
    for (arm, seed), named in found.items():
        if "index" not in named:
            raise ValueError(
                f"{path}: {arm!r}, seed {seed} has no 'index'; its images cannot be paired. Write it anew."
            )
    return {
        (arm, seed): Correctness(arm, seed, named.pop("index"), probes=named.pop("probes", None), correct=named)
        for (arm, seed), named in found.items()
    }


@dataclass(frozen=True)
class Environment:
    """Where numbers were made. commit: of this library's source, "+changes" when it was edited, None outside git."""

    versions: dict[str, str]
    commit: str | None
    device: str
    threads: int


PACKAGES = ("twicing", "torch", "torchvision", "timm", "transformers", "lightning", "numpy", "scipy", "scikit-learn")


def environment(device: torch.device | str = "cpu") -> Environment:
    """Versions of what is installed, the commit of this library, and the device's name; imports nothing heavy."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Environment(versions, _commit(Path(__file__).parents[1]), _device_name(device), torch.get_num_threads())


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        # json accepts NaN and Infinity; Record refuses them with a clearer sentence than a parser's.
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected one JSON object, got a broken line ({error.msg}). Remove it.") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected one JSON object, got {type(entry).__name__}. Is it a results.jsonl?")
    return entry


def _record(entry: dict[str, Any], where: str) -> Record:
    fields = dataclasses.fields(Record)
    unknown = sorted(set(entry) - {f.name for f in fields})
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in entry]
    if unknown or missing:
        raise ValueError(
            f"{where}: a record's keys do not fit (unknown: {', '.join(unknown) or 'none'}; "
            f"missing: {', '.join(missing) or 'none'}). It was written by another version of twicing."
        )
    try:
        return Record(**entry)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _commit(folder: Path) -> str | None:
    # An installed copy may lie inside someone else's repository; only a tracked file has that commit.
    tracked = _git(folder, ["ls-files", "--error-unmatch", "version.py"])
    commit = _git(folder, ["rev-parse", "HEAD"])
    if not tracked or not commit:
        return None
    return commit + ("+changes" if _git(folder, ["status", "--porcelain", "--", "."]) else "")


def _git(folder: Path, arguments: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _device_name(device: torch.device | str) -> str:
    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.get_device_name(kind)
    if kind.type != "cpu":
        return kind.type
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {models[0] if models else platform.processor() or platform.machine()}"
