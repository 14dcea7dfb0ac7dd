"""A comparison that is killed, interrupted, diverges or runs out of room: one sentence, nothing lost, nobody left."""

import errno
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_comparison import command, numbers, right, run, stamps, started

from twicing.experiments import processes


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_the_same_numbers(tmp_path):
    whole = tmp_path / "whole"
    done = run(command(whole))
    assert done.returncode == 0, done.stderr
    draws = random.Random(20261121)
    killed = tmp_path / "killed"
    kills = 0
    for _ in range(4):
        before = stamps(killed)
        process = started(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        # Once it has got on (a part or an epoch more than before), at a random moment.
        while stamps(killed) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draws.uniform(0, 0.4))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        parts = {name: stamp for name, stamp in before.items() if name.endswith(".json")}
        after = stamps(killed)
        assert {name: after[name] for name in parts} == parts, "a finished part was computed again"
    assert kills >= 2, "the runs were over before they could be killed: the test has to be made longer"
    assert wait_until(lambda: not workers_of(killed)), "workers live on without their parent"
    done = run(command(killed))
    assert done.returncode == 0, done.stderr
    assert numbers(killed) == numbers(whole)
    assert right(killed) == right(whole)


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def workers_of(folder):
    """Processes that have a log of the folder open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            open_files = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(name.startswith(str(folder)) and name.endswith("log.txt") for name in open_files):
            found.append(process.name)
    return found


def test_ctrl_c_stops_with_a_sentence_and_nothing_is_lost(tmp_path):
    stopped = tmp_path / "stopped"
    process = started(command(stopped), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert wait_until(lambda: bool(stamps(stopped)) or process.poll() is not None, 60)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "Stopped. What is finished is kept; the same command goes on from there."
    kept = {name for name in stamps(stopped) if name.endswith(".json")}
    assert wait_until(lambda: not workers_of(stopped))
    assert kept


def test_a_failing_training_is_one_sentence(tmp_path):
    done = run(command(tmp_path / "run", "learning_rate=1e30"))
    assert done.returncode == 1
    assert "failed: the training diverged: the loss of epoch" in done.stderr
    assert "log.txt" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("limit", [500, 20_000], ids=["no room for config.json", "no room for a checkpoint"])
def test_a_full_disk_is_one_sentence(tmp_path, limit):
    # A limit on the size of a file fails in the same call as a full disk does.
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run(command(tmp_path / "run"), preexec_fn=fill)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    unfinished = [path.name for path in tmp_path.rglob(".*") if path.name != ".lock"]
    assert unfinished == [], "half-written files are left behind"


def test_where_the_log_cannot_be_written_the_reason_is_told_all_the_same(tmp_path, monkeypatch):
    """As on a full disk, where the log has no room for the story either."""

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("_log_to", "_end_with_parent"):
        monkeypatch.setattr(processes, name, lambda *_: None)
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)
    monkeypatch.setattr(processes.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(processes, "run_job", full)
    monkeypatch.setattr(processes.traceback, "print_exc", full)
    here, there = multiprocessing.Pipe(duplex=False)
    processes._work(SimpleNamespace(folder=tmp_path), None, there, last=False)
    assert here.recv() == ("failed", "[Errno 28] No space left on device.")


@pytest.mark.slow
def test_a_killed_worker_is_an_error_and_ends_the_others(tmp_path):
    """As when memory runs out; the parent notices, says which one, and leaves no process behind."""
    folder = tmp_path / "run"
    process = started(command(folder, "epochs=200"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert wait_until(lambda: len(workers_of(folder)) == 2, 60), "trainings are not side by side"
        assert wait_until(lambda: len(stamps(folder)) >= 2, 60)
        os.kill(int(workers_of(folder)[0]), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "did not finish: it was killed by signal 9, as happens when memory runs out" in errors
    assert len(errors.strip().splitlines()) == 1
    assert wait_until(lambda: not workers_of(folder), 5)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_workers_end_with_their_parent_even_while_they_are_silent(tmp_path, end):
    """A worker in a long attack writes no message, so that no broken pipe tells it that its parent is gone."""
    folder = tmp_path / "run"
    process = started(
        command(folder, "epochs=1", "evaluation.pgd_steps=1000000"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_until(lambda: len(list(folder.glob("*/fgsm.json"))) == 2, 60)
        time.sleep(0.5)
        assert len(workers_of(folder)) == 2
        process.send_signal(end)
        process.wait(30)
    finally:
        process.kill()
    assert wait_until(lambda: not workers_of(folder), 5)
