"""Is the robustness real? Checks that a model with masked gradients fails: it hides the way, it does not close it.

Athalye et al., arXiv 1802.00420, section 3.1 (signs of obfuscated gradients); Carlini et al., arXiv 1902.06705.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from twicing.robustness.attacks import PgdPlan, fgsm
from twicing.robustness.draws import draw_seed, image_streams, uniform
from twicing.robustness.search import AttackResult, Model, NoGradientError, Search
from twicing.robustness.spsa import SpsaPlan
from twicing.robustness.threat import Threat

LOSSES = ("cross-entropy", "margin")
# A defect that touches 15 % of the images goes unseen in 20 of them with probability 0.85^20 = 4 %.
FEWEST_IMAGES = 20
# Two forwards on a GPU may add in another order; noise inside a model that could mislead an attack is far larger.
SAME_ANSWER = 1e-3
MOST_ZEROS = 0.01
GRADIENT_CHECKS = (
    "longer attack",
    "unbounded attack",
    "order of attacks",
    "SPSA",
    "transfer",
    "losses",
    "gradients",
)


@dataclass(frozen=True)
class MaskingCheck:
    """One check. seen: what was measured, as one short sentence with its numbers."""

    name: str
    passed: bool
    seen: str


@dataclass(frozen=True)
class MaskingVerdict:
    """All checks of masking_verdict(), in its order, and the accuracies behind them (share of all images)."""

    checks: tuple[MaskingCheck, ...]
    accuracies: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Did every check pass? One that could not be made did not."""
        return all(check.passed for check in self.checks)

    @property
    def sentence(self) -> str:
        """The verdict in words, with what every failed check saw."""
        if self.passed:
            return "no sign of gradient masking"
        reasons = dict.fromkeys(check.seen for check in self.checks if not check.passed)
        return f"robustness not established: {'; '.join(reasons)}"


def masking_verdict(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    transferred: Mapping[str, Tensor],
    steps: int = 20,
    strong_steps: int = 100,
    strong_restarts: int = 5,
    spsa_images: int = 0,
    spsa_iterations: int = 40,
    spsa_samples: int = 128,
    spsa_learning_rate: float = 0.01,
    spsa_delta: float = 0.01,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    progress: Callable[[float], None] | None = None,
) -> MaskingVerdict:
    """Examine one model at one threat. It passes only if all of this holds (numbers are the defaults):

    1. images: 20 or more are right without an attack.
    2. same answer twice: two forwards of the same images give the same logits, to 1/1000 of their spread.
    3. longer attack: PGD-100 with 5 restarts breaks at most 1 point more than PGD-20.
    4. unbounded attack: with eps the whole pixel range, where any image may be shown, PGD-20 leaves none right.
    5. order of attacks: accuracy under PGD-20 <= FGSM <= uniform noise of the same eps.
    6. SPSA, which needs no gradient, does not leave fewer right than the white-box attack.
    7. transfer: images made against other models do not leave fewer right than the white-box attack.
    8. losses: PGD-20 by cross-entropy alone and by the margin alone are within 1 point.
    9. gradients: fewer than 1 % of their entries are exactly 0, for either loss (pixels that a model never looks at
       count too).

    PGD-20 is both losses, each from the same random start. The white-box attack of 6 and 7 is the better of PGD-20 and
    the longer one, image by image; it knows more than they do, so not one image fewer is allowed. 1 point is of all
    images, and never less than one image: of fewer than 100, one image is the smallest difference there is. A check
    that was not made has not passed: transfer without other models, all of them where autograd finds no gradient.

    transferred: name of the other model -> [n] bool, what transfer() returned for this model, images and threat.
    model, images, labels, batch_size: as in pgd(). spsa_*: as in spsa(). It attacks the first spsa_images (0: all) that
    PGD left right, and if it breaks any, also the images before the last of these, and is compared on those.
    generator: draws random starts, noise and directions, by an image's index alone.
    progress: told the share of the work that is done.
    Raises what pgd() and spsa() raise but for a missing gradient, and ValueError for transferred of a wrong shape.
    Source: arXiv 1802.00420, section 3.1; arXiv 1902.06705.
    """
    _check_transferred(transferred, images)
    if threat.eps == 0 or spsa_images < 0:
        raise ValueError(
            "a verdict needs an eps above 0, and spsa_images of 0 (all) or more: "
            f"got {threat.eps_label} and {spsa_images}."
        )
    strong = PgdPlan(strong_steps, None, strong_restarts, LOSSES, random_start=True)
    spsa_plan = SpsaPlan(spsa_iterations, spsa_samples, spsa_learning_rate, spsa_delta)
    with torch.inference_mode(False), torch.enable_grad():
        case = _Case(model, images, labels, threat, batch_size, generator, progress or _silent)
        checks = [case.images_check(), case.same_answer()]
        try:
            checks += case.gradient_checks(steps, strong, spsa_plan, spsa_images, transferred)
        except NoGradientError:
            seen = "the logits carry no gradient to the images, so that there is no white-box attack to go by"
            checks += [MaskingCheck(name, False, seen) for name in GRADIENT_CHECKS]
        case.progress(1.0)
    return MaskingVerdict(tuple(checks), case.accuracies)


