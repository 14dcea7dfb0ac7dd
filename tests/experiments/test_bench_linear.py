"""`twicing bench linear`: slopes and crossings from made-up rows, the gate that finds wrong forms, and a small run."""

import pytest
import torch

from twicing.experiments.bench import linear
from twicing.experiments.bench.cases import FORWARD, PASSES, TRAINING, parse_case
from twicing.experiments.bench.contenders import Contender
from twicing.experiments.bench.linear import bench_linear, complaint, linear_contenders
from twicing.experiments.bench.linear_growth import LINEAR, TWICED, crossing, growth_tables, slope
from twicing.experiments.bench.linear_options import LinearOptions
from twicing.experiments.bench.memory import Measurement, peak_growth
from twicing.experiments.bench.rows import MEASURED, OpsRow, read_rows
from twicing.experiments.bench.screen import PlainScreen
from twicing.ops.linear import linear_smoother, twicing_linear_attention
from twicing.testing import WRONG_FORMULAS

CPU = torch.device("cpu")


def case(text, dtype=torch.float32):
    return parse_case(text, dtype, CPU)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_the_slope_of_a_power_law_is_its_exponent(power):
    assert slope([(n, 3.0 * n**power) for n in (64, 128, 1000, 4096)]) == pytest.approx(power)


def test_one_length_has_no_slope():
    assert slope([(64, 1.0)]) is None
    assert slope([]) is None


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([(1000, 0.5), (2000, 0.4)], "below 1,000"),
        ([(1000, 3.0), (2000, 1.5)], "beyond 2,000"),
        # Ratio 2000 / N: it is 1 at 2,000 tokens, between those that were measured.
        ([(500, 4.0), (1000, 2.0), (4000, 0.5), (8000, 0.25)], "about 2,000"),
        # Faster, slower, and faster for good.
        ([(500, 0.9), (1000, 2.0), (4000, 0.5)], "about 2,000"),
        ([(4000, 0.5), (1000, 2.0)], "about 2,000"),
        ([], "not measured"),
    ],
)
def test_a_crossing_is_where_the_ratio_stays_below_one(ratios, said):
    assert crossing(ratios) == said


def made_up(contender, tokens, ms, mb=None, is_causal=False, passes=FORWARD):
    return OpsRow(
        MEASURED, ms, ms, ms, ms, 3, shape=f"1x1x{tokens}x8", tokens=tokens, is_causal=is_causal, passes=passes,
        dtype="float32", contender=contender, peak_memory_mb=mb,
    )  # fmt: skip


def test_growth_is_told_for_every_kind_of_call():
    rows = []
    for tokens in (64, 1024, 4096, 16384):
        # The shortest is far off every law, and is not fitted.
        own = 1e3 if tokens == 64 else tokens / 1024
        rows += [made_up(LINEAR, tokens, own, 0.0 if tokens == 64 else tokens), made_up(TWICED, tokens, 1.5 * own)]
        rows += [made_up(LINEAR, tokens, own, is_causal=True), made_up("SDPA", tokens, (tokens / 2048) ** 2)]
    rows.append(OpsRow("wrong: output off", tokens=99, contender=TWICED, passes=FORWARD))
    whole, causal, crossings = growth_tables(rows)
    assert whole.title == f"Growth by number of tokens, not causal, {FORWARD}"
    assert whole.lines == (
        (LINEAR, "1,024 to 16,384", "1.00", "1.00", "", ""),
        (TWICED, "1,024 to 16,384", "1.00", "", "1.50", "1.50"),
        ("SDPA", "1,024 to 16,384", "2.00", "", "", ""),
    )
    assert causal.title == f"Growth by number of tokens, causal, {FORWARD}"
    assert causal.lines == ((LINEAR, "1,024 to 16,384", "1.00", "", "", ""),)
    assert [bool(table.notes) for table in (whole, causal, crossings)] == [False, True, False]
    # tokens / 1024 = (tokens / 2048)^2 at 4,096 tokens, and 1.5 times as far for the twiced.
    assert crossings.lines == (
        ("not causal", FORWARD, LINEAR, "SDPA", "about 4,096"),
        ("not causal", FORWARD, TWICED, "SDPA", "about 6,144"),
        ("not causal", FORWARD, TWICED, "two SDPA calls", "not measured"),
        ("causal", FORWARD, LINEAR, "SDPA", "not measured"),
        ("causal", FORWARD, TWICED, "SDPA", "not measured"),
        ("causal", FORWARD, TWICED, "two SDPA calls", "not measured"),
    )


