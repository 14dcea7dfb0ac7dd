"""MNIST, 28 x 28 handwritten digits, from one .npz file with the arrays train_x, train_y, test_x, test_y.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", Proc. IEEE 86(11), 1998.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from twicing.data.images import MemoryImages

FILE_NAME = "mnist.npz"
SIDE = 28
DIGITS = tuple(str(digit) for digit in range(10))
ARRAYS = ("train_x", "train_y", "test_x", "test_y")


def load_mnist(path: str | Path) -> tuple[MemoryImages, MemoryImages]:
    """Read the images to train on and those held out, [n, 1, 28, 28], in the file's order.

    path: the .npz file or the folder that holds mnist.npz. The arrays x are uint8 of [n, 28, 28], y whole numbers
    from 0 to 9 of [n]. The file may be sorted by class: shuffle before you take a part.
    Raises ValueError naming the file where it is missing, damaged, or holds something else.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give the .npz file of MNIST or the folder that holds {FILE_NAME}.")
    names, arrays = _read(file)
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise ValueError(
            f"{file} must hold the arrays {', '.join(ARRAYS)}: {', '.join(missing)} missing, "
            f"got {', '.join(names) or 'none'}. Save them by numpy.savez under these names."
        )
    return _part(file, "train", arrays), _part(file, "test", arrays)


def _read(file: Path) -> tuple[list[str], dict[str, Any]]:
    """The names of all arrays in the file, and those arrays of MNIST that are there."""
    try:
        import numpy as np
    except ImportError as error:
        raise ImportError("MNIST is read by NumPy, which is missing: pip install 'twicing[lab]'") from error
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is not an .npz file, or it is truncated: get it again.")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return list(arrays), {name: arrays[name] for name in ARRAYS if name in arrays}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{file} holds pickled objects, which could run code and are not read: "
                "save plain arrays by numpy.savez."
            ) from error
        raise ValueError(f"{file} is damaged ({error}): get it again.") from error


def _part(file: Path, part: str, arrays: dict[str, Any]) -> MemoryImages:
    images, labels = arrays[f"{part}_x"], arrays[f"{part}_y"]
    if str(images.dtype) != "uint8" or images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or not len(images):
        raise ValueError(
            f"{file}: {part}_x must be uint8 of [n, {SIDE}, {SIDE}]: got {images.dtype} of {list(images.shape)}."
        )
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise ValueError(
            f"{file}: {part}_y must be whole numbers of [{len(images)}], one for each of {part}_x: "
            f"got {labels.dtype} of {list(labels.shape)}."
        )
    low, high = labels.min(), labels.max()
    if low < 0 or high >= len(DIGITS):
        raise ValueError(f"{file}: {part}_y must be digits from 0 to 9: got labels from {low} to {high}.")
    return MemoryImages(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype("int64")), DIGITS)
