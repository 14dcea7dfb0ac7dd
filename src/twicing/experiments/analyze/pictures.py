"""The pictures that models are looked at with: held-out images, a folder, or scikit-learn's two photographs."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from twicing.data.decode import open_rgb
from twicing.data.folders import SUFFIXES, is_picture
from twicing.data.transforms import test_transform
from twicing.experiments.evaluate.subjects import HeldOut

# Of two photographs more views would hardly be other pictures.
VIEWS = 32


@dataclass(frozen=True, eq=False)
class Pictures:
    """What models are shown. pixels: [n, C, H, W] in [0, 1]. labels: [n], or None where there are none the model knows.

    words: what they are.
    """

    pixels: Tensor
    labels: Tensor | None
    words: str


def held_out_pictures(held_out: HeldOut, count: int) -> Pictures:
    """So many held-out images, every class in its share; all where there are fewer."""
    chosen = held_out.order[:count].tolist()
    words = f"{len(chosen)} held-out images, every class in its share"
    return Pictures(held_out.images.load(chosen), held_out.images.labels[chosen], words)


def folder_pictures(folder: Path, count: int, size: int) -> Pictures:
    """So many pictures from anywhere below a folder, evenly spaced in the order of their names, as is every beginning.

    Resized and cropped to size as the papers do. Raises ValueError where there is none, or one cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"--images {folder} is not a folder: give the folder that holds the pictures.")
    files = sorted(path for path in folder.rglob("*") if is_picture(path.name) and path.is_file())
    if not files:
        raise ValueError(f"--images {folder} holds no picture ({', '.join(SUFFIXES)}).")
    count = min(count, len(files))
    # By reversed binary digits: the few that are drawn are not all of the first class.
    digits = (count - 1).bit_length()
    order = sorted(range(count), key=lambda place: f"{place:0{digits}b}"[::-1])
    chosen = [files[place * len(files) // count] for place in order]
    transform = test_transform(size)
    pixels = torch.stack([transform(open_rgb(file, file)) for file in chosen])
    return Pictures(pixels, None, f"{count} of the {len(files)} pictures in {folder}")


def photographs(count: int, size: int, seed: int) -> Pictures:
    """The two photographs of scikit-learn, "China" and "Flower", then views cut from them at seeded places.

    At most VIEWS pictures; a view is a square of half to all of the shorter side, resized to size.
    Raises ImportError where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ImportError("The photographs need scikit-learn, which is missing: pip install 'twicing[lab]'") from error
    sources = [Image.fromarray(picture) for picture in load_sample_images().images]
    transform = test_transform(size)
    draw = torch.Generator().manual_seed(seed)
    count = min(count, VIEWS)
    pictures = [transform(source) for source in sources[:count]]
    while len(pictures) < count:
        source = sources[len(pictures) % len(sources)]
        share, x, y = torch.rand(3, generator=draw).tolist()
        side = int(min(source.size) * (0.5 + 0.5 * share))
        left, top = int(x * (source.width - side)), int(y * (source.height - side))
        pictures.append(transform(source.crop((left, top, left + side, top + side))))
    views = max(0, count - len(sources))
    cut = f" and {views} views cut from them" if views else ""
    words = f"scikit-learn's two sample photographs{cut}, as no --images were given"
    return Pictures(torch.stack(pictures), None, words)