def test_the_largest_ratio_is_told_beside_that_of_the_longest():
    rows = [made_up(LINEAR, n, 1.0) for n in (64, 128, 256)]
    rows += [made_up(TWICED, n, ms) for n, ms in ((64, 1.9), (128, 2.3), (256, 1.4))]
    assert growth_tables(rows)[0].lines[1][-2:] == ("1.40", "2.30")
    assert growth_tables([]) == []


@pytest.mark.parametrize("name", [LINEAR, TWICED])
@pytest.mark.parametrize("shape", ["2x2x63x16", "1x2x1500x8-causal", "1x4x16x8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_contenders_pass(shape, dtype, name):
    assert complaint(linear_contenders("relu")[name], case(shape, dtype), "relu") is None


@pytest.mark.parametrize("wrong", WRONG_FORMULAS.values(), ids=list(WRONG_FORMULAS))
@pytest.mark.parametrize("shape", ["1x2x1024x16", "1x2x256x16-causal"])
def test_wrong_formulas_get_no_time(shape, wrong):
    def attend(query, key, value, is_causal):
        return wrong(linear_smoother(query, key, is_causal=is_causal), value)

    planted = Contender("planted", 2, attend)
    assert complaint(planted, case(shape), "elu+1").startswith("wrong: output off by ")


def test_what_goes_wrong_beyond_the_checked_tokens_gets_no_time():
    def forgets_late_tokens(query, key, value, is_causal):
        late = (torch.arange(value.shape[-2]) >= 1100)[:, None]
        return twicing_linear_attention(query, key, value.masked_fill(late, 0.0), None, is_causal)

    planted = Contender("planted", 2, forgets_late_tokens)
    assert complaint(planted, case("1x1x1000x8-causal"), "elu+1") is None
    assert complaint(planted, case("1x1x1200x8-causal"), "elu+1").startswith("wrong: output of all tokens off by ")


def test_a_wrong_gradient_and_an_exception_get_no_time():
    def detached(query, key, value, is_causal):
        return twicing_linear_attention(query, key.detach(), value, None, is_causal) + 0.0 * key

    def breaks(*_):
        raise RuntimeError("out of memory\nand more")

    assert complaint(Contender("planted", 2, detached), case("1x1x64x8"), "elu+1").startswith("wrong: gradient of key")
    assert (
        complaint(Contender("planted", 2, breaks), case("1x1x64x8"), "elu+1") == "failed: RuntimeError: out of memory"
    )


QUICK = {"heads": 2, "width": 8, "threads": 1, "repeats": 3, "seconds": 0.01, "memory": False}


def test_a_small_run_has_a_row_for_everything_and_says_how_it_grows(tmp_path, capsys):
    options = LinearOptions(**QUICK, lengths=(64, 16, 64, 32), softmax_up_to=32, out=tmp_path)
    assert bench_linear(options, PlainScreen())
    rows, machine = read_rows(tmp_path / "linear-cpu-1-threads-float32.csv")
    assert machine.threads == 1
    softmax = {"SDPA", "two SDPA calls"}
    assert [(row.tokens, row.is_causal, row.passes, row.contender) for row in rows] == [
        (tokens, is_causal, passes, name)
        for is_causal in (False, True)
        for tokens in (16, 32, 64)
        for passes in PASSES
        for name in (LINEAR, TWICED, "SDPA", "two SDPA calls")
        if tokens <= 32 or name not in softmax
    ]
    assert all(row.status == MEASURED and row.samples == 3 and row.peak_memory_mb is None for row in rows)
    for row in rows:
        assert (row.ratio is None) == (row.tokens == 64)
        if row.ratio is not None:
            sdpa = next(r for r in rows if (r.shape, r.passes, r.contender) == (row.shape, row.passes, "SDPA"))
            assert row.ratio == pytest.approx(row.median_ms / sdpa.median_ms, rel=1e-4)
    printed = capsys.readouterr().out
    assert "**Growth by number of tokens, causal, forward**" in printed
    assert "| twicing-linear | 16 to 64 |" in printed
    assert "**Faster from how many tokens on**" in printed


def test_a_contender_that_is_wrong_has_a_row_without_a_time(tmp_path, monkeypatch):
    def planted(feature_map):
        known = linear_contenders(feature_map)
        return {**known, TWICED: Contender(TWICED, 2, known[LINEAR].attend)}

    monkeypatch.setattr(linear, "linear_contenders", planted)
    bench_linear(LinearOptions(**QUICK, lengths=(32,), causal=False, out=tmp_path), PlainScreen())
    rows, _ = read_rows(tmp_path / "linear-cpu-1-threads-float32.csv")
    wrong = [row for row in rows if row.contender == TWICED]
    assert [row.passes for row in wrong] == list(PASSES)
    assert all(row.status.startswith("wrong: output off by") and row.median_ms is None for row in wrong)
    assert not any(row.is_causal for row in rows)


def test_peak_memory_is_that_of_the_call_and_grows_with_the_tokens():
    """A fixed part, and for every token some of what autograd keeps, in numbers of the width of a head."""
    grown = []
    for tokens in (20_000, 80_000):
        twiced = linear_contenders("elu+1")[TWICED]
        bytes_grown = peak_growth(Measurement(twiced, case(f"1x1x{tokens}x32"), TRAINING, threads=1))
        if bytes_grown is None:
            pytest.skip("only Linux tells the growth of a process")
        grown.append(bytes_grown)
    # 14 to 26, by how the allocator cuts its memory; a dense A would take 80,000 / 32 = 2,500 for each token.
    assert 6 < (grown[1] - grown[0]) / (60_000 * 32 * 4) < 60


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": ()}, "--lengths are whole numbers of at least 16: got none"),
        ({"lengths": (64, 1)}, "--lengths are whole numbers of at least 16: got 64 1"),
        ({"softmax_up_to": -1}, "--softmax-up-to must be 0 or larger: got -1"),
        ({"heads": 0}, "--batch, --heads and --width must be 1 or larger: got 1, 0, 8"),
        ({"feature_map": "gelu"}, "Unknown feature map 'gelu'"),
        ({"dtype": "int8"}, "Unknown dtype 'int8'"),
        ({"seconds": 0.0}, "--seconds above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_mean_nothing(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        bench_linear(LinearOptions(**{**QUICK, **changed}, out=tmp_path), PlainScreen())
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_what_is_finished_and_still_tells_how_it_grows(tmp_path, monkeypatch, capsys):
    whole = linear.interleaved

    def stops(calls, device, **effort):
        if "SDPA" not in calls:
            raise KeyboardInterrupt
        return whole(calls, device, **effort)

    monkeypatch.setattr(linear, "interleaved", stops)
    assert not bench_linear(LinearOptions(**QUICK, lengths=(16, 32), softmax_up_to=16, out=tmp_path), PlainScreen())
    rows, _ = read_rows(tmp_path / "linear-cpu-1-threads-float32.csv")
    assert {row.tokens for row in rows} == {16}
    assert "Growth by number of tokens" in capsys.readouterr().out
