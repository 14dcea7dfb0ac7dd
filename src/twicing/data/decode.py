"""One image file to RGB, in the way torchvision's ImageFolder reads it, but for 16-bit greys (which it clips to white).

Grey, palette, CMYK and 16-bit images become RGB of 8 bits. Alpha is dropped: the colours stored beneath it are kept.
The EXIF orientation is not applied. Of an animation the first picture is taken.
"""

import os
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

try:
    from PIL import Image
except ImportError as error:
    raise ImportError("Image files are read by Pillow, which is missing: pip install 'twicing[lab]'") from error

SIXTEEN_BITS = 65535


def open_rgb(source: Path | BinaryIO, name: str | os.PathLike[str]) -> Image.Image:
    """Decode one image file completely, as RGB; name stands for it in errors.

    Raises ValueError naming it where it is missing, truncated, damaged, no image, or of real numbers (TIFF's floats).
    """
    try:
        with Image.open(source) as image:
            image.load()
            return to_rgb(image)
    # A damaged file makes a reader of Pillow stumble anywhere: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        reason = str(error) or type(error).__name__
        # Pillow names the object it read from, which says nothing here.
        reason = "not a picture in any known format" if "cannot identify image file" in reason else reason
        raise ValueError(f"{name} cannot be read as an image ({reason}): replace the file or remove it.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the decoded image as 8-bit RGB; 16 bits keep their upper 8. Raises ValueError for other number formats."""
    # With it, Pillow would warn about every palette image that has an alpha value per colour.
    image.info.pop("transparency", None)
    if image.mode == "F":
        raise ValueError("its pixels are real numbers of an unknown range")
    if image.mode.startswith("I"):
        low, high = image.getextrema()
        if not 0 <= low <= high <= SIXTEEN_BITS:  # type: ignore[operator]
            raise ValueError(f"its pixels go from {low} to {high}, more than 16 bits")
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    return image.convert("RGB")


def pixels_of(image: Image.Image) -> Tensor:
    """Return the image's pixels, uint8, [C, H, W]. Raises ValueError for pixels that are not 8-bit grey or colours."""
    channels = len(image.getbands())
    width, height = image.size
    raw = bytearray(image.tobytes())
    if len(raw) != channels * width * height:
        raise ValueError(f"pixels must be of 8 bits: got an image of mode {image.mode!r}. Convert it to RGB first.")
    return torch.frombuffer(raw, dtype=torch.uint8).view(height, width, channels).permute(2, 0, 1)


def to_tensor(image: Image.Image) -> Tensor:
    """Return the image as it is, [C, H, W], float32, in [0, 1] (grey level / 255)."""
    return pixels_of(image).contiguous().float() / 255
