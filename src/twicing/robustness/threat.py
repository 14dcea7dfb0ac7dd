"""The threat model: what an attacker may do to an image, in pixels, with the size of the change kept as a fraction.

Szegedy et al., arXiv 1312.6199, and Madry et al., arXiv 1706.06083, section 2 (the set S of allowed changes).
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

FractionLike = Fraction | str | int


def as_fraction(value: FractionLike, name: str = "eps") -> Fraction:
    """Read "4/255", "0.1", "0.26/255", "1/16/255" (a sixteenth of a step of 8 bits), 0 or a Fraction, exactly.

    A float is refused with TypeError: 4/255 has no exact float, and what is printed would not be what was meant.
    """
    if isinstance(value, bool) or not isinstance(value, (Fraction, str, int)):
        raise TypeError(
            f"{name} must be a fraction, so that it prints as it was meant: got the {type(value).__name__} {value!r}. "
            f'Write it as a string, "4/255" or "0.1", or as fractions.Fraction(4, 255).'
        )
    if not isinstance(value, str):
        return Fraction(value)
    numerator, slash, denominator = value.rpartition("/")
    try:
        return Fraction(numerator) / Fraction(denominator) if slash else Fraction(value)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'{name} must read like "4/255", "1/16" or "0.1": got {value!r}.') from None


@dataclass(frozen=True, init=False)
class Threat:
    """The images an attacker may show instead of x: {x' : |x' - x| <= eps in every pixel, x' within the bounds}.

    eps: a fraction of the pixel scale, as "4/255" or fractions.Fraction(4, 255); 0 is no change. Kept exactly;
    eps_label is how it was spelt ("3/255" stays "3/255" though it equals 1/85).
    bounds: the lowest and highest pixel value. norm: "linf", the largest change of any pixel, is the only one so far.
    Raises TypeError for a float eps, ValueError for an eps below 0 or wider than the bounds, and for other norms.
    Source: arXiv 1706.06083, section 2.
    """

    eps: Fraction
    bounds: tuple[float, float]
    norm: str
    eps_label: str = field(compare=False)

    def __init__(self, eps: FractionLike, bounds: tuple[float, float] = (0.0, 1.0), norm: str = "linf"):
        exact = as_fraction(eps)
        low, high = (float(bound) for bound in bounds)
        if not -math.inf < low < high < math.inf:
            raise ValueError(
                f"bounds must be the lowest and the highest pixel value, as (0, 1): got ({low:g}, {high:g})."
            )
        if norm != "linf":
            raise ValueError(f'norm must be "linf", the only one there is so far: got {norm!r}.')
        if exact < 0:
            raise ValueError(f"eps must be 0 or larger: got {eps}.")
        if exact > Fraction(high) - Fraction(low):
            raise ValueError(
                f"eps must not exceed the whole pixel range [{low:g}, {high:g}]: got {eps}. "
                f'For steps of an 8-bit image write "{eps}/255".'
            )
        object.__setattr__(self, "eps", exact)
        object.__setattr__(self, "bounds", (low, high))
        object.__setattr__(self, "norm", norm)
        object.__setattr__(self, "eps_label", eps.strip() if isinstance(eps, str) else str(exact))

    def __str__(self) -> str:
        low, high = self.bounds
        return f"{self.norm}, eps {self.eps_label}, pixels in [{low:g}, {high:g}]"

    def check_images(self, images: Tensor) -> None:
        """Raise unless images are float32 or float64, finite, and within the bounds; the error names the range seen."""
        check_pixels(images, self.bounds)

    def project(self, candidate: Tensor, images: Tensor) -> Tensor:
        """Return the allowed image nearest to the candidate: clipped to eps around images, then to the bounds.

        candidate, images: the same shape. In images' dtype, so |result - images| <= eps up to one rounding of it.
        """
        low, high = self.bounds
        radius = float(self.eps)
        return candidate.clamp(images - radius, images + radius).clamp(low, high)


def check_pixels(images: Tensor, bounds: tuple[float, float]) -> None:
    """Raise unless images are [n, ...], float32 or float64, finite, and within the bounds.

    Half precision is refused because its steps (1/2048 near 1) are as large as the changes an attack makes.
    """
    if not isinstance(images, Tensor) or images.dtype not in (torch.float32, torch.float64):
        came = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"images must be a float32 or float64 tensor of pixels: got {came}. "
            "Convert integers by images.float() / 255; half precision belongs inside the model (autocast)."
        )
    if images.ndim < 2:
        raise ValueError(f"images must be [n, ...], n images in the first axis: got the shape {list(images.shape)}.")
    if images.numel() == 0:
        raise ValueError(f"images must hold at least one pixel: got the shape {list(images.shape)}.")
    low, high = bounds
    smallest, largest = (bound.item() for bound in images.detach().aminmax())
    if not (smallest >= low and largest <= high):  # false for NaN too
        raise ValueError(
            f"images must lie in [{low:g}, {high:g}] (pixels): got values from {smallest:.3g} to {largest:.3g}; "
            "put the normalisation inside the model."
        )
