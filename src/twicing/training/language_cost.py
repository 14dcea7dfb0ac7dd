"""Multiply-adds of a language model's blocks, and the feed-forward part with which standard costs what twicing does.

By the algebra of the layers, as in cost.py for images; the softmax over words, the same for all, is left out.
"""

from math import floor

from twicing.training.language_recipe import LanguageRecipe


def block_multiply_adds(recipe: LanguageRecipe, twiced_layers: int = 0) -> int:
    """Multiply-adds of one window through all blocks, twicing (order 2, A kept) in so many of them.

    With N tokens of width C and P = N (N + 1) / 2 pairs under the causal mask: 4 N C^2 for the projections and 2 P C
    for attention (3 P C twiced), as often as there are attention passes, and 2 N C H for a feed-forward part of H.
    Raises ValueError where there are not so many layers, or where layers with two attention passes are to be twiced.
    """
    _check_layers(recipe, twiced_layers)
    tokens, width = recipe.length, recipe.width
    pairs = tokens * (tokens + 1) // 2
    attention = recipe.attention_passes * (4 * tokens * width**2 + 2 * pairs * width)
    feed = 2 * tokens * width * recipe.inner
    return recipe.depth * (attention + feed) + twiced_layers * pairs * width


def equal_cost_inner(recipe: LanguageRecipe, twiced_layers: int) -> int:
    """The number of hidden units with which standard attention costs what twicing in so many layers does.

    Every layer gets the same number more: twiced_layers (N + 1) / (4 depth), rounded (a half upwards).
    Raises ValueError as block_multiply_adds() does.
    """
    _check_layers(recipe, twiced_layers)
    return recipe.inner + floor(twiced_layers * (recipe.length + 1) / (4 * recipe.depth) + 0.5)


def _check_layers(recipe: LanguageRecipe, twiced_layers: int) -> None:
    if not 0 <= twiced_layers <= recipe.depth:
        raise ValueError(f"twiced_layers must be from 0 to {recipe.depth}, the recipe's depth: got {twiced_layers}.")
    if twiced_layers and recipe.attention_passes > 1:
        raise ValueError(f"a layer with {recipe.attention_passes} attention passes cannot be twiced: drop one of both.")
