"""One training with its evaluation, in parts that are written as they are finished and never computed twice.

A part is a file: records and, where there are any, which images were right. A killed job goes on after its last part.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twicing.adapters.surgery import spec
from twicing.analysis.layer_similarity import layer_similarity
from twicing.experiments.plan import Job
from twicing.experiments.results import Correctness, Environment, Record, read_json, threat_key, write_json
from twicing.robustness.attacks import fgsm
from twicing.robustness.noise import gaussian_noise
from twicing.robustness.sweep import pgd_sweep
from twicing.robustness.threat import Threat
from twicing.training.classification import build_model, load_trained, train_classifier
from twicing.training.split import Split, load_split, stream_seed

ACCURACY = "accuracy [share of images]"
# Streams of random numbers next to those of training (1 and 2 in training.split).
NOISE_STREAM, ATTACK_STREAM, MECHANISM_STREAM = 3, 4, 5

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Finding:
    """One number of a part: metric, value, how many images it is over, and its conditions."""

    metric: str
    value: float
    n: int
    conditions: dict[str, Any] = field(default_factory=dict)


@dataclass
class Part:
    """What one part found. correct: threat key -> one boolean per held-out image."""

    findings: list[Finding] = field(default_factory=list)
    correct: dict[str, list[bool]] = field(default_factory=dict)

    def add_accuracy(self, conditions: dict[str, Any], correct: Tensor) -> None:
        """Add an accuracy and the images behind it."""
        self.findings.append(Finding(ACCURACY, correct.double().mean().item(), len(correct), conditions))
        self.correct[threat_key(conditions)] = correct.tolist()


@dataclass
class Workbench:
    """What the parts of one job work on. The model has its initial weights until the training part has run."""

    job: Job
    split: Split
    model: nn.Module
    draw_seed: int
    progress: Progress

    def similarity(self, when: str) -> Part:
        """Similarity and rank of tokens, by layer."""
        self.model.eval()
        n = len(self.split.test_images)
        found = layer_similarity(self.model, self.split.test_images)
        return Part(
            [
                Finding(metric, value, n, {"layer": layer, "where": where, "when": when})
                for (where, metric), values in found.items()
                for layer, value in enumerate(values.tolist(), start=1)
            ]
        )

    def initialisation(self) -> Part:
        """Tokens before training."""
        return self.similarity("initialisation")

    def training(self) -> Part:
        """Train, or go on training."""

        def progress(share: float) -> None:
            self.progress("training", share)

        curve = train_classifier(
            self.model, self.job.recipe, self.split, self.draw_seed, self.job.folder, progress=progress
        )
        n_train, n_test = len(self.split.train_labels), len(self.split.test_labels)
        part = Part()
        for row in curve:
            epoch = {"epoch": row.epoch}
            part.findings += [
                Finding("training loss [nats]", row.loss, n_train, epoch),
                Finding("held-out accuracy [share of images]", row.held_out_accuracy, n_test, epoch),
                Finding("training time [s]", row.seconds, n_train, epoch),
            ]
        steps = len(curve) * -(-n_train // self.job.recipe.batch_size)
        part.findings.append(Finding("training time [s per step]", curve[-1].seconds / steps, steps))
        return part

    def clean(self) -> Part:
        """Accuracy on the held-out images as they are."""
        part = Part()
        part.add_accuracy({"threat": "clean"}, self._right(self.split.test_images))
        return part

    def noise(self) -> Part:
        """Accuracy under Gaussian noise; the same noise for every arm of a seed."""
        part = Part()
        for count, sd in enumerate(self.job.recipe.evaluation.noise):
            noisy = gaussian_noise(self.split.test_images, sd, generator=self._generator(NOISE_STREAM, count))
            part.add_accuracy({"threat": "noise", "sd": sd}, self._right(noisy))
        return part

    def fgsm(self) -> Part:
        """Accuracy under one signed gradient step."""
        part = Part()
        self.model.eval()
        for eps in self.job.recipe.evaluation.eps:
            result = fgsm(self.model, self.split.test_images, self.split.test_labels, Threat(eps))
            conditions = {"threat": "fgsm", "eps": eps}
            part.add_accuracy(conditions, result.correct)
            blind = Finding("share of zero gradients", result.zero_gradient_share, len(result.correct), conditions)
            part.findings.append(blind)
        return part

    def pgd(self) -> Part:
        """Accuracy under PGD with both losses, from small to large eps; the same random starts for every arm."""
        part = Part()
        self.model.eval()
        evaluation = self.job.recipe.evaluation
        sweep = pgd_sweep(
            self.model,
            self.split.test_images,
            self.split.test_labels,
            evaluation.eps,
            steps=evaluation.pgd_steps,
            restarts=evaluation.pgd_restarts,
            generator=self._generator(ATTACK_STREAM, 0),
        )
        for eps, correct in zip(evaluation.eps, sweep.correct, strict=True):
            part.add_accuracy({"threat": "pgd", "eps": eps}, correct)
        return part

    def trained_similarity(self) -> Part:
        """Tokens after training."""
        return self.similarity("trained")

    def _right(self, images: Tensor) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            return self.model(images).argmax(1) == self.split.test_labels

    def _generator(self, stream: int, count: int) -> torch.Generator:
        # Of the pair's seed, not of the arm's: what is added to an image is the same in every arm.
        return torch.Generator().manual_seed(stream_seed(self.job.seed, stream, count))


# Each part with its share of a job's time in percent (measured for `digits`), by which progress and time left count.
PARTS: dict[str, tuple[Callable[[Workbench], Part], int]] = {
    "initialisation": (Workbench.initialisation, 1),
    "training": (Workbench.training, 62),
    "clean": (Workbench.clean, 1),
    "noise": (Workbench.noise, 1),
    "fgsm": (Workbench.fgsm, 3),
    "pgd": (Workbench.pgd, 31),
    "similarity": (Workbench.trained_similarity, 1),
}


# These start from the initial weights, all others from the trained ones, whatever was finished before.
BEFORE_TRAINING = ("initialisation", "training")


def share_done(job: Job) -> float:
    """The share of the job's work whose parts are finished, in [0, 1]; exactly 1 when all are."""
    return sum(percent for name, (_, percent) in PARTS.items() if part_file(job, name).exists()) / 100


