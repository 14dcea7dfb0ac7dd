"""How far a long job is: a function that is called with the share done, from 0 to 1."""

from collections.abc import Callable

Progress = Callable[[float], None]


def part_of(progress: Progress | None, start: float, share: float) -> Progress | None:
    """The progress of a part of the job: its 0 to 1 become start to start + share of the whole."""
    return None if progress is None else lambda done: progress(start + share * done)
