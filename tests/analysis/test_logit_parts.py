"""The first layer's logits in parts: they sum to what the layer sees, each is its own side's, other models are told."""

import pytest
import torch
from torch import nn

from twicing.adapters.surgery import convert
from twicing.analysis.attention_inputs import record_attention
from twicing.analysis.logit_parts import PARTS, centred_rows, logit_parts, mean_square, sum_of
from twicing.models.language import language_model

IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def lively(model):
    """Fresh positions are nearly zero, and so are biases."""
    with torch.no_grad():
        model.pos_embed.normal_()
        for name, parameter in model.blocks[0].named_parameters():
            if name.endswith("bias") or "norm1" in name:
                parameter.normal_()
    return model


@pytest.fixture
def model(make_vit):
    return lively(make_vit())


def by_hand(model):
    """In float64, token by token, from the definition alone."""
    captured = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _module, inputs: captured.append(inputs[0]))
    with torch.no_grad():
        model(IMAGES)
    handle.remove()
    x, block = captured[0].double(), model.double().blocks[0]
    position = model.pos_embed.detach()[0]
    sides = {}
    for name, one in (("token", x - position), ("position", position.expand_as(x))):
        deviation = ((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + block.norm1.eps).sqrt()
        normed = block.norm1.weight * (one - one.mean(-1, keepdim=True)) / deviation
        sides[name] = (normed @ block.attn.qkv.weight.T).detach().reshape(2, 17, 3, 3, 8)
    return {
        f"{left}-{right}": torch.einsum("bihd,bjhd->bhij", sides[left][:, :, 0], sides[right][:, :, 1]) / 8**0.5
        for left in sides
        for right in sides
    }


def test_the_parts_are_those_of_the_definition(model):
    found = logit_parts(model, IMAGES)
    expected = by_hand(model)
    assert tuple(found.parts) == PARTS
    for name in PARTS:
        assert found.parts[name].shape == (2, 3, 17, 17)
        torch.testing.assert_close(found.parts[name], expected[name], atol=1e-5, rtol=1e-4)


def test_a_hosts_own_scale_is_in_all_of_them(model):
    plain = logit_parts(model, IMAGES)
    convert(model, "standard")
    # Without the fused kernel timm multiplies by its own scale, and so does what stands in for it.
    attention = model.blocks[0].attn
    attention.fused_attn, attention.scale = False, 3 * attention.scale
    scaled = logit_parts(model, IMAGES)
    torch.testing.assert_close(scaled.logits, 3 * plain.logits)
    for name in PARTS:
        torch.testing.assert_close(scaled.parts[name], 3 * plain.parts[name])


def test_they_sum_to_the_logits_that_the_layer_sees(model):
    found = logit_parts(model, IMAGES)
    torch.testing.assert_close(sum_of(found.parts) + found.rest, found.logits, atol=1e-4, rtol=1e-4)
    with record_attention(model, reduce=lambda inputs: inputs.matrix()) as recorded, torch.no_grad():
        model(IMAGES)
    torch.testing.assert_close(found.logits.softmax(-1), recorded.tensor(1).double(), atol=1e-5, rtol=1e-4)
    assert all(part.norm() > 0.01 * found.logits.norm() for part in (*found.parts.values(), found.rest))


def test_positions_alone_do_not_depend_on_the_image_but_through_the_deviation(make_vit):
    model = lively(make_vit())
    with torch.no_grad():
        model.pos_embed.zero_()
    found = logit_parts(model, IMAGES)
    for name in PARTS[1:]:
        assert found.parts[name].abs().max() == 0
    assert found.parts["token-token"].abs().max() > 0.1


def test_a_converted_and_an_unconverted_layer_have_the_same_parts(model):
    before = logit_parts(model, IMAGES)
    convert(model, "twicing")
    after = logit_parts(model, IMAGES)
    assert all(torch.equal(before.parts[name], after.parts[name]) for name in PARTS)


def test_nothing_is_left_behind(model):
    before = model(IMAGES)
    logit_parts(model, IMAGES)
    assert torch.equal(model(IMAGES), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("options", [{"class_token": False, "global_pool": "avg"}, {"no_embed_class": True}])
def test_prefix_tokens_may_have_no_position(make_vit, options):
    model = lively(make_vit(**options))
    found = logit_parts(model, IMAGES)
    torch.testing.assert_close(sum_of(found.parts) + found.rest, found.logits, atol=1e-4, rtol=1e-4)
    if "no_embed_class" in options:
        assert found.parts["position-token"][:, :, 0].abs().max() == 0
        assert found.parts["position-token"][:, :, 1:].abs().max() > 0


def test_centred_rows_are_the_same_attention():
    logits = torch.randn(2, 5, 5)
    torch.testing.assert_close(centred_rows(logits).softmax(-1), logits.softmax(-1))
    torch.testing.assert_close(centred_rows(logits).sum(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)


def test_causal_rows_are_centred_over_what_a_query_sees():
    logits = torch.randn(2, 5, 5, dtype=torch.float64)
    found = centred_rows(logits, causal=True)
    for row in range(5):
        seen = logits[:, row, : row + 1]
        torch.testing.assert_close(found[:, row, : row + 1], seen - seen.mean(-1, keepdim=True))
        assert not found[:, row, row + 1 :].any()
    entries = torch.cat([found[:, row, : row + 1] for row in range(5)], dim=1)
    torch.testing.assert_close(mean_square(found, causal=True), entries.square().mean(1))
    torch.testing.assert_close(mean_square(logits), logits.square().mean((-1, -2)))


SENTENCES = torch.randint(20, (2, 7), generator=torch.Generator().manual_seed(1))


def lively_language_model(**options):
    sizes = {"vocabulary": 20, "length": 9, "depth": 2, "width": 16, "heads": 2, "inner": 8}
    model = language_model(seed=2, **sizes, **options).eval()
    with torch.no_grad():
        for name, parameter in model.blocks[0].named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_the_parts_of_a_language_model_are_those_of_words_and_positions(norm, positions):
    model = lively_language_model(norm=norm, positions=positions, attention_bias=True)
    found = logit_parts(nn.Sequential(model), SENTENCES)
    assert found.causal
    words, width = model.embedding.weight[SENTENCES].double(), 16
    if positions == "learned":
        added = model.position.weight[:7].double()
    else:
        words = words * width**0.5
        # Counted from the end, all sines before all cosines.
        place = torch.arange(6, -1, -1, dtype=torch.float64)
        angles = place[:, None] * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        added = torch.cat([angles.sin(), angles.cos()], 1)
    block, sides = model.blocks[0], {}
    x = words + added
    for name, one in (("token", words), ("position", added.expand_as(words))):
        if norm == "pre":
            deviation = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            one = block.attention_norm.weight.double() * (one - one.mean(-1, keepdim=True)) / deviation
        sides[name] = (one @ block.attention.qkv.weight.double().T).detach().reshape(2, 7, 3, 2, 8)
    for name in PARTS:
        left, right = (sides[side] for side in name.split("-"))
        expected = torch.einsum("bihd,bjhd->bhij", left[:, :, 0], right[:, :, 1]) / 8**0.5
        torch.testing.assert_close(found.parts[name], expected, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(sum_of(found.parts) + found.rest, found.logits, atol=1e-5, rtol=1e-3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_other_tokens_than_words_and_positions_are_noticed():
    model = lively_language_model()
    model.dropout.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    with pytest.raises(ValueError, match="what enters the first layer of LanguageModel is not its words and positions"):
        logit_parts(model, SENTENCES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pos_embed": "none"}, "keeps no additive absolute positions"),
        ({"qk_norm": True}, "has a q_norm"),
        ({"pre_norm": True}, "has a norm_pre"),
    ],
)
def test_other_models_are_told_why(make_vit, options, message):
    with pytest.raises(ValueError, match=message):
        logit_parts(make_vit(**options), IMAGES)


def test_another_norm_and_added_positions_that_differ_are_told(make_vit, model):
    other = make_vit()
    other.blocks[0].norm1 = nn.Identity()
    with pytest.raises(ValueError, match="not a LayerNorm norm1"):
        logit_parts(other, IMAGES)
    model.pos_drop.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    with pytest.raises(ValueError, match="does not add pos_embed to its patches as it is"):
        logit_parts(model, IMAGES)


def test_a_step_that_is_not_known_is_noticed(model):
    # As rotary positions would: something happens to the queries after the projection.
    model.blocks[0].attn.qkv.register_forward_hook(lambda _module, _inputs, output: output.roll(1, dims=1))
    with pytest.raises(ValueError, match=r"miss the logits of layer 1 by .* a step that is not known here"):
        logit_parts(model, IMAGES)
