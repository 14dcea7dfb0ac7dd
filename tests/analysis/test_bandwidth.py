"""Scaled logits: every layer's, whatever mechanism it has, and afterwards the model is what it was, bit for bit."""

import copy
import itertools

import pytest
import torch
from torch import nn

from twicing.adapters.surgery import convert, spec
from twicing.analysis.attention_inputs import record_attention
from twicing.analysis.bandwidth import FACTORS, answers_by_factor, log_probabilities_by_factor, scaled_logits
from twicing.mechanisms import Mechanism

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def everything_of(model):
    """All that could be changed: modules with their classes and attributes, hooks, tensors."""
    return {
        name: (type(module), sorted(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    }


def logits_of(model):
    """The logits of every layer, [layers, B, H, N, N], from A, without the mean of each row, which A does not keep."""
    with record_attention(model, reduce=lambda inputs: inputs.matrix()) as recorded, torch.no_grad():
        model(IMAGES)
    logs = torch.stack([recorded.tensor(layer) for layer in recorded.layers]).double().log()
    return logs - logs.mean(-1, keepdim=True)


@pytest.mark.parametrize("mechanism", [None, "twicing", "neutreno"])
@pytest.mark.parametrize("factor", [0.5, 1.7])
def test_the_first_layers_logits_are_multiplied(make_vit, mechanism, factor):
    model = make_vit()
    if mechanism:
        convert(model, mechanism)
    before = logits_of(model)
    # The pre-hook of the factor was there first, so what is recorded is what the mechanism sees.
    with scaled_logits(model, factor):
        scaled = logits_of(model)
    torch.testing.assert_close(scaled[0], factor * before[0], atol=1e-4, rtol=1e-4)
    # Later layers are scaled too, but of other tokens.
    assert (scaled[2] - before[2]).norm() > 0.1 * abs(factor - 1) * before[2].norm()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("layers", [None, "2-3", "all"])
def test_every_layer_is_scaled_as_by_its_weights(make_vit, fused, layers):
    model = make_vit(fused=fused)
    by_weights = copy.deepcopy(model)
    with torch.no_grad():
        for block in by_weights.blocks:
            # Queries are the first third of the common projection, bias included.
            block.attn.qkv.weight[:24] *= 0.5
            block.attn.qkv.bias[:24] *= 0.5
    if layers:
        convert(model, "twicing", layers=layers)
        convert(by_weights, "twicing", layers=layers)
    with scaled_logits(model, 0.5), torch.no_grad():
        scaled = model(IMAGES)
    torch.testing.assert_close(scaled, by_weights(IMAGES), atol=1e-5, rtol=1e-5)
    assert (scaled - model(IMAGES)).abs().max() > 1e-3


@pytest.mark.parametrize("mechanism", [None, "twicing", "neutreno"])
def test_the_model_is_what_it_was(make_vit, mechanism):
    model = make_vit()
    if mechanism:
        convert(model, mechanism, layers=[2])
    seen = []
    model.blocks[0].attn.register_forward_hook(lambda *_: seen.append(1))
    state, was, entries = copy.deepcopy(model.state_dict()), everything_of(model), spec(model)
    with torch.no_grad():
        before = model(IMAGES)
        with scaled_logits(model, 0.7):
            assert not torch.equal(model(IMAGES), before)
        assert torch.equal(model(IMAGES), before)
        with pytest.raises(KeyError), scaled_logits(model, 2.0):
            raise KeyError("something")
        assert torch.equal(model(IMAGES), before)
    assert everything_of(model) == was
    assert spec(model) == entries
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    # Hooks of others stay and fire.
    assert len(seen) == 4


def test_factor_one_touches_nothing(make_vit):
    model = make_vit()
    was = everything_of(model)
    with scaled_logits(model, 1.0):
        assert everything_of(model) == was


class ByName(Mechanism):
    """Called with its query by name, and blind to `scale`."""

    def forward(self, query, key, value, *, scale=None, **options):
        return (query @ key.mT).softmax(-1) @ value


def test_a_mechanism_that_ignores_the_scale_is_scaled_all_the_same(make_vit):
    model = make_vit()
    convert(model, ByName)
    mechanism = model.blocks[0].attn.twicing_mechanism
    query, key, value = torch.randn(3, 1, 3, 17, 8).unbind(0)
    with scaled_logits(model, 0.5):
        expected = (0.5 * query @ key.mT).softmax(-1) @ value
        torch.testing.assert_close(mechanism(query, key, value), expected)
        torch.testing.assert_close(mechanism(key=key, query=query, value=value), expected)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_other_factors_are_refused(make_vit, factor):
    with pytest.raises(ValueError, match="scaled by a positive number"), scaled_logits(make_vit(), factor):
        pass


def test_factors_go_from_half_to_double():
    assert FACTORS[0] == 0.5
    assert FACTORS[-1] == 2.0
    assert FACTORS[4] == 1.0
    ratios = {round(b / a, 12) for a, b in itertools.pairwise(FACTORS)}
    assert len(ratios) == 1


def test_answers_are_those_of_the_scaled_model_whatever_the_batch(make_vit):
    model = make_vit()
    # What fresh weights say of everything would hide the pictures.
    with torch.no_grad():
        model.head.bias -= model(IMAGES).mean(0)
    passed = []
    found = answers_by_factor(model, IMAGES, (0.25, 1.0, 4.0), batch_size=2, passed=passed.append)
    assert sum(passed) == 15
    assert torch.equal(found, answers_by_factor(model, IMAGES, (0.25, 1.0, 4.0), batch_size=5))
    with torch.no_grad():
        assert torch.equal(found[1], model(IMAGES).argmax(1))
        with scaled_logits(model, 4.0):
            assert torch.equal(found[2], model(IMAGES).argmax(1))
    assert not torch.equal(found[0], found[2])


def test_log_probabilities_are_those_of_the_targets_under_the_scaled_model(make_vit):
    model, targets = make_vit(), torch.tensor([3, 0, 2, 1, 3])
    passed = []
    found = log_probabilities_by_factor(model, IMAGES, targets, (0.5, 1.0), batch_size=2, passed=passed.append)
    assert found.dtype == torch.float64
    assert passed == [2, 2, 1] * 2
    for row, factor in zip(found, (0.5, 1.0), strict=True):
        with torch.no_grad(), scaled_logits(model, factor):
            scores = model(IMAGES).double()
        expected = scores.softmax(1)[torch.arange(5), targets].log()
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(*found)
    with pytest.raises(ValueError, match="a target for each of the 5 inputs: got 4"):
        log_probabilities_by_factor(model, IMAGES, targets[:4])


def test_training_mode_no_images_and_no_attention_are_refused(make_vit):
    model = make_vit()
    with pytest.raises(ValueError, match="got 0 inputs"):
        answers_by_factor(model, IMAGES[:0])
    with pytest.raises(ValueError, match="eval mode"):
        answers_by_factor(model.train(), IMAGES)
    with pytest.raises(ValueError, match="no attention layers"), scaled_logits(nn.Linear(2, 2), 0.5):
        pass
