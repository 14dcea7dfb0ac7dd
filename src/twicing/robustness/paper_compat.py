"""PGD as papers of this line seem to run it: on normalised images, without clipping, against the model's own answers.

After the released code of a sibling paper; that of Twicing Attention (arXiv 2503.00687) is not released, so that
numbers made this way are *unverified*. For numbers that mean something take pgd(), in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from twicing.robustness.draws import draw_seed, image_streams, uniform
from twicing.robustness.search import Model, Search, cross_entropy_loss
from twicing.robustness.threat import FractionLike, Threat, check_pixels


@dataclass(frozen=True)
class PaperCompat:
    """What paper_compat() found, image by image.

    eps, eps_label: in normalised units. pixel_eps: what that is in pixels of [0, 1], one for each channel: eps std_c.
    adversarial: [n, C, H, W], normalised, as the network was shown them.
    outside_share: share of their entries that no pixel in [0, 1] gives, as nothing is clipped.
    correct, correct_before: [n] bool, against the true labels; an image may turn *right* under the attack, as it is
    pushed away from what the model said and not from what is true. correct_top5: true where the label is among the five
    largest logits; None where there are five classes or fewer.
    """

    status: ClassVar[str] = "unverified"
    threat_label: ClassVar[str] = "pgd, paper_compat (unverified)"

    eps: Fraction
    eps_label: str
    pixel_eps: tuple[float, ...]
    adversarial: Tensor
    outside_share: float
    correct: Tensor
    correct_before: Tensor
    correct_top5: Tensor | None

    @property
    def accuracy(self) -> float:
        """Share of all images that are right under the attack."""
        return self.correct.double().mean().item()

    @property
    def accuracy_before(self) -> float:
        """Share of all images that are right without it."""
        return self.correct_before.double().mean().item()

    @property
    def accuracy_top5(self) -> float | None:
        """Share of all images whose label is among the five largest logits under the attack."""
        return None if self.correct_top5 is None else self.correct_top5.double().mean().item()


def paper_compat(
    network: Model,
    images: Tensor,
    labels: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    eps: FractionLike,
    steps: int = 20,
    relative_step_size: float = 0.15,
    random_start: bool = True,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> PaperCompat:
    """PGD on z = (x - mean) / std: z' <- clip(z' + step sgn(grad L(network(z'), y^)), z - eps, z + eps).

    L is cross-entropy; y^ is what the network says to z. All steps are made, fooled or not, and the last z' counts.
    network: normalised images -> logits, in eval mode: what lies behind the normalisation, PixelModel.network.
    images: pixels [n, C, H, W] in [0, 1]. labels: [n], the true classes, by which right and wrong is told.
    mean, std: one for each channel. eps: in normalised units, "4/255"; papers plot 1/255 to 6/255.
    relative_step_size: in units of eps. generator: draws the random starts, an image's by its index alone.
    Raises what pgd() raises, and ValueError for mean or std that do not fit the images.
    Source: a description of a sibling paper's code; see the head of this file.
    """
    check_pixels(images, (0.0, 1.0))
    centre, spread = _per_channel(mean, std, images)
    if steps < 1 or not 0 < relative_step_size <= 2:
        raise ValueError(
            f"steps must be 1 or more and relative_step_size in (0, 2]: got {steps} and {relative_step_size}."
        )
    with torch.inference_mode(False), torch.enable_grad():
        normalised = (images.detach().clone() - centre) / spread
        threat = _without_clipping(normalised, eps)
        search = Search(network, normalised, labels, threat, batch_size)
        answers = search.logits(normalised).argmax(1)
        step, seed = relative_step_size * float(threat.eps), draw_seed(generator)
        found = []
        for indices in torch.arange(len(images), device=images.device).split(batch_size):
            z, said = normalised[indices], answers[indices]
            adversarial = z
            if random_start:
                adversarial = z + float(threat.eps) * uniform(list(image_streams(seed, indices)), z)
            for _ in range(steps):
                _, gradient = search.gradient(adversarial, said, cross_entropy_loss)
                adversarial = threat.project(adversarial + step * gradient.sign(), z)
            found.append(adversarial)
        adversarial = torch.cat(found)
        logits = search.logits(adversarial)
        low, high = -centre / spread, (1 - centre) / spread
        return PaperCompat(
            eps=threat.eps,
            eps_label=f"{threat.eps_label} normalised",
            pixel_eps=tuple((float(threat.eps) * spread).flatten().tolist()),
            adversarial=adversarial,
            outside_share=((adversarial < low) | (adversarial > high)).double().mean().item(),
            correct=logits.argmax(1) == search.labels,
            correct_before=search.correct_before,
            correct_top5=_among_five(logits, search.labels),
        )


def _per_channel(mean: Sequence[float], std: Sequence[float], images: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim != 4 or not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            "mean and std must have one number for each channel of images [n, C, H, W]: "
            f"got {len(mean)} and {len(std)} for {list(images.shape)}."
        )
    if not all(isfinite(value) for value in (*mean, *std)) or min(std) <= 0:
        raise ValueError(f"mean and std must be finite, std above 0: got {list(mean)} and {list(std)}.")
    centre = images.new_tensor(list(mean)).view(1, -1, 1, 1)
    return centre, images.new_tensor(list(std)).view(1, -1, 1, 1)


def _without_clipping(normalised: Tensor, eps: FractionLike) -> Threat:
    """The threat on normalised images, whose bounds no change can reach."""
    low, high = (bound.item() for bound in normalised.aminmax())
    room = 1 + 2 * float(Threat(eps, (-1e6, 1e6)).eps)
    return Threat(eps, (low - room, high + room))


def _among_five(logits: Tensor, labels: Tensor) -> Tensor | None:
    if logits.shape[1] <= 5:
        return None
    return (logits.topk(5, dim=1).indices == labels.unsqueeze(1)).any(1)
