"""One command at a time in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other commands of ours out of the folder while the block runs.

    Raises ValueError where another one is at work in it.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another twicing command is at work in {folder}: wait for it, or use --out.") from None
    try:
        yield
    finally:
        lock.release()
