"""`twicing evaluate`: do the parts that are not finished, model by model, then write results and page."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from twicing.experiments.alone import alone_in
from twicing.experiments.devices import chosen_device
from twicing.experiments.evaluate.bench import Bench
from twicing.experiments.evaluate.folder import (
    ABOUT,
    collect,
    is_finished,
    open_evaluation,
    refuse_other_images,
    write_part,
)
from twicing.experiments.evaluate.options import Evaluate
from twicing.experiments.evaluate.page import print_results, write_page
from twicing.experiments.evaluate.pretrained import timm_subject
from twicing.experiments.evaluate.subjects import Subject, trained_subjects
from twicing.experiments.evaluate.tasks import HELD_OUT, Task, tasks_of
from twicing.experiments.plan import CONFIG
from twicing.experiments.report import EVALUATION, report_above, write_report
from twicing.experiments.results import BASELINE, Environment, environment
from twicing.experiments.telling import tell
from twicing.names import few


def evaluate(options: Evaluate, console: Console, command: str) -> Path:
    """Evaluate what the options name, or go on with what the folder holds; returns the page, evaluation.html.

    command: what was typed, kept beside the results. Whatever ends it, finished parts are kept.
    Raises ValueError, one sentence, for whatever of the options, the models or the data does not fit.
    """
    device = chosen_device(options.device)
    subjects, folder = _subjects(options, console)
    tasks = tasks_of(subjects, options, folder)
    if not (folder / ABOUT).exists() and any(task.images == HELD_OUT for task in tasks):
        # Data that are not there are told before anything is written.
        subjects[0].held_out()
    where = environment(device)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        open_evaluation(folder, options, subjects, where, command)
        unfinished = [task for task in tasks if not is_finished(task, folder)]
        if unfinished:
            refuse_other_images(folder, options.images)
        finished = f"; {len(tasks) - len(unfinished)} finished already" if len(unfinished) < len(tasks) else ""
        models = "1 model" if len(subjects) == 1 else f"{len(subjects)} models"
        tell(console, f"{options.model}: {models}, {len(tasks)} parts{finished}.")
        with _Display(console, unfinished) as display:
            for last in (False, True):
                for subject in subjects:
                    own = [task for task in unfinished if task.subject is subject and task.last == last]
                    _do(subject, own, options, folder, where, device, display)
        collect(folder)
        page = write_page(folder)
    report = report_above(folder, EVALUATION)
    if report:
        # It has a section for it.
        write_report(report.parent)
    print_results(folder, console)
    tell(console, f"Page: {page}")
    return page


def _subjects(options: Evaluate, console: Console) -> tuple[list[Subject], Path]:
    named = Path(options.model)
    if (named / CONFIG).is_file():
        _refuse_options_of_timm(options)
        subjects, untrained = trained_subjects(named, options.data_dir)
        if untrained:
            tell(console, f"Note: not trained yet, and left out: {few(untrained)}.")
        return subjects, options.out or named / EVALUATION
    if named.is_dir():
        raise ValueError(f"{named} is a folder without {CONFIG}: name the run folder of a comparison or training.")
    if options.pretrained:
        tell(console, "timm's own weights were asked for: it downloads them if they are not in its cache.")
    subject = timm_subject(options)
    if not options.checkpoint and not options.pretrained:
        tell(console, f"Note: {subject.label} has random weights; give --checkpoint FILE or --pretrained.")
    return [subject], options.out or Path("runs") / f"evaluate-{subject.folder_name}"


def _refuse_options_of_timm(options: Evaluate) -> None:
    given = {
        "--checkpoint": options.checkpoint is not None,
        "--pretrained": options.pretrained,
        "--mechanism": options.mechanism != BASELINE,
        "--layers": options.layers != "all",
        "--options": bool(options.options),
        "--model-args": bool(options.model_args),
        "--seed": options.seed != 0,
    }
    wrong = [name for name, there in given.items() if there]
    if wrong:
        raise ValueError(
            f"{options.model} is a run folder, whose models have weights, mechanisms and seeds: "
            f"leave {', '.join(wrong)} out."
        )


def _do(
    subject: Subject,
    tasks: Sequence[Task],
    options: Evaluate,
    folder: Path,
    where: Environment,
    device: torch.device,
    display: "_Display",
) -> None:
    if not tasks:
        return
    (folder / subject.folder_name).mkdir(exist_ok=True)
    bench = Bench(subject, options, device, display.passed)
    try:
        for task in tasks:
            display.begin(task)
            started = time.perf_counter()
            part = task.run(bench)
            write_part(task, part, bench, folder, where, time.perf_counter() - started)
            display.end(task, bench.notes)
            bench.notes.clear()
    finally:
        bench.close()


class _Display:
    """All parts together and the running one, by how often the model was shown an image; plain lines elsewhere."""

    def __init__(self, console: Console, tasks: Sequence[Task]):
        self._console, self._left, self._total = console, len(tasks), len(tasks)
        self._shown = 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
        )
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._all = self._bars.add_task("all parts", total=max(len(tasks), 1), detail="")
        self._part = self._bars.add_task("", total=1, detail="", visible=False)

    def __enter__(self) -> "_Display":
        self._bars.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bars.stop()

    def begin(self, task: Task) -> None:
        self._shown = 0
        # What is shown at most is seldom needed: an image that is fooled is left alone.
        self._bars.reset(self._part, total=max(task.passes, 1), visible=True)
        self._bars.update(self._part, description=f"{task.subject.name}: {task.name}")

    def passed(self, images: int) -> None:
        """The model was shown so many images."""
        self._shown += images
        self._bars.update(self._part, advance=images, detail=f"{self._shown:,} images shown")

    def end(self, task: Task, notes: Sequence[str]) -> None:
        self._left -= 1
        self._bars.advance(self._all)
        self._bars.update(self._part, visible=False)
        if not self._console.is_terminal:
            done = self._total - self._left
            tell(self._console, f"[{done} of {self._total}] {task.subject.name}: {task.name}")
        for note in notes:
            tell(self._console, f"Note on {task.name} of {task.subject.name}: {note}")
