"""The Triton kernels, in Triton's interpreter on the CPU, in processes of their own.

Triton must see TRITON_INTERPRET=1 before anything imports it, and every other test here may have imported it before.
To see more of one file: TRITON_INTERPRET=1 python -m pytest tests/ops/triton_interpreted/check_errors.py
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "triton_interpreted"
FILES = sorted(path.name for path in FOLDER.glob("check_*.py"))


def why_not():
    """Why the interpreter cannot be used, or None."""
    if find_spec("triton") is None:
        return "needs triton (on Linux: pip install triton)"
    try:
        numpy = tuple(map(int, version("numpy").split(".")[:2]))
    except PackageNotFoundError:
        return "Triton's interpreter needs numpy"
    return "Triton's interpreter needs numpy < 2.4" if numpy >= (2, 4) else None


def run(*arguments):
    """pytest in a process of its own, with Triton's interpreter."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_files_are_there():
    assert FILES == ["check_errors.py", "check_operator.py", "check_options.py"]


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.slow
@pytest.mark.parametrize("name", ["check_errors.py", "check_operator.py", "check_options.py"])
def test_in_the_interpreter(name):
    done = run(str(FOLDER / name))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
