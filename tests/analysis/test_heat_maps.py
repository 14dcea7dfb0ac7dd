"""Heat maps: recomputed from a fused model they are an unfused one's softmax; laid out and coloured as they say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from twicing.analysis.attention_inputs import record_attention
from twicing.analysis.heat_maps import FEWEST_PATCHES, Patches, patches_of
from twicing.analysis.heat_maps_overlay import OPACITY, overlay


def test_a_fused_models_map_is_the_softmax_of_an_unfused_one(make_vit):
    fused, unfused = make_vit(), make_vit(fused=False)
    images = torch.rand(2, 1, 8, 8)
    explicit = []
    for block in unfused.blocks:
        # With fused_attn off timm forms A itself; its dropout is the only module that sees it.
        block.attn.attn_drop.register_forward_hook(lambda _module, _inputs, attn: explicit.append(attn))
    with record_attention(fused, reduce=lambda inputs: inputs.matrix()) as recorded, torch.no_grad():
        fused(images)
        unfused(images)
    patches = patches_of(fused, 17)
    for layer, attn in enumerate(explicit, start=1):
        found = patches.laid_out(recorded.tensor(layer))
        assert found.shape == (2, 3, 4, 4)
        torch.testing.assert_close(found, attn[:, :, 0, 1:].reshape(2, 3, 4, 4), atol=1e-6, rtol=1e-5)


def test_patches_lie_in_reading_order():
    matrix = torch.zeros(7, 7)
    matrix[0] = torch.arange(7)
    assert Patches(1, 2, 3).laid_out(matrix).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_registers_are_left_out_and_without_a_class_token_patches_are_averaged():
    matrix = torch.arange(36.0).reshape(6, 6)
    assert Patches(2, 2, 2).laid_out(matrix).tolist() == [[2, 3], [4, 5]]
    grid = Patches(0, 2, 3)
    assert grid.laid_out(matrix).tolist() == matrix.mean(0).reshape(2, 3).tolist()
    assert "no class token" in grid.whose
    assert Patches(1, 2, 2).whose == "the class token's"


def test_registers_alone_are_no_class_token():
    matrix = torch.arange(36.0).reshape(6, 6)
    patches = Patches(2, 2, 2, only_registers=True)
    assert patches.laid_out(matrix).tolist() == matrix[2:, 2:].mean(0).reshape(2, 2).tolist()
    assert "no class token" in patches.whose


def test_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"2 x 2 patches and 1 prefix tokens.*\[\.\.\., 5, 5\]: got \[6, 6\]"):
        Patches(1, 2, 2).laid_out(torch.ones(6, 6))


def test_few_patches_are_too_few():
    assert FEWEST_PATCHES == 36
    assert Patches(1, 6, 6).enough
    assert not Patches(1, 5, 7).enough
    assert not Patches(30, 4, 4).enough


def test_the_grid_is_read_from_the_model(make_vit):
    assert patches_of(make_vit(), 17) == Patches(1, 4, 4)
    assert patches_of(make_vit(distilled=True), 18) == Patches(2, 4, 4)
    assert patches_of(make_vit(distilled=True, img_size=(8, 12)), 26) == Patches(2, 4, 6)
    assert patches_of(make_vit(reg_tokens=3), 20) == Patches(4, 4, 4)
    assert patches_of(make_vit(class_token=False, global_pool="avg"), 16) == Patches(0, 4, 4)
    pooled = make_vit(class_token=False, reg_tokens=3, global_pool="avg")
    assert patches_of(pooled, 19) == Patches(3, 4, 4, only_registers=True)
    model = make_vit()
    del model.num_prefix_tokens
    with pytest.raises(ValueError, match="does not say how its 17 tokens lie on the image"):
        patches_of(model, 17)


def test_the_grid_is_read_from_a_config_around_the_model(make_vit):
    outer, inner = nn.Module(), nn.Module()
    outer.add_module("inner", inner)
    inner.add_module("vit", make_vit(distilled=True))
    del inner.vit.num_prefix_tokens
    # The nearest one says it.
    outer.config = SimpleNamespace(image_size=64, patch_size=2)
    inner.config = SimpleNamespace(image_size=8, patch_size=2)
    assert patches_of(outer, 18) == Patches(2, 4, 4)
    assert patches_of(outer, 16) == Patches(0, 4, 4)
    with pytest.raises(ValueError, match="does not say how its 15 tokens lie on the image"):
        patches_of(outer, 15)
    inner.config = SimpleNamespace(image_size=(8, 8), patch_size=2)
    outer.config = None
    with pytest.raises(ValueError, match="does not say how its 18 tokens lie"):
        patches_of(outer, 18)


def test_a_sequential_overlay_goes_from_dark_to_bright_over_the_grey_image():
    black = np.zeros((3, 6, 4))
    heat = np.array([[0.1, 0.2], [0.3, 0.4], [0.2, 0.9]])
    drawn = overlay(black, heat)
    assert drawn.shape == (6, 4, 3)
    assert drawn.dtype == np.uint8
    # A patch is one colour, the smallest the darkest, the largest the brightest.
    assert (drawn[:2, :2] == drawn[0, 0]).all()
    light = drawn[::2, ::2].sum(-1)
    assert light.argmin() == 0
    assert light.argmax() == 5
    white = overlay(np.ones((1, 6, 4)), heat)
    assert np.abs(white.astype(int) - drawn - 255 * (1 - OPACITY)).max() <= 1


def test_a_diverging_overlay_is_white_at_zero():
    heat = np.array([[-0.5, 0.0], [0.25, 0.5]])
    drawn = overlay(np.ones((3, 4, 4)), heat)[::2, ::2].astype(int)
    negative, zero, some, positive = drawn.reshape(4, 3)
    assert zero.min() > 240
    assert negative[2] > negative[0] + 40
    assert positive[0] > positive[2] + 40
    assert positive[2] < some[2] < zero[2]
    # A larger limit makes the same numbers paler.
    assert overlay(np.ones((3, 4, 4)), heat, limit=5.0)[2, 2, 2] > some[2]


def test_a_map_without_differences_is_drawn_and_one_that_does_not_fit_is_refused():
    assert len(np.unique(overlay(np.zeros((3, 4, 4)), np.full((2, 2), 0.25)).reshape(-1, 3), axis=0)) == 1
    with pytest.raises(ValueError, match="3 x 2 patches do not divide an image of 4 x 4"):
        overlay(np.zeros((3, 4, 4)), np.zeros((3, 2)))
