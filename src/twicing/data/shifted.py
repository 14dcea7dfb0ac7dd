"""ImageNet's shifted test sets from their released folders: ImageNet-C, -A, -R, -V2 and Sketch.

Which label a folder means follows from its name and the synsets of the 1,000 classes in order, which callers hand in.
C: arXiv 1903.12261. A: arXiv 1907.07174. R: arXiv 2006.16241. V2: arXiv 1902.10811. Sketch: arXiv 1905.13549.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twicing.data.folders import class_folders
from twicing.data.images import FolderImages
from twicing.names import few

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_C = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
IMAGENET_C_EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
IMAGENET_C_SIDE = 224
SEVERITIES = (1, 2, 3, 4, 5)
# The archives are released by group, and some people unpack each into a folder of its name.
GROUPS = ("noise", "blur", "weather", "digital", "extra")

Transform = Callable[["Image.Image"], Tensor]


@dataclass(frozen=True)
class CentreCrop:
    """Picture of Pillow -> its central size x size pixels, [C, size, size], float32, in [0, 1]; nothing is resized.

    Raises ValueError for a picture that is smaller.
    """

    size: int

    def __call__(self, image: Image.Image) -> Tensor:
        from twicing.data.decode import to_tensor

        width, height = image.size
        if min(width, height) < self.size:
            raise ValueError(f"a picture of {width} x {height} pixels is smaller than the crop of {self.size}.")
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return to_tensor(image.crop((left, top, left + self.size, top + self.size)))


@dataclass(frozen=True, eq=False)
class ClassSubset:
    """Images of some of a model's classes; the model chooses among these alone.

    images: labels count the set's own classes, in the order of their synsets. columns: [classes of the set], int64,
    where these classes are among the model's logits.
    """

    images: FolderImages
    columns: Tensor

    def cut(self, logits: Tensor) -> Tensor:
        """Keep the logits of the set's classes: [n, classes of the model] -> [n, classes of the set]; then argmax."""
        return logits[:, self.columns.to(logits.device)]


def plain_set(root: str | Path, synsets: Sequence[str], transform: Transform) -> FolderImages:
    """ImageNet's own validation set, -V2, Sketch: one folder per class, named by synset, or 0 to 999 as in -V2.

    synsets: the model's classes in the order of its logits; labels are positions in it, whatever order names sort in.
    Raises ValueError naming folders that are missing or that are no class of the model, or that hold no image.
    """
    root = Path(root)
    found = _folders(root)
    names = list(synsets)
    if not set(found) <= set(names) and all(name.isdecimal() for name in found):
        names = [str(number) for number in range(len(synsets))]
    _refuse_unknown(root, found, names)
    _refuse_missing(root, found, names)
    return class_folders(root, classes=names, transform=transform)


def subset(
    root: str | Path, synsets: Sequence[str], transform: Transform, *, own: Sequence[str] | None = None
) -> ClassSubset:
    """ImageNet-A or -R: root/synset/*.jpg for 200 of the 1,000 classes, which the folders' names tell.

    synsets: the model's classes in the order of its logits. Cut the logits with .cut() before the argmax.
    own: the set's classes as released, all of which must be there: among fewer a model is right more often.
    Raises ValueError naming folders that are no class of the model or of the set, are missing, or hold no image.
    """
    root = Path(root)
    found = _folders(root)
    _refuse_unknown(root, found, synsets)
    if own is not None:
        _refuse_unknown(root, found, own, of="the set's")
        _refuse_missing(root, found, own)
    columns = sorted(list(synsets).index(name) for name in found)
    names = [synsets[column] for column in columns]
    return ClassSubset(class_folders(root, classes=names, transform=transform), torch.tensor(columns))


def imagenet_c_folders(root: str | Path, kinds: Sequence[str] | None = None) -> dict[tuple[str, int], Path]:
    """Where the images of each corruption and severity lie: root/kind/severity, or root/group/kind/severity.

    kinds: some of IMAGENET_C and IMAGENET_C_EXTRA; by default all fifteen, and those of the extra four that are there.
    Raises ValueError naming an unknown kind, or the corruptions or the severity that root lacks.
    """
    root = Path(root)
    _folders(root)
    unknown = [kind for kind in kinds or () if kind not in IMAGENET_C + IMAGENET_C_EXTRA]
    if unknown:
        raise ValueError(
            f"{few(unknown)}: no corruption of ImageNet-C; it has {', '.join(IMAGENET_C)}, and apart "
            f"from these {', '.join(IMAGENET_C_EXTRA)}."
        )
    places = {kind: _place(root, kind) for kind in kinds or IMAGENET_C + IMAGENET_C_EXTRA}
    missing = [kind for kind, place in places.items() if place is None and (kinds or kind in IMAGENET_C)]
    if missing:
        raise ValueError(
            f"{root} must hold a folder for each corruption: {few(missing)} missing. "
            "Unpack the missing archives, or name the corruptions that are there."
        )
    folders = {
        (kind, severity): place / str(severity)
        for kind, place in places.items()
        if place is not None
        for severity in SEVERITIES
    }
    absent = next((folder for folder in folders.values() if not folder.is_dir()), None)
    if absent is not None:
        raise ValueError(f"{absent} is missing: every corruption has severities 1 to 5. Unpack its archive again.")
    return folders


def imagenet_c(folder: str | Path, synsets: Sequence[str], size: int = IMAGENET_C_SIDE) -> FolderImages:
    """One corruption at one severity, folder/synset/*.JPEG: the central 224 pixels of the released files, not resized.

    folder: one of imagenet_c_folders(). size: pixels of the crop.
    Raises ValueError as plain_set() does, and for files that are smaller than the crop.
    """
    images = plain_set(folder, synsets, CentreCrop(size))
    width, height = images.open(0).size
    if min(width, height) < size:
        raise ValueError(
            f"{images.paths[0]} is of {width} x {height} pixels: ImageNet-C's released files have "
            f"{IMAGENET_C_SIDE} or more each way, and {size} are cut out."
        )
    return images


def _folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: name the one that the released archive was unpacked into.")
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise ValueError(f"{root} holds no folders: name the one that the released archive was unpacked into.")
    return found


def _place(root: Path, kind: str) -> Path | None:
    candidates = [root / kind, *(root / group / kind for group in GROUPS)]
    return next((candidate for candidate in candidates if candidate.is_dir()), None)


def _refuse_missing(root: Path, found: Sequence[str], names: Sequence[str]) -> None:
    there = set(found)
    missing = [name for name in names if name not in there]
    if missing:
        raise ValueError(
            f"{root} must hold a folder for each of the {len(names)} classes: {few(missing)} missing. "
            "Unpack the whole set, or name the folder that holds the class folders."
        )


def _refuse_unknown(root: Path, found: Sequence[str], names: Sequence[str], of: str = "the model's") -> None:
    known = set(names)
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ValueError(
            f"{root} must hold folders named by {of} {len(names)} classes (as {names[0]}): got {few(unknown)}. "
            "Name the folder that holds the class folders, and remove what is no class."
        )
