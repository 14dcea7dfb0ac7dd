"""A model on the bench: what is done to it and its images, one function for each kind of part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twicing.data.images import Images
from twicing.data.shifted import ClassSubset
from twicing.experiments.attacking import leave_adversarial, look_for_masking, under_fgsm, under_pgd
from twicing.experiments.evaluate.options import Evaluate
from twicing.experiments.evaluate.subjects import HeldOut, Subject
from twicing.experiments.metrics import TOP5
from twicing.experiments.parts import MANY_CLASSES, Finding, Part
from twicing.robustness.auto_attack import auto_attack
from twicing.robustness.corruptions import SEVERITIES, corrupt
from twicing.robustness.noise import gaussian_noise
from twicing.robustness.paper_compat import paper_compat
from twicing.robustness.spsa import spsa
from twicing.robustness.threat import Threat
from twicing.training.streams import stream_seed

# Streams of random numbers of an evaluation, next to those of training and comparison (see training.streams).
NOISE_STREAM, PGD_STREAM, EPS50_STREAM, SPSA_STREAM, AUTO_STREAM, CORRUPTION_STREAM = range(30, 36)
TRANSFER_STREAM, VERDICT_STREAM, COMPAT_STREAM = 36, 37, 38

# What the results call the released files, so that nobody takes the generated corruptions for them.
IMAGENET_C = "ImageNet-C"

# How many of the verdict's images SPSA, the slowest of its attacks, is tried on.
SPSA_IMAGES = 50


@dataclass
class Bench:
    """A model, ready to answer. passed: told how many images the model was just shown.

    notes: what the parts found doubtful in themselves, for their reader.
    """

    subject: Subject
    options: Evaluate
    device: torch.device
    passed: Callable[[int], None]
    model: nn.Module = field(init=False)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.subject.build().to(self.device).eval()
        self._hook = self.model.register_forward_pre_hook(lambda _, inputs: self.passed(len(inputs[0])))

    def close(self) -> None:
        """Leave the model as it came."""
        self._hook.remove()

    @cached_property
    def held_out(self) -> HeldOut:
        """The images that the model has not seen."""
        return self.subject.held_out()

    @cached_property
    def probes(self) -> Tensor:
        """Which of them are attacked and corrupted, [m], ascending."""
        return self.held_out.order[: self.options.images or None].sort().values

    @cached_property
    def images(self) -> Tensor:
        """The probes' pixels, [m, C, H, W]."""
        return self.held_out.images.load(self.probes.tolist()).to(self.device)

    @cached_property
    def labels(self) -> Tensor:
        """The probes' classes, [m]."""
        return self.held_out.images.labels[self.probes].to(self.device)

    @cached_property
    def of_verdict(self) -> tuple[Tensor, Tensor]:
        """The images that gradient masking is looked for on, and their labels: the first in the order of choice."""
        chosen = self.held_out.order[: self.options.verdict_images]
        labels = self.held_out.images.labels[chosen].to(self.device)
        return self.held_out.images.load(chosen.tolist()).to(self.device), labels

    def generator(self, stream: int, count: int = 0) -> torch.Generator:
        """Random numbers of the seed, not of the model: what is added to an image is the same in every arm."""
        return torch.Generator().manual_seed(stream_seed(self.subject.seed, stream, count))

    def answers(self, images: Tensor) -> Tensor:
        """The logits at images in memory, [n, classes], on the CPU."""
        with torch.no_grad():
            batches = images.split(self.options.batch_size)
            return torch.cat([self.model(batch.to(self.device)).cpu() for batch in batches])

    def answers_on(self, images: Images) -> Tensor:
        """The logits at images that are read batch by batch, [n, classes], on the CPU."""
        batches = torch.arange(len(images)).split(self.options.batch_size)
        return torch.cat([self.answers(images.load(batch.tolist())) for batch in batches])


def clean(bench: Bench) -> Part:
    """Accuracy on all held-out images as they are."""
    images = bench.held_out.images
    return _judged({"threat": "clean"}, bench.answers_on(images), images.labels)


def noise(bench: Bench, sds: Sequence[str]) -> Part:
    """Accuracy on the probes under Gaussian noise."""
    part = Part()
    for count, sd in enumerate(sds):
        noisy = gaussian_noise(bench.images, sd, generator=bench.generator(NOISE_STREAM, count))
        part.judge({"threat": "noise", "sd": sd}, bench.answers(noisy), bench.labels)
    return part


def signed_step(bench: Bench, eps: Sequence[str]) -> Part:
    """Accuracy under FGSM."""
    return under_fgsm(bench.model, bench.images, bench.labels, eps, batch_size=bench.options.batch_size)


