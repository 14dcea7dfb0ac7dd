"""Multiply-adds of a recipe's model (the papers' FLOPs), and the width at which standard costs what twicing does.

By the algebra of the layers: weight matrices and the products of attention; norms, softmax and sums are left out.
"""

from math import floor, nextafter

from twicing.training.recipe import Recipe


def multiply_adds(recipe: Recipe, twiced_layers: int = 0) -> int:
    """Multiply-adds of one image through the recipe's model, twicing (order 2, A kept) in so many of its layers.

    With N tokens of width C: 4 N C^2 for the projections and 2 N^2 C for attention (3 N^2 C twiced), as many times as
    there are attention passes; 2 N C H for a feed-forward part of H hidden units; patches and classes beside them.
    Raises ValueError where there are not so many layers, or where layers with two attention passes are to be twiced.
    """
    _check_layers(recipe, twiced_layers)
    tokens, width = _tokens(recipe), recipe.width
    patches = (tokens - 1) * width * recipe.channels * recipe.patch_size**2
    attention = recipe.attention_passes * (4 * tokens * width**2 + 2 * tokens**2 * width)
    feed_forward = 2 * tokens * width * _hidden(recipe)
    correction = twiced_layers * tokens**2 * width
    return patches + recipe.depth * (attention + feed_forward) + correction + width * recipe.classes


def equal_cost_mlp_ratio(recipe: Recipe, twiced_layers: int) -> float:
    """The mlp_ratio with which standard attention costs what twicing in so many layers does, to the nearest unit.

    Every layer gets the same number of hidden units more: twiced_layers N / (2 depth), rounded (a half upwards).
    Raises ValueError as multiply_adds() does.
    """
    _check_layers(recipe, twiced_layers)
    more = floor(twiced_layers * _tokens(recipe) / (2 * recipe.depth) + 0.5)
    hidden = _hidden(recipe) + more
    ratio = hidden / recipe.width
    # timm cuts width * ratio off, and a quotient that was rounded down would lose a whole unit.
    return ratio if int(recipe.width * ratio) == hidden else nextafter(ratio, float("inf"))


def _tokens(recipe: Recipe) -> int:
    return (recipe.image_size // recipe.patch_size) ** 2 + 1


def _hidden(recipe: Recipe) -> int:
    return int(recipe.width * recipe.mlp_ratio)


def _check_layers(recipe: Recipe, twiced_layers: int) -> None:
    if not 0 <= twiced_layers <= recipe.depth:
        raise ValueError(f"twiced_layers must be from 0 to {recipe.depth}, the recipe's depth: got {twiced_layers}.")
    if twiced_layers and recipe.attention_passes > 1:
        raise ValueError(f"a layer with {recipe.attention_passes} attention passes cannot be twiced: drop one of both.")
