"""scripts/gpu_check.sh, as far as it can be seen without a GPU: its stages, their limits, and its exit status."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from twicing.experiments.bench.__main__ import _BENCHES, _options
from twicing.experiments.bench.cases import parse_case
from twicing.experiments.bench.contenders import all_contenders

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
# Nine minutes, and of these half a minute to start.
MOST_SECONDS = 510 + 20

# Says what it was asked to do, and fails or hangs where the test says so.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "ran $*" >> "$OUT/calls"
case "$*" in
    *"-m pytest"*) exit ${TESTS_STATUS:-0} ;;
    *"bench ops"*) exit 3 ;;
esac
"""


def run(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def stages():
    """Name -> limit and command, from the dry run."""
    done = run("--dry-run", OUT="some where")
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return {name: (int(limit), shlex.split(command)) for name, limit, command in lines}


def test_the_stages_fit_into_nine_minutes(stages):
    assert list(stages) == ["gpu-tests", "bench-ops", "bench-decode", "bench-model"]
    assert sum(limit for limit, _ in stages.values()) <= MOST_SECONDS


def test_the_benchmarks_are_told_what_they_understand(stages):
    for name in ("ops", "decode", "model"):
        command = stages[f"bench-{name}"][1]
        assert command[1:4] == ["-m", "twicing.experiments.bench", name]
        options = _options(_BENCHES[name][0], json.loads(command[4]))
        assert options.device == "cuda"
        assert options.out == Path("some where")
    ops = _options(_BENCHES["ops"][0], json.loads(stages["bench-ops"][1][4]))
    cuda = torch.device("cuda")
    assert [str(parse_case(shape, torch.bfloat16, cuda)) for shape in ops.shapes] == list(ops.shapes)


def test_its_contenders_are_those_of_a_gpu(stages, monkeypatch):
    # Whether a backend has order 1 is asked with a tensor on the device.
    monkeypatch.setattr("twicing.experiments.bench.contenders._has_order_1", lambda backend, device: True)
    known = all_contenders(torch.device("cuda"))
    assert "twicing: blocked" not in known
    assert "twicing: triton" not in all_contenders(torch.device("cpu"))
    assert set(json.loads(stages["bench-ops"][1][4])["contenders"]) <= set(known)


@pytest.fixture
def fake(tmp_path):
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return {"PYTHON": str(python), "OUT": str(tmp_path / "out")}


@pytest.mark.parametrize("status", [0, 1])
def test_the_tests_decide_and_a_benchmark_that_fails_stops_nothing(status, fake):
    done = run(**fake, TESTS_STATUS=str(status))
    assert done.returncode == status
    calls = Path(fake["OUT"], "calls").read_text().splitlines()
    assert len(calls) == 4
    assert "-m gpu tests/gpu" in calls[0]
    summary = done.stdout.partition("== summary\n")[2].splitlines()
    assert summary[0].startswith("gpu-tests: passed" if status == 0 else "gpu-tests: failed with status 1")
    assert summary[1].startswith("bench-ops: failed with status 3")
    assert summary[3].startswith("bench-model: passed")


def test_a_wrong_argument_is_answered():
    done = run("--dryrun")
    assert done.returncode == 2
    assert "Unknown argument '--dryrun': only --dry-run" in done.stderr
