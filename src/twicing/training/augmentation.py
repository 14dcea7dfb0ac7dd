"""Augmentation of training images: a function of (seed, epoch, image, repeat), in whatever process it is computed.

For images in memory: flips and shifted crops, on whole batches. For image files: timm's transforms (random resized
crop, RandAugment, arXiv 1909.13719, colour jitter, random erasing, arXiv 1708.04896), the ones DeiT was trained with.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from twicing.training.streams import AUGMENT_STREAM, stream_seed

# Strength, its spread and limit, number, share and weights of the changes, and whether they grow with strength.
RAND_AUGMENT = re.compile(r"rand(-(m|mstd|mmax|n|p|w|inc)\d+(\.\d+)?)*")


@dataclass(frozen=True)
class Augmentation:
    """What is done to the images that are trained on; as it is, nothing.

    The mixing of mixing.py is declared here too, as all of it belongs to one recipe.
    """

    flip: bool = False
    """Every second image is mirrored, left to right."""
    pad_crop: int = 0
    """Images in memory: so many black pixels are put around, and a part of the old size is cut out."""
    smallest_crop: float = 1.0
    """Image files: a part of at least this share of the area is cut out and resized."""
    rand_augment: str = ""
    """Image files: RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1; colour_jitter is then not used."""
    colour_jitter: float = 0.0
    """Image files: brightness, contrast and saturation change by up to this share."""
    erasing: float = 0.0
    """Image files: share of the images of which a rectangle becomes noise."""
    repeats: int = 1
    """Repeated augmentation (arXiv 1902.05509): so many versions of an image, one after the other; an epoch stays as
    long as it was, and sees a part of the images only."""
    mixup: float = 0.0
    """Alpha of mixup (arXiv 1710.09412); 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix (arXiv 1905.04899); 0 is off."""
    switch: float = 0.5
    """Share of the batches that get CutMix, where mixup is on as well."""
    smoothing: float = 0.0
    """Label smoothing."""

    def __post_init__(self) -> None:
        for name in ("colour_jitter", "mixup", "cutmix", "pad_crop"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"augmentation.{name} must be 0 or larger: got {getattr(self, name)}.")
        for name in ("erasing", "switch", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} must be from 0 to 1: got {getattr(self, name)}.")
        if not 0 < self.smallest_crop <= 1:
            raise ValueError(f"augmentation.smallest_crop must be above 0 and at most 1: got {self.smallest_crop}.")
        # timm passes over what it does not know, and the images would be augmented in another way than was meant.
        if self.rand_augment and not RAND_AUGMENT.fullmatch(self.rand_augment):
            raise ValueError(
                "augmentation.rand_augment must be in timm's notation, as rand-m9-mstd0.5-inc1: got "
                f"{self.rand_augment!r}."
            )
        if self.repeats < 1:
            raise ValueError(f"augmentation.repeats must be 1 or larger: got {self.repeats}.")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def for_files_only(self) -> str:
        """The name of a setting that is on and works on image files alone; empty where there is none."""
        on = {
            "smallest_crop": self.smallest_crop < 1,
            "rand_augment": self.rand_augment != "",
            "colour_jitter": self.colour_jitter > 0,
            "erasing": self.erasing > 0,
        }
        return next((name for name, is_on in on.items() if is_on), "")

    @property
    def for_pixels_only(self) -> str:
        """The same for settings that work on images in memory alone."""
        return "pad_crop" if self.pad_crop else ""


def augment_pixels(
    pixels: Tensor,
    numbers: Sequence[int],
    repeats: Sequence[int],
    *,
    augmentation: Augmentation,
    seed: int,
    pass_number: int,
    n: int,
) -> Tensor:
    """Flip and shift images [b, C, H, W]: what happens to one depends on seed, pass, its number and its repeat alone.

    numbers: the images' numbers below n. repeats: which version of each is wanted, from 0.
    """
    if not augmentation.flip and not augmentation.pad_crop:
        return pixels
    draws = torch.stack([_draws(seed, pass_number, r, n)[i] for i, r in zip(numbers, repeats, strict=True)])
    if augmentation.flip:
        mirrored = (draws[:, 0] < 0.5)[:, None, None, None]
        pixels = torch.where(mirrored, pixels.flip(3), pixels)
    if augmentation.pad_crop:
        height, width = pixels.shape[2:]
        around = torch.nn.functional.pad(pixels, [augmentation.pad_crop] * 4)
        corners = (draws[:, 1:] * (2 * augmentation.pad_crop + 1)).long().tolist()
        cut = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(around, corners, strict=True)]
        pixels = torch.stack(cut)
    return pixels


# The draws of one pass for all images at once: a generator per image would take longer than a training step.
@lru_cache(maxsize=4)
def _draws(seed: int, pass_number: int, repeat: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(stream_seed(seed, AUGMENT_STREAM, pass_number, repeat))
    return torch.rand(n, 3, generator=generator)


class FileTransform:
    """Picture of Pillow -> training image [3, size, size]; draws from the global generators (see drawing_from()).

    All in [0, 1], but for the rectangle of random erasing. DeiT erases *after* the normalisation, by N(0, 1) noise;
    ours is inside the model, so that the same rectangle is mean + std N(0, 1) in pixels. It is not cut off at 0 and 1,
    as the network then sees exactly what DeiT's saw.
    """

    def __init__(self, augmentation: Augmentation, size: int, mean: Sequence[float], std: Sequence[float]):
        from timm.data.random_erasing import RandomErasing
        from timm.data.transforms_factory import create_transform

        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self.picture_to_bytes: Callable[[Any], Tensor] = create_transform(
            size,
            is_training=True,
            scale=(augmentation.smallest_crop, 1.0),
            hflip=0.5 if augmentation.flip else 0.0,
            color_jitter=augmentation.colour_jitter,
            auto_augment=augmentation.rand_augment or None,
            interpolation="bicubic",
            # RandAugment fills what it uncovers with the mean.
            mean=tuple(mean),
            std=tuple(std),
            normalize=False,
        )
        self.erase = RandomErasing(augmentation.erasing, mode="pixel", device="cpu") if augmentation.erasing else None

    def __call__(self, picture: Any) -> Tensor:
        pixels = self.picture_to_bytes(picture).float() / 255
        if self.erase is None:
            return pixels
        normalised = (pixels - self.mean) / self.std
        erased = self.erase(normalised.clone())
        # Elsewhere the pixels themselves, not what rounding makes of them on the way there and back.
        return torch.where(erased == normalised, pixels, erased * self.std + self.mean)
