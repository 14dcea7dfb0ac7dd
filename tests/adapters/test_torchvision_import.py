"""The mending of the torchvision import, in fresh processes, with stand-ins for torchvision in every state."""

import subprocess
import sys

import pytest

# As torchvision does it: a submodule first, then shape rules for operators whose compiled part may be missing.
BROKEN = """
from torchvision import extension
import torch
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
torch.library.register_fake("torchvision::qnms")(lambda dets, scores, iou_threshold: dets)
"""
MEND = "from twicing.torchvision_import import mend_torchvision_import as mend\nimport sys, torch\n"


def run(code, folder=None):
    path = "" if folder is None else f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    return subprocess.run([sys.executable, "-W", "error", "-c", path + code], capture_output=True, text=True)


@pytest.fixture
def stand_in(tmp_path):
    def make(source):
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text(source)
        (package / "extension.py").write_text("import sys\nsys.times_run = getattr(sys, 'times_run', 0) + 1\n")
        return tmp_path

    return make


def test_timm_imports_after_it():
    # The adapter calls it by itself.
    done = run("import twicing.adapters.timm, timm, torchvision\n" + MEND + "mend()")
    assert done.returncode == 0, done.stderr


def test_missing_operators_are_declared_so_that_the_next_import_works(stand_in):
    folder = stand_in(BROKEN)
    done = run("import torchvision", folder)
    assert "operator torchvision::nms does not exist" in done.stderr
    # What a failed import leaves behind is run again.
    check = "mend(); mend()\nimport torchvision\nassert torch.ops.torchvision.nms\nassert sys.times_run == 2"
    done = run(MEND + check, folder)
    assert done.returncode == 0, done.stderr


def test_a_sound_torchvision_is_left_alone(stand_in):
    done = run(MEND + "mend()\nassert not hasattr(torch.ops.torchvision, 'nms')", stand_in(""))
    assert done.returncode == 0, done.stderr


def test_other_faults_are_left_to_the_import_that_meets_them(stand_in):
    folder = stand_in("raise RuntimeError('another fault')")
    done = run(MEND + "mend()\nassert not hasattr(torch.ops.torchvision, 'nms')\nimport torchvision", folder)
    assert "another fault" in done.stderr
    assert "AssertionError" not in done.stderr


def test_without_torchvision_nothing_happens():
    block = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torchvision':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    done = run(block + MEND + "mend()\nassert not hasattr(torch.ops.torchvision, 'nms')")
    assert done.returncode == 0, done.stderr


def test_the_surgery_needs_no_host():
    code = "import sys, twicing.adapters.surgery\nassert not {'timm', 'torchvision'} & set(sys.modules)"
    done = run(code)
    assert done.returncode == 0, done.stderr
