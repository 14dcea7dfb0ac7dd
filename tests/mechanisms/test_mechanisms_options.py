"""Options: checked against the constructor, completed with its defaults, and kept to what JSON can hold."""

import json

import pytest
from torch import nn

from twicing.mechanisms import Mechanism, Standard, Twicing
from twicing.mechanisms.options import build, complete_options


class NeedsStrength(Mechanism):
    def __init__(self, layer, num_heads, head_dim, *, strength, kernel=nn.ReLU):
        super().__init__(layer, num_heads, head_dim)


def takes_anything(layer, num_heads, head_dim, **options):
    return Standard(layer, num_heads, head_dim)


def test_defaults_are_filled_in():
    assert complete_options(Twicing, "twicing", {"gain": 0.5}) == {
        "order": 2,
        "gain": 0.5,
        "learn_gain": False,
        "backend": "auto",
    }
    assert list(complete_options(Twicing, "twicing", {"backend": "sdpa", "order": 3}))[:2] == ["order", "gain"]
    assert complete_options(Twicing, "twicing", None)["gain"] == 1.0
    assert complete_options(Standard, "standard", {}) == {}


def test_a_default_that_json_cannot_hold_is_left_to_the_constructor():
    assert complete_options(NeedsStrength, "needs", {"strength": [1, {"a": None}]}) == {"strength": [1, {"a": None}]}


def test_a_factory_with_free_options_takes_any():
    assert complete_options(takes_anything, "any", {"x": 1}) == {"x": 1}


@pytest.mark.parametrize(
    ("factory", "options", "error", "message"),
    [
        (
            Twicing,
            {"gian": 1},
            ValueError,
            r"Unknown option 'gian' of the mechanism 'it': did you mean 'gain'\? Known are 'order', 'gain', ",
        ),
        (Twicing, {"layer": 1}, ValueError, "Unknown option 'layer' of the mechanism 'it': known are 'order'"),
        (Standard, {"gain": 1}, ValueError, r"Unknown option 'gain' of the mechanism 'it': known are none\."),
        (NeedsStrength, {}, ValueError, r"needs the options \['strength'\]: pass options=\{'strength': \.\.\.\}"),
        (Twicing, {"gain": float("nan")}, TypeError, "The option 'gain' of 'it' must be a JSON value .* got nan"),
        (Twicing, {"gain": (1, 2)}, TypeError, r"must be a JSON value .* got \(1, 2\)"),
        (takes_anything, {"a": {"b": [{1}]}}, TypeError, "The option 'a' of 'it' must be a JSON value"),
        (takes_anything, {"a": {1: 2}}, TypeError, "must be a JSON value"),
        (Twicing, "gain=1", TypeError, r"options must be a dict, such as \{'gain': 0.5\}: got 'gain=1'"),
    ],
)
def test_wrong_options_are_refused(factory, options, error, message):
    with pytest.raises(error, match=message):
        complete_options(factory, "it", options)


def test_complete_options_survive_json():
    options = complete_options(Twicing, "twicing", {"learn_gain": True})
    assert json.loads(json.dumps(options)) == options


def test_building_checks_what_came_out():
    class WithoutMask(nn.Module):
        def forward(self, query, key, value, *, is_causal, scale, dropout_p, enable_gqa, context):
            return value

    assert isinstance(build(Twicing, "it", {"order": 3}, 1, 2, 3), Twicing)
    with pytest.raises(
        TypeError, match=r"The mechanism 'it' must build a torch\.nn\.Module: for layer 4 it built a str"
    ):
        build(lambda *_: "module", "it", {}, 4, 2, 3)
    with pytest.raises(
        TypeError, match=r"The forward\(\) of the mechanism 'it' must take .*: got an unexpected keyword"
    ):
        build(lambda *_: WithoutMask(), "it", {}, 1, 2, 3)
