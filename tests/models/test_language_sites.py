"""The language model as a host: its attention is found, converted, undone and looked into like that of others."""

import copy

import pytest
import torch
from torch import nn

import twicing
from twicing.adapters import language_sites, surgery
from twicing.analysis.capture import capture
from twicing.models.language import language_model
from twicing.ops.reference import attention_matrix

SIZES = {"vocabulary": 50, "length": 12, "depth": 3, "width": 16, "heads": 2, "inner": 24}


@pytest.fixture
def model():
    # With small initial weights attention would be flat, and mechanisms nearly alike.
    model = language_model(seed=0, **SIZES)
    for block in model.blocks:
        nn.init.normal_(block.attention.qkv.weight, std=0.5)
    return model.double().eval()


@pytest.fixture
def tokens():
    return torch.randint(50, (2, 12))


def test_sites_are_numbered_and_named(model):
    sites = surgery.find_sites(model)
    assert [(site.layer, site.path, site.stack) for site in sites] == [
        (number, f"blocks.{number - 1}.attention", "blocks") for number in (1, 2, 3)
    ]
    for site, block in zip(sites, model.blocks, strict=True):
        assert model.get_submodule(site.path) is site.attention is block.attention
        assert (site.block, site.merge) == (block, block.attention.proj)
        assert (site.num_heads, site.head_dim) == (2, 8)


def test_within_another_module_paths_are_from_there(model):
    outer = nn.ModuleDict({"lm": model})
    sites = list(language_sites.find_sites(outer))
    assert [(site.layer, site.path, site.stack) for site in sites][1] == (2, "lm.blocks.1.attention", "lm.blocks")
    assert list(language_sites.find_sites(nn.Linear(2, 2))) == []


def test_values_are_read_off_the_common_projection(model, tokens):
    site = surgery.find_sites(model)[0]
    seen = {}
    site.attention.qkv.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], qkv=output))
    model(tokens)
    values = site.read_values(seen["qkv"])
    by_head = (seen["x"] @ site.attention.qkv.weight[32:].T).view(2, 12, 2, 8).transpose(1, 2)
    torch.testing.assert_close(values, by_head)


def twiced_by_hand(attention, x):
    q, k, v = attention.qkv(x).chunk(3, -1)
    q, k, v = (part.view(2, 12, 2, 8).transpose(1, 2) for part in (q, k, v))
    matrix = attention_matrix(q, k, is_causal=True)
    smoothed = matrix @ v
    return attention.proj((smoothed + matrix @ (v - smoothed)).transpose(1, 2).reshape(2, 12, 16))


def test_a_converted_layer_computes_twicing_and_the_others_stay(model, tokens):
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    expected = twiced_by_hand(model.blocks[2].attention, x)
    before = [block.attention(x) for block in model.blocks]
    job = twicing.convert(model, "twicing", layers="last-1")
    assert job.layers == (3,)
    torch.testing.assert_close(model.blocks[2].attention(x), expected, rtol=1e-9, atol=1e-9)
    # The first token sees itself only, and there nothing can change.
    assert (expected - before[2])[:, 1:].abs().amax(-1).min() > 1e-3, "the test would not notice"
    assert all(torch.equal(model.blocks[i].attention(x), before[i]) for i in (0, 1))


def test_a_converted_model_is_causal(model, tokens):
    twicing.convert(model, "twicing")
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    torch.testing.assert_close(model(tokens)[:, :7], model(changed)[:, :7], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("mechanism", "options"), [("standard", None), ("twicing", {"gain": 0.0, "backend": "sdpa"})])
def test_off_is_off_to_the_bit(mechanism, options, model, tokens):
    before = model.log_probabilities(tokens)
    twicing.convert(model, mechanism, options=options)
    assert torch.equal(model.log_probabilities(tokens), before)


def test_undone_to_the_bit_and_state_dicts_keep_their_keys(model, tokens):
    before, keys = model(tokens), list(model.state_dict())
    twicing.convert(model, "twicing", layers="2-3")
    assert list(model.state_dict()) == keys
    assert [entry["layers"] for entry in twicing.spec(model)] == [[2, 3]]
    copied = copy.deepcopy(model)
    twicing.undo(copied)
    twicing.undo(model)
    assert torch.equal(model(tokens), before)
    assert torch.equal(copied(tokens), before)


def test_neutreno_reads_the_first_layers_values(model, tokens):
    """In layers 2 and 3: A V + lambda (V_1 - V), V_1 with its gradient."""
    kept = copy.deepcopy(model)
    twicing.convert(model, "neutreno", layers="2-3")
    features = model(tokens)
    assert not torch.isclose(features, kept(tokens)).all()
    lam = 0.6
    words, positions = kept.words_and_positions(tokens)
    x = kept.dropout(words + positions)
    first = None
    for number, block in enumerate(kept.blocks):
        q, k, v = block.attention.qkv(x).view(2, 12, 3, 2, 8).permute(2, 0, 3, 1, 4)
        first = v if number == 0 else first
        attended = attention_matrix(q, k, is_causal=True) @ v + (lam * (first - v) if number else 0)
        x = block.attention_norm(x + block.attention.proj(attended.transpose(1, 2).reshape(2, 12, 16)))
        x = block.feed_norm(x + block.feed(x))
    torch.testing.assert_close(features, x, rtol=1e-9, atol=1e-9)


def test_capture_sees_attention_and_block_outputs(model, tokens):
    inputs, outputs = [], []
    model.blocks[1].attention.proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model.blocks[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    with capture(model) as captured:
        model(tokens)
    assert captured.layers == (1, 2, 3)
    assert torch.equal(captured.tensor("attention output", 2), inputs[0])
    assert torch.equal(captured.tensor("block output", 2), outputs[0])


def test_blocks_that_attend_twice_are_no_layers(tokens):
    model = language_model(seed=0, **SIZES, attention_passes=2)
    assert list(model.attention_sites()) == []
    with pytest.raises(ValueError, match="is not known to the library"):
        twicing.convert(model, "twicing")


def test_other_attention_in_a_block_is_refused(model):
    class MyAttention(nn.Identity):
        pass

    model.blocks[1].attention = MyAttention()
    with pytest.raises(ValueError, match=r"blocks.1.attention is a MyAttention: .* knows CausalSelfAttention only"):
        twicing.convert(model, "twicing")
