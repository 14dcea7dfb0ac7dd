"""The pixel model: normalisation inside, weights a function of the seed."""

import pytest
import torch

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
