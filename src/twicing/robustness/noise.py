"""Gaussian noise on pixels: the corruption that has no adversary.

Hendrycks and Dietterich, arXiv 1903.12261, "gaussian_noise": x + sd z, clipped to the pixel range.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from twicing.robustness.draws import draw_seed, image_streams
from twicing.robustness.threat import as_fraction, check_pixels


def gaussian_noise(
    images: Tensor,
    sd: float | Fraction | str,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Add noise: clip(x + sd z, bounds), z normal with variance 1, independent in every pixel.

    images: [n, ...] within the bounds, float32 or float64. sd: in units of the pixel scale, 0.125 or "1/8".
    The noise of image i depends on the generator's state and on i alone.
    Clipping lowers the spread near the bounds, so sd is that of the noise before it.
    Raises ValueError for images out of range or an sd that is negative or not finite.
    Source: arXiv 1903.12261.
    """
    check_pixels(images, bounds)
    spread = sd if isinstance(sd, float) else float(as_fraction(sd, "sd"))
    if not (math.isfinite(spread) and spread >= 0):
        raise ValueError(f"sd must be a finite number, 0 or larger: got {sd}.")
    streams = image_streams(draw_seed(generator), torch.arange(len(images)))
    noise = torch.stack([torch.randn(images.shape[1:], generator=stream, dtype=images.dtype) for stream in streams])
    return (images + spread * noise.to(images.device)).clamp(*bounds)
