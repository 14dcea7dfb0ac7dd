"""What every test gets: one thread, deterministic algorithms, and memory of torch.empty that is filled with NaN."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# Here as well as below: fixtures of a module run before those of a test, and two workers share the cores.
torch.set_num_threads(1)

REAL_DATA = Path(os.environ.get("TWICING_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _strict_torch():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Deterministic mode also fills uninitialised memory with NaN, so that a kernel that reads it is caught.
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def real_data():
    """The folder of real data sets that continuous integration has; never needed by a user."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"needs the real data sets, looked for in {REAL_DATA} (set TWICING_TEST_DATA to their folder)")
    return REAL_DATA


@pytest.fixture
def type_in(capfd):
    """Give a command in this process, as in type_in("env"): a fresh process takes seconds to import torch."""

    def call(*arguments):
        from twicing.cli import main

        try:
            main(arguments)
            code, message = 0, ""
        except SystemExit as end:
            # What Python does at exit: a message is an error of code 1.
            code, message = (1, f"{end.code}\n") if isinstance(end.code, str) else (end.code or 0, "")
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err + message)

    return call
