"""Records: what is written is what is read, with the machine in every row, and tables say what was left out."""

import pytest
import torch

from twicing.experiments.bench.machine import this_machine
from twicing.experiments.bench.rows import DecodeRow, ModelRow, OpsRow, read_rows, timed, write_rows
from twicing.experiments.bench.tables import overview, tables
from twicing.experiments.bench.timing import Spread

SPREAD = Spread(2.0, 1.5, 3.0, 2.25, 7)
SDPA = OpsRow(
    **vars(timed(SPREAD)), shape="1x2x8x4", tokens=8, passes="forward", dtype="float32", contender="SDPA", order=1,
    ratio=1.0, floor=1.5, peak_memory_mb=12.0,
)  # fmt: skip
TWICED = OpsRow(
    **vars(timed(Spread(4.0, 3.5, 123.4, 4.5, 7))), shape="1x2x8x4", tokens=8, passes="forward", dtype="float32",
    contender="dense", ratio=2.0, floor=1.5, share_of_floor=0.75, is_causal=True,
)  # fmt: skip
WRONG = OpsRow(
    "wrong: output off", shape="1x2x8x4", tokens=8, passes="forward", dtype="float32", contender="odd", floor=1.5
)
DECODED = DecodeRow(
    **vars(timed(SPREAD)), tokens=1024, batch=1, heads=8, key_heads=2, width=64, dtype="float32", contender="order 2",
    ratio=2.4, byte_ratio=3.0, ratio_over_bytes=0.8,
)  # fmt: skip
MODEL = ModelRow(
    **vars(timed(SPREAD, per=2)), model="deit", layers="1-12", backend="auto", job="one image", batch=2, ratio=1.25,
    multiply_adds=1_343_000_000, parameters=5_717_416,
)  # fmt: skip


@pytest.mark.parametrize("rows", [[SDPA, TWICED, WRONG], [DECODED], [MODEL]], ids=["ops", "decode", "model"])
def test_what_is_written_is_read(tmp_path, rows):
    machine = this_machine(torch.device("cpu"))
    write_rows(tmp_path / "record.csv", rows, machine)
    assert read_rows(tmp_path / "record.csv") == (rows, machine)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "status\nmeasured\n"], ids=["empty", "other", "incomplete"])
def test_another_file_is_no_record(tmp_path, text):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=r"x.csv is no record of twicing bench, or one of another version: measure it"):
        read_rows(tmp_path / "x.csv")


def test_a_time_is_per_image():
    assert (MODEL.median_ms, MODEL.lower_ms, MODEL.upper_ms, MODEL.mean_ms, MODEL.samples) == (1.0, 0.75, 1.5, 1.125, 7)


def test_the_machine_tells_what_decides_times_and_nothing_else(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SOME_SECRET", "hidden")
    assert this_machine(torch.device("cpu")).allocator == "default"
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    machine = this_machine(torch.device("cpu"))
    assert machine.allocator == "MALLOC_MMAP_THRESHOLD_=1000"
    assert "OMP_NUM_THREADS=1" in machine.threading
    assert machine.threads == 1
    assert f"torch {torch.__version__}" in machine.versions
    assert "hidden" not in str(machine)


def test_a_table_of_calls_in_markdown():
    assert tables([SDPA, TWICED, WRONG])[0].markdown() == (
        "**1x2x8x4, forward, float32, floor 1.50**\n"
        "\n"
        "| contender | ms | quartiles | ratio to SDPA | of the floor | peak MB |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| SDPA | 2 | 1.5 to 3 | 1.00 |  | 12 |\n"
        "| dense | 4 | 3.5 to 123 | 2.00 | 75% |  |\n"
        "\n"
        "* odd: wrong: output off."
    )


def test_an_overview_has_a_line_for_each_shape_and_a_column_for_each_contender():
    table = overview([SDPA, TWICED, WRONG], "ratio")
    assert table.headers == ("shape", "pass", "floor", "SDPA", "dense", "odd")
    assert table.lines == (("1x2x8x4", "forward", "1.50", "1.00", "2.00", ""),)
    assert overview([SDPA, TWICED], "peak_memory_mb").lines[0][3:] == ("12", "")


def test_tables_of_decoding_and_of_models():
    assert tables([DECODED])[0].lines == (("1,024", "order 2", "2", "1.5 to 3", "2.40", "3.00", "0.80"),)
    assert "4 heads share a key" in tables([DECODED])[0].title
    assert tables([MODEL])[0].lines == (("1-12", "auto", "1", "0.75 to 1.5", "1.12", "1.25", "1.343", "5.72"),)
