"""One training with its evaluation, in parts that are written as they are finished and never computed twice.

A part is a file: records and, where there are any, which images were right. A killed job goes on after its last part.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twicing.analysis.layer_similarity import layer_similarity
from twicing.experiments.plan import Job
from twicing.experiments.results import (
    Correctness,
    Environment,
    Record,
    read_json,
    replace_file,
    threat_key,
    write_json,
)
from twicing.robustness.attacks import fgsm, pgd
from twicing.robustness.eps50 import eps50
from twicing.robustness.masking import masking_verdict
from twicing.robustness.noise import gaussian_noise
from twicing.robustness.sweep import pgd_sweep
from twicing.robustness.threat import Threat
from twicing.robustness.transfer import transfer
from twicing.training.checkpoint import formula
from twicing.training.choice import balanced_order
from twicing.training.classification import build_model, load_trained, train_classifier
from twicing.training.order import training_steps
from twicing.training.split import Split, load_split, stream_seed

ACCURACY = "accuracy [share of images]"
EPS50 = "eps50 [share of pixel range]"
# Streams of random numbers next to those of training (see training.streams).
NOISE_STREAM, ATTACK_STREAM, MECHANISM_STREAM = 3, 4, 5
TRANSFER_STREAM, VERDICT_STREAM = 20, 21

# Images that a model answers at once.
BATCH = 1000
# What the others of a seed attack this model with.
ADVERSARIAL = "adversarial.npy"

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
    """What one part found. correct: threat key -> one boolean per image; verdict: what masking() found."""

    findings: list[Finding] = field(default_factory=list)
    correct: dict[str, list[bool]] = field(default_factory=dict)
    verdict: dict[str, Any] | None = None

    def add_accuracy(self, conditions: dict[str, Any], correct: Tensor) -> None:
        """Add an accuracy and the images behind it."""
        self.findings.append(Finding(ACCURACY, correct.double().mean().item(), len(correct), conditions))
        self.correct[threat_key(conditions)] = correct.tolist()


@dataclass
class Workbench:
    """What the parts of one job work on. The model has its initial weights until the training part has run.

    images, labels: the probes, which are disturbed and attacked; all held-out images where there are few.
    """

    job: Job
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

    def similarity(self, when: str) -> Part:
        """Similarity and rank of tokens, by layer."""
        self._ready()
        found = layer_similarity(self.model, self.images)
        return Part(
            [
                Finding(metric, value, len(self.images), {"layer": layer, "where": where, "when": when})
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

        job = self.job
        curve = train_classifier(
            self.model,
            job.recipe,
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
                Finding("training loss [nats]", row.loss, n_train, epoch),
                Finding("held-out accuracy [share of images]", row.held_out_accuracy, n_test, epoch),
                Finding("training time [s]", row.seconds, n_train, epoch),
            ]
        steps = training_steps(job.recipe, n_train)
        part.findings.append(Finding("training time [s per step]", curve[-1].seconds / steps, steps))
        return part

    def clean(self) -> Part:
        """Accuracy on all held-out images as they are; the five best guesses too where there are many classes."""
        part = Part()
        logits = self._logits(self.split)
        labels = self.split.test.labels
        part.add_accuracy({"threat": "clean"}, logits.argmax(1) == labels)
        if logits.shape[1] > MANY_CLASSES:
            among_five = (logits.topk(5).indices == labels[:, None]).any(1)
            metric = "top-5 accuracy [share of images]"
            part.findings.append(Finding(metric, among_five.double().mean().item(), len(labels), {"threat": "clean"}))
        return part

    def noise(self) -> Part:
        """Accuracy under Gaussian noise; the same noise for every arm of a seed."""
        part = Part()
        for count, sd in enumerate(self.job.recipe.evaluation.noise):
            noisy = gaussian_noise(self.images, sd, generator=self._generator(NOISE_STREAM, count))
            self._ready()
            with torch.no_grad():
                right = self.model(noisy).argmax(1) == self.labels
            part.add_accuracy({"threat": "noise", "sd": sd}, right)
        return part

    def fgsm(self) -> Part:
        """Accuracy under one signed gradient step."""
        part = Part()
        self._ready()
        for eps in self.job.recipe.evaluation.eps:
            result = fgsm(self.model, self.images, self.labels, Threat(eps))
            conditions = {"threat": "fgsm", "eps": eps}
            part.add_accuracy(conditions, result.correct)
            blind = Finding("share of zero gradients", result.zero_gradient_share, len(result.correct), conditions)
            part.findings.append(blind)
        return part

    def pgd(self) -> Part:
        """Accuracy under PGD with both losses, from small to large eps, and eps50; the same random starts in all arms.

        eps50 is refined by bisection between the two sizes of the sweep that it lies between.
        """
        part = Part()
        self._ready()
        evaluation = self.job.recipe.evaluation
        steps, restarts = evaluation.pgd_steps, evaluation.pgd_restarts
        sweep = pgd_sweep(
            self.model,
            self.images,
            self.labels,
            evaluation.eps,
            steps=steps,
            restarts=restarts,
            generator=self._generator(ATTACK_STREAM, 0),
        )
        for eps, correct in zip(evaluation.eps, sweep.correct, strict=True):
            part.add_accuracy({"threat": "pgd", "eps": eps}, correct)
        if evaluation.eps50:
            median = eps50(
                self.model,
                self.images,
                self.labels,
                sweep,
                steps=steps,
                restarts=restarts,
                generator=self._generator(ATTACK_STREAM, 1),
            )
            if median.value is not None:
                part.findings.append(Finding(EPS50, median.value, median.n, {"threat": "pgd"}))
        return part

    def trained_similarity(self) -> Part:
        """Tokens after training."""
        return self.similarity("trained")

    def adversarial(self) -> Part:
        """Leave images that fool this model, or come nearest to it, for the other arms of the seed to be shown."""
        self._ready()
        evaluation = self.job.recipe.evaluation
        images, labels = self._of_verdict()
        result = pgd(
            self.model,
            images,
            labels,
            Threat(evaluation.verdict_eps),
            steps=evaluation.pgd_steps,
            generator=self._generator(TRANSFER_STREAM, 0),
        )
        replace_file(self.job.folder / ADVERSARIAL, lambda file: np.save(file, result.adversarial.cpu().numpy()))
        return Part()

    def masking(self) -> Part:
        """Transfer from every other arm of the seed, and whether the attacks can be believed."""
        self._ready()
        evaluation = self.job.recipe.evaluation
        images, labels = self._of_verdict()
        threat = Threat(evaluation.verdict_eps)
        part = Part()
        transferred = {}
        for label, folder in self.job.others.items():
            made = torch.from_numpy(np.load(folder / ADVERSARIAL, allow_pickle=False)).to(self.device)
            transferred[label] = transfer(self.model, made, images, labels, threat)
            conditions = {"threat": "transfer", "eps": evaluation.verdict_eps, "from": label}
            right = transferred[label].double().mean().item()
            part.findings.append(Finding(ACCURACY, right, len(images), conditions))
        verdict = masking_verdict(
            self.model,
            images,
            labels,
            threat,
            transferred=transferred,
            spsa_images=evaluation.spsa_images,
            spsa_iterations=evaluation.spsa_iterations,
            spsa_samples=evaluation.spsa_samples,
            generator=self._generator(VERDICT_STREAM, 0),
            progress=lambda share: self.progress("masking", share),
        )
        part.verdict = {
            "passed": verdict.passed,
            "eps": evaluation.verdict_eps,
            "images": len(images),
            "sentence": verdict.sentence,
            "checks": [asdict(check) for check in verdict.checks],
            "accuracies": dict(verdict.accuracies),
        }
        return part

    def _of_verdict(self) -> tuple[Tensor, Tensor]:
        labels = self.split.test.labels
        chosen = balanced_order(labels)[: self.job.recipe.evaluation.verdict_images]
        return self.split.test.load(chosen.tolist()).to(self.device), labels[chosen].to(self.device)

    def _logits(self, split: Split) -> Tensor:
        self._ready()
        batches = torch.arange(len(split.test)).split(BATCH)
        with torch.no_grad():
            return torch.cat([self.model(split.test.load(batch.tolist()).to(self.device)).cpu() for batch in batches])

    def _ready(self) -> None:
        self.model.to(self.device).eval()

    def _generator(self, stream: int, count: int) -> torch.Generator:
        # Of the pair's seed, not of the arm's: what is added to an image is the same in every arm.
        return torch.Generator().manual_seed(stream_seed(self.job.seed, stream, count))


def _has_verdict(job: Job) -> bool:
    evaluation = job.recipe.evaluation
    return job.place < evaluation.verdict_seeds and evaluation.verdict_images > 0


def _has_sites(job: Job) -> bool:
    # Where a block attends twice, "the attention output of a layer" has no meaning.
    return job.recipe.attention_passes == 1


def _always(_job: Job) -> bool:
    return True


@dataclass(frozen=True)
class Kind:
    """One kind of part. percent: its share of a job's time, measured for `digits`. applies: to which jobs."""

    run: Callable[[Workbench], Part]
    percent: int
    applies: Callable[[Job], bool] = _always


