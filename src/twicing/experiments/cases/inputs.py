"""What a model is shown: pictures or windows of a text, read batch by batch, so that memory stays bounded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from twicing.data.decode import open_rgb
from twicing.data.folders import SUFFIXES, is_picture
from twicing.data.images import Images
from twicing.data.transforms import test_transform
from twicing.experiments.evaluate.subjects import HeldOut

IMAGES, WINDOWS = "images", "windows"
# Why a band over inputs is too narrow where the inputs are parts of the same few things.
ONE_SOURCE = "The inputs are parts of {}, so that they are more alike than inputs at large: the bands are too narrow."
# Of two photographs more views would hardly be other pictures.
VIEWS = 32


@dataclass(frozen=True)
class Wanted:
    """What the options ask to show: how many inputs, and of what; without a folder or a text, what is at hand.

    tokens: in a window of the text. seed: decides the views that are cut from photographs.
    """

    count: int
    images: Path | None = None
    text: Path | None = None
    tokens: int = 128
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Inputs:
    """words: what they are, for the page. caution: what the bands do not say; "" where they say what they should.

    load: positions -> [b, ...], what the model takes. unit: "images" or "windows". labels: [count], or None where
    there are none that the model knows. sorted: whether they lie as in their source, so that the first few are no
    sample of them.
    """

    count: int
    words: str
    caution: str
    load: Callable[[Sequence[int]], Tensor]
    unit: str = IMAGES
    labels: Tensor | None = None
    sorted: bool = False

    def batches(self, size: int, device: torch.device) -> Iterator[Tensor]:
        """All of them in order, so many at once."""
        for start in range(0, self.count, size):
            yield self.load(range(start, min(start + size, self.count))).to(device)

    def sampled(self) -> tuple[Tensor, Tensor | None]:
        """All of them, [count, ...], and their labels, in an order of which every beginning is a sample."""
        order = spread(self.count) if self.sorted else list(range(self.count))
        return self.load(order), None if self.labels is None else self.labels[order]


def spread(count: int) -> list[int]:
    """0 to count - 1, by reversed binary digits: every beginning lies about evenly between the ends."""
    digits = (count - 1).bit_length()
    return sorted(range(count), key=lambda place: f"{place:0{digits}b}"[::-1])


def held_out_inputs(held_out: HeldOut, count: int) -> Inputs:
    """So many held-out images, every class in its share; all where there are fewer."""
    images: Images = held_out.images
    chosen = held_out.order[:count].tolist()
    words = f"{len(chosen)} images that were held out from training, every class in its share"
    return Inputs(
        len(chosen),
        words,
        "",
        lambda wanted: images.load([chosen[place] for place in wanted]),
        labels=images.labels[chosen],
    )


def picture_inputs(wanted: Wanted, size: int) -> Inputs:
    """Pictures of a folder, or the photographs where none is named, of so many pixels each way. Raises as the two."""
    if wanted.images is None:
        return photograph_inputs(wanted.count, size, wanted.seed)
    return folder_inputs(wanted.images, wanted.count, size)


def folder_inputs(folder: Path, count: int, size: int) -> Inputs:
    """So many pictures from anywhere below a folder, evenly spaced in the order of their names; decoded when loaded.

    Resized and cropped to size as the papers do. Raises ValueError where there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"--images {folder} is not a folder: give the folder that holds the pictures.")
    files = sorted(path for path in folder.rglob("*") if is_picture(path.name) and path.is_file())
    if not files:
        raise ValueError(f"--images {folder} holds no picture ({', '.join(SUFFIXES)}).")
    count = min(count, len(files))
    chosen = [files[place * len(files) // count] for place in range(count)]
    transform = test_transform(size)

    def load(wanted: Sequence[int]) -> Tensor:
        return torch.stack([transform(open_rgb(chosen[place], chosen[place])) for place in wanted])

    return Inputs(count, f"{count} of the {len(files)} pictures in {folder}", "", load, sorted=True)


def photograph_inputs(count: int, size: int, seed: int) -> Inputs:
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
    pixels = torch.stack(pictures)
    views = max(0, count - len(sources))
    cut = f" and {views} views cut from them" if views else ""
    words = f"scikit-learn's two sample photographs{cut}, as no --images were given"
    return Inputs(count, words, ONE_SOURCE.format("two photographs"), lambda wanted: pixels[list(wanted)])
