"""All recipes by name, and which programme each follows."""

from collections.abc import Callable

from twicing.experiments.language_job import LANGUAGE
from twicing.experiments.plan import AnyRecipe
from twicing.experiments.programme import Programme
from twicing.experiments.vision_job import VISION
from twicing.names import listed
from twicing.training.language_recipes import LANGUAGE_RECIPES
from twicing.training.recipe import RECIPES, Recipe

ALL_RECIPES: dict[str, Callable[[], AnyRecipe]] = {**RECIPES, **LANGUAGE_RECIPES}


def find_any_recipe(name: str) -> AnyRecipe:
    """The recipe of that name. Raises ValueError that lists the known ones for any other."""
    if name not in ALL_RECIPES:
        raise ValueError(f"unknown recipe {name!r}: {listed(name, ALL_RECIPES)}")
    return ALL_RECIPES[name]()


def programme_of(recipe: AnyRecipe) -> Programme:
    """What a job of the recipe consists of."""
    return VISION if isinstance(recipe, Recipe) else LANGUAGE
