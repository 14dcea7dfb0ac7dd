"""Multiply-adds by algebra against those counted layer by layer, and a wider standard that costs the same."""

import dataclasses

import pytest
import torch

from twicing.adapters.surgery import convert
from twicing.experiments.bench.multiply_adds import multiply_adds as counted
from twicing.training.classification import build_model
from twicing.training.cost import equal_cost_mlp_ratio, multiply_adds
from twicing.training.recipe import cifar10, digits, imagenet_deit_tiny, mnist

DEIT = dataclasses.replace(imagenet_deit_tiny(), classes=1000)


@pytest.mark.parametrize("recipe", [digits(), mnist(), cifar10()], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("layers", [0, 3, 12])
def test_they_are_those_of_the_model(recipe, layers):
    model = build_model(recipe, 0).eval()
    if layers:
        convert(model, "twicing", layers=f"{13 - layers}-12")
    image = torch.rand(1, recipe.channels, recipe.image_size, recipe.image_size)
    assert multiply_adds(recipe, layers) == counted(model, image)


def test_deit_tiny_costs_what_is_known():
    """DESIGN: 1.254 / 1.276 / 1.343 G with 197 tokens."""
    assert [round(multiply_adds(DEIT, layers) / 1e9, 3) for layers in (0, 3, 12)] == [1.254, 1.276, 1.343]


def test_two_passes_cost_the_attention_twice():
    twice = dataclasses.replace(digits(), attention_passes=2)
    attention = 12 * (4 * 17 * 64**2 + 2 * 17**2 * 64)
    assert multiply_adds(twice) - multiply_adds(digits()) == attention
    with pytest.raises(ValueError, match="a layer with 2 attention passes cannot be twiced: drop one of both"):
        multiply_adds(twice, 1)


@pytest.mark.parametrize("recipe", [digits(), mnist(), cifar10(), DEIT], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("layers", [0, 1, 3, 12])
def test_a_wider_standard_costs_the_same_to_the_nearest_unit(recipe, layers):
    wider = dataclasses.replace(recipe, mlp_ratio=equal_cost_mlp_ratio(recipe, layers))
    tokens = (recipe.image_size // recipe.patch_size) ** 2 + 1
    one_unit = 2 * tokens * recipe.width * recipe.depth
    assert abs(multiply_adds(wider) - multiply_adds(recipe, layers)) <= one_unit / 2
    if layers == 0:
        assert multiply_adds(wider) == multiply_adds(recipe)


def test_the_ratio_gives_whole_units_in_timm():
    """It cuts width * ratio off, so a quotient rounded down would lose one."""
    assert int(44 * (49 / 44)) == 48
    for width in (44, 64):
        for hidden in range(width - 10, 3 * width):
            recipe = dataclasses.replace(digits(), width=width, mlp_ratio=(hidden + 0.5) / width)
            ratio = equal_cost_mlp_ratio(recipe, 12)
            assert int(width * ratio) == hidden + 9


def test_the_ratio_is_that_of_the_model_that_is_built():
    recipe = dataclasses.replace(digits(), mlp_ratio=equal_cost_mlp_ratio(digits(), 12), depth=2)
    assert build_model(recipe, 0).network.blocks[1].mlp.fc1.weight.shape == (128 + 9, 64)


@pytest.mark.parametrize("layers", [-1, 13])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match=rf"twiced_layers must be from 0 to 12, the recipe's depth: got {layers}"):
        equal_cost_mlp_ratio(digits(), layers)
