"""The examples run as they are, without arguments, and say what they should."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_torch(tmp_path):
    output = run("plain_torch.py", tmp_path)
    losses = {name: (float(a), float(b)) for name, a, b in re.findall(r"(\w+) +loss (\S+) -> (\S+) nats", output)}
    assert set(losses) == {"standard", "twicing"}
    assert all(last < 0.5 * first for first, last in losses.values())


def test_timm_vit(tmp_path):
    output = run("timm_vit.py", tmp_path)
    assert "layer 10 = blocks.9.attn: Attention -> twicing (order 2, gain 1)" in output
    assert float(re.search(r"largest change of a logit: (\S+)", output)[1]) > 0
    assert "rebuilt from [{'mechanism': 'twicing', 'layers': [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]" in output


def test_export(tmp_path):
    output = run("export.py", tmp_path)
    assert output.count("largest difference") == 3
    assert "6 calls of fused attention" in output


def test_own_mechanism(tmp_path):
    output = run("own_mechanism.py", tmp_path)
    assert "GiveBack is sound." in output
    assert "New parameters: 6, so make the optimiser now" in output
    assert (tmp_path / "runs" / "own_mechanism" / "report.html").exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_each_is_tested(path):
    assert len(path.read_text().splitlines()) < 60
    assert f'run("{path.name}"' in Path(__file__).read_text()
