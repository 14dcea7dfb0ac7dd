"""What is evaluated: the trained models of a run folder, each with its held-out images and its own choice of probes."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from twicing.data.images import Images
from twicing.experiments.arms import Arm
from twicing.experiments.evaluate.weights import fingerprint
from twicing.experiments.job import part_file
from twicing.experiments.plan import CONFIG, Job, Plan, Resources, first_difference
from twicing.experiments.results import read_json
from twicing.experiments.run import DATA_CACHE
from twicing.experiments.vision_job import converted_model
from twicing.training.checkpoint import CHECKPOINT
from twicing.training.choice import balanced_order
from twicing.training.classification import load_trained
from twicing.training.recipe import Recipe, find_recipe
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
    config = read_json(run / CONFIG)
    try:
        recipe: Recipe = _rebuilt(find_recipe(config["recipe_name"]), config["recipe"])
        plan = Plan(recipe, tuple(Arm(**arm) for arm in config["arms"]), tuple(config["seeds"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run / CONFIG} is not of a comparison or training of this version ({error!r}).") from error
    wanted = {key: value for key, value in plan.identity().items() if key in ("recipe", "arms", "seeds")}
    difference = first_difference(config, wanted)
    if difference:
        raise ValueError(f"{run} was made by another version of twicing ({difference}): evaluate it with that one.")
    where = data_dir or (Path(config["data_dir"]) if config.get("data_dir") else None)
    jobs = plan.jobs(run, Resources(where, cache=run / DATA_CACHE))
    trained = [job for job in jobs if part_file(job, "training").exists() and (job.folder / CHECKPOINT).exists()]
    if not trained:
        raise ValueError(f"{run} holds no trained model yet: give the command that made it to go on.")
    # In the order of the arms, not of the trainings.
    places = {arm.label: place for place, arm in enumerate(plan.arms)}
    trained.sort(key=lambda job: (places[job.arm.label], job.seed))
    return [_subject(job) for job in trained], [job.name for job in jobs if job not in trained]


def _subject(job: Job) -> Subject:
    draw_seed = job.seed + job.arm.seed_offset
    evaluation = job.recipe.evaluation

    def build() -> nn.Module:
        model = converted_model(job, draw_seed)
        load_trained(model, draw_seed, job.folder)
        return model.eval()

    def held_out() -> HeldOut:
        split = load_split(job.recipe, job.seed, job.resources.data_dir, job.resources.cache)
        return HeldOut(split.test, split.test_index, balanced_order(split.test.labels))

    return Subject(
        label=job.arm.label,
        seed=job.seed,
        mechanism=job.arm.mechanism,
        layers=job.arm.layers,
        control=job.arm.control,
        folder_name=job.folder.name,
        classes=job.recipe.classes,
        image_size=job.recipe.image_size,
        names_classes=True,
        weights=f"{CHECKPOINT} {fingerprint(job.folder / CHECKPOINT)}",
        protocol=Protocol(job.recipe.name, job.recipe.std, evaluation.eps, evaluation.noise, evaluation.verdict_eps),
        build=build,
        held_out=held_out,
    )


def _rebuilt(config: Any, values: dict[str, Any]) -> Any:
    """The recipe with the values that a config.json keeps; its parts are dataclasses again, its lists tuples."""
    changes = {}
    for name, value in values.items():
        old = getattr(config, name)
        if isinstance(value, dict) and dataclasses.is_dataclass(old):
            changes[name] = _rebuilt(old, value)
        else:
            changes[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(config, **changes)
