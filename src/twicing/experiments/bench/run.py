"""What the benchmarks share as programs: threads, rows that are kept as they come, and an end that Ctrl-C can make."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from twicing.experiments.bench.machine import this_machine
from twicing.experiments.bench.rows import Row, write_rows
from twicing.experiments.bench.screen import Screen
from twicing.experiments.bench.tables import tables


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads for torch's CPU operations; as many as there were where None."""
    if count is not None and count < 1:
        raise ValueError(f"--threads must be 1 or larger: got {count}.")
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_effort(repeats: int, seconds: float) -> None:
    """Raise where nothing would be measured."""
    if repeats < 1 or not seconds > 0:
        raise ValueError(f"--repeats must be 1 or larger and --seconds above 0: got {repeats} and {seconds}.")


def check_numbers(option: str, numbers: Sequence[int], *, least: int) -> None:
    """Raise where there are none, or one is too small."""
    if not numbers or min(numbers) < least:
        got = " ".join(map(str, numbers)) or "none"
        raise ValueError(f"--{option} are whole numbers of at least {least}: got {got}.")


def record(groups: Iterable[Sequence[Row]], path: Path, device: torch.device, screen: Screen) -> tuple[list[Row], bool]:
    """Show each group of rows as it is finished, and keep all of them in the CSV at `path`.

    Returns the rows, and whether it came to the end: Ctrl-C ends it early, with the finished groups kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = this_machine(device)
    rows: list[Row] = []
    finished = False
    try:
        for group in groups:
            rows += group
            write_rows(path, rows, machine)
            for table in tables(group):
                screen.show(table)
        finished = True
    except KeyboardInterrupt:
        screen.say("Stopped. The rows that were finished are kept.")
    if rows:
        screen.say(f"Record: {path}")
    return rows, finished


def record_name(bench: str, device: torch.device, *parts: str) -> str:
    """The stem of a record's file, such as "ops-cpu-2-threads-float32"; the same settings replace the same file."""
    where = f"cpu-{torch.get_num_threads()}-threads" if device.type == "cpu" else device.type
    return "-".join([bench, where, *parts])
