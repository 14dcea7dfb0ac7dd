"""One live display for all jobs of a comparison, with the time left; plain lines where nobody watches a terminal."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from twicing.experiments.job import share_done
from twicing.experiments.plan import Job


class JobProgress:
    """Shows all jobs together and every running one; report() is told what they do."""

    def __init__(self, jobs: Sequence[Job], console: Console):
        self._console = console
        self._shares = {job.name: share_done(job) for job in jobs}
        self._tasks: dict[str, TaskID] = {}
        self._started = time.monotonic()
        self._display = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
            transient=True,
            # Long enough to average over an epoch of every job.
            speed_estimate_period=120,
            disable=not console.is_terminal,
        )
        self._display.columns = (*self._display.columns, TimeElapsedColumn(), TimeLeft(elapsed_when_finished=True))
        detail = "(time so far, time left)"
        self._all = self._display.add_task(f"all {len(jobs)} trainings", total=len(jobs), detail=detail)
        self._display.update(self._all, completed=sum(self._shares.values()))

    def __enter__(self) -> "JobProgress":
        self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.stop()

    def report(self, job: Job, part: str, share: float) -> None:
        """A job is at this part, and this share of it is done."""
        self._shares[job.name] = share
        if job.name not in self._tasks:
            self._tasks[job.name] = self._display.add_task(job.name, total=1.0, detail=part)
        self._display.update(self._tasks[job.name], completed=share, detail=part)
        self._display.update(self._all, completed=sum(self._shares.values()))
        if part == "done":
            self._display.remove_task(self._tasks.pop(job.name))
            self._tell_finished(job)

    def _tell_finished(self, job: Job) -> None:
        finished = len([share for share in self._shares.values() if share >= 1])
        minutes, seconds = divmod(round(time.monotonic() - self._started), 60)
        if not self._console.is_terminal:
            self._console.print(
                f"[{minutes}:{seconds:02d}] {finished} of {len(self._shares)} finished: {job.name}",
                highlight=False,
                markup=False,
            )
