"""Carry out a plan in a folder: its trainings, side by side, or what is left of them, and their results together."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from twicing.experiments import job as one_job
from twicing.experiments.alone import alone_in
from twicing.experiments.job import read_job, read_notes, read_verdict, share_done, unfinished_parts
from twicing.experiments.plan import Job, Plan, Resources, open_folder
from twicing.experiments.processes import run_all
from twicing.experiments.programmes import programme_of
from twicing.experiments.progress import JobProgress
from twicing.experiments.results import environment, write_json, write_predictions, write_records
from twicing.mechanisms.registry import find_mechanism
from twicing.testing.soundness import checked

RESULTS, PREDICTIONS, VERDICTS, NOTES = "results.jsonl", "predictions.npz", "verdicts.json", "notes.json"
# Below a run folder: decoded images, kept for the processes that train side by side.
DATA_CACHE = "data"


def run_plan(
    plan: Plan, folder: Path, *, side_by_side: int, command: str, console: Console, resources: Resources | None = None
) -> None:
    """Do all trainings of the plan that folder does not hold finished, then write their results together.

    Written: results.jsonl, predictions.npz, and verdicts.json where gradient masking was looked for.
    side_by_side: trainings at once; the numbers are the same for any. command: what was typed, kept in config.json.
    Raises ValueError for a folder of another plan or one that another process works in, for data that cannot be read
    and mechanisms that are not sound, OSError where it cannot be written, JobFailedError where a training fails.
    Whatever ends it, finished parts are kept.
    """
    if side_by_side < 1:
        raise ValueError(f"--jobs must be 1 or larger: got {side_by_side}.")
    _refuse_what_cannot_be_built(plan)
    resources = resources or Resources()
    resources.hardware.check_processes()
    where = environment(resources.device)
    resources = replace(resources, cache=resources.cache or folder / DATA_CACHE)
    jobs = plan.jobs(folder, resources)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        started = datetime.now(UTC).isoformat(timespec="seconds")
        warning = open_folder(folder, plan, command, min(side_by_side, len(jobs)), where, started, resources)
        if warning:
            console.print(f"Note: {warning}", highlight=False, markup=False)
        unfinished = [job for job in jobs if share_done(job) < 1]
        if unfinished:
            _prepare(plan, resources, console)
            side_by_side = min(side_by_side, len(unfinished))
            announcement = _announcement(plan, len(jobs), len(jobs) - len(unfinished), side_by_side)
            console.print(announcement, highlight=False, markup=False)
            with JobProgress(jobs, console) as progress:
                # Looking at a seed's other arms has to wait for all of them.
                for last in (False, True):
                    waiting = [job for job in unfinished if unfinished_parts(job, last=last)]
                    run_all(waiting, side_by_side, where, progress.report, last=last)
        found = [read_job(job) for job in jobs]
        write_records(folder / RESULTS, [record for records, _ in found for record in records])
        answers = [correct for _, correct in found if correct.correct]
        if answers:
            write_predictions(folder / PREDICTIONS, answers)
        _write_verdicts(jobs, folder)
        notes = list(dict.fromkeys(note for job in jobs for note in read_notes(job)))
        if notes:
            write_json(folder / NOTES, notes)


def follow_training(plan: Plan, folder: Path, resources: Resources) -> None:
    """Take part in the one training of the plan as another process than the first, which does all the rest."""
    [job] = plan.jobs(folder, replace(resources, cache=resources.cache or folder / DATA_CACHE))
    one_job.follow_training(job)


def _prepare(plan: Plan, resources: Resources, console: Console) -> None:
    """Read and check the data before any training."""
    reading = f"Reading the data of {plan.recipe.name} ..."
    with console.status(reading) as status:
        found = programme_of(plan.recipe).prepare(
            plan.recipe, resources, lambda share: status.update(f"{reading} {share:.0%}")
        )
    if found:
        console.print(found, highlight=False, markup=False)


def _write_verdicts(jobs: list[Job], folder: Path) -> None:
    verdicts: dict[str, dict[str, Any]] = {}
    for job in jobs:
        verdict = read_verdict(job)
        if verdict is not None:
            verdicts.setdefault(job.arm.label, {})[str(job.seed)] = verdict
    if verdicts:
        write_json(folder / VERDICTS, verdicts)


def _refuse_what_cannot_be_built(plan: Plan) -> None:
    """Build every arm's model once, and check what is not our own, before a folder is made."""
    for arm in plan.arms:
        try:
            arm.apply(programme_of(plan.recipe).trial_model(arm.recipe(plan.recipe)), plan.recipe.baseline)
        except TypeError as error:
            raise ValueError(f"The mechanism {arm.mechanism!r} cannot be built: {error}") from error
        if ":" in arm.mechanism:
            checked(find_mechanism(arm.mechanism), arm.mechanism)


def _announcement(plan: Plan, total: int, finished: int, side_by_side: int) -> str:
    trainings = "1 training" if total == 1 else f"{total} trainings ({len(plan.arms)} arms x {len(plan.seeds)} seeds)"
    epochs = "1 epoch" if plan.recipe.all_epochs == 1 else f"{plan.recipe.all_epochs} epochs"
    already = f"; {finished} finished already" if finished else ""
    at_once = f", {side_by_side} side by side" if side_by_side > 1 else ""
    headline = f"{plan.recipe.headline[:1].upper()}{plan.recipe.headline[1:]}"
    return f"{headline}: {trainings} of {epochs}{at_once}{already}."
