"""The folder of an evaluation: what it is of, its finished parts, and the results that are made of them.

A part is a file, written whole when it is finished; the same command goes on after the last one, and later commands
add parts. A part that is there with other settings is never mixed with others.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twicing.adapters.surgery import spec
from twicing.experiments.evaluate.bench import IMAGENET_C, Bench
from twicing.experiments.evaluate.options import Evaluate
from twicing.experiments.evaluate.subjects import Subject
from twicing.experiments.evaluate.tasks import HELD_OUT, Task, file_of
from twicing.experiments.metrics import ACCURACY, CORRUPTED
from twicing.experiments.parts import Part
from twicing.experiments.plan import first_difference
from twicing.experiments.results import (
    Correctness,
    Environment,
    Record,
    read_json,
    select,
    write_json,
    write_predictions,
    write_records,
)
from twicing.robustness.corruption_error import (
    ALEXNET_ERRORS,
    ALEXNET_EXTRA_ERRORS,
    corruption_error,
    extra_corruption_error,
    mean_corruption_error,
)
from twicing.robustness.corruptions import CORRUPTIONS, SEVERITIES

ABOUT, RESULTS, VERDICTS = "evaluation.json", "results.jsonl", "verdicts.json"
# Of the held-out images.
PREDICTIONS = "predictions.npz"
CORRUPTION_ERROR = "corruption error [share of AlexNet's error]"
MCE = "mCE, fifteen corruptions [share of AlexNet's error]"
EXTRA_ERROR = "mean corruption error, extra four [share of AlexNet's error]"


def open_evaluation(
    folder: Path, options: Evaluate, subjects: Sequence[Subject], environment: Environment, command: str
) -> None:
    """Make the folder with its evaluation.json, or see that what is there is of the same models.

    Raises ValueError where it is of others, saying in what they differ, or holds something else.
    """
    path = folder / ABOUT
    about: dict[str, Any] = {
        "recipe": subjects[0].protocol.recipe,
        "seed": options.seed,
        "transform": options.transform,
        "model_args": list(options.model_args),
        "std": list(subjects[0].protocol.std),
    }
    named = {subject.name: subject.as_json() for subject in subjects}
    commands: list[str] = []
    if path.exists():
        found = read_json(path)
        # More models may have been trained since; those that were there must be the same.
        before = {name: one for name, one in found["subjects"].items() if name in named}
        difference = first_difference(found, about) or first_difference(named, before)
        if difference:
            raise ValueError(
                f"{folder} holds another evaluation ({difference}): name another folder with --out, or remove it."
            )
        named = found["subjects"] | named
        commands = [one for one in found["commands"] if one != command]
    elif any(entry.name != ".lock" for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no evaluation: name another folder with --out.")
    where = {
        # A run folder may have been moved: what its models are is told by their weights.
        "model": options.model,
        "subjects": named,
        "commands": [*commands, command],
        "versions": environment.versions,
        "commit": environment.commit,
        "device": environment.device,
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(path, about | where)


def is_finished(task: Task, folder: Path) -> bool:
    """Whether the part is there. Raises ValueError where it is there with other settings."""
    path = file_of(task.subject, folder, task.name)
    if not path.exists():
        return False
    difference = first_difference(_read_part(path)["settings"], json.loads(json.dumps(task.settings)))
    if difference:
        raise ValueError(
            f"{path} was made with other settings ({difference}): name another folder with --out, or delete it."
        )
    return True


def refuse_other_images(folder: Path, images: int) -> None:
    """Raise ValueError where a part is there that was made on another number of chosen images than these."""
    for path in sorted(folder.glob("*/*.json")):
        part = _read_part(path)
        if part["probes"] is not None and part["settings"]["images"] != images:
            raise ValueError(
                f"{path} was made with --images {part['settings']['images']}: give the same here, or another --out."
            )


def write_part(task: Task, part: Part, bench: Bench, folder: Path, environment: Environment, seconds: float) -> None:
    """Keep a finished part."""
    subject = task.subject
    records = [
        Record(
            metric=finding.metric,
            value=finding.value,
            n=finding.n,
            seed=subject.seed,
            arm=subject.label,
            recipe=subject.protocol.recipe,
            mechanism=subject.mechanism,
            layers=subject.layers,
            spec=spec(bench.model),
            conditions=finding.conditions,
            versions=environment.versions,
            commit=environment.commit,
            device=environment.device,
            seconds=seconds,
        )
        for finding in part.findings
    ]
    held_out = task.images == HELD_OUT
    write_json(
        file_of(subject, folder, task.name),
        {
            "part": task.name,
            "settings": task.settings,
            "images": task.images,
            "index": _unless_counting(bench.held_out.index) if held_out else None,
            "of": len(bench.held_out.index) if held_out else None,
            # Of what is done to the chosen images alone; accuracy on all of them does not depend on the choice.
            "probes": bench.probes.tolist() if held_out and part.correct and "images" in task.settings else None,
            "records": [asdict(record) for record in records],
            # One digit an image: of ImageNet there are millions.
            "correct": {key: "".join(str(int(one)) for one in right) for key, right in part.correct.items()},
            "verdict": part.verdict,
            "notes": bench.notes,
        },
    )


def collect(folder: Path) -> list[Record]:
    """Write results.jsonl, predictions and verdicts from all finished parts, also those of earlier commands.

    predictions.npz is of the held-out images, predictions-NAME.npz of another test set.
    Returns the records: those of the parts, then what follows from them (corruption errors, means).
    """
    records: list[Record] = []
    answers: dict[str, list[Correctness]] = {}
    verdicts: dict[str, dict[str, Any]] = {}
    for name, subject in read_json(folder / ABOUT)["subjects"].items():
        own: list[Record] = []
        found: dict[str, list[dict[str, Any]]] = {}
        for path in sorted((folder / subject["folder_name"]).glob("*.json")):
            part = _read_part(path)
            own += [Record(**record) for record in part["records"]]
            found.setdefault(part["images"], []).append(part)
            if part["verdict"] is not None:
                verdicts.setdefault(subject["label"], {})[str(subject["seed"])] = part["verdict"]
        for images, parts in found.items():
            if any(part["correct"] for part in parts):
                answers.setdefault(images, []).append(_correctness(subject, parts, name))
        records += own + _following(own)
    write_records(folder / RESULTS, records)
    for images, correct in answers.items():
        write_predictions(
            folder / (PREDICTIONS if images == HELD_OUT else f"predictions-{images.lower()}.npz"), correct
        )
    if verdicts:
        write_json(folder / VERDICTS, verdicts)
    return records


def _read_part(path: Path) -> dict[str, Any]:
    part = read_json(path)
    keys = {"settings", "images", "index", "of", "probes", "records", "correct", "verdict"}
    if not isinstance(part, dict) or not keys <= part.keys():
        raise ValueError(f"{path} is no part of an evaluation: delete it and run the same command again.")
    return part


def _unless_counting(index: Tensor) -> list[int] | None:
    """The index as a list; None for 0, 1, 2, ..., which need not be written a million times."""
    return None if torch.equal(index, torch.arange(len(index))) else index.tolist()


def _correctness(subject: dict[str, Any], parts: Sequence[dict[str, Any]], name: str) -> Correctness:
    correct: dict[str, NDArray[np.bool_]] = {}
    for part in parts:
        correct |= {key: np.array([digit == "1" for digit in text]) for key, text in part["correct"].items()}
    first = parts[0]
    chosen = [part["probes"] for part in parts if part["probes"] is not None]
    if any(part[key] != first[key] for part in parts for key in ("index", "of")) or any(
        one != chosen[0] for one in chosen
    ):
        raise ValueError(
            f"the parts of {name} are on different images, as --images or the data have changed: use another --out."
        )
    n = first["of"] or len(next(iter(correct.values())))
    index = np.arange(n) if first["index"] is None else np.array(first["index"], dtype=np.int64)
    probes = np.array(chosen[0], dtype=np.int64) if chosen else None
    return Correctness(subject["label"], subject["seed"], index, correct, probes)


def _following(records: Sequence[Record]) -> list[Record]:
    """What follows from a model's records: corruption errors of ImageNet-C, the mean over the generated corruptions."""
    return _of_imagenet_c(records) + _of_generated(records)


