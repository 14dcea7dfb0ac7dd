"""Standard and Twicing as modules: the same arguments as the operator, the options, the learned gain."""

import copy

import pytest
import torch
import torch.nn.functional as F

from twicing.mechanisms import Mechanism, Standard, Twicing
from twicing.ops.attention import twicing_attention
from twicing.ops.boost import boost
from twicing.testing import WRONG_FORMULAS, check_mechanism, make_inputs, relative_rms

BUDGET = 1.4e-14
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(1)},
    "scale": {"scale": 0.7},
    "grouped": {"enable_gqa": True},
}


def inputs(call="plain", heads=4):
    generator = torch.Generator().manual_seed(0)
    return make_inputs(
        (2, heads, 5, 8), generator=generator, key_heads=2 if call == "grouped" else None, dtype=torch.float64
    )


@pytest.mark.parametrize("call", CALLS)
def test_standard_is_sdpa_bit_for_bit(call):
    query, key, value = inputs(call)
    expected = F.scaled_dot_product_attention(query, key, value, **CALLS[call])
    assert torch.equal(Standard(1, 4, 8)(query, key, value, **CALLS[call]), expected)


@pytest.mark.parametrize("call", CALLS)
def test_twicing_is_the_formula(call):
    query, key, value = inputs(call)
    repeats = query.shape[1] // key.shape[1]
    options = {name: option for name, option in CALLS[call].items() if name != "enable_gqa"}
    all_keys, all_values = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))

    def smooth(v):
        return F.scaled_dot_product_attention(query, all_keys, v, **options)

    smoothed = smooth(all_values)
    expected = smoothed + smooth(all_values - smoothed)
    output = Twicing(1, 4, 8)(query, key, value, **CALLS[call])
    assert relative_rms(output, expected) < BUDGET
    for wrong in WRONG_FORMULAS.values():
        assert relative_rms(output, wrong(smooth, all_values)) > 1e3 * BUDGET


def test_options_reach_the_operator():
    query, key, value = inputs()
    mechanism = Twicing(1, 4, 8, order=3, gain=0.4, backend="reference")
    expected = twicing_attention(query, key, value, order=3, gain=0.4, backend="reference")
    assert torch.equal(mechanism(query, key, value), expected)


def test_dropout_reaches_the_mechanisms():
    query, key, value = inputs()
    for mechanism in (Standard(1, 4, 8), Twicing(1, 4, 8)):
        assert torch.equal(mechanism(query, key, value, dropout_p=1.0), torch.zeros_like(value))


def test_a_learned_gain_is_one_fp32_number_for_each_head():
    mechanism = Twicing(1, 4, 8, gain=0.5, learn_gain=True)
    assert [name for name, _ in mechanism.named_parameters()] == ["gain"]
    assert torch.equal(mechanism.gain, torch.full((4,), 0.5))
    query, key, value = inputs()
    with torch.no_grad():
        mechanism.gain.copy_(torch.tensor([0.0, 0.5, 1.0, -1.0]))
    output = mechanism(query, key, value)
    for head, gain in enumerate(mechanism.gain.tolist()):
        expected = twicing_attention(query, key, value, gain=gain)[:, head]
        assert relative_rms(output[:, head], expected) < BUDGET
    output.sum().backward()
    assert mechanism.gain.grad.shape == (4,)
    assert mechanism.gain.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("factory", "formula"),
    [(Standard, lambda smooth, v: smooth(v)), (Twicing, boost), (lambda *at: Twicing(*at, learn_gain=True), boost)],
    ids=["standard", "twicing", "learned-gain"],
)
def test_the_mechanisms_are_sound(factory, formula):
    check_mechanism(factory, formula=formula)


def test_without_a_learned_gain_there_are_no_parameters():
    assert not list(Twicing(1, 4, 8).parameters())
    assert not list(Standard(1, 4, 8).parameters())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_learned_gain_stays_fp32_and_moves(cast):
    mechanism = Twicing(1, 4, 8, gain=0.3, learn_gain=True)
    mechanism.gain.grad = torch.full((4,), 0.7)
    parameter = mechanism.gain
    getattr(mechanism, cast)()
    assert mechanism.gain is parameter
    assert torch.equal(mechanism.gain, torch.full((4,), 0.3))
    assert torch.equal(mechanism.gain.grad, torch.full((4,), 0.7))
    moved = mechanism.to("meta", torch.float16)
    assert (moved.gain.device.type, moved.gain.dtype) == ("meta", torch.float32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"order": 0}, ValueError, "order must be at least 1"),
        ({"order": 2.0}, TypeError, "order must be an integer"),
        ({"gain": float("inf")}, ValueError, "gain must be finite"),
        ({"gain": "1"}, TypeError, "gain must be a number"),
        ({"gain": torch.ones(4)}, TypeError, "gain must be a number here: with learn_gain=True"),
        ({"order": 1, "gain": 0.5}, ValueError, "gain has no effect with order=1"),
        ({"order": 1, "learn_gain": True}, ValueError, "gain has no effect with order=1"),
        ({"learn_gain": 1}, TypeError, "learn_gain must be True or False: got 1"),
        ({"backend": "spda"}, ValueError, r"Unknown backend 'spda': did you mean 'sdpa'\? Known are 'auto', "),
    ],
    ids=str,
)
def test_options_without_meaning_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Twicing(1, 4, 8, **options)


def test_order_one_is_standard_attention():
    query, key, value = inputs()
    assert torch.equal(Twicing(1, 4, 8, order=1)(query, key, value), Standard(1, 4, 8)(query, key, value))


def test_mechanisms_print_their_formula():
    assert repr(Twicing(1, 4, 8)) == "Twicing(order 2, gain 1)"
    assert repr(Twicing(1, 4, 8, order=3, gain=0.25, backend="sdpa")) == "Twicing(order 3, gain 0.25, backend sdpa)"
    assert repr(Twicing(1, 4, 8, learn_gain=True)) == "Twicing(order 2, gain learned per head)"
    assert repr(copy.deepcopy(Standard(1, 4, 8))) == "Standard()"


def test_a_mechanism_without_forward_says_so():
    query, key, value = inputs()
    with pytest.raises(NotImplementedError, match=r"Mechanism must define forward\(query, key, value"):
        Mechanism(1, 4, 8)(query, key, value)
