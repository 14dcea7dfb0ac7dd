"""docs/performance.md and the committed records agree, and what is committed was measured without a mistake."""

import importlib.util
from pathlib import Path

import pytest
import torch

from twicing.experiments.bench.machine import this_machine
from twicing.experiments.bench.rows import OpsRow, write_rows

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "performance_table.py"
PAGE = ROOT / "docs" / "performance.md"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("performance_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_the_tables_of_the_records(script):
    page = PAGE.read_text(encoding="utf-8")
    assert page == script.with_sections(page, script.sections(script.RECORDS)), (
        "records and page differ: run python scripts/performance_table.py"
    )


def test_no_contender_of_a_committed_record_is_wrong(script):
    for path in sorted(script.RECORDS.glob("*.csv")):
        assert "wrong: " not in path.read_text(encoding="utf-8"), path.name


def test_a_record_becomes_a_section(script, tmp_path):
    shown = {"shape": "1x2x8x4", "tokens": 8, "passes": "forward", "dtype": "float32"}
    rows = [
        OpsRow("measured", 2.0, 1.0, 3.0, 2.0, 5, **shown, contender="SDPA", order=1, ratio=1.0, floor=1.5),
        OpsRow("skipped: no such device.", **shown, contender="triton"),
    ]
    write_rows(tmp_path / "ops-x.csv", rows, this_machine(torch.device("cpu")))
    text = script.sections(tmp_path)
    assert text.startswith("### ops-x.csv\n\n")
    assert "1 threads, allocator " in text
    assert "| 1x2x8x4 | forward | 1.50 | 1.00 |  |" in text
    assert "* triton: skipped: no such device." in text


def test_a_record_of_linear_attention_shows_its_growth(script, tmp_path):
    shown = {"shape": "1x2x8x4", "passes": "forward", "dtype": "float32", "order": 1}
    rows = [
        OpsRow("measured", median_ms=tokens / 500, tokens=tokens, contender="linear", **shown)
        for tokens in (1000, 2000)
    ]
    write_rows(tmp_path / "linear-x.csv", rows, this_machine(torch.device("cpu")))
    text = script.sections(tmp_path)
    assert "**Growth by number of tokens, not causal, forward**" in text
    assert "| linear | 1,000 to 2,000 | 1.00 |" in text


def test_a_page_without_marks_is_refused(script):
    with pytest.raises(ValueError, match="must hold the marks"):
        script.with_sections("no marks", "tables")
