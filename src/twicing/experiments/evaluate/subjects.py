"""What is evaluated: the trained models of a run folder, each with its held-out images and its own choice of probes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from twicing.data.images import Images
from twicing.experiments.evaluate.weights import fingerprint
from twicing.experiments.plan import Job
from twicing.experiments.trained import trained_jobs
from twicing.experiments.vision_job import converted_model
from twicing.training.checkpoint import CHECKPOINT
from twicing.training.choice import balanced_order
from twicing.training.classification import load_trained
from twicing.training.recipe import Recipe
from twicing.training.split import load_split


@dataclass(frozen=True)
class HeldOut:
    """The images that a model has not seen.

    index: [n], their positions in the whole data set. order: [n], in which they are chosen for attacks: every
    beginning of it has each class in its share.
    """

    images: Images
    index: Tensor
    order: Tensor


@dataclass(frozen=True)
class Protocol:
    """How strong the disturbances are where the command does not say. recipe: its name in the results.

    std: of the model's normalisation, by channel.
    """

    recipe: str
    std: tuple[float, ...]
    eps: tuple[str, ...]
    noise: tuple[str, ...]
    verdict_eps: str


@dataclass(frozen=True)
class Subject:
    """One model. label: its arm, or its name. weights: where they came from, in words and digits.
    image_size: pixels each way. names_classes: whether the classes of held_out() tell what its logits mean.

    build: makes the model, in eval mode, pixels in [0, 1] to logits. held_out: reads the data.
    """

    label: str
    seed: int
    mechanism: str
    layers: str
    control: bool
    folder_name: str
    weights: str
    classes: int
    image_size: int
    names_classes: bool
    protocol: Protocol
    build: Callable[[], nn.Module]
    held_out: Callable[[], HeldOut]

    @property
    def name(self) -> str:
        """What progress and errors call it."""
        return f"{self.label}, seed {self.seed}"

    def as_json(self) -> dict[str, Any]:
        """What the evaluation's folder says of it."""
        kept = ("label", "seed", "mechanism", "layers", "control", "folder_name", "weights")
        return {key: getattr(self, key) for key in kept}


def trained_subjects(run: Path, data_dir: Path | None) -> tuple[list[Subject], list[str]]:
    """Every trained model of a run folder, and the names of those that are not trained yet.

    data_dir: where the recipe's images are now; by default where they were.
    Raises ValueError where the folder is of something else or another version, or holds no trained model.
    """
    jobs, untrained = trained_jobs(run, data_dir)
    if any(not isinstance(job.recipe, Recipe) for job in jobs):
        raise ValueError(
            f"{run} holds language models, and images are needed here: `twicing diagnose` and `twicing analyze` take "
            "both."
        )
    return [_subject(job) for job in jobs], untrained


def _subject(job: Job) -> Subject:
    assert isinstance(job.recipe, Recipe)  # trained_subjects() saw to it
    recipe, draw_seed = job.recipe, job.seed + job.arm.seed_offset
    evaluation = recipe.evaluation

    def build() -> nn.Module:
        model = converted_model(job, draw_seed)
        load_trained(model, draw_seed, job.folder)
        return model.eval()

    def held_out() -> HeldOut:
        split = load_split(recipe, job.seed, job.resources.data_dir, job.resources.cache)
        return HeldOut(split.test, split.test_index, balanced_order(split.test.labels))

    return Subject(
        label=job.arm.label,
        seed=job.seed,
        mechanism=job.arm.mechanism,
        layers=job.arm.layers,
        control=job.arm.control,
        folder_name=job.folder.name,
        classes=recipe.classes,
        image_size=recipe.image_size,
        names_classes=True,
        weights=f"{CHECKPOINT} {fingerprint(job.folder / CHECKPOINT)}",
        protocol=Protocol(recipe.name, recipe.std, evaluation.eps, evaluation.noise, evaluation.verdict_eps),
        build=build,
        held_out=held_out,
    )