def pgd_curve(bench: Bench, eps: Sequence[str]) -> Part:
    """Accuracy under PGD from small to large eps, and eps50 by bisection between two of them."""
    return under_pgd(
        bench.model,
        bench.images,
        bench.labels,
        eps,
        steps=bench.options.pgd_steps,
        restarts=bench.options.pgd_restarts,
        batch_size=bench.options.batch_size,
        start=bench.generator(PGD_STREAM),
        bisection=bench.generator(EPS50_STREAM),
    )


def spsa_at(bench: Bench, eps: str) -> Part:
    """Accuracy under SPSA, which sees no gradient."""
    options = bench.options
    result = spsa(
        bench.model,
        bench.images,
        bench.labels,
        Threat(eps),
        iterations=options.spsa_iterations,
        samples=options.spsa_samples,
        batch_size=options.batch_size,
        generator=bench.generator(SPSA_STREAM),
    )
    part = Part()
    part.add_accuracy({"threat": "spsa", "eps": eps}, result.correct)
    return part


def autoattack_at(bench: Bench, eps: str) -> Part:
    """Accuracy under AutoAttack's standard ensemble."""
    result = auto_attack(
        bench.model,
        bench.images,
        bench.labels,
        Threat(eps),
        batch_size=bench.options.batch_size,
        generator=bench.generator(AUTO_STREAM),
    )
    bench.notes += result.notes
    part = Part()
    part.add_accuracy({"threat": "autoattack", "eps": eps}, result.correct)
    return part


def as_papers_do(bench: Bench, eps: Sequence[str]) -> Part:
    """Accuracy under PGD as papers of this line seem to run it, in normalised units; labelled as unverified."""
    part = Part()
    model = bench.model
    for size in eps:
        result = paper_compat(
            model.get_submodule("network"),
            bench.images,
            bench.labels,
            mean=model.get_buffer("mean").flatten().tolist(),
            std=model.get_buffer("std").flatten().tolist(),
            eps=size,
            batch_size=bench.options.batch_size,
            generator=bench.generator(COMPAT_STREAM),
        )
        conditions = {"threat": result.threat_label, "eps": result.eps_label}
        part.add_accuracy(conditions, result.correct)
        if result.accuracy_top5 is not None and bench.subject.classes > MANY_CLASSES:
            part.findings.append(Finding(TOP5, result.accuracy_top5, len(result.correct), conditions))
    return part


def corruption(bench: Bench, kind: str) -> Part:
    """Accuracy on the probes under one generated corruption at all severities."""
    part = Part()
    batches = torch.arange(len(bench.images)).split(bench.options.batch_size)
    for severity in SEVERITIES:
        corrupted = [
            # The same state for every batch: an image's numbers follow from its position.
            corrupt(
                bench.images[batch],
                kind,
                severity,
                indices=bench.probes[batch].tolist(),
                generator=bench.generator(CORRUPTION_STREAM),
            )
            for batch in batches
        ]
        conditions = {"threat": "corruption", "kind": kind, "severity": severity}
        part.judge(conditions, bench.answers(torch.cat(corrupted)), bench.labels)
    return part


def released_corruption(bench: Bench, kind: str, images: Mapping[int, Images]) -> Part:
    """Accuracy on ImageNet-C's files of one corruption, severity by severity."""
    part = Part()
    for severity, of_severity in images.items():
        conditions = {"threat": IMAGENET_C, "kind": kind, "severity": severity}
        part.judge(conditions, bench.answers_on(of_severity), of_severity.labels)
    return part


def shifted(bench: Bench, name: str, images: Images | ClassSubset) -> Part:
    """Accuracy on another test set; on one of fewer classes, among these alone."""
    if isinstance(images, ClassSubset):
        logits, labels = images.cut(bench.answers_on(images.images)), images.images.labels
    else:
        logits, labels = bench.answers_on(images), images.labels
    return _judged({"threat": name}, logits, labels)


def adversarial(bench: Bench, eps: str, file: Path) -> Part:
    """Leave images that fool this model, or come nearest to it, for the other models of the seed to be shown."""
    return leave_adversarial(
        file,
        bench.model,
        *bench.of_verdict,
        eps,
        steps=bench.options.pgd_steps,
        batch_size=bench.options.batch_size,
        generator=bench.generator(TRANSFER_STREAM),
    )


def verdict(bench: Bench, eps: str, others: Mapping[str, Path]) -> Part:
    """Transfer from the other models of the seed, and whether the attacks can be believed."""
    return look_for_masking(
        bench.model,
        *bench.of_verdict,
        eps,
        others,
        steps=bench.options.pgd_steps,
        spsa_images=SPSA_IMAGES,
        spsa_iterations=bench.options.spsa_iterations,
        spsa_samples=bench.options.spsa_samples,
        batch_size=bench.options.batch_size,
        generator=bench.generator(VERDICT_STREAM),
    )


def _judged(conditions: dict[str, Any], logits: Tensor, labels: Tensor) -> Part:
    part = Part()
    part.judge(conditions, logits, labels)
    return part
