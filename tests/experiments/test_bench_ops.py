"""`twicing bench ops` as a whole, on shapes of nothing: what it writes, what it leaves out, and how it ends."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from twicing.experiments.bench import cases, ops, plot
from twicing.experiments.bench.cases import PASSES
from twicing.experiments.bench.contenders import Contender, all_contenders
from twicing.experiments.bench.options import OpsOptions
from twicing.experiments.bench.rich_screen import RichScreen
from twicing.experiments.bench.rows import MEASURED, read_rows
from twicing.experiments.bench.screen import PlainScreen
from twicing.experiments.drawing import arm_styles
from twicing.testing import make_inputs

CPU = torch.device("cpu")
RECORDS = Path(__file__).parents[2] / "benchmarks/results"
QUICK = {"shapes": ("1x2x16x8", "1x1x32x8-causal"), "threads": 1, "repeats": 3, "seconds": 0.01, "memory": False}


@pytest.fixture
def planted(monkeypatch):
    """Contenders without the compiled one, which takes seconds, and with one that forgets the correction."""
    known = {name: one for name, one in all_contenders(CPU).items() if not one.compiles}
    known["forgets"] = Contender("forgets", 2, known["SDPA"].attend)
    monkeypatch.setattr(ops, "chosen_contenders", lambda names, device: dict(known))
    return known


def test_every_contender_has_a_row_for_each_shape_and_pass(tmp_path, planted, capsys):
    assert ops.bench_ops(OpsOptions(**QUICK, out=tmp_path), PlainScreen())
    rows, machine = read_rows(tmp_path / "ops-cpu-1-threads-float32.csv")
    assert machine.threads == 1
    named = {(row.shape, row.passes, row.contender) for row in rows}
    assert named == {(shape, passes, name) for shape in QUICK["shapes"] for passes in PASSES for name in planted}
    for row in rows:
        if row.contender == "forgets":
            assert row.status.startswith("wrong: output without a graph off by")
            assert row.median_ms is row.ratio is None
            continue
        assert row.status == MEASURED
        assert row.samples == 3
        assert row.lower_ms <= row.median_ms <= row.upper_ms
        sdpa = next(r for r in rows if (r.shape, r.passes, r.contender) == (row.shape, row.passes, "SDPA"))
        assert row.ratio == pytest.approx(row.median_ms / sdpa.median_ms, rel=1e-4)
        assert (row.share_of_floor is None) == (row.order == 1)
        assert row.share_of_floor is None or row.share_of_floor == pytest.approx(row.floor / row.ratio, rel=1e-4)
        assert row.floor >= 10 / 7 - 1e-4 if row.passes == PASSES[1] else row.floor > 1
    printed = capsys.readouterr().out
    assert "| two SDPA calls |" in printed
    assert "* forgets: wrong: output without a graph off by" in printed
    picture = (tmp_path / "ops-cpu-1-threads-float32.svg").read_text()
    assert "two SDPA calls" in picture
    assert "peak memory [MB]" in picture
    assert "forgets" not in picture


def test_numbers_are_drawn_once_for_all_contenders_and_both_passes(tmp_path, planted, monkeypatch):
    """Of a large shape drawing takes many seconds, and a GPU's benchmark spent most of its time there."""
    drawn = []

    def counted(shape, **options):
        drawn.append(shape)
        return make_inputs(shape, **options)

    monkeypatch.setattr(cases, "make_inputs", counted)
    options = OpsOptions(**QUICK | {"shapes": ("1x3x16x8-causal", "1x3x16x8")}, out=tmp_path)
    assert ops.bench_ops(options, PlainScreen())
    assert drawn == [(1, 3, 16, 8)]


def test_inputs_of_a_case_are_its_own():
    case = cases.parse_case("1x2x5x8", torch.float32, CPU)
    for make in (case.inputs, lambda: (case.upstream(),)):
        spoilt = [tensor.zero_() for tensor in make()]
        assert all(not torch.equal(one, other) for one, other in zip(make(), spoilt, strict=True))
    assert all(tensor.requires_grad and tensor.is_leaf for tensor in case.inputs(needs_grad=True))


def test_the_plot_shows_every_contender_by_a_mark_of_its_own_and_ours_in_full_colours(tmp_path, monkeypatch):
    styles = {}

    def kept(names, controls):
        styles.update(arm_styles(names, controls))
        return styles

    monkeypatch.setattr("twicing.experiments.drawing.arm_styles", kept)
    rows, _ = read_rows(RECORDS / "ops-cpu-2-threads-float32.csv")
    assert plot.draw(rows, tmp_path / "plot.svg", PlainScreen())
    assert set(styles) == {row.contender for row in rows}
    assert len({(style.color, style.marker) for style in styles.values()}) == len(styles)
    assert {name for name, style in styles.items() if style.control} == {"two SDPA calls", "dense", "dense, compiled"}
    ours = [style.color for style in styles.values() if not style.control]
    assert len(set(ours)) == len(ours)


def test_axes_of_less_than_a_decade_have_ticks_too():
    assert plot._ticks(0.9, 2.2, (1.0, 1.5, 2.0, 3.0, 5.0)) == [1.0, 1.5, 2.0]
    assert plot._ticks(11.0, 99.0, (1.0, 2.0, 5.0)) == [20.0, 50.0]
    assert plot._ticks(0.4, 12.0, (1.0, 2.0, 5.0)) == [0.5, 1.0, 2.0, 5.0, 10.0]


