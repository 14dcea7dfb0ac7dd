"""SPSA: an attack that only asks the model for answers, so that masked gradients cannot stop it.

Uesato et al., arXiv 1802.05666, algorithm 1, with Adam for the update as in their experiments; the estimator is that of
Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation", 1992.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from twicing.robustness.draws import draw_seed, image_streams
from twicing.robustness.search import AttackResult, Model, Search, margin_loss
from twicing.robustness.threat import Threat

# Adam's own defaults (arXiv 1412.6980, algorithm 1).
BETA_MEAN, BETA_SQUARE, ADAM_EPS = 0.9, 0.999, 1e-8


def spsa(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    iterations: int = 40,
    samples: int = 128,
    learning_rate: float = 0.01,
    delta: float = 0.01,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Raise the margin loss by Adam on estimated gradients, projected to the threat after each step; from x itself.

    Every step estimates the gradient from `samples` random directions (see spsa_gradient), steps, projects, and asks
    whether the model is fooled; a fooled image is left alone. The model is asked at most
    1 + iterations (2 samples + 1) times per image: 10,281 times by default. No gradient of the model is used.

    model: pixels [n, ...] -> logits [n, classes], normalisation inside, in eval mode. labels: [n], the true classes.
    learning_rate: Adam's, about the largest change of a pixel in one step; delta: how far a direction is followed. Both
    in units of the pixel scale; the model is asked up to delta outside the ball and the pixel range, but judged inside.
    batch_size: images in one forward. generator: draws the directions; an image's depend on its index alone, so that
    neither batch_size nor the other images matter (beyond the rounding of the model itself).
    Raises ValueError for images outside the bounds, a model in training mode, labels outside its classes, logits that
    are not finite, and settings that make no attack.
    Source: arXiv 1802.05666, algorithm 1; defaults: common settings of its implementations, not the paper's 8,192
    samples.
    """
    plan = SpsaPlan(iterations, samples, learning_rate, delta)
    with torch.inference_mode(False), torch.no_grad():
        search = Search(model, images, labels, threat, batch_size)
        plan.run(search, draw_seed(generator))
        return search.result("spsa")


def spsa_gradient(values: Callable[[Tensor], Tensor], points: Tensor, directions: Tensor, delta: float) -> Tensor:
    """Estimate gradients from differences, g = 1/m sum_j v_j [J(x + delta v_j) - J(x - delta v_j)] / (2 delta).

    values: J, [b, k, ...] -> [b, k] for any k. points: x, [b, ...]. directions: v, [b, m, ...], entries -1 or 1.
    Returns [b, ...].
    For a linear or quadratic J with gradient g its mean is g, and the variance of entry i is (|g|^2 - g_i^2) / m.
    Source: arXiv 1802.05666, algorithm 1 (where v^-1 = v, as the entries are -1 or 1).
    """
    both = torch.cat([delta * directions, -delta * directions], dim=1)
    ahead, behind = values(points.unsqueeze(1) + both).chunk(2, dim=1)
    # The logits of a model may be of a wider type than its images.
    slopes = ((ahead - behind) / (2 * delta)).to(directions.dtype)
    return torch.einsum("bm,bm...->b...", slopes, directions) / directions.shape[1]


@dataclass(frozen=True)
class SpsaPlan:
    """The settings of spsa(), checked, and the runs they make. Raises ValueError for settings that make no attack."""

    iterations: int
    samples: int
    learning_rate: float
    delta: float

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.samples < 1:
            raise ValueError(f"iterations and samples must be 1 or more: got {self.iterations} and {self.samples}.")
        for name in ("learning_rate", "delta"):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0, in units of the pixel scale: got {value}.")

    def run(self, search: Search, seed: int) -> None:
        """Attack the images of the search that still stand; seed is that of the directions."""
        # All directions of one image go through the model together, and where there is room, those of several images.
        at_once = max(1, search.batch_size // (2 * self.samples))
        for batch in search.standing_batches():
            for indices in batch.split(at_once):
                self._ascend(search, indices, list(image_streams(seed, indices)))

    def _ascend(self, search: Search, indices: Tensor, streams: Sequence[torch.Generator]) -> None:
        candidates = search.images[indices]
        mean, square = torch.zeros_like(candidates), torch.zeros_like(candidates)
        for step in range(1, self.iterations + 1):
            gradient = self._estimate(search, indices, candidates, streams)
            mean = BETA_MEAN * mean + (1 - BETA_MEAN) * gradient
            square = BETA_SQUARE * square + (1 - BETA_SQUARE) * gradient.square()
            spread = (square / (1 - BETA_SQUARE**step)).sqrt() + ADAM_EPS
            stepped = candidates + self.learning_rate * mean / (1 - BETA_MEAN**step) / spread
            candidates = search.threat.project(stepped, search.images[indices])
            search.judge(indices, candidates)
            unbroken = search.correct[indices]
            if not unbroken.any():
                return
            streams = [stream for stream, kept in zip(streams, unbroken.tolist(), strict=True) if kept]
            indices, candidates = indices[unbroken], candidates[unbroken]
            mean, square = mean[unbroken], square[unbroken]

    def _estimate(
        self, search: Search, indices: Tensor, candidates: Tensor, streams: Sequence[torch.Generator]
    ) -> Tensor:
        directions = torch.stack([_signs(stream, self.samples, candidates) for stream in streams])

        def values(points: Tensor) -> Tensor:
            labels = search.labels[indices].repeat_interleave(points.shape[1])
            return margin_loss(search.logits(points.flatten(0, 1)), labels).view(points.shape[:2])

        gradient = spsa_gradient(values, candidates, directions, self.delta)
        search.count_zeros(gradient)
        return gradient


def _signs(stream: torch.Generator, samples: int, like: Tensor) -> Tensor:
    """Draw -1 or 1, `samples` times for every pixel of one image, on the CPU: the same on every device."""
    drawn = torch.randint(0, 2, (samples, *like.shape[1:]), generator=stream)
    return (2 * drawn - 1).to(like.device, like.dtype)
