"""CIFAR-10, 32 x 32 colour images of 10 classes, from class folders of image files or tar archives of them.

Krizhevsky, "Learning multiple layers of features from tiny images", 2009. Images that were stored as JPEG are not
those that published accuracies are about: call them "CIFAR-10 (JPEG)".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from twicing.data.archive import SUFFIXES, ArchiveImages, class_archive
from twicing.data.folders import check_same_classes, class_folders
from twicing.data.images import FolderImages, MemoryImages, expect_classes
from twicing.data.progress import Progress, part_of

if TYPE_CHECKING:
    from PIL import Image

SIDE = 32
CLASSES = 10
PARTS = ("train", "test")
# The training images' share of the work, for the progress.
TRAIN_SHARE = 5 / 6


def load_cifar10(
    path: str | Path, cache: str | Path | None = None, *, progress: Progress | None = None
) -> tuple[MemoryImages, MemoryImages]:
    """Decode the images to train on and those held out, uint8, [n, 3, 32, 32]; sorted by class, then by file name.

    path: a folder with train/ and test/ class folders, or with one archive each whose name contains "train" and
    "test", or one archive that holds both folders.
    cache: a folder that keeps the decoded pixels (184 MB for all of it), used again as long as the archives (their
    names, sizes and times) or the files of the class folders are the same; a damaged cache is made anew.
    progress: called with the share done, up to 1.
    Raises ValueError naming the file where something is missing, broken, not 32 x 32, or not of 10 classes.
    """
    train_source, test_source = _sources(Path(path))
    cache = None if cache is None else Path(cache)
    train = _decoded(train_source, "train", cache, part_of(progress, 0, TRAIN_SHARE))
    test = _decoded(test_source, "test", cache, part_of(progress, TRAIN_SHARE, 1 - TRAIN_SHARE))
    check_same_classes(test_source.path, test.classes, train.classes)
    return train, test


@dataclass(frozen=True)
class _Source:
    """A folder of class folders or an archive of them; part is given where the archive holds both sets."""

    path: Path
    part: str | None = None

    def list(self) -> FolderImages | ArchiveImages:
        if self.path.is_dir():
            return class_folders(self.path)
        return class_archive(self.path, self.part)

    def record(self) -> dict[str, object]:
        """What must be the same for decoded images to be used again."""
        if self.path.is_dir():
            found = class_folders(self.path)
            lines = [f"{file}\0{_size_and_time(found.root / file)}\n" for file in found.files]
            digest = hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
            return {"folder": self.path.name, "files": len(lines), "sha256 of names, sizes and times": digest}
        state = self.path.stat()
        return {"archive": self.path.name, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns}


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    # A link to nowhere: decoding complains about it.
    except FileNotFoundError:
        return None
    return state.st_size, state.st_mtime_ns


def _sources(path: Path) -> tuple[_Source, _Source]:
    if path.is_file():
        return _Source(path, "train"), _Source(path, "test")
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: give the folder that holds train/ and test/, or an archive of each.")
    if all((path / part).is_dir() for part in PARTS):
        return _Source(path / "train"), _Source(path / "test")
    archives = sorted(file for file in path.iterdir() if file.name.lower().endswith(SUFFIXES) and file.is_file())
    train, test = (_archive_of(path, part, archives) for part in PARTS)
    if train == test:
        return _Source(train, "train"), _Source(test, "test")
    return _Source(train), _Source(test)


def _archive_of(path: Path, part: str, archives: list[Path]) -> Path:
    """The one archive whose name contains the part's; where there are more, the one that is also named cifar."""
    matching = [file for file in archives if part in file.name.lower() and not file.name.startswith(".")]
    if len(matching) > 1:
        matching = [file for file in matching if "cifar" in file.name.lower()] or matching
    if not matching:
        raise ValueError(
            f"{path} must hold the class folders train/ and test/, or one tar archive of each: "
            f"no {part}/ beside its counterpart, and no archive with {part!r} in its name."
        )
    if len(matching) > 1:
        names = ", ".join(file.name for file in matching)
        raise ValueError(f"{path} must hold one archive with {part!r} in its name: got {names}. Move the others away.")
    return matching[0]


def _decoded(source: _Source, part: str, cache: Path | None, progress: Progress | None) -> MemoryImages:
    if cache is None:
        return _decode(source, progress)
    from twicing.data.pixel_cache import keep, kept

    record, name = source.record(), f"cifar10-{part}"
    images = kept(cache, name, record)
    if images is None:
        decoded = _decode(source, progress)
        keep(decoded, cache, name, record)
        # Read back, so that processes share it; none, if another process has just put something else there.
        shared = kept(cache, name, record)
        images = decoded if shared is None else shared
    elif progress is not None:
        progress(1.0)
    return images


def _decode(source: _Source, progress: Progress | None) -> MemoryImages:
    from twicing.data.decode import pixels_of

    listed = source.list()
    expect_classes(listed, CLASSES, source.path)
    pixels = torch.empty(len(listed), 3, SIDE, SIDE, dtype=torch.uint8)
    for index, picture in _pictures(listed, progress):
        if picture.size != (SIDE, SIDE):
            width, height = picture.size
            raise ValueError(
                f"{listed.name(index)} must be of {SIDE} x {SIDE} pixels: got {width} x {height}. Is this CIFAR-10?"
            )
        pixels[index] = pixels_of(picture)
    return MemoryImages(pixels, listed.labels, listed.classes)


def _pictures(listed: FolderImages | ArchiveImages, progress: Progress | None) -> Iterator[tuple[int, Image.Image]]:
    if isinstance(listed, ArchiveImages):
        yield from listed.pictures(progress)
        return
    for index in range(len(listed)):
        yield index, listed.open(index)
        if progress is not None:
            progress((index + 1) / len(listed))
