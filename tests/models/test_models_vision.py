"""The pixel model: normalisation inside, weights a function of the seed."""

import pytest
import torch

from twicing.adapters.surgery import convert
from twicing.models.vision import vision_transformer


def build(**changes):
    options = {
        "image_size": 8,
        "patch_size": 2,
        "channels": 1,
        "classes": 10,
        "width": 16,
        "depth": 2,
        "heads": 2,
        "mlp_ratio": 2.0,
        "mean": (0.3,),
        "std": (0.4,),
        "seed": 0,
    }
    return vision_transformer(**(options | changes))


def test_pixels_are_normalised_inside():
    model = build().eval()
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(model(images), model.network((images - 0.3) / 0.4))
    assert model(images).shape == (3, 10)


def test_the_constants_are_not_among_the_weights():
    assert not [name for name in build().state_dict() if name in ("mean", "std")]


def test_channels_have_their_own_constants():
    model = build(channels=2, mean=(0.1, 0.5), std=(0.2, 0.4)).eval()
    images = torch.rand(1, 2, 8, 8)
    by_hand = torch.stack([(images[:, 0] - 0.1) / 0.2, (images[:, 1] - 0.5) / 0.4], dim=1)
    torch.testing.assert_close(model(images), model.network(by_hand))


@pytest.mark.parametrize("seed", [0, 1])
def test_weights_are_a_function_of_the_seed(seed):
    torch.manual_seed(seed + 100)
    first = build(seed=seed).state_dict()
    again = build(seed=seed).state_dict()
    other = build(seed=seed + 1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_two_passes_run_the_attention_twice_with_the_same_weights():
    torch.manual_seed(1)
    once, twice = build(), build(attention_passes=2)
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(weight, twice.state_dict()[name]) for name, weight in once.state_dict().items())
    tokens = torch.randn(2, 17, 16)
    block = once.network.blocks[1]
    x = tokens + block.attn(block.norm1(tokens))
    x = x + block.attn(block.norm1(x))
    x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(twice.network.blocks[1](tokens), x)
    assert not torch.allclose(once.network.blocks[1](tokens), x)


def test_a_mask_reaches_both_passes():
    block = build(attention_passes=2).eval().network.blocks[0]
    tokens = torch.randn(1, 17, 16)
    changed = tokens.clone()
    changed[:, 9:] += 1
    for options in ({"is_causal": True}, {"attn_mask": torch.ones(17, 17, dtype=torch.bool).tril()}):
        ours, other = block(tokens, **options), block(changed, **options)
        torch.testing.assert_close(ours[:, :9], other[:, :9])
        assert not torch.allclose(ours[:, 9:], other[:, 9:])


def test_drop_path_is_in_both_passes_and_off_in_evaluation():
    dropped = build(attention_passes=2, drop_path=0.9)
    block = dropped.network.blocks[1]
    assert block.drop_path1.drop_prob == pytest.approx(0.9)
    tokens = torch.randn(50, 17, 16)
    change = (block.train()(tokens) - tokens).flatten(1).abs().sum(1)
    # All three branches of an image are dropped in .9^3 of the cases.
    assert 0.5 < (change == 0).double().mean() < 0.9
    torch.testing.assert_close(block.eval()(tokens), build(attention_passes=2).network.blocks[1].eval()(tokens))


def test_no_site_is_found_in_two_passes():
    with pytest.raises(ValueError, match=r"network\.blocks\.0\.attn is a timm\.layers\.attention\.Attention"):
        convert(build(attention_passes=2), "twicing")


def test_other_weights_and_passes_are_refused():
    with pytest.raises(ValueError, match="weights must be one of xavier, timm: got 'jax'"):
        build(weights="jax")
    with pytest.raises(ValueError, match="attention_passes must be 1 or 2: got 3"):
        build(attention_passes=3)


def test_timms_weights_are_small_and_xaviers_are_not():
    spreads = [build(weights=weights).network.blocks[0].mlp.fc1.weight.std().item() for weights in ("timm", "xavier")]
    assert spreads[0] == pytest.approx(0.02, rel=0.1)
    assert spreads[1] > 0.1
