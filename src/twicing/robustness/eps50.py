"""eps50: the eps at which half of the images are lost, the median over images of the smallest eps that succeeds.

One number for a whole curve of accuracy against eps, at a height where neither ceiling nor floor hides a difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from twicing.robustness.attacks import PgdPlan
from twicing.robustness.draws import draw_seed
from twicing.robustness.search import Model, Search
from twicing.robustness.sweep import Sweep
from twicing.robustness.threat import Threat

# A share of the pixel range near the rounding of float32 pixels (2^-24): brackets are not halved below it.
FINEST = Fraction(1, 2**20)


@dataclass(frozen=True)
class Eps50:
    """The median over n images of the smallest eps at which the attack succeeds, as a share of the pixel range.

    low, high: at low more than half of the images withstood the attack, at high half or fewer did. value is high: an
    *upper bound* of the true median, because every image counted as lost was lost to an image that exists, while a
    better attack might find one nearer. Of an even number of images it is the lower median.
    0 where half of the images are wrong without an attack; value and high are None where more than half withstand even
    the whole pixel range, which no model does but by masked gradients.
    """

    value: float | None
    low: float
    high: float | None
    n: int


def eps50(
    model: Model,
    images: Tensor,
    labels: Tensor,
    sweep: Sweep,
    *,
    resolution: float = 0.02,
    steps: int = 20,
    relative_step_size: float | None = None,
    restarts: int = 1,
    losses: Sequence[str] = ("cross-entropy", "margin"),
    random_start: bool = True,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Eps50:
    """Bisect between the two sizes of the sweep where its accuracy crosses one half, until high - low <= 2 % of high.

    sweep: of the same model, images and labels, from pgd_sweep(); give the same attack here. An image that was lost at
    the low end is lost inside, one that withstood the high end stands inside, so only those in between are attacked
    again, at the middle, and fewer each time. Where more than half withstand the sweep's largest size, it is doubled
    until they do not or the pixel range is reached; those that stand are attacked.
    resolution: (high - low) / high at which to stop; brackets narrower than 2^-20 of the pixel range are not halved.
    Everything else as in pgd(), and so is what it raises; ValueError for a resolution outside (0, 1) and for a sweep of
    other images.
    """
    plan = PgdPlan(steps, relative_step_size, restarts, tuple(losses), random_start)
    if not 0 < resolution < 1:
        raise ValueError(f"resolution must lie between 0 and 1, as a share of the value: got {resolution}.")
    if sweep.correct.shape[1] != len(images):
        raise ValueError(
            f"sweep must be of the same images: got one of {sweep.correct.shape[1]} images and {len(images)} images."
        )
    with torch.inference_mode(False), torch.enable_grad():
        search = Search(model, images, labels, sweep.threats[0], batch_size)
        if not torch.equal(search.correct_before, sweep.correct_before.to(images.device)):
            raise ValueError(
                "sweep must be of the same model, images and labels: it has other images right without an attack."
            )
        bracket = _Bracket(plan, search, draw_seed(generator), sweep)
        bracket.extend()
        bracket.halve(resolution)
    return bracket.found(len(images))


class _Bracket:
    """Two sizes and who stands at each: above half at the low one, half or fewer at the high one (None: not yet)."""

    def __init__(self, plan: PgdPlan, search: Search, seed: int, sweep: Sweep):
        self.plan, self.search, self.seed = plan, search, seed
        self.bounds = sweep.threats[0].bounds
        low, high = self.bounds
        self.range = Fraction(high) - Fraction(low)
        self.low = Fraction(0)
        self.high: Fraction | None = None
        self.stands_low = self.stands_high = search.correct_before
        if _half(self.stands_low):
            self.high = self.low
            return
        for threat, row in zip(sweep.threats, sweep.correct.to(search.images.device), strict=True):
            self._narrow(threat.eps, row)
            if self.high is not None:
                return

    def extend(self) -> None:
        """Double the size until half are lost."""
        while self.high is None and self.low < self.range:
            self._try(min(2 * self.low, self.range) if self.low else self.range, self.stands_low)

    def halve(self, resolution: float) -> None:
        """Halve the bracket until it is narrow enough."""
        limit = Fraction(resolution)
        while self.high is not None and self.high - self.low > max(limit * self.high, FINEST * self.range):
            self._try((self.low + self.high) / 2, self.stands_low & ~self.stands_high)

    def found(self, n: int) -> Eps50:
        high = None if self.high is None else float(self.high / self.range)
        return Eps50(value=high, low=float(self.low / self.range), high=high, n=n)

    def _try(self, eps: Fraction, undecided: Tensor) -> None:
        self.search.threat = Threat(eps, self.bounds)
        self.search.only(undecided)
        self.plan.run(self.search, self.seed)
        self._narrow(eps, self.stands_low & ~(undecided & ~self.search.correct))

    def _narrow(self, eps: Fraction, stands: Tensor) -> None:
        if _half(stands):
            self.high, self.stands_high = eps, stands
        else:
            self.low, self.stands_low = eps, stands


def _half(stands: Tensor) -> bool:
    """Are half of the images or more lost?"""
    return 2 * int(stands.sum()) <= len(stands)
