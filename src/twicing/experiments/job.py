"""One training with its evaluation, in parts that are written as they are finished and never computed twice.

A part is a file: records and, where there are any, which images were right. A killed job goes on after its last part.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from twicing.experiments.parts import Part
from twicing.experiments.plan import Job
from twicing.experiments.programme import Bench, Kind, Progress
from twicing.experiments.programmes import programme_of
from twicing.experiments.results import Correctness, Environment, Record, read_json, write_json
from twicing.training.checkpoint import formula


def parts_of(job: Job, *, last: bool | None = None) -> dict[str, Kind]:
    """The parts that the job has: those before the other arms are looked at, those after (last), or all of them."""
    programme = programme_of(job.recipe)
    first, final = programme.parts, programme.last_parts
    kinds = {None: {**first, **final}, False: first, True: final}[last]
    return {name: kind for name, kind in kinds.items() if kind.applies(job)}


def share_done(job: Job) -> float:
    """The share of the job's work whose parts are finished, in [0, 1]; exactly 1 when all are."""
    kinds = parts_of(job)
    done = sum(kind.percent for name, kind in kinds.items() if part_file(job, name).exists())
    return done / sum(kind.percent for kind in kinds.values())


def unfinished_parts(job: Job, *, last: bool | None = None) -> list[str]:
    """The names of the job's parts that are still to be done."""
    return [name for name in parts_of(job, last=last) if not part_file(job, name).exists()]


def part_file(job: Job, part: str) -> Path:
    """Where a finished part is kept."""
    return job.folder / f"{part}.json"


def run_job(job: Job, environment: Environment, progress: Progress, *, last: bool = False) -> None:
    """Do the parts of the job that are not finished yet; with last, those that look at the seed's other arms.

    progress is told the part and the job's share that is done.
    """
    unfinished = unfinished_parts(job, last=last)
    if not unfinished:
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    everything = sum(kind.percent for kind in parts_of(job).values())

    def part_progress(name: str, share: float) -> None:
        progress(name, share_done(job) + share * parts_of(job)[name].percent / everything)

    programme = programme_of(job.recipe)
    bench = programme.open(job, part_progress)
    trained = False
    for name in unfinished:
        if name not in programme.before_training and not trained:
            bench.restore()
            trained = True
        part_progress(name, 0.0)
        started = time.perf_counter()
        part = parts_of(job)[name].run(bench)
        _write_part(job, name, part, bench, environment, time.perf_counter() - started)
    progress("done" if not unfinished_parts(job) else "waiting for the other arms", share_done(job))


def follow_training(job: Job) -> None:
    """Take part in the job's training as another process than the first, which does all the rest."""
    # Written by the first process after a training that this one takes part in, so both see the same.
    if "training" in unfinished_parts(job):
        programme_of(job.recipe).open(job, lambda *_: None).train()


def read_job(job: Job) -> tuple[list[Record], Correctness]:
    """The records of a finished job in a fixed order, and which images were right under every threat."""
    records: list[Record] = []
    correct: dict[str, Any] = {}
    index: Sequence[int] = []
    probes: Sequence[int] | None = None
    for name in parts_of(job):
        saved = _read_part(job, name)
        try:
            records += [Record(**record) for record in saved["records"]]
            correct |= {threat: np.array(values, dtype=np.bool_) for threat, values in saved["correct"].items()}
            index, probes = saved["index"], saved["probes"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{part_file(job, name)} is damaged: delete it and run the same command again.") from error
    kept = None if probes is None else np.array(probes, dtype=np.int64)
    return records, Correctness(job.arm.label, job.seed, np.array(index, dtype=np.int64), correct, kept)


def read_verdict(job: Job) -> dict[str, Any] | None:
    """What the finished job found about gradient masking, where it looked for it."""
    if "masking" not in parts_of(job):
        return None
    verdict: dict[str, Any] = _read_part(job, "masking")["verdict"]
    return verdict


def read_notes(job: Job) -> list[str]:
    """What the parts of the finished job found worth saying of themselves, each sentence once."""
    return list(dict.fromkeys(note for name in parts_of(job) for note in _read_part(job, name).get("notes", [])))


def _read_part(job: Job, name: str) -> dict[str, Any]:
    saved = read_json(part_file(job, name))
    if not isinstance(saved, dict):
        raise ValueError(f"{part_file(job, name)} is damaged: delete it and run the same command again.")
    return saved


def _write_part(job: Job, name: str, part: Part, bench: Bench, environment: Environment, seconds: float) -> None:
    records = [
        Record(
            metric=finding.metric,
            value=finding.value,
            n=finding.n,
            seed=job.seed,
            arm=job.arm.label,
            recipe=job.recipe.name,
            mechanism=job.arm.mechanism,
            layers=job.arm.layers,
            spec=formula(bench.model),
            conditions=finding.conditions,
            versions=environment.versions,
            commit=environment.commit,
            device=environment.device,
            seconds=seconds,
        )
        for finding in part.findings
    ]
    write_json(
        part_file(job, name),
        {
            "part": name,
            "records": [asdict(record) for record in records],
            "correct": part.correct,
            **bench.examples(),
            "verdict": part.verdict,
            "notes": part.notes,
        },
    )
