"""The plain test transforms of the papers: resize the shorter side, bicubic, then cut out the centre.

"papers" (256 / 224): DeiT, arXiv 2012.12877, and the papers that follow it. "0.9" (248 / 224): the published numbers
of timm's DeiT models. Both give the same pixels as torchvision's Resize, CenterCrop and ToTensor on Pillow's images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

# The crop's share of the resized shorter side, as numerator and denominator: 224 / 256 and 224 / 248 (rounded down).
SHARES = {"papers": (7, 8), "0.9": (9, 10)}


@dataclass(frozen=True)
class ResizeAndCrop:
    """Picture of Pillow -> [C, crop, crop], float32, in [0, 1]: shorter side to `resize` pixels, then the centre.

    The longer side is rounded down, the crop's corner to the nearest even whole number where it lies halfway, as in
    torchvision. Raises ValueError for pixels that are not of 8 bits: convert to RGB first.
    """

    resize: int
    crop: int

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            raise ValueError(f"crop must be from 1 to resize: got a crop of {self.crop} out of {self.resize} pixels.")

    def __call__(self, image: Image.Image) -> Tensor:
        from PIL.Image import Resampling

        from twicing.data.decode import to_tensor

        width, height = image.size
        short, long = min(width, height), max(width, height)
        if short != self.resize:
            longer = int(self.resize * long / short)
            width, height = (self.resize, longer) if width <= height else (longer, self.resize)
            image = image.resize((width, height), Resampling.BICUBIC)
        left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
        return to_tensor(image.crop((left, top, left + self.crop, top + self.crop)))


# Not a test, though ruff takes it for one by its name.
def test_transform(size: int, crop: str = "papers") -> Callable[[Image.Image], Tensor]:  # noqa: PT028
    """Return the transform to `size` pixels: "papers" resizes to 8/7 of it (256 for 224), "0.9" to 10/9 (248).

    Raises ValueError for a size below 1 and for another crop.
    """
    if crop not in SHARES:
        raise ValueError(f"crop must be one of {', '.join(map(repr, SHARES))}: got {crop!r}.")
    if size < 1:
        raise ValueError(f"size must be 1 pixel or more: got {size}.")
    numerator, denominator = SHARES[crop]
    return ResizeAndCrop(size * denominator // numerator, size)