PARTS = {
    "initialisation": Kind(Workbench.initialisation, 1, _has_sites),
    "training": Kind(Workbench.training, 60),
    "clean": Kind(Workbench.clean, 1),
    "noise": Kind(Workbench.noise, 1),
    "fgsm": Kind(Workbench.fgsm, 3),
    "pgd": Kind(Workbench.pgd, 32),
    "similarity": Kind(Workbench.trained_similarity, 1, _has_sites),
    "adversarial": Kind(Workbench.adversarial, 1, _has_verdict),
}

# What looks at the seed's other arms, and so comes after all their PARTS.
LAST_PARTS = {"masking": Kind(Workbench.masking, 25, _has_verdict)}

# These start from the initial weights, all others from the trained ones, whatever was finished before.
BEFORE_TRAINING = ("initialisation", "training")

MANY_CLASSES = 20


def parts_of(job: Job, *, last: bool | None = None) -> dict[str, Kind]:
    """The parts that the job has: those before the other arms are looked at, those after (last), or all of them."""
    kinds = {None: PARTS | LAST_PARTS, False: PARTS, True: LAST_PARTS}[last]
    return {name: kind for name, kind in kinds.items() if kind.applies(job)}


def share_done(job: Job) -> float:
    """The share of the job's work whose parts are finished, in [0, 1]; exactly 1 when all are."""
    kinds = parts_of(job)
    done = sum(kind.percent for name, kind in kinds.items() if part_file(job, name).exists())
    return done / sum(kind.percent for kind in kinds.values())


