"""What a model is shown: pictures or windows of a text, read batch by batch, so that memory stays bounded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twicing.data.decode import open_rgb
from twicing.data.folders import SUFFIXES, is_picture
from twicing.data.images import Images
from twicing.data.transforms import test_transform
from twicing.experiments.analyze.pictures import photographs
from twicing.experiments.evaluate.subjects import HeldOut

# Why a band over inputs is too narrow where the inputs are parts of the same few things.
ONE_SOURCE = "The inputs are parts of {}, so that they are more alike than inputs at large: the bands are too narrow."


@dataclass(frozen=True, eq=False)
class Inputs:
    """words: what they are, for the page. caution: what the bands do not say; "" where they say what they should.

    load: positions -> [b, ...], what the model takes.
    """

    count: int
    words: str
    caution: str
    load: Callable[[Sequence[int]], Tensor]

    def batches(self, size: int, device: torch.device) -> Iterator[Tensor]:
        """All of them in order, so many at once."""
        for start in range(0, self.count, size):
            yield self.load(range(start, min(start + size, self.count))).to(device)


def held_out_inputs(held_out: HeldOut, count: int) -> Inputs:
    """So many held-out images, every class in its share; all where there are fewer."""
    images: Images = held_out.images
    chosen = held_out.order[:count].tolist()
    words = f"{len(chosen)} images that were held out from training, every class in its share"
    return Inputs(len(chosen), words, "", lambda wanted: images.load([chosen[place] for place in wanted]))


def picture_inputs(folder: Path | None, count: int, size: int, seed: int) -> Inputs:
    """Pictures of a folder, or the photographs where none is named. Raises as the two do."""
    return photograph_inputs(count, size, seed) if folder is None else folder_inputs(folder, count, size)


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

    return Inputs(count, f"{count} of the {len(files)} pictures in {folder}", "", load)


def photograph_inputs(count: int, size: int, seed: int) -> Inputs:
    """scikit-learn's two photographs and views cut from them, as many as there may be."""
    pictures = photographs(count, size, seed)
    caution = ONE_SOURCE.format("two photographs")
    return Inputs(len(pictures.pixels), pictures.words, caution, lambda wanted: pictures.pixels[list(wanted)])
