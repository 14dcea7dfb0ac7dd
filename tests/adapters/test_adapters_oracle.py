"""The converted model against an independent oracle: the untouched model, with every SDPA call rewritten on the way."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock
from torch.overrides import TorchFunctionMode

from twicing.adapters.surgery import convert, undo
from twicing.testing import WRONG_FORMULAS, relative_rms

# Three layers in fp64; one attention alone is within 1.4e-14.
BUDGET = 1e-13


class RewrittenSDPA(TorchFunctionMode):
    """Replaces each call of SDPA by formula(smooth, value), where smooth(v) is that call with v as values."""

    def __init__(self, formula):
        super().__init__()
        self.formula = formula
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        query, key, value, *rest = args
        return self.formula(lambda v: func(query, key, v, *rest, **kwargs), value)


def twiced(smooth, value):
    return smooth(value) + smooth(value - smooth(value))


def by_oracle(run, images, formula=twiced):
    with RewrittenSDPA(formula) as mode:
        output = run(images)
    assert mode.calls == 3
    return output


def with_attention(model, **options):
    """The model with attention modules of other options, which the model's constructor does not offer."""
    for block in model.blocks:
        block.attn = Attention(48, num_heads=3, qkv_bias=True, **options).eval()
    return model


MODELS = {
    "plain": lambda vit: vit(),
    "distilled": lambda vit: vit(VisionTransformerDistilled),
    "qk-norm": lambda vit: vit(qk_norm=True),
    "scale-norm": lambda vit: vit(scale_attn_norm=True),
    "gated": lambda vit: with_attention(vit(), gated=True),
    "narrow-heads": lambda vit: with_attention(vit(), attn_head_dim=8),
    "registers": lambda vit: vit(reg_tokens=3),
    "no-class-token": lambda vit: vit(class_token=False, global_pool="avg"),
    "attention-pooling": lambda vit: vit(class_token=False, global_pool="map"),
    "layer-scale": lambda vit: vit(init_values=0.5),
    "norm-after": lambda vit: vit(block_fn=ResPostBlock),
}


@pytest.mark.parametrize("name", MODELS)
def test_converted_model_equals_the_oracle_and_undo_restores_it(name, small_vit, images):
    model, images = MODELS[name](small_vit).double(), images.double()
    untouched = model(images)
    # Without the head: pooling by attention calls SDPA too, and is no layer.
    expected = by_oracle(model.forward_features, images)

    convert(model, "twicing")
    assert relative_rms(model.forward_features(images), expected) < BUDGET
    assert not torch.equal(model(images), untouched)
    undo(model)
    assert torch.equal(model(images), untouched)


def test_queries_and_keys_keep_their_own_norms(small_vit, images):
    model, images = small_vit(qk_norm=True).double(), images.double()
    with torch.no_grad():
        # Weights alone would not tell the two norms apart: logits hold their product, which is symmetric.
        for block in model.blocks:
            for norm in (block.attn.q_norm, block.attn.k_norm):
                norm.weight.normal_(mean=1.0)
                norm.bias.normal_()
    expected = by_oracle(model, images)
    convert(model, "twicing")
    assert relative_rms(model(images), expected) < BUDGET
    for block in model.blocks:
        block.attn.q_norm, block.attn.k_norm = block.attn.k_norm, block.attn.q_norm
    assert relative_rms(model(images), expected) > 1e3 * BUDGET


@pytest.mark.parametrize("wrong", WRONG_FORMULAS)
def test_the_oracle_rejects_wrong_formulas(wrong, small_vit, images):
    model, images = small_vit().double(), images.double()
    expected = by_oracle(model, images, WRONG_FORMULAS[wrong])
    convert(model, "twicing")
    assert relative_rms(model(images), expected) > 1e3 * BUDGET


@pytest.mark.parametrize("name", ["plain", "qk-norm", "gated"])
def test_without_fused_attention_the_result_is_the_same(name, small_vit, images):
    model, images = MODELS[name](small_vit).double(), images.double()
    expected = by_oracle(model, images)
    for block in model.blocks:
        block.attn.fused_attn = False
    convert(model, "twicing")
    assert relative_rms(model(images), expected) < BUDGET


def test_without_fused_attention_the_hosts_own_scale_counts(small_vit, images):
    model, images = small_vit().double(), images.double()
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.scale = 0.9
    expected = model(images)
    convert(model, "twicing", options={"gain": 0.0})
    assert relative_rms(model(images), expected) < BUDGET


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
def test_masks_reach_the_mechanism(kind, fused, small_vit):
    block = small_vit().double().blocks[0]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, 48, generator=generator, dtype=torch.float64)
    mask = {
        "bool": {"attn_mask": torch.rand(5, 5, generator=generator) > 0.4},
        "float": {"attn_mask": torch.randn(5, 5, generator=generator, dtype=torch.float64)},
        "causal": {"is_causal": True},
    }[kind]
    if kind == "bool":
        mask["attn_mask"].fill_diagonal_(True)
    with RewrittenSDPA(twiced):
        expected = block(x, **mask)
    block.attn.fused_attn = fused
    convert(block, "twicing")
    assert relative_rms(block(x, **mask), expected) < BUDGET
    assert relative_rms(block(x), expected) > 1e3 * BUDGET


def test_causal_prevails_over_a_mask_where_it_does_in_the_host(small_vit):
    block = small_vit().double().blocks[0]
    block.attn.fused_attn = False
    x, mask = torch.randn(2, 5, 48, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    expected = block(x, attn_mask=mask, is_causal=True)
    convert(block, "twicing", options={"gain": 0.0})
    assert relative_rms(block(x, attn_mask=mask, is_causal=True), expected) < BUDGET


def test_gain_zero_is_the_host_bit_for_bit_where_it_calls_sdpa(small_vit, images):
    model = small_vit()
    untouched = model(images)
    convert(model, "twicing", options={"gain": 0.0, "backend": "sdpa"})
    assert torch.equal(model(images), untouched)


def test_the_standard_mechanism_is_the_host_bit_for_bit(small_vit, images):
    model = small_vit()
    untouched = model(images)
    convert(model, "standard")
    assert torch.equal(model(images), untouched)


@pytest.mark.parametrize("which", ["model.train()", "only the dropout"])
def test_attention_dropout_drops_what_the_host_would_drop(which, small_vit, images):
    model, images = small_vit(attn_drop_rate=0.4).double(), images.double()
    for block in model.blocks:
        block.attn.fused_attn = False
    # "Monte Carlo dropout" puts nothing but the dropouts into training.
    model.train() if which == "model.train()" else [block.attn.attn_drop.train() for block in model.blocks]

    def run():
        torch.manual_seed(3)
        return model(images)

    expected = run()
    convert(model, "twicing", options={"gain": 0.0, "backend": "reference"})
    assert relative_rms(run(), expected) < BUDGET
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))
