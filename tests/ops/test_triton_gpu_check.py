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

TEST_PARTS = [f"gpu-tests-{part}" for part in (1, 2, 3, 4)]

# Says what it was asked to do, and fails or hangs where the test says so.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "ran $*" >> "$OUT/calls"
case "$*" in
    *"-m pytest"*"-k not blocks and causal "*) exit ${TESTS_STATUS:-0} ;;
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
    assert list(stages) == [*TEST_PARTS, "bench-ops", "bench-decode", "bench-model"]
    # The parts of the tests run side by side.
    one_after_the_other = [limit for name, (limit, _) in stages.items() if name not in TEST_PARTS[1:]]
    assert sum(one_after_the_other) <= MOST_SECONDS


def test_the_parts_of_the_tests_leave_out_none_and_run_none_twice(stages):
    conditions = []
    for name in TEST_PARTS:
        command = stages[name][1]
        assert command[1:5] == ["-m", "pytest", "-m", "gpu"]
        conditions.append(command[command.index("-k") + 1])
    for blocks in (True, False):
        for causal in (True, False):
            assert sum(eval(condition, {"blocks": blocks, "causal": causal}) for condition in conditions) == 1


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
    assert ["-m gpu tests/gpu" in call for call in calls] == [True] * 4 + [False] * 3
    summary = done.stdout.partition("== summary\n")[2].splitlines()
    assert [line.partition(",")[0] for line in summary[:-1]] == [
        "gpu-tests-1: passed",
        "gpu-tests-2: passed",
        "gpu-tests-3: passed" if status == 0 else "gpu-tests-3: failed with status 1",
        "gpu-tests-4: passed",
        "bench-ops: failed with status 3",
        "bench-decode: passed",
        "bench-model: passed",
    ]


def test_a_wrong_argument_is_answered():
    done = run("--dryrun")
    assert done.returncode == 2
    assert "Unknown argument '--dryrun': only --dry-run" in done.stderr