def unfinished_parts(job: Job, *, last: bool | None = None) -> list[str]:
    """The names of the job's parts that are still to be done."""
    return [name for name in parts_of(job, last=last) if not part_file(job, name).exists()]


def part_file(job: Job, part: str) -> Path:
    """Where a finished part is kept."""
    return job.folder / f"{part}.json"


def run_job(
    job: Job, environment: Environment, progress: Progress, *, last: bool = False, following: bool = False
) -> None:
    """Do the parts of the job that are not finished yet; with last, those that look at the seed's other arms.

    progress is told the part and the job's share that is done. following: another process does the job, and this one
    takes part in its training.
    """
    unfinished = ["training"] if following else unfinished_parts(job, last=last)
    if not unfinished:
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    draw_seed = job.seed + job.arm.seed_offset
    model = converted_model(job, draw_seed)
    everything = sum(kind.percent for kind in parts_of(job).values())

    def part_progress(name: str, share: float) -> None:
        progress(name, share_done(job) + share * parts_of(job)[name].percent / everything)

    split = load_split(job.recipe, job.seed, job.resources.data_dir, job.resources.cache)
    bench = Workbench(job, split, model, draw_seed, part_progress)
    trained = False
    for name in unfinished:
        if name not in BEFORE_TRAINING and not trained:
            load_trained(model, draw_seed, job.folder)
            trained = True
        part_progress(name, 0.0)
        started = time.perf_counter()
        part = parts_of(job)[name].run(bench)
        if following:
            return
        _write_part(job, name, part, bench, environment, time.perf_counter() - started)
    progress("done" if not unfinished_parts(job) else "waiting for the other arms", share_done(job))


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
    index: Sequence[int] = []
    probes: Sequence[int] | None = None
    for name in parts_of(job):
        saved = _read_part(job, name)
        try:
            records += [Record(**record) for record in saved["records"]]
            correct |= {threat: np.array(values, dtype=np.bool_) for threat, values in saved["correct"].items()}
            index, probes = saved["index"], saved["probes"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{part_file(job, name)} is damaged: delete it and run the same command again.") from error
    kept = None if probes is None else np.array(probes, dtype=np.int64)
    return records, Correctness(job.arm.label, job.seed, np.array(index, dtype=np.int64), correct, kept)


def read_verdict(job: Job) -> dict[str, Any] | None:
    """What the finished job found about gradient masking, where it looked for it."""
    if "masking" not in parts_of(job):
        return None
    verdict: dict[str, Any] = _read_part(job, "masking")["verdict"]
    return verdict


def _read_part(job: Job, name: str) -> dict[str, Any]:
    saved = read_json(part_file(job, name))
    if not isinstance(saved, dict):
        raise ValueError(f"{part_file(job, name)} is damaged: delete it and run the same command again.")
    return saved


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
            spec=formula(bench.model),
            conditions=finding.conditions,
            versions=environment.versions,
            commit=environment.commit,
            device=environment.device,
            seconds=seconds,
        )
        for finding in part.findings
    ]
    split = bench.split
    write_json(
        part_file(job, name),
        {
            "part": name,
            "records": [asdict(record) for record in records],
            "correct": part.correct,
            "index": split.test_index.tolist(),
            "probes": None if len(split.probes) == len(split.test) else split.probes.tolist(),
            "verdict": part.verdict,
        },
    )
