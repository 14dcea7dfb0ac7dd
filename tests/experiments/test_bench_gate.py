"""The gate before any time: right contenders pass, and nothing wrong gets through, however small a part of it."""

import pytest
import torch

from twicing.experiments.bench.cases import parse_case
from twicing.experiments.bench.contenders import Contender, all_contenders, chosen_contenders
from twicing.experiments.bench.gate import MOST_TOKENS, Gate
from twicing.ops.attention import BACKENDS, twicing_attention
from twicing.ops.reference import attention_matrix
from twicing.testing import WRONG_FORMULAS

CPU = torch.device("cpu")
SOUND = [name for name, one in all_contenders(CPU).items() if not one.compiles]


def case(text, dtype=torch.float32):
    return parse_case(text, dtype, CPU)


def twiced(query, key, value, is_causal):
    return twicing_attention(query, key, value, is_causal=is_causal)


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("shape", ["2x2x63x16", "1x2x197x16-causal", "1x3x16x16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_right_contenders_pass(shape, dtype, name):
    assert Gate(case(shape, dtype)).complaint(all_contenders(CPU)[name]) is None


@pytest.mark.parametrize("wrong", WRONG_FORMULAS.values(), ids=list(WRONG_FORMULAS))
@pytest.mark.parametrize("shape", ["2x2x63x16", "1x1x1024x16", "1x2x256x16-causal"])
def test_wrong_formulas_get_no_time(shape, wrong):
    def attend(query, key, value, is_causal):
        attn = attention_matrix(query, key, is_causal=is_causal)
        return wrong(lambda v: attn @ v, value)

    complaint = Gate(case(shape)).complaint(Contender("planted", 2, attend))
    assert complaint.startswith("wrong: output without a graph off by ")
    assert "the budget is" in complaint


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_a_wrong_gradient_gets_no_time(which):
    def attend(query, key, value, is_causal):
        given = {"query": query, "key": key, "value": value}
        # The same number, with a gradient a thousandth too large.
        given[which] = given[which] + 1e-3 * (given[which] - given[which].detach())
        return twicing_attention(*given.values(), is_causal=is_causal)

    complaint = Gate(case("2x2x63x16")).complaint(Contender("planted", 2, attend))
    assert complaint.startswith(f"wrong: gradient of {which} off by ")


@pytest.mark.parametrize(("enabled", "what"), [(False, "output without a graph"), (True, "output")])
def test_both_forwards_are_checked_as_training_and_inference_may_differ(enabled, what):
    def attend(query, key, value, is_causal):
        return twiced(query, key, value, is_causal) * (1.01 if torch.is_grad_enabled() == enabled else 1.0)

    complaint = Gate(case("1x2x64x16")).complaint(Contender("planted", 2, attend))
    assert complaint.startswith(f"wrong: {what} off by ")


@pytest.mark.parametrize("planted", [1.01, float("nan")], ids=["off", "nan"])
def test_a_bug_in_the_last_head_alone_is_found(planted):
    def attend(query, key, value, is_causal):
        factor = torch.ones(query.shape[:2])
        factor[-1, -1] = planted
        return twiced(query, key, value, is_causal) * factor[..., None, None]

    assert "output without a graph off by" in Gate(case("2x3x64x16")).complaint(Contender("planted", 2, attend))


def test_order_1_is_held_against_standard_attention():
    plain = all_contenders(CPU)["SDPA"]
    gate = Gate(case("1x2x64x16"))
    assert gate.complaint(plain) is None
    assert gate.complaint(Contender("claims to be twicing", 2, plain.attend)).startswith("wrong: output")
    assert gate.complaint(Contender("claims to be plain", 1, twiced)).startswith("wrong: output")


def test_what_raises_is_reported_in_one_line():
    def attend(query, key, value, is_causal):
        raise RuntimeError("no kernel for this\nand a page of more")

    assert Gate(case("1x1x8x8")).complaint(Contender("broken", 2, attend)) == "failed: RuntimeError: no kernel for this"


def test_a_backend_that_refuses_says_why(monkeypatch):
    class Refusing:
        ABOUT = "nothing"

        def __init__(self, refused):
            self.refused = refused

        def refuses(self, call):
            return f"not {list(call.query.shape)}." if call.order in self.refused else None

    monkeypatch.setitem(BACKENDS, "new", Refusing({2}))
    monkeypatch.setitem(BACKENDS, "newer", Refusing({1, 2}))
    contenders = all_contenders(CPU)
    assert list(contenders)[-3:] == ["twicing: new, order 1", "twicing: new", "twicing: newer"]
    assert Gate(case("1x2x8x8")).complaint(contenders["twicing: newer"]) == "skipped: not [1, 2, 8, 8]."


def test_what_cannot_be_checked_is_not_timed():
    with pytest.raises(ValueError, match="1x1x65536x8 cannot be checked: fp64 attention of more than 32768 tokens"):
        Gate(case(f"1x1x{2 * MOST_TOKENS}x8"))


def test_contenders_are_chosen_by_name_and_sdpa_is_always_there():
    assert list(chosen_contenders(("dense",), CPU)) == ["SDPA", "dense"]
    assert len(chosen_contenders((), CPU)) == len(all_contenders(CPU)) > 4
    with pytest.raises(ValueError, match=r"Unknown contender 'dens': did you mean 'dense'"):
        chosen_contenders(("dens",), CPU)


@pytest.mark.parametrize("shape", ["32,3,197,64", "3x197x64", "1x0x8x8", "1x2x8x8-casual", ""])
def test_shapes_that_are_none_are_refused(shape):
    with pytest.raises(ValueError, match="A shape is batch, heads, tokens and width, as in 32x3x197x64 or"):
        case(shape)


def test_a_shape_is_read_and_printed_alike():
    read = case("2x8x1024x64-causal")
    assert (read.shape, read.is_causal, str(read)) == ((2, 8, 1024, 64), True, "2x8x1024x64-causal")
    assert not case("2x8x1024x64").is_causal


def test_one_token_is_refused():
    with pytest.raises(ValueError, match=r"cannot be checked: one token attends to itself alone.*Choose two tokens"):
        Gate(case("1x1x1x16"))
