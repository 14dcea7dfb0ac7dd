"""The arms of a comparison: standard attention, the mechanisms under test, and the controls of the test itself."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from twicing.adapters.layers import chosen_layers
from twicing.adapters.surgery import convert
from twicing.experiments.results import BASELINE
from twicing.mechanisms.registry import find_mechanism
from twicing.training.cost import equal_cost_mlp_ratio
from twicing.training.recipe import Recipe

# Far from any seed that a comparison uses itself.
OTHER_SEEDS = 100_000

EQUAL_TIME = "standard-equal-time"


@dataclass(frozen=True)
class Arm:
    """One row of the comparison: which mechanism, in which layers, with which options.

    label: its name in the report. control: whether it tests the experiment rather than the mechanism.
    changes: fields of the recipe that this arm has otherwise, such as {"mlp_ratio": 2.1}.
    seed_offset: added to the seed of weights and data order, not to the fold that is held out.
    """

    label: str
    mechanism: str
    layers: str
    meaning: str
    options: dict[str, Any] = field(default_factory=dict)
    control: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    seed_offset: int = 0

    def apply(self, model: nn.Module) -> nn.Module:
        """Put the mechanism into the model, in place; standard attention leaves it untouched."""
        if self.mechanism != BASELINE:
            convert(model, self.mechanism, layers=self.layers, options=self.options)
        return model

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe as this arm follows it."""
        return dataclasses.replace(recipe, **self.changes)

    @property
    def folder_name(self) -> str:
        """The label as a folder's name."""
        return re.sub(r"[^a-zA-Z0-9.-]+", "-", self.label).strip("-")

    def as_json(self) -> dict[str, Any]:
        """What config.json says of the arm."""
        return asdict(self)


def arms_under_test(mechanisms: Sequence[str], layers: Sequence[str]) -> list[Arm]:
    """Standard attention first, then every named mechanism in every placement.

    mechanisms: names or import paths; NAME@LAYERS has a placement of its own, the others take each of `layers`.
    Raises ValueError for an unknown mechanism, and for an arm that is named twice.
    """
    placed: list[tuple[str, str]] = []
    for entry in mechanisms:
        name, at, where = entry.partition("@")
        find_mechanism(name)
        if at and not where:
            raise ValueError(f"a placement is NAME@LAYERS, as in twicing@10-12: got {entry!r}.")
        if name == BASELINE and at:
            raise ValueError(f"{BASELINE!r} is the model as it is and takes no layers: got {entry!r}.")
        placed += [(name, where)] if at else [(name, one) for one in layers]
    # The baseline has no layers, so that several placements name it several times; the user did so only once.
    named = [entry for entry in placed if entry[0] != BASELINE] + [entry for entry in mechanisms if entry == BASELINE]
    twice = sorted({str(one if isinstance(one, str) else one[0]) for one in named if named.count(one) > 1})
    if twice:
        raise ValueError(f"each mechanism is named once: got {', '.join(twice)} more than once.")
    arms = [Arm(BASELINE, BASELINE, "all", "The model as it is, with softmax attention A V.")]
    for name, where in placed:
        if name != BASELINE:
            meaning = f"{name} with its published defaults {_in_words(where)}, the rest standard."
            arms.append(Arm(_label(name, where), name, where, meaning))
    return arms


def controls_of(recipe: Recipe, arms: Sequence[Arm], equal_time: float) -> list[Arm]:
    """The five controls of the arms: what else could have made their differences.

    equal_time: how many times as long as standard's a training step of controlled_arm() takes.
    """
    controlled = controlled_arm(arms, recipe.depth)
    where = _in_words(controlled.layers)
    wide = equal_cost_mlp_ratio(recipe, len(chosen_layers(controlled.layers, recipe.depth)))
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
            f"Standard attention with an MLP ratio of {wide:.4g} instead of {recipe.mlp_ratio:g}: as many "
            f"multiply-adds as twicing {where} takes. Its initial weights cannot be those of the others.",
            control=True,
            changes={"mlp_ratio": wide},
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
            "A/A: standard against standard with other initial weights and another order of the same images. "
            "Its differences are the noise floor.",
            control=True,
            seed_offset=OTHER_SEEDS,
        ),
    ]


def controlled_arm(arms: Sequence[Arm], depth: int) -> Arm:
    """The arm that the controls go by: twicing in the largest number of layers, else the last of the tested arms."""
    tested = [arm for arm in arms if arm.mechanism != BASELINE]
    if not tested:
        return Arm("twicing", "twicing", "all", "Not trained here: what the controls go by.")
    twiced = [arm for arm in tested if arm.mechanism == "twicing"]
    return max(twiced, key=lambda arm: len(chosen_layers(arm.layers, depth))) if twiced else tested[-1]


def refuse_nothing_to_compare(arms: Sequence[Arm]) -> None:
    """Raise ValueError where there is only the baseline."""
    if len(arms) < 2:
        raise ValueError(
            f"there is nothing to compare {BASELINE!r} with: name a mechanism beside it, as in "
            "--mechanisms standard twicing, or add --controls."
        )


def with_equal_time(found: Mapping[str, Any]) -> float | None:
    """The measured ratio that a config.json holds, so that an interrupted comparison goes on with it."""
    for arm in found.get("arms", []):
        if arm.get("label") == EQUAL_TIME:
            return float(arm["changes"]["training_length"])
    return None


def _label(name: str, layers: str) -> str:
    return name if layers == "all" else f"{name} [{layers}]"


def _in_words(layers: str) -> str:
    return "in all layers" if layers == "all" else f"in the layers {layers}"