def test_without_a_sound_sdpa_there_is_no_ratio(tmp_path, planted, monkeypatch):
    planted["SDPA"] = Contender("SDPA", 1, planted["dense"].attend, is_baseline=True)
    monkeypatch.setattr(ops, "chosen_contenders", lambda names, device: planted)
    ops.bench_ops(OpsOptions(**QUICK, out=tmp_path), PlainScreen())
    rows, _ = read_rows(tmp_path / "ops-cpu-1-threads-float32.csv")
    assert all(row.ratio is row.floor is None for row in rows)
    assert any(row.median_ms is not None for row in rows)


def test_ctrl_c_keeps_what_is_finished(tmp_path, planted, monkeypatch, capsys):
    whole = ops._times

    def stops_at_the_second_shape(case, *arguments):
        if case.is_causal:
            raise KeyboardInterrupt
        return whole(case, *arguments)

    monkeypatch.setattr(ops, "_times", stops_at_the_second_shape)
    assert not ops.bench_ops(OpsOptions(**QUICK, out=tmp_path), PlainScreen())
    rows, _ = read_rows(tmp_path / "ops-cpu-1-threads-float32.csv")
    assert {(row.shape, row.passes) for row in rows} == {("1x2x16x8", passes) for passes in PASSES}
    assert "Stopped. The rows that were finished are kept." in capsys.readouterr().out


def test_what_fails_without_a_graph_only_is_left_out(tmp_path, planted):
    def attend(query, key, value, is_causal):
        if not torch.is_grad_enabled():
            raise RuntimeError("no compiler for inference")
        return planted["dense"].attend(query, key, value, is_causal)

    planted["moody"] = Contender("moody", 2, attend)
    ops.bench_ops(OpsOptions(**QUICK, out=tmp_path), PlainScreen())
    rows, _ = read_rows(tmp_path / "ops-cpu-1-threads-float32.csv")
    assert {row.status for row in rows if row.contender == "moody"} == {
        "failed: RuntimeError: no compiler for inference"
    }


def test_a_compiled_contender_is_timed_or_says_why_not(tmp_path):
    options = OpsOptions(**{**QUICK, "shapes": ("1x1x16x8",)}, contenders=("dense, compiled",), out=tmp_path)
    ops.bench_ops(options, PlainScreen())
    rows, _ = read_rows(tmp_path / "ops-cpu-1-threads-float32.csv")
    assert {row.contender for row in rows} == {"SDPA", "dense, compiled"}
    assert all(row.status == MEASURED or row.status.startswith("failed: ") for row in rows)


def test_on_a_console_of_rich(tmp_path, planted):
    console = Console(record=True, width=120)
    ops.bench_ops(OpsOptions(**QUICK, out=tmp_path), RichScreen(console))
    printed = console.export_text()
    assert "1x2x16x8, forward, float32, floor" in printed
    assert "two SDPA calls" in printed
    assert "Record: " in printed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "float31"}, "Unknown dtype 'float31': did you mean 'float32'"),
        ({"device": "cpus"}, "Unknown device 'cpus': did you mean 'cpu'"),
        ({"shapes": ("3x4",)}, "A shape is batch, heads, tokens and width"),
        ({"shapes": ("1x1x8x8", "1x1x99999x8")}, "1x1x99999x8 cannot be checked"),
        ({"contenders": ("dens",)}, "Unknown contender 'dens'"),
        ({"repeats": 0}, "--repeats must be 1 or larger and --seconds above 0: got 0 and 0.01"),
        ({"shapes": ()}, "--shapes must name one at least"),
        ({"seconds": 0.0}, "--seconds above 0: got 3 and 0.0"),
        ({"threads": 0}, "--threads must be 1 or larger: got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_mean_nothing(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        ops.bench_ops(OpsOptions(**{**QUICK, **changed}, out=tmp_path), PlainScreen())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is no CUDA device that this torch can use: leave out --device cuda"):
        ops.bench_ops(OpsOptions(**QUICK, device="cuda", out=tmp_path), PlainScreen())


WITHOUT_THE_LAB = """
import sys
for name in ("rich", "tyro", "matplotlib", "markupsafe", "timm", "torchvision", "lightning", "scipy", "jinja2"):
    sys.modules[name] = None
from twicing.experiments.bench.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def bare(*arguments):
    command = [sys.executable, "-c", WITHOUT_THE_LAB, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_runs_on_a_machine_with_nothing_but_torch_and_numpy(tmp_path):
    options = (
        f'{{"shapes": ["1x1x8x8"], "contenders": ["dense"], "seconds": 0.01, "memory": false, "out": "{tmp_path}"}}'
    )
    done = bare("ops", options)
    assert done.returncode == 0, done.stderr
    assert "| dense |" in done.stdout
    assert "No plot: matplotlib is missing (pip install 'twicing[lab]')." in done.stdout
    assert [path.suffix for path in tmp_path.iterdir()] == [".csv"]


def test_without_timm_the_model_has_no_table():
    done = bare("model")
    assert done.returncode == 1
    assert done.stderr == "timm is missing: pip install 'twicing[lab]'\n"
