"""What a recipe is made of: one frozen value that, with the seed, defines a training and its evaluation."""

from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from twicing.training.augmentation import Augmentation
from twicing.training.evaluation import Evaluation

# Facts of a recipe and its data, which --set cannot change.
FIXED = {"settable": False}

# Where the images come from, and whether they are files that stay on the disk.
SOURCES = {"digits": False, "mnist": False, "cifar10": False, "imagefolder": True, "timm": True}


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
class Cosine:
    """timm's optimiser and schedule: AdamW that decays no bias and no norm, one learning rate for each epoch.

    The rate rises from warmup_rate over the warm-up epochs, falls on a cosine to last_rate, and stays there for
    cooldown_epochs beyond the recipe's epochs. DeiT's released loop names ten of these and ends before them.
    Source: arXiv 1608.03983 (cosine), arXiv 2012.12877, table 9 (DeiT).
    """

    warmup_epochs: int = 5
    warmup_rate: float = 1e-6
    last_rate: float = 1e-5
    cooldown_epochs: int = 10

    def __post_init__(self) -> None:
        for name in ("warmup_epochs", "cooldown_epochs", "warmup_rate", "last_rate"):
            value = getattr(self, name)
            if not isfinite(value) or value < 0:
                raise ValueError(f"cosine.{name} must be a finite number 0 or larger: got {value}.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that defines a training and its evaluation; everything else follows from it and the seed.

    Without `cosine`, AdamW decays all weights and the learning rate makes one cycle by steps (arXiv 1708.07120).
    The last weights count in either case; no epoch is chosen.
    """

    name: str = field(metadata=FIXED)
    title: str = field(metadata=FIXED)
    """What is trained on what, in a few words; {depth} stands for the number of layers."""
    limits: str = field(metadata=FIXED)
    """What the experiment cannot tell, said first in its report."""
    data: str = field(metadata=FIXED)
    """Where the images come from: one of SOURCES."""
    dataset: str = ""
    """A name that timm's create_dataset takes, as "hfds/owner/name"; empty is the folder that is given."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    channels: int
    classes: int
    """0 stands for as many as the data have: with_classes() fills it in."""
    folds: int = field(metadata=FIXED)
    """The data are cut into so many parts, and seed k holds out part k (k wraps around). 0: they have a part of their
    own to hold out."""
    train_images: int = 0
    """Images to train on, a fixed choice with each class's share; 0 is all of them."""
    initialisation: str = field(metadata=FIXED)
    """How weights are drawn, in one sentence."""
    weights: str = field(metadata=FIXED)
    """The same as vision_transformer() takes it."""
    patch_size: int
    depth: int
    width: int
    heads: int
    mlp_ratio: float
    attention_passes: int = field(default=1, metadata=FIXED)
    """2 is the control `two-attentions`: every attention sub-layer runs twice with the same weights."""
    drop_path: float = 0.0
    """Share of a layer's branches that are dropped, rising from 0 in the first layer to this in the last."""
    epochs: int
    batch_size: int
    """Images of a step, over all processes."""
    learning_rate: float
    """Largest learning rate of the schedule (AdamW)."""
    weight_decay: float
    warmup_share: float = 0.2
    """Share of all steps in which the learning rate rises; not used with `cosine`."""
    training_length: float = 1.0
    """Factor on the number of steps of every epoch: above 1, an epoch goes on into the next pass over the data."""
    cosine: Cosine | None = None
    ema_decay: float = 0.0
    """Decay of a running mean of the weights, kept in the checkpoint beside them; 0 is none. What is evaluated are the
    last weights themselves, as in DeiT's script."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    primary: tuple[Primary, ...]
    """At most three metrics, declared before the runs."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    fixed: tuple[str, ...] = field(default=(), metadata=FIXED)
    """Further fields that are facts of this recipe's data."""

    @property
    def headline(self) -> str:
        """The title with what it names filled in."""
        return self.title.format(depth=self.depth)

    @property
    def baseline(self) -> str:
        """The mechanism that the standard model has: softmax attention."""
        return "standard"

    @property
    def all_epochs(self) -> int:
        """Epochs that are trained, cool-down included."""
        return self.epochs + (self.cosine.cooldown_epochs if self.cosine else 0)

    @property
    def reads_files(self) -> bool:
        """Whether the images stay in files and are decoded when they are needed."""
        return SOURCES[self.data]

    @property
    def needs_folder(self) -> bool:
        """Whether the data are in a folder or file that has to be named."""
        return self.data != "digits" and not self.dataset

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_schedule()
        self._check_data()
        for primary in self.primary:
            eps = primary.conditions.get("eps")
            if eps is not None and eps not in self.evaluation.eps:
                raise ValueError(
                    f"evaluation.eps must contain {eps}, spelt so, as {primary.name!r} is a primary metric: got "
                    f"{', '.join(self.evaluation.eps)}."
                )
            if primary.metric.startswith("eps50") and not self.evaluation.eps50:
                raise ValueError(f"evaluation.eps50 must be true, as {primary.name!r} is a primary metric: got false.")

    def _check_numbers(self) -> None:
        for name in ("image_size", "channels", "patch_size", "depth", "width", "heads", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or larger: got {getattr(self, name)}.")
        for name in ("classes", "train_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or larger: got {getattr(self, name)}.")
        if self.image_size % self.patch_size or self.width % self.heads:
            raise ValueError(
                "image_size must be a multiple of patch_size, and width of heads: got "
                f"{self.image_size} and {self.patch_size}, {self.width} and {self.heads}."
            )
        if self.attention_passes not in (1, 2):
            raise ValueError(f"attention_passes must be 1 or 2: got {self.attention_passes}.")
        for name in ("drop_path", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1: got {getattr(self, name)}.")
        for name, lowest in (
            ("learning_rate", 0.0),
            ("mlp_ratio", 0.0),
            ("training_length", 0.0),
            ("weight_decay", None),
        ):
            value = getattr(self, name)
            if not isfinite(value) or (value < 0 if lowest is None else value <= lowest):
                bound = "0 or larger" if lowest is None else "above 0"
                raise ValueError(f"{name} must be a finite number {bound}: got {value}.")
        if len(self.mean) != self.channels or len(self.std) != self.channels or not min(self.std) > 0:
            raise ValueError(
                f"mean and std must have one number for each of the {self.channels} channels, std above 0: got "
                f"{self.mean} and {self.std}."
            )

    def _check_schedule(self) -> None:
        if not 0 < self.warmup_share < 1:
            raise ValueError(f"warmup_share must lie between 0 and 1: got {self.warmup_share}.")
        if self.cosine and self.cosine.warmup_epochs >= self.epochs:
            raise ValueError(
                f"cosine.warmup_epochs must be below epochs: got {self.cosine.warmup_epochs} and {self.epochs}."
            )
        if self.augmentation.mixes and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix mix pairs, so batch_size must be even: got {self.batch_size}.")

    def _check_data(self) -> None:
        if self.data not in SOURCES:
            raise ValueError(f"data must be one of {', '.join(SOURCES)}: got {self.data!r}.")
        if self.dataset and self.data != "timm":
            raise ValueError(f"dataset is a name of timm's and the recipe {self.name} reads no such: leave it empty.")
        if self.folds not in (0, *range(2, 100)):
            raise ValueError(f"folds must be 0 or from 2 to 99: got {self.folds}.")
        if not self.classes and not self.reads_files:
            raise ValueError("classes must be 1 or larger: got 0.")
        if self.reads_files and self.channels != 3:
            raise ValueError(f"image files are read as RGB, so channels must be 3: got {self.channels}.")
        wrong = self.augmentation.for_pixels_only if self.reads_files else self.augmentation.for_files_only
        if wrong:
            kind, other = ("image files", "images in memory") if self.reads_files else ("images in memory", "files")
            raise ValueError(f"augmentation.{wrong} is for {other}, and {self.name} has {kind}: leave it as it is.")
