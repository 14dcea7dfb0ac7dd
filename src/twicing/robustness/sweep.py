"""Accuracy against eps under PGD, from small to large: what breaks in a small ball is broken in every larger one.

Carlini et al., arXiv 1902.06705: report the whole curve; it must fall as the allowed change grows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from twicing.robustness.attacks import PgdPlan
from twicing.robustness.draws import draw_seed
from twicing.robustness.search import Model, Search
from twicing.robustness.threat import FractionLike, Threat


@dataclass(frozen=True)
class Sweep:
    """Which images stay right at which eps.

    threats: from the smallest eps to the largest. correct: [number of threats, n] bool, never true again once false.
    correct_before: [n] bool, without an attack.
    """

    threats: tuple[Threat, ...]
    correct: Tensor
    correct_before: Tensor

    @property
    def accuracies(self) -> list[float]:
        """Share of all images that are right, one for each threat."""
        return self.correct.double().mean(1).tolist()

    @property
    def eps50(self) -> Fraction | None:
        """The median over the images of the smallest eps that fools the model, among those tried.

        0 where half of the images are wrong without an attack; None where more than half withstand the largest eps.
        """
        rows = [
            (Fraction(0), self.correct_before),
            *((t.eps, row) for t, row in zip(self.threats, self.correct, strict=True)),
        ]
        return next((eps for eps, row in rows if 2 * int(row.sum()) <= len(row)), None)


def pgd_sweep(
    model: Model,
    images: Tensor,
    labels: Tensor,
    eps: Sequence[FractionLike],
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    steps: int = 20,
    relative_step_size: float | None = None,
    restarts: int = 1,
    losses: Sequence[str] = ("cross-entropy", "margin"),
    random_start: bool = True,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Sweep:
    """Run pgd() at every eps, smallest first; an image that broke at a smaller one is broken at all larger ones.

    The smaller ball lies inside the larger one, so this is the better of the attacks tried, and costs less than they do
    one by one. At the smallest eps it is pgd() from the same generator state; random starts are the same at every eps
    but for the scale. eps: ascending, each as in Threat. Everything else as in pgd(), and so is what it raises.
    """
    threats = tuple(Threat(size, bounds) for size in eps)
    if not threats or any(low.eps >= high.eps for low, high in pairwise(threats)):
        raise ValueError(
            f"eps must be one or more sizes, each larger than the one before: got {[str(e) for e in eps]}."
        )
    plan = PgdPlan(steps, relative_step_size, restarts, tuple(losses), random_start)
    rows = []
    with torch.inference_mode(False), torch.enable_grad():
        search = Search(model, images, labels, threats[0], batch_size)
        seed = draw_seed(generator)
        for threat in threats:
            search.threat = threat
            plan.run(search, seed)
            rows.append(search.correct.clone())
    return Sweep(threats, torch.stack(rows), search.correct_before)
