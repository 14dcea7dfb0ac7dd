"""`import twicing` needs torch and nothing else, whatever else is installed."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1] / "pyproject.toml"

# Blocks every module whose name is given, before torch comes; prints what was loaded beside torch and Python's own.
BLOCKED_IMPORT = """
import sys

blocked = set(sys.argv[1].split(","))

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import torch
loaded_by_torch = set(sys.modules)
STATEMENT
loaded = {name.partition(".")[0] for name in set(sys.modules) - loaded_by_torch}
print(sorted(name for name in loaded - {"torch"} if name not in sys.stdlib_module_names))
"""


def optional_modules():
    """The import names of all packages of the extras, as installed here."""
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    wanted = {re.split(r"[<>=\[]", entry)[0].lower() for entries in extras.values() for entry in entries} - {"twicing"}
    names = {
        module
        for module, distributions in packages_distributions().items()
        if wanted & {distribution.lower() for distribution in distributions} and not module.startswith("_")
    }
    assert {"timm", "lightning", "scipy", "sklearn", "rich", "PIL", "numpy"} <= names
    return names


def run_blocked(statement):
    program = BLOCKED_IMPORT.replace("STATEMENT", statement)
    return subprocess.run(
        [sys.executable, "-c", program, ",".join(optional_modules())], capture_output=True, text=True, check=False
    )


def test_importing_twicing_loads_torch_and_nothing_else():
    statement = (
        "import twicing; import twicing.testing; q = torch.randn(1, 2, 4, 8); twicing.twicing_attention(q, q, q)"
    )
    done = run_blocked(statement)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['twicing']"


@pytest.mark.parametrize("module", ["numpy", "timm"])
def test_the_test_above_can_fail(module):
    done = run_blocked(f"import {module}")
    assert "is blocked" in done.stderr


def test_what_the_package_offers():
    import twicing

    assert all(hasattr(twicing, name) for name in twicing.__all__)
    assert twicing.__all__ == sorted(twicing.__all__)
    assert {"boost", "boosted_values", "explain_backend", "twicing_attention"} <= set(twicing.__all__)
