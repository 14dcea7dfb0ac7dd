"""Time contenders in turns: one call of each per round, so that a busy or throttled machine slows all of them alike.

Ratios of medians of one such run are what is reported; milliseconds alone do not travel between machines.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# Fewer have no quartiles worth the name.
LEAST_SAMPLES = 3
WARM_UP_CALLS = 3
# Of its time, what a contender may spend on warming up.
WARM_UP_SHARE = 0.1
# About a millisecond, in which the CPU puts all kernels of a call into the queue of the GPU.
HEAD_START_CYCLES = 2_000_000


@dataclass(frozen=True)
class Spread:
    """Times of one contender in milliseconds: median, lower and upper quartile, mean, and how many they are of."""

    median: float
    lower: float
    upper: float
    mean: float
    samples: int


def spread(times: list[float]) -> Spread:
    """The spread of times in milliseconds; quartiles are interpolated between the times."""
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return Spread(median, lower, upper, statistics.fmean(times), len(times))


def interleaved(calls: Mapping[str, Call], device: torch.device, *, repeats: int, seconds: float) -> dict[str, Spread]:
    """Time each call `repeats` times or for `seconds`, whichever is less, but at least three times.

    The order of every round is drawn, the same in every run: a call finds little in the caches after one with a large
    matrix, and none is to come after it always. What a call returns is dropped outside its time.
    """
    one_round = _gpu_round if device.type == "cuda" else _cpu_round
    for call in calls.values():
        _warm_up(call, device, seconds * WARM_UP_SHARE)
    times: dict[str, list[float]] = {name: [] for name in calls}
    draw = random.Random(0)
    while waiting := [name for name in calls if _wants_more(times[name], repeats, seconds)]:
        order = draw.sample(waiting, len(waiting))
        for name, elapsed in zip(order, one_round([calls[name] for name in order]), strict=True):
            times[name].append(elapsed)
    return {name: spread(measured) for name, measured in times.items()}


def synchronize(device: torch.device) -> None:
    """Wait for what the device was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _wants_more(times: list[float], repeats: int, seconds: float) -> bool:
    if len(times) < LEAST_SAMPLES:
        return True
    return len(times) < repeats and sum(times) < 1000 * seconds


def _warm_up(call: Call, device: torch.device, seconds: float) -> None:
    end = time.perf_counter() + seconds
    for _ in range(WARM_UP_CALLS):
        call()
        synchronize(device)
        if time.perf_counter() > end:
            break


def _cpu_round(calls: list[Call]) -> list[float]:
    times = []
    for call in calls:
        start = time.perf_counter()
        result = call()
        times.append(1000 * (time.perf_counter() - start))
        del result
    return times


def _gpu_round(calls: list[Call]) -> list[float]:
    """By events in the queue. Before each call the GPU is kept busy, so that in none it waits for the CPU.

    One head start for a whole round would be used up by its first calls: small kernels run faster than they start.
    """
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
    for call, (start, end) in zip(calls, events, strict=True):
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        result = call()
        end.record()
        del result
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]