def part_file(job: Job, part: str) -> Path:
    """Where a finished part is kept."""
    return job.folder / f"{part}.json"


def run_job(job: Job, environment: Environment, progress: Progress) -> None:
    """Do all parts of the job that are not finished yet. progress is told the part and the job's share that is done."""
    unfinished = [name for name in PARTS if not part_file(job, name).exists()]
    if not unfinished:
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    draw_seed = job.seed + job.arm.seed_offset
    model = converted_model(job, draw_seed)

    def part_progress(name: str, share: float) -> None:
        progress(name, share_done(job) + share * PARTS[name][1] / 100)

    bench = Workbench(job, load_split(job.recipe, job.seed), model, draw_seed, part_progress)
    trained = False
    for name in unfinished:
        if name not in BEFORE_TRAINING and not trained:
            load_trained(model, draw_seed, job.folder)
            trained = True
        part_progress(name, 0.0)
        started = time.perf_counter()
        part = PARTS[name][0](bench)
        _write_part(job, name, part, bench, environment, time.perf_counter() - started)
    progress("done", 1.0)


def converted_model(job: Job, draw_seed: int) -> nn.Module:
    """The job's model before training. Weights that a mechanism brings along come from a stream of their own."""
    model = build_model(job.recipe, draw_seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(draw_seed, MECHANISM_STREAM, 0))
        return job.arm.apply(model)


def read_job(job: Job) -> tuple[list[Record], Correctness]:
    """The records of a finished job in a fixed order, and which images were right under every threat."""
    records: list[Record] = []
    correct: dict[str, Any] = {}
    index: list[int] = []
    for name in PARTS:
        saved = read_json(part_file(job, name))
        try:
            records += [Record(**record) for record in saved["records"]]
            correct |= {threat: np.array(values, dtype=np.bool_) for threat, values in saved["correct"].items()}
            index = saved["index"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{part_file(job, name)} is damaged: delete it and run the same command again.") from error
    return records, Correctness(job.arm.label, job.seed, np.array(index, dtype=np.int64), correct)


def _write_part(job: Job, name: str, part: Part, bench: Workbench, environment: Environment, seconds: float) -> None:
    records = [
        Record(
            metric=finding.metric,
            value=finding.value,
            n=finding.n,
            seed=job.seed,
            arm=job.arm.label,
            recipe=job.recipe.name,
            mechanism=job.arm.mechanism,
            layers=job.arm.layers,
            spec=spec(bench.model),
            conditions=finding.conditions,
            versions=environment.versions,
            commit=environment.commit,
            device=environment.device,
            seconds=seconds,
        )
        for finding in part.findings
    ]
    write_json(
        part_file(job, name),
        {
            "part": name,
            "records": [asdict(record) for record in records],
            "correct": part.correct,
            "index": bench.split.test_index.tolist(),
        },
    )
