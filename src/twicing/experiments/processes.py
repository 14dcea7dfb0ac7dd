"""Run jobs side by side, each in a process of its own with one thread, so that no job can touch another's numbers.

On Unix the processes are forked from a server that has imported torch, timm and Lightning once.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from twicing.experiments.job import run_job
from twicing.experiments.plan import Job
from twicing.experiments.results import Environment

Report = Callable[[Job, str, float], None]


class JobFailedError(RuntimeError):
    """A job ended with an error, or was killed. The others' finished parts are kept."""


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    messages: Connection


def run_all(
    jobs: Sequence[Job], side_by_side: int, environment: Environment, report: Report, *, last: bool = False
) -> None:
    """Run every job, at most `side_by_side` at once; report is told job, part and share done as they go on.

    last: the parts that look at a seed's other arms, which must all have finished theirs.

    Raises JobFailedError for the first job that fails, after ending the others: what they had finished is kept.
    KeyboardInterrupt ends them as well.
    """
    context = _context()
    waiting = list(reversed(jobs))
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < side_by_side:
                running.append(_start(context, waiting.pop(), environment, last))
            for ready in wait([one.messages for one in running]):
                one = next(one for one in running if one.messages is ready)
                if _hear(one, report):
                    one.process.join()
                    running.remove(one)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.join()


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "twicing.experiments.preload"])
    return context


def _start(context: Any, job: Job, environment: Environment, last: bool) -> _Running:
    here, there = context.Pipe(duplex=False)
    # No daemon: it may have children of its own, which read images. run_all() ends it, and it ends with its parent.
    process = context.Process(target=_work, args=(job, environment, there, last), name=job.name)
    process.start()
    # The child holds the only writing end, so that its death is the end of the messages.
    there.close()
    return _Running(job, process, here)


def _hear(one: _Running, report: Report) -> bool:
    """Pass on one message; True when it was the last one."""
    try:
        kind, *content = one.messages.recv()
    except EOFError:
        one.process.join()
        code = one.process.exitcode
        cause = f"it was killed by signal {-code}" if code and code < 0 else f"its process ended with code {code}"
        if code == -signal.SIGKILL:
            cause += ", as happens when memory runs out"
        raise JobFailedError(f"{one.job.name} did not finish: {cause}. See {one.job.folder / 'log.txt'}.") from None
    if kind == "failed":
        raise JobFailedError(f"{one.job.name} failed: {content[0]} The whole story is in {one.job.folder / 'log.txt'}.")
    if kind == "done":
        return True
    report(one.job, *content)
    return False


def _work(job: Job, environment: Environment, messages: Connection, last: bool) -> None:
    # Ctrl-C reaches the whole group; the parent decides, and ends its children in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    torch.set_num_threads(1)
    # Lightning's notes on devices and its advertisements would fill the log.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        _log_to(job)
        run_job(job, environment, lambda part, share: messages.send(("progress", part, share)), last=last)
        messages.send(("done",))
    except Exception as error:
        # Where the disk is full the log cannot be written either, and the sentence is all there is.
        with contextlib.suppress(OSError):
            traceback.print_exc()
            sys.stderr.flush()
        messages.send(("failed", _sentence(error)))


def _sentence(error: Exception) -> str:
    text = str(error) if isinstance(error, OSError | ValueError | FloatingPointError) else repr(error)
    return text if text.endswith((".", "!")) else f"{text}."


def _log_to(job: Job) -> None:
    # On the file descriptors, so that what C++ code prints is kept too.
    log = os.open(job.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a child only

    def watch() -> None:
        wait([parent.sentinel])
        # A SIGKILL of the parent: nobody is left to report to, and the next run must find the folder alone.
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
