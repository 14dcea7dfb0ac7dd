"""The search for the worst case: per image, what has been tried, what came nearest, and whether the model still stands.

An attack proposes images, the search judges them; accuracy under an attack is that of the worst image found
(Carlini et al., arXiv 1902.06705: count an example as broken if any of the attacks breaks it).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twicing.robustness.threat import Threat

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class NoGradientError(ValueError):
    """The logits do not depend on the images by any path that autograd knows: there is nothing to follow."""


def cross_entropy_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss to be raised, -log softmax(z)_y in nats: [n, classes], [n] -> [n]."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss to be raised, max_{j != y} z_j - z_y in units of the logits: [n, classes], [n] -> [n].

    Above 0 the model is fooled. Its gradient does not die where the softmax saturates, as that of cross-entropy does.
    Source: arXiv 1608.04644, f_6 without its floor.
    """
    is_label = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(is_label, -torch.inf).amax(1) - logits.masked_fill(~is_label, 0).sum(1)


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, image by image.

    adversarial: [n, ...], for every image the worst one found: the one that fools the model, else the one that came
    nearest to it; an image that was wrong from the start is returned as it was. All lie in the threat's set.
    correct, correct_before: [n] bool, with and without the attack; correct is never true where correct_before is false.
    zero_gradient_share: share of the gradients' entries that were exactly 0. Near 1 the attack was blind (saturated
    loss, masked gradients) and its accuracy means nothing.
    notes: what the attack itself found doubtful, sentence by sentence; empty but for attacks that look.
    """

    attack: str
    threat: Threat
    adversarial: Tensor
    correct: Tensor
    correct_before: Tensor
    zero_gradient_share: float
    notes: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        """Share of all images that are right under the attack."""
        return self.correct.double().mean().item()

    @property
    def accuracy_before(self) -> float:
        """Share of all images that are right without it."""
        return self.correct_before.double().mean().item()


class Search:
    """Per image, the worst case found so far for one model; attacks call gradient() and judge().

    Source: arXiv 1902.06705, on per-example success.
    """

    def __init__(self, model: Model, images: Tensor, labels: Tensor, threat: Threat, batch_size: int):
        threat.check_images(images)
        _check_labels(labels, images)
        _check_eval_mode(model)
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or larger: got {batch_size}.")
        self.model = model
        self.threat = threat
        self.batch_size = batch_size
        # Autograd refuses tensors made in inference mode, in which trainers evaluate; a clone made outside it is plain.
        self.images = images.detach().clone()
        self.labels = labels.clone()
        logits = self.logits(self.images)
        _check_classes(labels, logits.shape[1])
        self.correct_before = logits.argmax(1) == self.labels
        self.correct = self.correct_before.clone()
        self.adversarial = self.images.clone()
        self.worst_margin = torch.full_like(logits[:, 0], -torch.inf)
        self.gradient_entries = 0
        self.zero_entries = torch.zeros((), dtype=torch.int64, device=images.device)

    def standing_batches(self) -> tuple[Tensor, ...]:
        """Return the indices of the images that are still right, in batches."""
        return self.correct.nonzero().squeeze(1).split(self.batch_size) if self.correct.any() else ()

    def gradient(self, candidates: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Return the logits at the candidates and the loss's gradient there; the model's parameters get none."""
        candidates = candidates.detach().requires_grad_()
        logits = self._logits(candidates)
        # Summed, not averaged, so that an image's gradient does not depend on how many others are in the batch.
        total = loss(logits, labels).sum()
        # Logits of a model whose weights require gradients are in a graph even where the images are not.
        gradient = torch.autograd.grad(total, candidates, allow_unused=True)[0] if total.requires_grad else None
        if gradient is None:
            raise NoGradientError(
                "the logits carry no gradient to the images, so there is nothing for this attack to follow: "
                "remove no_grad, inference_mode, detach or rounding from inside the model."
            )
        if not gradient.isfinite().all():
            raise ValueError(
                "the loss's gradient at the images has values that are not finite, so no attack can follow it: "
                "run the model in float32, or look for a division by zero in its backward."
            )
        self.count_zeros(gradient)
        return logits.detach(), gradient

    def count_zeros(self, gradient: Tensor) -> None:
        """Add a gradient, or an estimate of one, to the share of entries that were exactly 0."""
        self.gradient_entries += gradient.numel()
        self.zero_entries += (gradient == 0).sum()

    def logits(self, candidates: Tensor) -> Tensor:
        """Return the logits at any number of candidates, [m, classes], without a gradient."""
        with torch.no_grad():
            return torch.cat([self._logits(batch) for batch in candidates.split(self.batch_size)])

    def only(self, chosen: Tensor) -> None:
        """Leave all but the chosen images alone from now on; chosen: [n] bool."""
        self.correct = self.correct_before & chosen

    def judge(self, indices: Tensor, candidates: Tensor) -> None:
        """Clip the candidates to the threat, ask the model anew, and keep them where they are the worst so far."""
        candidates = self.threat.project(candidates.detach(), self.images[indices])
        labels = self.labels[indices]
        with torch.no_grad():
            logits = self._logits(candidates)
        margin = margin_loss(logits, labels)
        fooled = logits.argmax(1) != labels
        worse = fooled | (margin > self.worst_margin[indices])
        self.worst_margin[indices[worse]] = margin[worse]
        self.adversarial[indices[worse]] = candidates[worse]
        self.correct[indices[fooled]] = False

    def result(self, attack: str, notes: tuple[str, ...] = ()) -> AttackResult:
        """Return what was found."""
        return AttackResult(
            attack=attack,
            threat=self.threat,
            adversarial=self.adversarial,
            correct=self.correct,
            correct_before=self.correct_before,
            zero_gradient_share=self.zero_entries.item() / max(self.gradient_entries, 1),
            notes=notes,
        )

    def _logits(self, candidates: Tensor) -> Tensor:
        logits = self.model(candidates)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(candidates) or logits.shape[1] < 2:
            came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"the model must return logits [{len(candidates)}, classes], two classes or more, "
                f"for {len(candidates)} images: got {came}."
            )
        if not logits.isfinite().all():
            raise ValueError(
                "the model's logits have values that are not finite, so right and wrong mean nothing: did it diverge?"
            )
        # A model that ends in half precision would round the loss away.
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_labels(labels: Tensor, images: Tensor) -> None:
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or labels.device != images.device:
        raise ValueError(
            f"labels must be int64 class numbers of shape [{len(images)}] on {images.device}, one per image: "
            f"got {labels.dtype} of shape {list(labels.shape)} on {labels.device}."
        )


def _check_classes(labels: Tensor, classes: int) -> None:
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < 0 or largest >= classes:
        raise ValueError(
            f"labels must lie in 0 to {classes - 1}, the model's {classes} classes: "
            f"got values from {smallest} to {largest}."
        )


def _check_eval_mode(model: Model) -> None:
    if not isinstance(model, nn.Module):
        return
    training = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            "the model must be in eval mode, or dropout and batch statistics give a different answer each time: "
            f"got training mode in {training[0]} ({len(training)} modules in all). Call model.eval() first."
        )
