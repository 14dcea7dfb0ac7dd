"""A labelled set of images, read on demand: the one form in which images reach training, attacks and corruptions.

Pixels are float32 in [0, 1] after the plain test transform; normalisation belongs inside the model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


class Images(Protocol):
    """What every set of images offers."""

    @property
    def labels(self) -> Tensor:
        """The class of each image, [n], int64, 0 to len(classes) - 1."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names; the index is the label."""

    def __len__(self) -> int: ...

    def load(self, indices: Sequence[int]) -> Tensor:
        """Return the images at these positions, [b, C, H, W], float32, in [0, 1].

        Raises ValueError naming the file of a broken image, IndexError for a position outside 0 to n - 1.
        """


@dataclass(frozen=True, eq=False)
class MemoryImages:
    """Images held in memory (or mapped into it).

    pixels: [n, C, H, W], uint8 (grey level, load() divides by 255) or float32 in [0, 1]. labels: [n], int64.
    Raises ValueError where these do not fit together, TypeError for other dtypes.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.pixels.dtype not in (torch.uint8, torch.float32):
            raise TypeError(f"pixels must be uint8 or float32: got {self.pixels.dtype}.")
        if self.pixels.ndim != 4 or not self.pixels.numel():
            raise ValueError(f"pixels must be [n, C, H, W] with an image or more: got {list(self.pixels.shape)}.")
        if self.pixels.dtype == torch.float32:
            low, high = (bound.item() for bound in self.pixels.aminmax())
            if not (low >= 0 and high <= 1):  # true for NaN too
                raise ValueError(
                    f"float pixels must lie in [0, 1]: got values from {low:.3g} to {high:.3g}; "
                    "leave the normalisation to the model."
                )
        check_labels(self.labels, len(self.pixels), self.classes)

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, indices: Sequence[int]) -> Tensor:
        """Return the images at these positions, [b, C, H, W], float32, in [0, 1]."""
        chosen = self.pixels[torch.tensor(positions(indices, len(self)))]
        return chosen.float() / 255 if chosen.dtype == torch.uint8 else chosen


@dataclass(frozen=True, eq=False)
class FolderImages:
    """Images that stay in their files, class_folders() lists them; decoded when asked for, in any process.

    root: the folder. files: paths below it ("class/name.jpg"), [n], sorted. labels: [n], int64.
    transform: from an RGB picture of Pillow to [C, H, W], float32, in [0, 1], the same size for all; a function of a
    module, not a lambda, where worker processes load. dataclasses.replace() exchanges it.
    """

    root: Path
    files: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]
    transform: Callable[[Image.Image], Tensor]

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError(f"{self.root} holds no image.")
        check_labels(self.labels, len(self.files), self.classes)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """What stands for an image in errors: its path."""
        return str(self.root / self.files[index])

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files with their folder, made anew at each call (a million names are kept as text only)."""
        return tuple(self.root / file for file in self.files)

    def open(self, index: int) -> Image.Image:
        """Decode one image, as RGB of its own size; see decode.py for what becomes RGB and how.

        Raises ValueError naming the file where it is broken, IndexError for a position outside 0 to n - 1.
        """
        from twicing.data.decode import open_rgb

        (position,) = positions([index], len(self))
        return open_rgb(self.root / self.files[position], self.name(position))

    def load(self, indices: Sequence[int]) -> Tensor:
        """Return the transformed images at these positions, [b, C, H, W], float32.

        Raises ValueError naming the file of a broken image, or of one whose transformed size differs from the others'.
        """
        chosen = positions(indices, len(self))
        loaded: list[Tensor] = []
        for index in chosen:
            pixels = self.transform(self.open(index))
            if pixels.ndim != 3 or pixels.dtype != torch.float32:
                raise ValueError(
                    f"transform must return float32 of [C, H, W]: got {pixels.dtype} of {list(pixels.shape)}."
                )
            if loaded and pixels.shape != loaded[0].shape:
                raise ValueError(
                    f"{self.name(index)} is {_size(pixels)} after the transform, and {self.name(chosen[0])} "
                    f"{_size(loaded[0])}: use a transform to one size, as test_transform()."
                )
            loaded.append(pixels)
        return torch.stack(loaded)


def positions(indices: Sequence[int], n: int) -> list[int]:
    """Return the indices as a list. Raises ValueError where there are none, IndexError for one outside 0 to n - 1."""
    chosen = [operator.index(index) for index in indices]
    if not chosen:
        raise ValueError("indices must name one image or more: got none.")
    for index in chosen:
        # Counting from the end would hide a wrong sign, and what is recorded per image would lie elsewhere.
        if not 0 <= index < n:
            raise IndexError(f"indices must be from 0 to {n - 1}: got {index}.")
    return chosen


def check_labels(labels: Tensor, n: int, classes: Sequence[str]) -> None:
    """Raise ValueError unless labels are [n], int64, from 0 to len(classes) - 1, and all names of classes differ."""
    if labels.dtype != torch.int64 or labels.shape != (n,):
        raise ValueError(f"labels must be int64 of [{n}]: got {labels.dtype} of {list(labels.shape)}.")
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if list(classes).count(name) > 1)
        raise ValueError(f"classes must have different names: got {twice!r} twice.")
    low, high = (bound.item() for bound in labels.aminmax())
    if low < 0 or high >= len(classes):
        raise ValueError(
            f"labels must be from 0 to {len(classes) - 1}, as there are {len(classes)} classes: "
            f"got labels from {low} to {high}."
        )


class HasClasses(Protocol):
    """Anything with a list of classes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names."""


def expect_classes(images: HasClasses, n: int, source: str | Path | None = None) -> None:
    """Raise ValueError naming the source unless there are n classes; the source of FolderImages is their folder."""
    if source is None:
        source = images.root if isinstance(images, FolderImages) else "the data"
    found = len(images.classes)
    if found != n:
        names = ", ".join(images.classes[:3]) + (", ..." if found > 3 else "")
        raise ValueError(
            f"{source} must have {n} classes: it has {found} ({names}). Change the data or the number of classes."
        )


def _size(pixels: Tensor) -> str:
    channels, height, width = pixels.shape
    return f"{height} x {width} with {channels} channels"
