"""Images in class folders, root/class-name/picture.jpg, listed in an order that is the same on every machine.

Classes are sorted by name, files within a class by their path; folders below a class folder count as part of it.
Hidden files and folders (".DS_Store", "._picture.jpg") and files without the suffix of a picture are not seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twicing.data.images import FolderImages
from twicing.data.progress import Progress, part_of
from twicing.names import few

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# The first of these that is there is held out.
HELD_OUT = ("val", "test")


def whole_picture(image: Image.Image) -> Tensor:
    """The transform that leaves the picture as it is: [C, H, W], float32, in [0, 1]."""
    from twicing.data.decode import to_tensor

    return to_tensor(image)


def class_folders(
    root: str | Path,
    *,
    classes: Sequence[str] | None = None,
    transform: Callable[[Image.Image], Tensor] = whole_picture,
    progress: Progress | None = None,
) -> FolderImages:
    """List the images below root, one folder per class; nothing is decoded yet.

    classes: the names that the folders must have, in the order of the labels (a held-out set takes the training
    set's); by default the folders' names, sorted. progress: called with the share of class folders listed, up to 1.
    Raises ValueError naming the folder where root does not exist, holds no class folder, where a class folder holds
    no image, or where folders of the given classes are missing or others are there.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give the folder that holds one folder of images per class.")
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise ValueError(f"{root} holds no class folder: put the images of each class into a folder of its name.")
    names = tuple(found if classes is None else classes)
    check_same_classes(root, found, names)
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        pictures = sorted(_pictures(root / name, name))
        if not pictures:
            raise ValueError(
                f"{root / name} holds no image ({', '.join(SUFFIXES)}): put its images there or remove the folder."
            )
        files += pictures
        labels += [label] * len(pictures)
        if progress is not None:
            progress((label + 1) / len(names))
    return FolderImages(root, tuple(files), torch.tensor(labels), names, transform)


def train_and_held_out(
    root: str | Path,
    *,
    transform: Callable[[Image.Image], Tensor] = whole_picture,
    progress: Progress | None = None,
) -> tuple[FolderImages, FolderImages]:
    """List root/train and root/val (root/test where there is no val), with the same classes in both.

    Raises ValueError naming the folder where one is missing, or as class_folders() does.
    """
    root = Path(root)
    if not (root / "train").is_dir():
        raise ValueError(f"{root / 'train'} is missing: put the class folders to train on there.")
    held_out = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
    if held_out is None:
        names = " and ".join(str(root / name) for name in HELD_OUT)
        raise ValueError(f"{names} are both missing: put the class folders of the held-out images into one of them.")
    # Listing takes as long as there are files; the held-out part is the smaller one.
    train = class_folders(root / "train", transform=transform, progress=part_of(progress, 0, 0.9))
    return train, class_folders(
        held_out, classes=train.classes, transform=transform, progress=part_of(progress, 0.9, 0.1)
    )


def check_same_classes(root: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise ValueError naming what is missing or unknown unless root's class folders are those wanted."""
    wanted_names, found_names = set(wanted), set(found)
    missing = [name for name in wanted if name not in found_names]
    unknown = [name for name in found if name not in wanted_names]
    if missing or unknown:
        parts = [f"{few(missing)} missing"] * bool(missing) + [f"{few(unknown)} unknown"] * bool(unknown)
        raise ValueError(
            f"{root} must have the {len(wanted)} class folders of the training images: {', '.join(parts)}. "
            "Rename, add or remove class folders until both have the same."
        )


def is_picture(name: str) -> bool:
    """Whether a file of this name is taken for a picture: a known suffix, in any case, and not hidden."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _pictures(folder: Path, prefix: str) -> Iterator[str]:
    """Paths of the pictures in a class folder, below its root; links are followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            # A link to nowhere is listed: opening it names it, while leaving it out would shift all indices.
            if is_picture(entry.name) and not entry.is_dir():
                yield f"{prefix}/{entry.name}"
            elif not entry.name.startswith(".") and entry.is_dir():
                yield from _pictures(folder / entry.name, f"{prefix}/{entry.name}")
