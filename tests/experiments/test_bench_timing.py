"""Times of `twicing bench`: who runs when, how often, and what becomes of the numbers."""

import time
from collections import Counter

import pytest
import torch

from twicing.experiments.bench.timing import LEAST_SAMPLES, interleaved, spread

CPU = torch.device("cpu")


def test_a_spread_is_median_quartiles_and_mean():
    found = spread([4.0, 1.0, 3.0, 2.0, 10.0])
    assert (found.lower, found.median, found.upper, found.mean, found.samples) == (2.0, 3.0, 4.0, 4.0, 5)


def test_every_contender_follows_each_of_the_others_about_as_often():
    """Rounds that only began with another one each time kept everyone behind the same one, with its caches."""
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    interleaved(calls, CPU, repeats=300, seconds=10.0)
    drawn = "".join(seen).removeprefix("aaabbbccc")
    rounds = [drawn[start : start + 3] for start in range(0, len(drawn), 3)]
    assert len(rounds) == 300
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds), "each once a round"
    follows = Counter(one[place : place + 2] for one in rounds for place in (0, 1))
    assert len(follows) == 6
    assert min(follows.values()) > 70, "of 100 each"


def test_ratios_are_those_of_the_work():
    calls = {"one": lambda: time.sleep(0.004), "two": lambda: time.sleep(0.008)}
    found = interleaved(calls, CPU, repeats=9, seconds=10.0)
    assert found["one"].median == pytest.approx(4.0, abs=2.0)
    assert found["two"].median / found["one"].median == pytest.approx(2.0, abs=0.5)


def test_a_slow_contender_stops_at_its_time_and_the_others_go_on():
    calls = {"slow": lambda: time.sleep(0.01), "fast": lambda: None}
    found = interleaved(calls, CPU, repeats=30, seconds=0.05)
    assert LEAST_SAMPLES <= found["slow"].samples <= 6
    assert found["fast"].samples == 30


def test_three_samples_are_taken_however_little_time_there_is():
    found = interleaved({"slow": lambda: time.sleep(0.01)}, CPU, repeats=1, seconds=0.001)
    assert found["slow"].samples == LEAST_SAMPLES


def test_on_a_gpu_each_call_has_a_head_start_of_its_own(monkeypatch):
    """The queue of a GPU, as far as it can be told without one: what was put into it, in which order."""
    queue = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue.append("event")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: queue.append("wait"))
    calls = {name: lambda name=name: queue.append(name) for name in ("one", "two")}
    found = interleaved(calls, torch.device("cuda"), repeats=3, seconds=10.0)
    *called, waited = queue[-9:]
    first, second = (["sleep", "event", name, "event"] for name in ("one", "two"))
    assert called in (first + second, second + first)
    assert waited == "wait"
    assert (found["one"].median, found["two"].samples) == (2.0, 3)
