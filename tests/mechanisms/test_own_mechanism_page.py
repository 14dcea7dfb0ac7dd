"""docs/own_mechanism.md: its code runs, its table names every check, and what it says of the context is so."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from twicing.mechanisms.registry import find_mechanism
from twicing.testing import CHECKS, MechanismError, check_mechanism, checked
from twicing.torchvision_import import mend_torchvision_import

PAGE = (Path(__file__).parents[2] / "docs" / "own_mechanism.md").read_text(encoding="utf-8")


@pytest.fixture
def page_module(tmp_path, monkeypatch):
    """All blocks as one file, since a mechanism must be found by its import path."""
    mend_torchvision_import()
    (tmp_path / "my_file.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module("my_file")
    del sys.modules["my_file"]


def test_the_code_runs_and_does_what_the_page_says(page_module, capsys):
    assert page_module.logits.shape == (1, 1000)
    assert "layer 3 = blocks.2.attn: Attention -> my_file:MyAttention (share 0.5)" in str(page_module.job)
    assert [site.converted for site in page_module.twicing.adapters.surgery.find_sites(page_module.model)] == [
        "my_file:Inertia"
    ] * 4
    assert checked(find_mechanism("my_file:MyAttention"), "my_file:MyAttention") is page_module.MyAttention
    with pytest.raises(MechanismError, match="formula"):
        check_mechanism(page_module.Inertia, formula_across=lambda smooth, v, earlier: smooth(v) + earlier[1] - v)


def test_the_table_has_every_check():
    assert re.findall(r"^\| ([a-z ]+?) \| (?!what it asks)", PAGE, flags=re.MULTILINE) == list(CHECKS)
