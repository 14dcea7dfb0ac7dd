"""Eight corruptions made on the fly at five severities: what happens to images that nobody attacks.

The family is that of Hendrycks and Dietterich, arXiv 1903.12261; the parameters are our own, one table for all sizes.
So these are "generated, not ImageNet-C", and there is no mCE of them: that belongs to the released files.
"""

import io
from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor

from twicing.robustness.draws import draw_seed, image_streams
from twicing.robustness.threat import check_pixels

GENERATED = "generated, not ImageNet-C"
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 28

# One image [C, H, W] in float64, the parameter of the severity, and the image's own stream of random numbers.
Corruption = Callable[[Tensor, float, torch.Generator], Tensor]


def corrupt(
    images: Tensor,
    kind: str,
    severity: int,
    *,
    indices: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Corrupt images by one of CORRUPTIONS at severity 1 to 5, then clip to [0, 1]. Generated, not ImageNet-C.

    | kind             | formula, for every pixel value x                   | severity 1 to 5         |
    | ---------------- | -------------------------------------------------- | ----------------------- |
    | gaussian_noise   | x + s z, z normal                                  | s = .04 .08 .12 .18 .26 |
    | shot_noise       | Poisson(l x) / l                                   | l = 250 100 50 25 12    |
    | impulse_noise    | a share p of the values becomes 0 or 1             | p = .01 .03 .06 .11 .18 |
    | speckle_noise    | x + s x z, z normal                                | s = .08 .15 .25 .35 .5  |
    | gaussian_blur    | mean with weights exp(-d^2 / 2 (b r)^2), mirrored  | b = .5 .65 .8 1 1.3     |
    | contrast         | m + c (x - m), m the channel's mean in the image   | c = .7 .5 .35 .2 .1     |
    | pixelate         | mean over square cells of (about) b r pixels       | b = 1.15 1.35 1.6 2 2.7 |
    | jpeg_compression | Pillow's JPEG after rounding to 8 bits             | quality 60 45 30 18 10  |

    Lengths are in pixels of a 32-pixel image and grow as r = sqrt(min(H, W) / 32): between those that the papers'
    authors chose for 32 and for 224 pixels, which differ by more than a constant and by less than the size.

    images: [n, 1 or 3, H, W] in [0, 1], float32 or float64, 28 pixels or more each way; chosen for 28 to 224.
    indices: the images' positions in their set, 0 to n - 1 by default: give them where a set is corrupted in batches.
    generator: its state decides the random numbers, together with an image's position and nothing else; so they are
    the same at every severity, and a batch needs a generator in the same state as the batch before it.
    Computed in float64 on the CPU, image by image. Returns a tensor like images, on their device.
    Raises ValueError for an unknown kind or severity, and images or positions that do not fit.
    Source: arXiv 1903.12261, section 3 and appendix B.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"the kind of corruption must be one of {', '.join(CORRUPTIONS)}: got {kind!r}.")
    if not isinstance(severity, int) or severity not in SEVERITIES:
        raise ValueError(f"the severity must be 1, 2, 3, 4 or 5: got {severity!r}.")
    _check_images(images)
    positions = torch.arange(len(images)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
    if positions.shape != images.shape[:1] or int(positions.min()) < 0:
        raise ValueError(
            f"indices must be {len(images)} positions, 0 or larger, one per image: got {positions.tolist()}."
        )
    apply, parameters = CORRUPTIONS[kind]
    parameter = parameters[severity - 1]
    streams = image_streams(draw_seed(generator), positions)
    originals = images.detach().to("cpu", torch.float64)
    corrupted = [apply(image, parameter, stream) for image, stream in zip(originals, streams, strict=True)]
    return torch.stack(corrupted).clamp(0, 1).to(images)


def gaussian_noise(image: Tensor, sd: float, stream: torch.Generator) -> Tensor:
    """Add normal noise: x + sd z."""
    return image + sd * torch.randn(image.shape, generator=stream, dtype=image.dtype)


def shot_noise(image: Tensor, photons: float, stream: torch.Generator) -> Tensor:
    """Count photons, of which white has so many on average: Poisson(photons x) / photons."""
    return torch.poisson(photons * image, generator=stream) / photons


def impulse_noise(image: Tensor, share: float, stream: torch.Generator) -> Tensor:
    """Replace a share of all values, half of these by 0 and half by 1."""
    hit = torch.rand(image.shape, generator=stream, dtype=image.dtype) < share
    salt = torch.rand(image.shape, generator=stream, dtype=image.dtype) < 0.5
    return torch.where(hit, salt.to(image.dtype), image)


def speckle_noise(image: Tensor, sd: float, stream: torch.Generator) -> Tensor:
    """Add normal noise in proportion to the value: x + sd x z."""
    return image + sd * image * torch.randn(image.shape, generator=stream, dtype=image.dtype)


def gaussian_blur(image: Tensor, sigma: float, _stream: torch.Generator) -> Tensor:
    """Blur within each channel; the image goes on mirrored beyond its edges."""
    try:
        from scipy.ndimage import gaussian_filter
    except ImportError as error:
        raise ImportError("gaussian_blur needs scipy, which is missing: pip install 'twicing[lab]'") from error
    width = sigma * _scale(image)
    return torch.from_numpy(gaussian_filter(image.numpy(), sigma=(0, width, width), mode="reflect"))


def contrast(image: Tensor, factor: float, _stream: torch.Generator) -> Tensor:
    """Draw every value towards the mean of its channel."""
    mean = image.mean((1, 2), keepdim=True)
    return mean + factor * (image - mean)


def pixelate(image: Tensor, block: float, _stream: torch.Generator) -> Tensor:
    """Replace every value by the mean of its cell; each pixel belongs to one cell."""
    side = block * _scale(image)
    down, across = (_cell_means(length, round(length / side), image.dtype) for length in image.shape[1:])
    return down @ image @ across.T


def jpeg_compression(image: Tensor, quality: float, _stream: torch.Generator) -> Tensor:
    """Round to 8 bits, write as JPEG (RGB with Pillow's usual halved colour resolution, or grey), and read again."""
    try:
        import numpy as np
        from PIL import Image
    except ImportError as error:
        raise ImportError("jpeg_compression needs Pillow, which is missing: pip install 'twicing[lab]'") from error
    grey = len(image) == 1
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if grey else pixels).save(file, "jpeg", quality=int(quality))
    with Image.open(file) as read:
        decoded = torch.from_numpy(np.array(read)).view(*image.shape[1:], len(image)).permute(2, 0, 1)
    return decoded.to(image.dtype) / 255


CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),
    "shot_noise": (shot_noise, (250, 100, 50, 25, 12)),
    "impulse_noise": (impulse_noise, (0.01, 0.03, 0.06, 0.11, 0.18)),
    "speckle_noise": (speckle_noise, (0.08, 0.15, 0.25, 0.35, 0.5)),
    "gaussian_blur": (gaussian_blur, (0.5, 0.65, 0.8, 1.0, 1.3)),
    "contrast": (contrast, (0.7, 0.5, 0.35, 0.2, 0.1)),
    "pixelate": (pixelate, (1.15, 1.35, 1.6, 2.0, 2.7)),
    # Not Pillow's usual 75: images that were kept as JPEG at that quality would come back unchanged.
    "jpeg_compression": (jpeg_compression, (60, 45, 30, 18, 10)),
}


def _scale(image: Tensor) -> float:
    """How much longer a length is in this image than in one of 32 pixels."""
    return sqrt(min(image.shape[1:]) / 32)


def _cell_means(length: int, cells: int, dtype: torch.dtype) -> Tensor:
    """[length, length]: row i averages over the pixels of i's cell."""
    cell = torch.arange(length) * cells // length
    same = (cell[:, None] == cell[None, :]).to(dtype)
    return same / same.sum(1, keepdim=True)


def _check_images(images: Tensor) -> None:
    check_pixels(images, (0.0, 1.0))
    shape = list(images.shape)
    if len(shape) != 4 or shape[1] not in (1, 3):
        raise ValueError(f"images must be [n, 1 or 3, height, width], grey or RGB: got the shape {shape}.")
    if min(shape[2:]) < SMALLEST_SIDE:
        raise ValueError(
            f"the corruptions are made for images of {SMALLEST_SIDE} to 224 pixels: got {shape[2]} x {shape[3]}. "
            "On smaller ones use noise only."
        )
