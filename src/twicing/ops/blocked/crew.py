"""Heads over threads, for long calls: every thread does whole boxes with kernels of one thread, and waits for nobody.

With every kernel split over the threads instead, as it is in short calls (see walk.py), they would meet some twenty
times in a box, and each time wait for the slowest.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from twicing.ops.blocked.plan import Box

_lock = threading.Lock()
_crews: dict[int, ThreadPoolExecutor] = {}


def each(boxes: Iterable[Box], new_worker: Callable[[], Callable[[Box], None]], threads: int) -> None:
    """Call a worker with every box; where there are several threads, each has a worker of its own."""
    if threads == 1:
        worker = new_worker()
        for box in boxes:
            worker(box)
        return
    left, lock = iter(boxes), threading.Lock()

    def work() -> None:
        # Also what lets a thread write into tensors that a caller made in inference mode.
        with torch.inference_mode():
            worker = new_worker()
            while True:
                with lock:
                    box = next(left, None)
                if box is None:
                    return
                worker(box)

    for future in [_crew(threads).submit(work) for _ in range(threads)]:
        future.result()


def _crew(threads: int) -> ThreadPoolExecutor:
    """So many threads, in each of which torch's own kernels use one thread."""
    with _lock:
        if threads not in _crews:
            together = threading.Barrier(threads)
            crew = ThreadPoolExecutor(threads, thread_name_prefix="twicing")

            def settle() -> None:
                # The first question fixes the number for this thread, from then on it is its own.
                torch.get_num_threads()
                torch.set_num_threads(1)
                together.wait()

            of_caller = torch.get_num_threads()
            for future in [crew.submit(settle) for _ in range(threads)]:
                future.result()
            # What threads yet to come begin with was changed too.
            torch.set_num_threads(of_caller)
            _crews[threads] = crew
        return _crews[threads]


def _start_over_in_child() -> None:
    _crews.clear()
    _lock.release()


# Threads do not survive a fork: the child makes its own. (Windows has no fork.)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_start_over_in_child)
