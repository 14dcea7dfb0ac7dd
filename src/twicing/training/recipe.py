"""A recipe is a function that returns a whole configuration; derive another one by changing two fields.

The protocol of `digits` is this library's own: no paper trains on these images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import Any, Literal

from twicing.data.digits import FOLDS
from twicing.names import listed
from twicing.robustness.attacks import PgdPlan
from twicing.robustness.threat import Threat, as_fraction

# Facts of a recipe and its data, which --set cannot change.
FIXED = {"settable": False}

PGD_HEADLINE = "1/16"


@dataclass(frozen=True)
class Primary:
    """A metric that the recipe declares before it is run; these alone are corrected and called a result.

    conditions: which of the metric's records are meant, such as {"threat": "clean"}; {"layer": "last"} is the deepest.
    """

    name: str
    metric: str
    conditions: dict[str, Any]
    better: Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Evaluation:
    """What a trained model is put through. Sizes of noise and attack are fractions of the pixel range [0, 1]."""

    noise: tuple[str, ...] = ("1/16", "1/8", "1/4")
    """Standard deviations of Gaussian noise."""
    eps: tuple[str, ...] = ("1/32", "1/16", "1/8")
    """Largest change of a pixel that FGSM and PGD may make, ascending."""
    pgd_steps: int = 15
    """Steps of PGD, each 3 / steps of eps (0.2 at 15 steps)."""
    pgd_restarts: int = 1
    """Restarts of PGD; each is one run per loss (cross-entropy and margin), each from its own random start."""

    def __post_init__(self) -> None:
        # What cannot be measured is refused here, and not after a training.
        for sd in self.noise:
            if as_fraction(sd, "evaluation.noise") <= 0:
                raise ValueError(f"evaluation.noise must be above 0: got {sd}.")
        sizes = [Threat(eps).eps for eps in self.eps]
        if not sizes or sizes[0] == 0 or any(low >= high for low, high in pairwise(sizes)):
            raise ValueError(f"evaluation.eps must be sizes above 0 in ascending order: got {', '.join(self.eps)}.")
        PgdPlan(self.pgd_steps, None, self.pgd_restarts, ("cross-entropy", "margin"), random_start=True)


@dataclass(frozen=True)
class Recipe:
    """All that defines a training and its evaluation; everything else follows from it and the seed."""

    name: str = field(metadata=FIXED)
    title: str = field(metadata=FIXED)
    """What is trained on what, in a few words; {depth} stands for the number of layers."""
    limits: str = field(metadata=FIXED)
    """What the experiment cannot tell, said first in its report."""
    data: Literal["digits"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int = field(metadata=FIXED)
    channels: int = field(metadata=FIXED)
    classes: int = field(metadata=FIXED)
    folds: int = field(metadata=FIXED)
    """The data are cut into so many parts, and seed k holds out part k (k wraps around)."""
    initialisation: str = field(metadata=FIXED)
    """How weights are drawn, in one sentence."""
    patch_size: int
    depth: int
    width: int
    heads: int
    mlp_ratio: float
    epochs: int
    batch_size: int
    learning_rate: float
    """Largest learning rate of the one-cycle schedule (AdamW)."""
    weight_decay: float
    warmup_share: float
    """Share of all steps in which the learning rate rises."""
    primary: tuple[Primary, ...]
    """At most three metrics, declared before the runs."""
    evaluation: Evaluation = field(default_factory=Evaluation)

    @property
    def headline(self) -> str:
        """The title with what it names filled in."""
        return self.title.format(depth=self.depth)

    def __post_init__(self) -> None:
        counts = ("image_size", "channels", "classes", "patch_size", "depth", "width", "heads", "epochs", "batch_size")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or larger: got {getattr(self, name)}.")
        if self.image_size % self.patch_size or self.width % self.heads:
            raise ValueError(
                "image_size must be a multiple of patch_size, and width of heads: got "
                f"{self.image_size} and {self.patch_size}, {self.width} and {self.heads}."
            )
        if not 0 < self.warmup_share < 1:
            raise ValueError(f"warmup_share must lie between 0 and 1: got {self.warmup_share}.")
        for name, lowest in (("learning_rate", 0.0), ("mlp_ratio", 0.0), ("weight_decay", None)):
            value = getattr(self, name)
            if not isfinite(value) or (value < 0 if lowest is None else value <= lowest):
                bound = "0 or larger" if lowest is None else "above 0"
                raise ValueError(f"{name} must be a finite number {bound}: got {value}.")
        if len(self.mean) != self.channels or len(self.std) != self.channels or min(self.std) <= 0:
            raise ValueError(
                f"mean and std must have one number for each of the {self.channels} channels, std above 0: got "
                f"{self.mean} and {self.std}."
            )
        for primary in self.primary:
            eps = primary.conditions.get("eps")
            if eps is not None and eps not in self.evaluation.eps:
                raise ValueError(
                    f"evaluation.eps must contain {eps}, spelt so, as {primary.name!r} is a primary metric: got "
                    f"{', '.join(self.evaluation.eps)}."
                )


def digits() -> Recipe:
    """Handwritten digits of scikit-learn, 8 x 8 pixels, a ViT of 12 layers: the embedded default, minutes on a CPU."""
    return Recipe(
        name="digits",
        title="a vision transformer of {depth} layers on scikit-learn's handwritten digits",
        limits="smoke demonstration: 1,797 images of 8 x 8 pixels, undefended models; it says nothing about ImageNet",
        data="digits",
        # Mean and deviation of all its pixels, to one digit: constants of the data set, the same for every fold.
        mean=(0.3,),
        std=(0.4,),
        image_size=8,
        channels=1,
        classes=10,
        folds=FOLDS,
        initialisation="Xavier-uniform weights, with which the tokens of so deep a model are alike before training",
        patch_size=2,
        depth=12,
        width=64,
        heads=4,
        mlp_ratio=2.0,
        # Standard attention reaches .92 after ten epochs and gains little after these. Small batches, because 64 images
        # a batch take three times as long to get there.
        epochs=12,
        batch_size=16,
        learning_rate=1e-3,
        weight_decay=0.05,
        warmup_share=0.2,
        primary=(
            Primary(
                f"PGD accuracy at eps {PGD_HEADLINE}",
                "accuracy [share of images]",
                {"threat": "pgd", "eps": PGD_HEADLINE},
                "higher",
            ),
            Primary("clean accuracy", "accuracy [share of images]", {"threat": "clean"}, "higher"),
            Primary(
                "token similarity after the last block",
                "mean pairwise cosine",
                {"layer": "last", "where": "block output", "when": "trained"},
                "neither",
            ),
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"digits": digits}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError that lists the known ones for any other."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: {listed(name, RECIPES)}")
    return RECIPES[name]()
