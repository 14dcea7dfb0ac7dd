"""record_attention never fails silently: what it cannot see, or did not see, is an error that says what to do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from twicing.adapters.surgery import convert
from twicing.analysis.attention_inputs import record_attention


def matrix(inputs):
    return inputs.matrix()


@pytest.fixture
def model(make_vit):
    return make_vit()


@pytest.fixture
def images():
    return torch.rand(4, 1, 8, 8)


def test_a_layer_that_calls_sdpa_twice_is_an_error(model, images, monkeypatch):
    norm = model.blocks[1].attn.q_norm

    class Twice(nn.Module):
        def forward(self, x):
            F.scaled_dot_product_attention(x, x, x)
            return norm(x)

    model.blocks[1].attn.q_norm = Twice()
    with (
        pytest.raises(RuntimeError, match=r"layer 2 .* 2 times: expected once"),
        record_attention(model, reduce=matrix),
    ):
        model(images)


def test_a_model_that_did_not_run_is_an_error(model):
    with (
        pytest.raises(RuntimeError, match="nothing was recorded: run the model"),
        record_attention(model, reduce=matrix),
    ):
        pass


def test_layers_that_did_not_run_are_named(model, images):
    def part_only():
        with record_attention(model, reduce=matrix):
            model.blocks[:2](model._pos_embed(model.patch_embed(images)))

    with pytest.raises(RuntimeError, match="1 calls of a layer were seen, but layer 3: 0"):
        part_only()


def test_models_that_cannot_be_looked_into_are_refused(model):
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    with pytest.raises(ValueError, match="compiled model"), record_attention(compiled, reduce=matrix):
        pass
    with pytest.raises(ValueError, match="no attention layers"), record_attention(nn.Linear(2, 2), reduce=matrix):
        pass


def test_an_unknown_layer_is_an_error(model, images):
    with record_attention(model, reduce=matrix) as recorded:
        model(images)
    with pytest.raises(KeyError, match=r"nothing is recorded of layer 4: there are the layers \[1, 2, 3\]"):
        recorded.tensor(4)


def test_a_converted_layer_that_passes_its_mechanism_by_is_an_error(model, images, monkeypatch):
    convert(model, "twicing", layers="2")

    def forward(self, x, attn_mask=None, is_causal=False):
        return self.proj(x)

    monkeypatch.setattr(type(model.blocks[1].attn), "forward", forward)
    message = r"layer 2 .* ran its mechanism no times: expected once.*use_cache=False"
    with pytest.raises(RuntimeError, match=message), record_attention(model, reduce=matrix):
        model(images)
