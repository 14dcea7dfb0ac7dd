"""What is done to one image classifier of a comparison: its training and its evaluation, part by part."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twicing.experiments.attacking import leave_adversarial, look_for_masking, under_fgsm, under_pgd
from twicing.experiments.job_model import has_sites, similarity_of, with_mechanism
from twicing.experiments.metrics import HELD_OUT_ACCURACY, STEP_TIME, TRAINING_LOSS, TRAINING_TIME
from twicing.experiments.parts import Finding, Part
from twicing.experiments.plan import Job, Resources
from twicing.experiments.programme import Kind, Programme, Progress
from twicing.robustness.noise import gaussian_noise
from twicing.training.choice import balanced_order
from twicing.training.classification import build_model, load_trained, train_classifier
from twicing.training.cost import equal_cost_mlp_ratio
from twicing.training.order import training_steps
from twicing.training.recipe import Recipe
from twicing.training.split import Split, load_split, prepare_data
from twicing.training.streams import stream_seed

# Streams of random numbers next to those of training (see training.streams).
NOISE_STREAM, ATTACK_STREAM = 3, 4
TRANSFER_STREAM, VERDICT_STREAM = 20, 21

# Images that a model answers at once, and that an attack works on at once.
BATCH, ATTACK_BATCH = 1000, 256
# The attack that a verdict compares with stronger ones (see robustness/masking.py).
VERDICT_STEPS = 20
# Where steps are timed on a CPU: a larger batch takes as much longer in either arm, and minutes.
MOST_IMAGES = 32
# What the others of a seed attack this model with.
ADVERSARIAL = "adversarial.npy"


@dataclass
class Workbench:
    """What the parts of one job work on. The model has its initial weights until the training part has run.

    images, labels: the probes, which are disturbed and attacked; all held-out images where there are few.
    """

    job: Job
    recipe: Recipe
    split: Split
    model: nn.Module
    draw_seed: int
    progress: Progress
    images: Tensor = field(init=False)
    labels: Tensor = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = self.job.resources.device
        self.images = self.split.test.load(self.split.probes.tolist()).to(self.device)
        self.labels = self.split.test.labels[self.split.probes].to(self.device)

    def restore(self) -> None:
        """Load the trained weights."""
        # Into a new model, as after an interruption: a training may leave its own in half precision or cut up.
        self.model = converted_model(self.job, self.draw_seed)
        load_trained(self.model, self.draw_seed, self.job.folder)

    def examples(self) -> dict[str, Any]:
        """Which images were held out, and which of these were disturbed; None where all were."""
        few = len(self.split.probes) < len(self.split.test)
        return {"index": self.split.test_index.tolist(), "probes": self.split.probes.tolist() if few else None}

    def similarity(self, when: str) -> Part:
        """Similarity and rank of tokens, by layer."""
        self._ready()
        return similarity_of(self.model, self.images, when)

    def initialisation(self) -> Part:
        """Tokens before training."""
        return self.similarity("initialisation")

    def train(self) -> Part:
        """Train, or go on training."""

        def progress(share: float) -> None:
            self.progress("training", share)

        job = self.job
        curve = train_classifier(
            self.model,
            self.recipe,
            self.split,
            self.draw_seed,
            job.folder,
            progress=progress,
            hardware=job.resources.hardware,
        )
        n_train, n_test = len(self.split.train), len(self.split.test)
        part = Part()
        for row in curve:
            epoch = {"epoch": row.epoch}
            part.findings += [
                Finding(TRAINING_LOSS, row.loss, n_train, epoch),
                Finding(HELD_OUT_ACCURACY, row.held_out_accuracy, n_test, epoch),
                Finding(TRAINING_TIME, row.seconds, n_train, epoch),
            ]
        steps = training_steps(self.recipe, n_train)
        part.findings.append(Finding(STEP_TIME, curve[-1].seconds / steps, steps))
        return part

    def clean(self) -> Part:
        """Accuracy on all held-out images as they are; the five best guesses too where there are many classes."""
        self._ready()
        test = self.split.test
        batches = torch.arange(len(test)).split(BATCH)
        with torch.no_grad():
            answers = [self.model(test.load(batch.tolist()).to(self.device)).cpu() for batch in batches]
        part = Part()
        part.judge({"threat": "clean"}, torch.cat(answers), test.labels)
        return part

    def noise(self) -> Part:
        """Accuracy under Gaussian noise; the same noise for every arm of a seed."""
        part = Part()
        for count, sd in enumerate(self.recipe.evaluation.noise):
            noisy = gaussian_noise(self.images, sd, generator=self._generator(NOISE_STREAM, count))
            self._ready()
            with torch.no_grad():
                right = self.model(noisy).argmax(1) == self.labels
            part.add_accuracy({"threat": "noise", "sd": sd}, right)
        return part

    def fgsm(self) -> Part:
        """Accuracy under one signed gradient step."""
        self._ready()
        return under_fgsm(self.model, self.images, self.labels, self.recipe.evaluation.eps, batch_size=ATTACK_BATCH)

    def pgd(self) -> Part:
        """Accuracy under PGD, and eps50; the same random starts in all arms."""
        self._ready()
        evaluation = self.recipe.evaluation
        return under_pgd(
            self.model,
            self.images,
            self.labels,
            evaluation.eps,
            steps=evaluation.pgd_steps,
            restarts=evaluation.pgd_restarts,
            batch_size=ATTACK_BATCH,
            start=self._generator(ATTACK_STREAM, 0),
            bisection=self._generator(ATTACK_STREAM, 1) if evaluation.eps50 else None,
        )

    def trained_similarity(self) -> Part:
        """Tokens after training."""
        return self.similarity("trained")

    def adversarial(self) -> Part:
        """Leave images that fool this model, or come nearest to it, for the other arms of the seed to be shown."""
        self._ready()
        evaluation = self.recipe.evaluation
        return leave_adversarial(
            self.job.folder / ADVERSARIAL,
            self.model,
            *self._of_verdict(),
            evaluation.verdict_eps,
            steps=evaluation.pgd_steps,
            batch_size=ATTACK_BATCH,
            generator=self._generator(TRANSFER_STREAM, 0),
        )

    def masking(self) -> Part:
        """Transfer from every other arm of the seed, and whether the attacks can be believed."""
        self._ready()
        evaluation = self.recipe.evaluation
        return look_for_masking(
            self.model,
            *self._of_verdict(),
            evaluation.verdict_eps,
            {label: folder / ADVERSARIAL for label, folder in self.job.others.items()},
            steps=VERDICT_STEPS,
            spsa_images=evaluation.spsa_images,
            spsa_iterations=evaluation.spsa_iterations,
            spsa_samples=evaluation.spsa_samples,
            batch_size=ATTACK_BATCH,
            generator=self._generator(VERDICT_STREAM, 0),
            progress=lambda share: self.progress("masking", share),
        )

    def _of_verdict(self) -> tuple[Tensor, Tensor]:
        labels = self.split.test.labels
        chosen = balanced_order(labels)[: self.recipe.evaluation.verdict_images]
        return self.split.test.load(chosen.tolist()).to(self.device), labels[chosen].to(self.device)

    def _ready(self) -> None:
        self.model.to(self.device).eval()

    def _generator(self, stream: int, count: int) -> torch.Generator:
        # Of the pair's seed, not of the arm's: what is added to an image is the same in every arm.
        return torch.Generator().manual_seed(stream_seed(self.job.seed, stream, count))


def _has_verdict(job: Job) -> bool:
    evaluation = _vision(job).evaluation
    return job.place < evaluation.verdict_seeds and evaluation.verdict_images > 0


def converted_model(job: Job, draw_seed: int) -> nn.Module:
    """The job's model before training."""
    return with_mechanism(job, build_model(_vision(job), draw_seed), draw_seed)


