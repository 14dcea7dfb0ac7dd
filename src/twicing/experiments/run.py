"""Carry out a plan in a folder: its trainings, side by side, or what is left of them, and their results together."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from twicing.experiments.job import read_job, share_done
from twicing.experiments.plan import Plan, open_folder
from twicing.experiments.processes import run_all
from twicing.experiments.progress import JobProgress
from twicing.experiments.results import environment, write_predictions, write_records
from twicing.training.classification import build_model

RESULTS, PREDICTIONS = "results.jsonl", "predictions.npz"


def run_plan(plan: Plan, folder: Path, *, side_by_side: int, command: str, console: Console) -> None:
    """Do all trainings of the plan that folder does not hold finished, then write results.jsonl and predictions.npz.

    side_by_side: trainings at once; the numbers are the same for any. command: what was typed, kept in config.json.
    Raises ValueError for a folder of another plan or one that another process works in, OSError where it cannot be
    written, JobFailedError where a training fails. Whatever ends it, finished parts are kept.
    """
    if side_by_side < 1:
        raise ValueError(f"--jobs must be 1 or larger: got {side_by_side}.")
    _refuse_what_cannot_be_built(plan)
    where = environment()
    jobs = plan.jobs(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        started = datetime.now(UTC).isoformat(timespec="seconds")
        warning = open_folder(folder, plan, command, min(side_by_side, len(jobs)), where, started)
        if warning:
            console.print(f"Note: {warning}", highlight=False, markup=False)
        unfinished = [job for job in jobs if share_done(job) < 1]
        if unfinished:
            side_by_side = min(side_by_side, len(unfinished))
            announcement = _announcement(plan, len(jobs), len(jobs) - len(unfinished), side_by_side)
            console.print(announcement, highlight=False, markup=False)
            with JobProgress(jobs, console) as progress:
                run_all(unfinished, side_by_side, where, progress.report)
        found = [read_job(job) for job in jobs]
        write_records(folder / RESULTS, [record for records, _ in found for record in records])
        write_predictions(folder / PREDICTIONS, [correct for _, correct in found])


def _refuse_what_cannot_be_built(plan: Plan) -> None:
    """Build every arm's model once, so that a wrong option is told before a folder is made."""
    for arm in plan.arms:
        try:
            arm.apply(build_model(plan.recipe, 0))
        except TypeError as error:
            raise ValueError(f"The mechanism {arm.mechanism!r} cannot be built: {error}") from error


def _announcement(plan: Plan, total: int, finished: int, side_by_side: int) -> str:
    trainings = "1 training" if total == 1 else f"{total} trainings ({len(plan.arms)} arms x {len(plan.seeds)} seeds)"
    epochs = "1 epoch" if plan.recipe.epochs == 1 else f"{plan.recipe.epochs} epochs"
    already = f"; {finished} finished already" if finished else ""
    return f"{plan.recipe.headline}: {trainings} of {epochs}, {side_by_side} side by side{already}."


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another twicing command is at work in {folder}: wait for it, or use --out.") from None
    try:
        yield
    finally:
        lock.release()