def _silent(_share: float) -> None:
    return


class _Case:
    """One model under examination; every attack is told which images to leave alone."""

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        threat: Threat,
        batch_size: int,
        generator: torch.Generator | None,
        progress: Callable[[float], None],
    ):
        self.model, self.images, self.labels, self.threat, self.batch_size = model, images, labels, threat, batch_size
        self.search = Search(model, images, labels, threat, batch_size)
        self.right = self.search.correct_before
        self.n = len(images)
        # 1 point, but no less than one image.
        self.allowed = max(self.n // 100, 1)
        self.start_seed, self.strong_seed, self.noise_seed, self.spsa_seed = (draw_seed(generator) for _ in range(4))
        self.progress = progress
        self.accuracies: dict[str, float] = {}
        self.keep("clean", self.right)

    def images_check(self) -> MaskingCheck:
        right = _count(self.right)
        seen = f"{right} of {self.n} images are right without an attack ({FEWEST_IMAGES} are needed)"
        return MaskingCheck("images", right >= FEWEST_IMAGES, seen)

    def same_answer(self) -> MaskingCheck:
        first, second = (self.search.logits(self.search.images) for _ in range(2))
        difference = (first - second).abs().max().item()
        spread = (first.amax() - first.amin()).item()
        seen = f"two forwards of the same images differ by {difference:.2g} in logits that span {spread:.2g}"
        return MaskingCheck("same answer twice", difference <= SAME_ANSWER * spread, seen)

    def gradient_checks(
        self, steps: int, strong: PgdPlan, spsa: SpsaPlan, spsa_images: int, transferred: Mapping[str, Tensor]
    ) -> list[MaskingCheck]:
        alone = []
        for loss in LOSSES:
            plan = PgdPlan(steps, None, 1, (loss,), random_start=True)
            alone.append(self.attack(plan, self.start_seed, self.right))
            self.keep(f"PGD-{steps}, {loss}", alone[-1].correct)
            self.progress(0.1 * len(alone))
        weak = self.keep(f"PGD-{steps}", alone[0].correct & alone[1].correct)
        best = self.keep(f"PGD-{strong.steps} x {strong.restarts}", self.attack(strong, self.strong_seed, weak).correct)
        self.progress(0.5)
        checks = [
            self._longer(weak, best, steps, strong),
            self._unbounded(best, steps),
            self._order(weak, steps),
        ]
        self.progress(0.6)
        return [
            *checks,
            self._spsa(best, spsa, spsa_images),
            self._transfer(best, transferred),
            self._losses(alone, steps),
            _gradients(alone),
        ]

    def attack(
        self, plan: PgdPlan | SpsaPlan, seed: int, standing: Tensor, threat: Threat | None = None
    ) -> AttackResult:
        """Attack those that stand; `correct` of the others is false."""
        search = Search(self.model, self.images, self.labels, threat or self.threat, self.batch_size)
        search.only(standing)
        plan.run(search, seed)
        return search.result("")

    def keep(self, name: str, correct: Tensor) -> Tensor:
        """Note the accuracy, and pass on who is right."""
        self.accuracies[name] = _count(correct) / self.n
        return correct

    def _longer(self, weak: Tensor, best: Tensor, steps: int, strong: PgdPlan) -> MaskingCheck:
        before, after = _count(weak), _count(best)
        seen = (
            f"PGD-{strong.steps} with {strong.restarts} restarts leaves {after} of {self.n} images right, "
            f"PGD-{steps} {before} (at most {self.allowed} apart is allowed)"
        )
        return MaskingCheck("longer attack", before - after <= self.allowed, seen)

    def _unbounded(self, best: Tensor, steps: int) -> MaskingCheck:
        low, high = self.threat.bounds
        whole = Threat(Fraction(high) - Fraction(low), self.threat.bounds)
        # What was broken in the small ball is broken in this one.
        plan = PgdPlan(steps, None, 1, LOSSES, random_start=True)
        left = _count(self.keep("PGD, any change", self.attack(plan, self.start_seed, best, whole).correct))
        seen = (
            f"with eps = {whole.eps_label}, where any image may be shown, PGD-{steps} leaves {left} of {self.n} right"
        )
        return MaskingCheck("unbounded attack", left == 0, seen)

    def _order(self, weak: Tensor, steps: int) -> MaskingCheck:
        one_step = fgsm(self.model, self.images, self.labels, self.threat, batch_size=self.batch_size).correct
        pgd, signed = _count(weak), _count(self.keep("FGSM", one_step))
        noise = _count(self.keep("uniform noise", self._under_noise()))
        seen = (
            f"PGD-{steps} leaves {pgd} of {self.n} images right, FGSM {signed}, uniform noise of the same size {noise}"
        )
        return MaskingCheck("order of attacks", pgd <= signed <= noise, seen)

    def _under_noise(self) -> Tensor:
        search = Search(self.model, self.images, self.labels, self.threat, self.batch_size)
        for indices in search.standing_batches():
            x = search.images[indices]
            draws = uniform(list(image_streams(self.noise_seed, indices)), x)
            search.judge(indices, x + float(self.threat.eps) * draws)
        return search.correct

    def _spsa(self, best: Tensor, plan: SpsaPlan, most: int) -> MaskingCheck:
        asked = torch.ones_like(best)
        if most:
            # Up to the image that is the last of so many that stand.
            asked = (best.cumsum(0) - best.long()) < most
        standing = _count(best & asked)
        kept = self.attack(plan, self.spsa_seed, best & asked).correct
        broken = standing - _count(kept)
        if broken == 0:
            return MaskingCheck("SPSA", True, f"SPSA breaks none of {standing} images that PGD leaves right")
        # It found what PGD did not; is it also the better attack?
        left = _count(kept | self.attack(plan, self.spsa_seed, self.right & ~best & asked).correct)
        seen = f"SPSA leaves {left} of {_count(asked)} images right, PGD {standing} (of which SPSA breaks {broken})"
        return MaskingCheck("SPSA", left >= standing, seen)

    def _transfer(self, best: Tensor, transferred: Mapping[str, Tensor]) -> MaskingCheck:
        if not transferred:
            return MaskingCheck("transfer", False, "transfer was not tried, as there is no other model to make images")
        left = {name: _count(self.keep(f"transfer from {name}", right)) for name, right in transferred.items()}
        worst = min(left, key=lambda name: left[name])
        seen = (
            f"images made against {worst}, the worst of {len(left)}, leave {left[worst]} of {self.n} right, "
            f"PGD {_count(best)}"
        )
        return MaskingCheck("transfer", left[worst] >= _count(best), seen)

    def _losses(self, alone: Sequence[AttackResult], steps: int) -> MaskingCheck:
        first, second = (_count(result.correct) for result in alone)
        seen = (
            f"PGD-{steps} by cross-entropy alone leaves {first} of {self.n} images right, by the margin alone {second} "
            f"(at most {self.allowed} apart is allowed)"
        )
        return MaskingCheck("losses", abs(first - second) <= self.allowed, seen)


def _gradients(alone: Sequence[AttackResult]) -> MaskingCheck:
    shares = [result.zero_gradient_share for result in alone]
    seen = f"{shares[0]:.2%} of the gradients' entries are exactly 0 for cross-entropy, {shares[1]:.2%} for the margin"
    return MaskingCheck("gradients", max(shares) < MOST_ZEROS, seen)


def _count(correct: Tensor) -> int:
    return int(correct.sum())


def _check_transferred(transferred: Mapping[str, Tensor], images: Tensor) -> None:
    for name, right in transferred.items():
        if right.dtype != torch.bool or right.shape != images.shape[:1]:
            raise ValueError(
                f"transferred must hold what transfer() returned, {len(images)} booleans for each other model: "
                f"got {right.dtype} of shape {list(right.shape)} for {name!r}."
            )