def _open_bench(job: Job, progress: Progress) -> Workbench:
    draw_seed = job.seed + job.arm.seed_offset
    split = load_split(_vision(job), job.seed, job.resources.data_dir, job.resources.cache)
    return Workbench(job, _vision(job), split, converted_model(job, draw_seed), draw_seed, progress)


def _vision(job: Job) -> Recipe:
    assert isinstance(job.recipe, Recipe)  # programme_of() saw to it
    return job.recipe


def _prepare(recipe: Recipe, resources: Resources, _progress: Callable[[float], None]) -> str:
    prepare_data(recipe, resources.data_dir, resources.cache)
    return ""


def _trial_model(recipe: Recipe) -> nn.Module:
    return build_model(recipe, 0)


def _timed(
    recipe: Recipe, _data_dir: Path | None, device: torch.device
) -> tuple[Callable[[Recipe], nn.Module], Callable[[nn.Module], Tensor]]:
    count = min(recipe.batch_size, MOST_IMAGES) if device.type == "cpu" else recipe.batch_size
    images = torch.rand(count, recipe.channels, recipe.image_size, recipe.image_size, device=device)
    labels = torch.randint(recipe.classes, (count,), device=device)
    return _trial_model, lambda model: F.cross_entropy(model(images), labels)


def _widened(recipe: Recipe, twiced_layers: int) -> tuple[dict[str, Any], str]:
    ratio = equal_cost_mlp_ratio(recipe, twiced_layers)
    return {"mlp_ratio": ratio}, f"an MLP ratio of {ratio:.4g} instead of {recipe.mlp_ratio:g}"


# Shares of time as measured for `digits`.
VISION = Programme(
    open=_open_bench,
    prepare=_prepare,
    trial_model=_trial_model,
    timed=_timed,
    widened=_widened,
    options={},
    parts={
        "initialisation": Kind(Workbench.initialisation, 1, has_sites),
        "training": Kind(Workbench.train, 60),
        "clean": Kind(Workbench.clean, 1),
        "noise": Kind(Workbench.noise, 1),
        "fgsm": Kind(Workbench.fgsm, 3),
        "pgd": Kind(Workbench.pgd, 32),
        "similarity": Kind(Workbench.trained_similarity, 1, has_sites),
        "adversarial": Kind(Workbench.adversarial, 1, _has_verdict),
    },
    last_parts={"masking": Kind(Workbench.masking, 25, _has_verdict)},
)
