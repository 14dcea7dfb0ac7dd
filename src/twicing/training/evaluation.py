"""What a trained model is put through, as a value that is checked before a training: sizes are shares of [0, 1]."""

from dataclasses import dataclass
from itertools import pairwise

from twicing.robustness.attacks import PgdPlan
from twicing.robustness.threat import Threat, as_fraction


@dataclass(frozen=True)
class Evaluation:
    """What a trained model is put through. Sizes of noise and attack are fractions of the pixel range [0, 1]."""

    noise: tuple[str, ...] = ("1/16", "1/8", "1/4")
    """Standard deviations of Gaussian noise."""
    eps: tuple[str, ...] = ("1/32", "1/16", "1/8")
    """Largest change of a pixel that FGSM and PGD may make, ascending."""
    pgd_steps: int = 15
    """Steps of PGD, each 3 / steps of eps (0.2 at 15 steps)."""
    pgd_restarts: int = 1
    """Restarts of PGD; each is one run per loss (cross-entropy and margin), each from its own random start."""
    probes: int = 0
    """Held-out images that attacks and corruptions work on, the same for every arm and seed; 0 is all of them."""
    eps50: bool = True
    """Whether the smallest eps that succeeds is found for every probe, and its median reported."""
    verdict_seeds: int = 1
    """So many of the seeds get a verdict on gradient masking, the first ones; 0 is none."""
    verdict_images: int = 100
    """Probes that the verdict looks at, every class in its share."""
    verdict_eps: str = "1/16"
    """The size of the attacks that the verdict compares; best where about half of the images still withstand."""
    spsa_images: int = 50
    """Images of the verdict that SPSA works on: it costs 2 x iterations x samples forwards of each."""
    spsa_iterations: int = 40
    """Steps of SPSA."""
    spsa_samples: int = 128
    """Random directions in each step of SPSA."""

    def __post_init__(self) -> None:
        # What cannot be measured is refused here, and not after a training.
        for sd in self.noise:
            if as_fraction(sd, "evaluation.noise") <= 0:
                raise ValueError(f"evaluation.noise must be above 0: got {sd}.")
        sizes = [Threat(eps).eps for eps in self.eps]
        if not sizes or sizes[0] == 0 or any(low >= high for low, high in pairwise(sizes)):
            raise ValueError(f"evaluation.eps must be sizes above 0 in ascending order: got {', '.join(self.eps)}.")
        PgdPlan(self.pgd_steps, None, self.pgd_restarts, ("cross-entropy", "margin"), random_start=True)
        if Threat(self.verdict_eps).eps == 0:
            raise ValueError(f"evaluation.verdict_eps must be above 0: got {self.verdict_eps}.")
        for name in ("probes", "verdict_seeds"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluation.{name} must be 0 or larger: got {getattr(self, name)}.")
        for name in ("verdict_images", "spsa_images", "spsa_iterations", "spsa_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name} must be 1 or larger: got {getattr(self, name)}.")
        for name, of in (("spsa_images", "verdict_images"), ("verdict_images", "probes")):
            part, whole = getattr(self, name), getattr(self, of)
            if self.verdict_seeds and 0 < whole < part:
                raise ValueError(
                    f"evaluation.{name} are among the {of}, of which there are {whole}: got {part}. "
                    f"Lower {name} or raise {of}."
                )
