"""The arms of a comparison: standard attention, the mechanisms under test, and the controls of the test itself."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from twicing.adapters.surgery import convert
from twicing.experiments.results import BASELINE
from twicing.mechanisms.registry import find_mechanism

# Far from any seed that a comparison uses itself.
OTHER_SEEDS = 100_000


@dataclass(frozen=True)
class Arm:
    """One row of the comparison: which mechanism, in which layers, with which options.

    label: its name in the report. control: whether it tests the experiment rather than the mechanism.
    seed_offset: added to the seed of weights and data order, not to the fold that is held out.
    """

    label: str
    mechanism: str
    layers: str
    meaning: str
    options: dict[str, Any] = field(default_factory=dict)
    control: bool = False
    seed_offset: int = 0

    def apply(self, model: nn.Module) -> nn.Module:
        """Put the mechanism into the model, in place; standard attention leaves it untouched."""
        if self.mechanism != BASELINE:
            convert(model, self.mechanism, layers=self.layers, options=self.options)
        return model

    @property
    def folder_name(self) -> str:
        """The label as a folder's name."""
        return re.sub(r"[^a-zA-Z0-9.-]+", "-", self.label).strip("-")

    def as_json(self) -> dict[str, Any]:
        """What config.json says of the arm."""
        return asdict(self)


def arms_of(mechanisms: Sequence[str], layers: str, controls: bool) -> list[Arm]:
    """Standard attention first, then every named mechanism, then the controls where they are wanted.

    Raises ValueError for an unknown mechanism, for one that is named twice, and where nothing is left to compare.
    """
    for name in mechanisms:
        find_mechanism(name)
    twice = sorted({name for name in mechanisms if list(mechanisms).count(name) > 1})
    if twice:
        raise ValueError(f"each mechanism is named once: got {', '.join(twice)} more than once.")
    tested = [name for name in mechanisms if name != BASELINE]
    if not tested and not controls:
        raise ValueError(
            f"there is nothing to compare {BASELINE!r} with: name a mechanism beside it, as in "
            "--mechanisms standard twicing, or add --controls."
        )
    where = "in all layers" if layers == "all" else f"in the layers {layers}"
    arms = [Arm(BASELINE, BASELINE, "all", "The model as it is, with softmax attention A V.")]
    arms += [
        Arm(name, name, layers, f"{name} with its published defaults {where}, the rest standard.") for name in tested
    ]
    if controls:
        arms.append(
            Arm(
                "smooth-more",
                "twicing",
                layers,
                f"A^2 V {where}: it costs what twicing costs and smooths more instead of less. "
                "What it changes as well is not due to giving back what attention smoothed away.",
                {"gain": -1.0},
                control=True,
            )
        )
        arms.append(
            Arm(
                f"{BASELINE} (other seeds)",
                BASELINE,
                "all",
                "A/A: standard against standard with other initial weights and another order of the same images. "
                "Its differences are the noise floor.",
                control=True,
                seed_offset=OTHER_SEEDS,
            )
        )
    return arms
