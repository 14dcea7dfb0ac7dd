"""`twicing bench decode`: the ratio of bytes, the gate that finds a wrong cache, and the whole on a few tokens."""

import pytest
import torch

from twicing.experiments.bench.decode import Cache, bench_decode, complaint
from twicing.experiments.bench.options import DecodeOptions
from twicing.experiments.bench.rows import MEASURED, read_rows
from twicing.experiments.bench.screen import PlainScreen
from twicing.ops.boost import boosted_values
from twicing.ops.call import to_query_heads
from twicing.ops.decode import decode_step
from twicing.ops.decode_state import DecodeState


def cache(tokens=100, heads=4, key_heads=4, dtype=torch.float32):
    return Cache(tokens, 2, heads, key_heads, 16, dtype, torch.device("cpu"))


@pytest.mark.parametrize(("key_heads", "ratio"), [(8, 1.5), (2, 3.0), (1, 5.0)])
def test_the_ratio_of_bytes_is_that_of_the_caches(key_heads, ratio):
    several = cache(heads=8, key_heads=key_heads)
    assert (several.byte_ratio(1), several.byte_ratio(2)) == (1.0, ratio)
    stored = [several.filled(order).bytes_per_token for order in (1, 2)]
    assert stored[1] / stored[0] == ratio


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("key_heads", [4, 1], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_cached_decoding_passes(order, key_heads, dtype):
    assert complaint(cache(key_heads=key_heads, dtype=dtype), order) is None


def forgets_the_correction(query, key, value, state, enable_gqa):
    plain = DecodeState(order=1)
    if state.length:
        for name, tensor in (("keys", state.keys), ("values", state.values)):
            plain.extended(name, tensor)
        plain.keep(state.length)
    output = decode_step(query, key, value, plain, enable_gqa=enable_gqa)
    decode_step(query, key, value, state, enable_gqa=enable_gqa)
    return output


def spoils_the_cache(query, key, value, state, enable_gqa):
    output = decode_step(query, key, value, state, enable_gqa=enable_gqa)
    state.residuals[:, :, -1:] = to_query_heads(value, query, enable_gqa)
    return output


def test_a_step_without_the_correction_gets_no_time():
    assert complaint(cache(), 2, forgets_the_correction).startswith("wrong: a step off by ")


def test_a_cache_that_comes_to_hold_something_else_gets_no_time():
    """Each step is right by what it finds; only the sequence shows that it left the values in place of residuals."""
    assert complaint(cache(), 2, spoils_the_cache).startswith("wrong: a decoded sequence off by ")


def test_the_definition_it_is_held_against_is_the_formula_of_the_library():
    value, smoothed = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(boosted_values(lambda _: smoothed, value), 2.0 * value - smoothed)


def test_rows_for_every_length_and_kind_of_heads(tmp_path, capsys):
    options = DecodeOptions(
        lengths=(16, 32), heads=4, width=8, threads=1, repeats=3, seconds=0.01, out=tmp_path
    )  # fmt: skip
    assert bench_decode(options, PlainScreen())
    rows, _ = read_rows(tmp_path / "decode-cpu-1-threads-float32.csv")
    contenders = {"order 1", "order 2 (twicing)", "SDPA, own cache"}
    assert {(row.tokens, row.key_heads, row.contender) for row in rows} == {
        (tokens, key_heads, name) for tokens in (16, 32) for key_heads in (4, 1) for name in contenders
    }
    assert all(row.status == MEASURED for row in rows)
    for row in rows:
        assert row.byte_ratio == (1.0 if row.order == 1 else {4: 1.5, 1: 3.0}[row.key_heads])
        assert row.ratio_over_bytes == pytest.approx(row.ratio / row.byte_ratio, rel=1e-4)
        assert row.contender != "order 1" or row.ratio == 1.0
    assert "4 heads share a key" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": ()}, "--lengths are whole numbers of at least 1: got none"),
        ({"groups": (0,)}, "--groups are whole numbers of at least 1: got 0"),
        ({"groups": (3,)}, "--groups must divide --heads: got 3 and 8"),
        ({"width": 0}, "--batch, --heads and --width must be 1 or larger: got 1, 8, 0"),
        ({"seconds": -1.0}, "--seconds above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_mean_nothing(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        bench_decode(DecodeOptions(**changed, out=tmp_path), PlainScreen())
