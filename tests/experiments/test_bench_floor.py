"""The floor, and the memory beside it: the arithmetic that DESIGN states, and what a process really takes."""

import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from twicing.experiments.bench.cases import FORWARD, PASSES, TRAINING, parse_case
from twicing.experiments.bench.contenders import all_contenders
from twicing.experiments.bench.floor import forward_floor, product_of, training_floor
from twicing.experiments.bench.memory import _CLEAR, Measurement, peak_growth

CPU = torch.device("cpu")
CONTENDERS = all_contenders(CPU)


def test_floors():
    # The products of the arithmetic: standard attention 2 units and 5, one more product 1.
    assert forward_floor(2.0, 1.0) == 1.5
    assert training_floor(7.0, 1.0) == pytest.approx(10 / 7)
    # Two more backward than forward; a fast product does not lower what the arithmetic says.
    assert training_floor(6.0, 1.0) == 1.5
    assert training_floor(7.0, 0.5) == pytest.approx(10 / 7)


@pytest.mark.parametrize(
    ("shape", "share"),
    [("2x3x64x16", 1.0), ("1x2x256x16-causal", 5 / 8), ("1x1x2048x8-causal", 17 / 32)],
)
def test_the_product_is_one_for_all_heads_and_of_the_triangle_where_causal(shape, share):
    case = parse_case(shape, torch.float32, CPU)
    with FlopCounterMode(display=False) as counter:
        product_of(case)()
    assert counter.get_total_flops() == 2 * share * case.batch * case.heads * case.tokens**2 * case.width


def test_heads_share_a_matrix_where_all_would_not_fit(monkeypatch):
    monkeypatch.setattr("twicing.experiments.bench.floor.MOST_BYTES", 4 * 64 * 64 * 2)
    case = parse_case("1x5x64x16", torch.float32, CPU)
    parts = product_of(case)()
    assert [len(part) for part in parts] == [2, 2, 1], "two heads at a time, and every head once"


@pytest.mark.skipif(not _CLEAR.exists(), reason="the peak of the resident set is known on Linux only")
def test_memory_of_the_dense_form_is_quadratic_and_that_of_sdpa_is_not():
    case = parse_case("1x2x2048x16", torch.float32, CPU)
    matrix = 4 * 2 * 2048**2
    grown = {
        (name, passes): peak_growth(Measurement(CONTENDERS[name], case, passes, threads=1))
        for name in ("SDPA", "dense")
        for passes in PASSES
    }
    assert grown["dense", FORWARD] >= 2 * matrix, "scores and A"
    assert grown["dense", TRAINING] >= 2 * matrix
    assert max(grown["SDPA", passes] for passes in PASSES) < matrix / 2


@pytest.mark.skipif(not _CLEAR.exists(), reason="the peak of the resident set is known on Linux only")
def test_what_making_the_inputs_took_is_not_counted():
    """Inputs are drawn in fp32, 50 MB here; the call itself needs its output, 33.6 MB, and little else."""
    case = parse_case("16x64x64x64", torch.float64, CPU)
    assert 33e6 <= peak_growth(Measurement(CONTENDERS["SDPA"], case, FORWARD, threads=1)) < 40e6


@pytest.mark.parametrize("name", [name for name, one in CONTENDERS.items() if not one.compiles])
def test_another_process_can_be_handed_a_contender(name):
    """Functions made inside functions could not be."""
    inputs = parse_case("1x2x8x8", torch.float32, CPU).inputs()
    handed = pickle.loads(pickle.dumps(CONTENDERS[name]))
    assert torch.equal(handed.attend(*inputs, True), CONTENDERS[name].attend(*inputs, True))
    assert handed.refuses(*inputs, True) == CONTENDERS[name].refuses(*inputs, True)


def test_what_is_compiled_has_no_memory_on_the_cpu():
    case = parse_case("1x1x8x8", torch.float32, CPU)
    assert peak_growth(Measurement(CONTENDERS["dense, compiled"], case, FORWARD, threads=1)) is None
