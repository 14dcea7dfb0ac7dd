"""The rooms import only downward: the contracts of import-linter hold, and would notice if they did not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
LINTER = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"


def lint(folder):
    """Run the linter on the package in a folder; it finds the package there first."""
    environment = os.environ | {"PYTHONPATH": str(folder / "src")}
    return subprocess.run(
        [sys.executable, "-c", LINTER, "--config", str(folder / "pyproject.toml"), "--no-cache"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path):
    """A copy of the sources, to plant a mistake in."""
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    shutil.copytree(PROJECT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_contracts_are_kept():
    done = lint(PROJECT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("room", "statement", "named"),
    [
        ("ops", "from twicing import experiments", "twicing.ops.planted -> twicing.experiments"),
        ("analysis", "from twicing import models", "twicing.analysis.planted -> twicing.models"),
        ("mechanisms", "import numpy", "twicing.mechanisms.planted -> numpy"),
        ("data", "import timm", "twicing.data.planted -> timm"),
    ],
    ids=["upward", "sideways", "core-needs-more-than-torch", "host-outside-its-adapter"],
)
def test_a_planted_import_breaks_them(room, statement, named, copy):
    (copy / "src" / "twicing" / room / "planted.py").write_text(f'"""Planted."""\n\n{statement}\n')
    done = lint(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert named in done.stdout