def _of_imagenet_c(records: Sequence[Record]) -> list[Record]:
    errors: dict[str, dict[int, Record]] = {}
    for record in select(records, metric=ACCURACY, conditions={"threat": IMAGENET_C}):
        errors.setdefault(record.conditions["kind"], {})[record.conditions["severity"]] = record
    shares = {kind: [1 - one[severity].value for severity in sorted(one)] for kind, one in errors.items()}
    images = {kind: sum(record.n for record in one.values()) for kind, one in errors.items()}
    found = [
        replace(
            next(iter(one.values())),
            metric=CORRUPTION_ERROR,
            value=corruption_error(kind, shares[kind]),
            n=images[kind],
            conditions={"threat": IMAGENET_C, "kind": kind},
        )
        for kind, one in errors.items()
    ]
    for metric, kinds, mean in (
        (MCE, ALEXNET_ERRORS, mean_corruption_error),
        (EXTRA_ERROR, ALEXNET_EXTRA_ERRORS, extra_corruption_error),
    ):
        if kinds.keys() <= shares.keys():
            n = sum(images[kind] for kind in kinds)
            found.append(replace(found[0], metric=metric, value=mean(shares), n=n, conditions={"threat": IMAGENET_C}))
    return found


def _of_generated(records: Sequence[Record]) -> list[Record]:
    found = select(records, metric=ACCURACY, conditions={"threat": "corruption"})
    if len(found) < len(CORRUPTIONS) * len(SEVERITIES):
        return []
    mean = math.fsum(record.value for record in found) / len(found)
    return [replace(found[0], metric=CORRUPTED, value=mean, conditions={})]
