"""The arms of a comparison: standard attention and the mechanisms under test. The controls are in controls.py."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from torch import nn

from twicing.adapters.surgery import convert, find_sites, spec
from twicing.experiments.results import BASELINE
from twicing.mechanisms.registry import find_mechanism

Recipe = TypeVar("Recipe")


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

    def apply(self, model: nn.Module, baseline: str = BASELINE) -> nn.Module:
        """Put the mechanism into the model, in place; standard attention leaves it untouched.

        baseline: the mechanism that the recipe's standard model has in all layers, and this arm in those it leaves.
        """
        taken: list[int] = []
        if self.mechanism != BASELINE:
            convert(model, self.mechanism, layers=self.layers, options=self.options)
            taken = [layer for entry in spec(model) for layer in entry["layers"]]
        if baseline != BASELINE:
            left = [site.layer for site in find_sites(model) if site.layer not in taken]
            if left:
                convert(model, baseline, layers=left)
        return model

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe as this arm follows it."""
        return dataclasses.replace(recipe, **self.changes)  # type: ignore[type-var]

    @property
    def folder_name(self) -> str:
        """The label as a folder's name."""
        return re.sub(r"[^a-zA-Z0-9.-]+", "-", self.label).strip("-")

    def as_json(self) -> dict[str, Any]:
        """What config.json says of the arm."""
        return asdict(self)


def arms_under_test(
    mechanisms: Sequence[str],
    layers: Sequence[str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    baseline: str = BASELINE,
) -> list[Arm]:
    """Standard attention first, then every named mechanism in every placement.

    mechanisms: names or import paths; NAME@LAYERS has a placement of its own, the others take each of `layers`.
    options: of mechanisms whose published defaults for such data are other than their own.
    baseline: as of Arm.apply().
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
    own = "softmax attention A V" if baseline == BASELINE else f"the mechanism {baseline} in all layers"
    arms = [Arm(BASELINE, BASELINE, "all", f"The model as it is, with {own}.")]
    for name, where in placed:
        if name != BASELINE:
            meaning = f"{name} with its published defaults {placement_in_words(where)}, the rest standard."
            arms.append(Arm(_label(name, where), name, where, meaning, dict((options or {}).get(name, {}))))
    return arms


def refuse_nothing_to_compare(arms: Sequence[Arm]) -> None:
    """Raise ValueError where there is only the baseline."""
    if len(arms) < 2:
        raise ValueError(
            f"there is nothing to compare {BASELINE!r} with: name a mechanism beside it, as in "
            "--mechanisms standard twicing, or add --controls."
        )


def _label(name: str, layers: str) -> str:
    return name if layers == "all" else f"{name} [{layers}]"


def placement_in_words(layers: str) -> str:
    """Where a mechanism stands, as the end of a sentence."""
    return "in all layers" if layers == "all" else f"in the layers {layers}"
