"""White-box attacks in pixel space: FGSM (one signed gradient step) and PGD (many, projected back each time).

FGSM: Goodfellow et al., arXiv 1412.6572, section 4. PGD: Madry et al., arXiv 1706.06083, section 2.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twicing.robustness.draws import draw_seed, image_streams, uniform
from twicing.robustness.search import AttackResult, Loss, Model, Search, cross_entropy_loss, margin_loss
from twicing.robustness.threat import Threat

LOSSES: dict[str, Loss] = {"cross-entropy": cross_entropy_loss, "margin": margin_loss}


def fgsm(model: Model, images: Tensor, labels: Tensor, threat: Threat, *, batch_size: int = 256) -> AttackResult:
    """Fast gradient sign method, x' = clip(x + eps sgn(grad_x L)), L the cross-entropy of model(x). A weak attack.

    model: pixels [n, ...] -> logits [n, classes], normalisation inside, in eval mode. labels: [n], the true classes.
    An image that was wrong from the start is not attacked and stays wrong.
    Leaves the model as it was: no parameter gets a gradient. Raises what pgd() raises.
    Source: arXiv 1412.6572, section 4.
    """
    # Evaluation loops run in inference mode, where there are no gradients; an attack needs them.
    with torch.inference_mode(False), torch.enable_grad():
        search = Search(model, images, labels, threat, batch_size)
        for indices in search.standing_batches():
            x = search.images[indices]
            _, gradient = search.gradient(x, search.labels[indices], cross_entropy_loss)
            search.judge(indices, x + float(threat.eps) * gradient.sign())
        return search.result("fgsm")


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int = 20,
    relative_step_size: float | None = None,
    restarts: int = 1,
    losses: Sequence[str] = ("cross-entropy", "margin"),
    random_start: bool = True,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Projected gradient descent, x <- project(x + step sgn(grad_x L(model(x), y))), from a random point of the ball.

    An image is broken if any restart with any loss fools the model at any step; it is then left alone. Whether it is
    broken is decided by a new forward of the final, clipped images. An image that was wrong stays wrong.

    model: pixels [n, ...] -> logits [n, classes], normalisation inside, in eval mode. labels: [n], the true classes.
    relative_step_size: in units of eps; None is 3 / steps, which is 0.15 at 20 steps.
    losses: from "cross-entropy" and "margin"; every restart is one run per loss, each from its own random start.
    generator: draws the random starts; an image's depend on its index alone, so that neither batch_size nor the other
    images matter (beyond the rounding of the model itself), and more restarts only add runs.
    Leaves the model as it was: no parameter gets a gradient.
    Raises ValueError for images outside the bounds, a model in training mode, labels outside its classes, logits or
    gradients that are not finite or do not exist, and settings that make no attack.
    Source: arXiv 1706.06083, section 2.1; the margin loss of arXiv 1608.04644, f_6.
    """
    plan = PgdPlan(steps, relative_step_size, restarts, tuple(losses), random_start)
    with torch.inference_mode(False), torch.enable_grad():
        search = Search(model, images, labels, threat, batch_size)
        plan.run(search, draw_seed(generator))
        return search.result("pgd")


@dataclass(frozen=True)
class PgdPlan:
    """The settings of pgd(), checked, and the runs they make: for every restart, one per loss.

    Raises ValueError for settings that make no attack. Source: arXiv 1706.06083, section 2.1.
    """

    steps: int
    relative_step_size: float | None
    restarts: int
    losses: tuple[str, ...]
    random_start: bool

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps and restarts must be 1 or more: got {self.steps} and {self.restarts}.")
        if not self.losses or not set(self.losses) <= set(LOSSES):
            raise ValueError(f"losses must be one or more of {', '.join(LOSSES)}: got {list(self.losses)}.")
        if self.relative_step_size is not None and not 0 < self.relative_step_size <= 2:
            raise ValueError(
                "relative_step_size must lie in (0, 2], in units of eps (2 crosses the whole ball): "
                f"got {self.relative_step_size}."
            )
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"{self.restarts} restarts without random_start would all be the same: use restarts=1.")

    def run(self, search: Search, seed: int) -> None:
        """Attack the images of the search that still stand; seed is that of the random starts."""
        for indices in search.standing_batches():
            streams = dict(zip(indices.tolist(), image_streams(seed, indices), strict=True))
            for loss in [LOSSES[name] for name in self.losses] * self.restarts:
                indices = indices[search.correct[indices]]
                if len(indices) == 0:
                    break
                start = search.images[indices]
                if self.random_start:
                    start = start + float(search.threat.eps) * uniform([streams[i] for i in indices.tolist()], start)
                search.judge(indices, self._ascend(search, indices, start, loss))

    def _ascend(self, search: Search, indices: Tensor, start: Tensor, loss: Loss) -> Tensor:
        step = float(search.threat.eps) * (self.relative_step_size or 3 / self.steps)
        images, labels = search.images[indices], search.labels[indices]
        candidates = search.threat.project(start, images)
        standing = torch.arange(len(indices), device=indices.device)
        for _ in range(self.steps):
            logits, gradient = search.gradient(candidates[standing], labels[standing], loss)
            # An image that fools the model already is kept as it is, and costs no further step.
            unbroken = logits.argmax(1) == labels[standing]
            standing, gradient = standing[unbroken], gradient[unbroken]
            if len(standing) == 0:
                break
            stepped = candidates[standing] + step * gradient.sign()
            candidates[standing] = search.threat.project(stepped, images[standing])
        return candidates
