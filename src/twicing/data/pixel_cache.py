"""Decoded images kept beside a record of what they were decoded from, so that decoding is done once.

Two files: NAME.npy, the pixels (mapped into memory, so that several processes share them), and NAME.json, the record.
"""

import json
import os
import uuid
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from twicing.data.images import MemoryImages

try:
    import numpy as np
except ImportError as error:
    raise ImportError("Decoded images are kept by NumPy, which is missing: pip install 'twicing[lab]'") from error

# Raise it when decoding changes.
VERSION = 1


def keep(images: MemoryImages, folder: Path, name: str, source: Mapping[str, object]) -> None:
    """Write uint8 images, sorted by label, and the record of their source (JSON values) into the folder.

    Each file appears whole or not at all. Raises ValueError naming the folder where it cannot be written.
    """
    assert images.pixels.dtype == torch.uint8
    assert images.labels.diff().ge(0).all()
    pixels = images.pixels.contiguous().numpy()
    record = {
        "version": VERSION,
        "source": source,
        "shape": list(pixels.shape),
        "crc32": zlib.crc32(pixels.data),
        "classes": images.classes,
        "images_per_class": images.labels.bincount(minlength=len(images.classes)).tolist(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(folder / f"{name}.npy", lambda file: np.save(file, pixels))
        _write_whole(folder / f"{name}.json", lambda file: file.write(json.dumps(record).encode()))
    except OSError as error:
        raise ValueError(
            f"{folder} cannot hold the decoded images ({error}): give another folder for the cache, or none."
        ) from error


def kept(folder: Path, name: str, source: Mapping[str, object]) -> MemoryImages | None:
    """Return the images kept under this name, mapped into memory; None where they are not of this source, or damaged.

    Damage is found by a checksum of all pixels (0.1 s for 100 MB). Writing into the pixels does not reach the file.
    """
    try:
        record = json.loads((folder / f"{name}.json").read_bytes())
        if record["version"] != VERSION or record["source"] != json.loads(json.dumps(source)):
            return None
        # "c": pages are shared until somebody writes to them.
        pixels = np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
        if list(pixels.shape) != record["shape"] or zlib.crc32(pixels.data) != record["crc32"]:
            return None
        counts = torch.tensor(record["images_per_class"])
        labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return MemoryImages(torch.from_numpy(pixels), labels, tuple(record["classes"]))
    # Whatever is wrong with a cache, the images can be decoded again.
    except Exception:
        return None


def _write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
