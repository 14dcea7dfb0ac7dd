"""The controls of a comparison: what else than the mechanism could have made its differences."""

from collections.abc import Mapping, Sequence
from typing import Any

from twicing.adapters.layers import chosen_layers
from twicing.experiments.arms import Arm, placement_in_words
from twicing.experiments.plan import AnyRecipe
from twicing.experiments.programmes import programme_of
from twicing.experiments.results import BASELINE

# Far from any seed that a comparison uses itself.
OTHER_SEEDS = 100_000

EQUAL_TIME = "standard-equal-time"


def controls_of(recipe: AnyRecipe, arms: Sequence[Arm], equal_time: float) -> list[Arm]:
    """The five controls of the arms: what else could have made their differences.

    equal_time: how many times as long as standard's a training step of controlled_arm() takes.
    """
    controlled = controlled_arm(arms, recipe.depth)
    where = placement_in_words(controlled.layers)
    twiced_layers = len(chosen_layers(controlled.layers, recipe.depth))
    changes, wider = programme_of(recipe).widened(recipe, twiced_layers)
    return [
        Arm(
            EQUAL_TIME,
            BASELINE,
            "all",
            f"Standard attention, trained for {equal_time:.2f} times as many steps: the time that {controlled.label} "
            "takes, by steps timed before the comparison. What it gains as well is not worth the time of a mechanism.",
            control=True,
            changes={"training_length": equal_time},
        ),
        Arm(
            "standard-wide",
            BASELINE,
            "all",
            f"Standard attention with {wider}: as many multiply-adds as twicing {where} takes. "
            "Its initial weights cannot be those of the others.",
            control=True,
            changes=changes,
        ),
        Arm(
            "two-attentions",
            BASELINE,
            "all",
            "Every block attends twice, one after the other, with the same weights: twice the attention, "
            "projections included, without giving back what was smoothed away.",
            control=True,
            changes={"attention_passes": 2},
        ),
        Arm(
            "smooth-more",
            "twicing",
            controlled.layers,
            f"A^2 V {where}: it costs what twicing costs and smooths more instead of less. "
            "What it changes as well is not due to giving back what attention smoothed away.",
            {"gain": -1.0},
            control=True,
        ),
        Arm(
            f"{BASELINE} (other seeds)",
            BASELINE,
            "all",
            "A/A: standard against standard with other initial weights and another order of the same data. "
            "Its differences are the noise floor.",
            control=True,
            seed_offset=OTHER_SEEDS,
        ),
    ]


def refuse_other_baseline(recipe: AnyRecipe) -> None:
    """Raise ValueError where standard is not softmax attention: what controls cost and smooth is that of A V."""
    if recipe.baseline != BASELINE:
        raise ValueError(
            f"the controls are made for softmax attention, and standard of {recipe.name} is {recipe.baseline!r}: "
            "leave --controls out."
        )


def controlled_arm(arms: Sequence[Arm], depth: int) -> Arm:
    """The arm that the controls go by: twicing in the largest number of layers, else the last of the tested arms."""
    tested = [arm for arm in arms if arm.mechanism != BASELINE]
    if not tested:
        return Arm("twicing", "twicing", "all", "Not trained here: what the controls go by.")
    twiced = [arm for arm in tested if arm.mechanism == "twicing"]
    return max(twiced, key=lambda arm: len(chosen_layers(arm.layers, depth))) if twiced else tested[-1]


def with_equal_time(found: Mapping[str, Any]) -> float | None:
    """The measured ratio that a config.json holds, so that an interrupted comparison goes on with it."""
    for arm in found.get("arms", []):
        if arm.get("label") == EQUAL_TIME:
            return float(arm["changes"]["training_length"])
    return None
