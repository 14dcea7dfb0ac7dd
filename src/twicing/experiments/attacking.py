"""What attacks do to one model, as parts of a job: the same for models of a comparison and for any that is evaluated.

model: pixels in [0, 1] to logits, in eval mode. images, labels: [m, C, H, W] and [m], on the model's device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from twicing.experiments.metrics import ACCURACY, EPS50, ZERO_GRADIENTS
from twicing.experiments.parts import Finding, Part
from twicing.experiments.results import replace_file
from twicing.robustness.attacks import fgsm, pgd
from twicing.robustness.eps50 import eps50
from twicing.robustness.masking import masking_verdict
from twicing.robustness.sweep import pgd_sweep
from twicing.robustness.threat import Threat
from twicing.robustness.transfer import transfer


def under_fgsm(model: nn.Module, images: Tensor, labels: Tensor, sizes: Sequence[str], *, batch_size: int) -> Part:
    """Accuracy under one signed gradient step of each size."""
    part = Part()
    for eps in sizes:
        result = fgsm(model, images, labels, Threat(eps), batch_size=batch_size)
        conditions = {"threat": "fgsm", "eps": eps}
        part.add_accuracy(conditions, result.correct)
        part.findings.append(Finding(ZERO_GRADIENTS, result.zero_gradient_share, len(result.correct), conditions))
    return part


def under_pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    sizes: Sequence[str],
    *,
    steps: int,
    restarts: int,
    batch_size: int,
    start: torch.Generator,
    bisection: torch.Generator | None,
) -> Part:
    """Accuracy under PGD with both losses, from small to large eps, and eps50 where there is a generator for it.

    eps50 is refined by bisection between the two sizes of the sweep that it lies between.
    """
    part = Part()
    sweep = pgd_sweep(
        model, images, labels, sizes, steps=steps, restarts=restarts, batch_size=batch_size, generator=start
    )
    for eps, correct in zip(sizes, sweep.correct, strict=True):
        part.add_accuracy({"threat": "pgd", "eps": eps}, correct)
    if bisection is not None:
        median = eps50(
            model, images, labels, sweep, steps=steps, restarts=restarts, batch_size=batch_size, generator=bisection
        )
        if median.value is not None:
            part.findings.append(Finding(EPS50, median.value, median.n, {"threat": "pgd"}))
    return part


def leave_adversarial(
    file: Path,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: str,
    *,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
) -> Part:
    """Write images that fool this model, or come nearest to it, for the other models of the seed to be shown."""
    result = pgd(model, images, labels, Threat(eps), steps=steps, batch_size=batch_size, generator=generator)
    replace_file(file, lambda opened: np.save(opened, result.adversarial.cpu().numpy()))
    return Part()


def look_for_masking(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: str,
    others: Mapping[str, Path],
    *,
    steps: int,
    spsa_images: int,
    spsa_iterations: int,
    spsa_samples: int,
    batch_size: int,
    generator: torch.Generator,
    progress: Callable[[float], None] | None = None,
) -> Part:
    """Transfer from the other models of the seed, and whether the attacks can be believed.

    others: label -> the images that leave_adversarial() wrote for that model.
    """
    part = Part()
    threat = Threat(eps)
    transferred = {}
    for label, file in others.items():
        made = torch.from_numpy(np.load(file, allow_pickle=False)).to(images.device)
        transferred[label] = transfer(model, made, images, labels, threat, batch_size=batch_size)
        conditions = {"threat": "transfer", "eps": eps, "from": label}
        part.findings.append(Finding(ACCURACY, transferred[label].double().mean().item(), len(images), conditions))
    verdict = masking_verdict(
        model,
        images,
        labels,
        threat,
        transferred=transferred,
        steps=steps,
        spsa_images=spsa_images,
        spsa_iterations=spsa_iterations,
        spsa_samples=spsa_samples,
        batch_size=batch_size,
        generator=generator,
        progress=progress,
    )
    part.verdict = {
        "passed": verdict.passed,
        "eps": eps,
        "images": len(images),
        "sentence": verdict.sentence,
        "checks": [asdict(check) for check in verdict.checks],
        "accuracies": dict(verdict.accuracies),
    }
    return part
