"""Class folders inside a tar archive (.tar, .tar.gz, .tgz, .tar.bz2, .tar.xz), read without unpacking a file.

Indices follow the sorted names, as for folders, whatever the order in the archive. An archive that could do harm when
unpacked (members outside of it, links, devices) is refused all the same, and so is one that ends early.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twicing.data.folders import is_picture
from twicing.data.progress import Progress

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# What the readers of tar and of the three compressions raise on damaged or shortened files.
DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, LZMAError)


@dataclass(frozen=True, eq=False)
class ArchiveImages:
    """The images of an archive: files [n] (names in the archive, sorted), labels [n] (int64), names of the classes."""

    archive: Path
    files: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """What stands for an image in errors."""
        return f"{self.archive}: {self.files[index]}"

    def pictures(self, progress: Progress | None = None) -> Iterator[tuple[int, Image.Image]]:
        """Yield (index, RGB picture) of every image once, in the order in which they lie in the archive.

        progress: called with the share of images done. Raises ValueError naming the archive and the broken image.
        """
        from twicing.data.decode import open_rgb

        index = {name: position for position, name in enumerate(self.files)}
        done = 0
        for done, (name, content) in enumerate(_contents(self.archive, index), 1):
            yield index[name], open_rgb(io.BytesIO(content), self.name(index[name]))
            if progress is not None:
                progress(done / len(index))
        if done != len(index):
            raise ValueError(
                f"{self.archive} has changed: {done} of the {len(index)} images listed before are left. "
                "Start again when it is written to no more."
            )


def class_archive(archive: str | Path, part: str | None = None) -> ArchiveImages:
    """List the images of an archive whose members are [folder/]class-name/picture.jpg; nothing is decoded yet.

    part: where one archive holds several sets, the folder ("train") above the class folders to take.
    Raises ValueError naming the archive, and the member where there is one: missing, truncated or damaged, a member
    that is absolute or climbs out by "..", a link, a device, a name that comes twice, a class folder without an
    image, images that do not all lie at the same depth, no image at all.
    """
    archive = Path(archive)
    if not archive.is_file():
        raise ValueError(f"{archive} does not exist: give a tar archive of class folders.")
    seen: set[PurePosixPath] = set()
    folders: set[PurePosixPath] = set()
    pictures: list[PurePosixPath] = []
    for member in _members(archive):
        path = _safe_path(archive, member)
        if any(piece.startswith(".") for piece in path.parts):
            continue
        if part is not None and part not in path.parts[:-1]:
            continue
        if member.isdir():
            folders.add(path)
        elif is_picture(path.name):
            if path in seen:
                raise ValueError(f"{archive} holds {path} twice: pack it again.")
            seen.add(path)
            pictures.append(path)
    return _by_class(archive, folders, sorted(pictures, key=str), part)


def _by_class(
    archive: Path, folders: set[PurePosixPath], pictures: Sequence[PurePosixPath], part: str | None
) -> ArchiveImages:
    inside = "" if part is None else f" in the folder {part}"
    if not pictures:
        raise ValueError(f"{archive} holds no image{inside}: pack class folders, as train/cat/0001.jpg.")
    tops = {picture.parent.parent: picture for picture in pictures}
    top = next(iter(tops))
    loose = [picture for picture in pictures if not picture.parent.name]
    if len(tops) > 1 or loose:
        examples = ", ".join(str(picture) for picture in [*loose, *tops.values()][:2])
        raise ValueError(
            f"{archive} must hold one folder per class, side by side{inside}: got {examples}. "
            "Pack each set of class folders into an archive of its own."
        )
    if part is not None and top.name != part:
        raise ValueError(f"{archive} must hold the class folders directly in {part}: got {pictures[0]}.")
    classes = sorted({picture.parent.name for picture in pictures})
    empty = sorted(folder.name for folder in folders if folder.parent == top and folder.name not in set(classes))
    if empty:
        raise ValueError(f"{archive}: the class folder {top / empty[0]} holds no image: add its images or remove it.")
    label = {name: position for position, name in enumerate(classes)}
    # By class and then by file, as class_folders() has it ("a-b/1" sorts before "a/1" as text).
    ordered = sorted(pictures, key=lambda picture: (picture.parent.name, picture.name))
    return ArchiveImages(
        archive,
        tuple(str(picture) for picture in ordered),
        torch.tensor([label[picture.parent.name] for picture in ordered]),
        tuple(classes),
    )


def _safe_path(archive: Path, member: tarfile.TarInfo) -> PurePosixPath:
    """The member's path; raises where unpacking it could write outside of a folder or make more than plain files."""
    # Read as Windows does, which knows both slashes and drives, so that no system's way out is missed.
    anywhere = PureWindowsPath(member.name)
    if anywhere.anchor or ".." in anywhere.parts:
        raise ValueError(
            f"{archive} is refused: its member {member.name!r} climbs out of the folder it is unpacked to."
        )
    if member.issym() or member.islnk():
        raise ValueError(f"{archive} is refused: its member {member.name!r} is a link. Pack the files themselves.")
    if not (member.isreg() or member.isdir()):
        raise ValueError(f"{archive} is refused: its member {member.name!r} is a device, neither file nor folder.")
    return PurePosixPath(member.name)


def _members(archive: Path) -> Iterator[tarfile.TarInfo]:
    """All members; after the last one raises ValueError where the archive is not complete."""
    with _complaints(archive), tarfile.open(archive) as tar:
        yield from tar
        # tarfile takes the end of the file, and any header it cannot read, for the end of the archive.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end mark is missing")
        # Up to the last byte, because the compressions' checksums come last.
        while tar.fileobj.read(1 << 20):
            pass


def _contents(archive: Path, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the wanted members, in the archive's order."""
    with _complaints(archive), tarfile.open(archive) as tar:
        for member in tar:
            name = str(PurePosixPath(member.name))
            if name in wanted and (file := tar.extractfile(member)) is not None:
                yield name, file.read()


@contextmanager
def _complaints(archive: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        # tarfile lists on further lines what each kind of compression found; that is no use to a reader.
        reason = str(error).partition("\n")[0].rstrip(":")
        raise ValueError(f"{archive} is truncated or damaged ({reason}): get it again.") from error
