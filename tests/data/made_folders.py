"""Small data sets, written for a test: class folders, a train and a held-out part of them, tar archives.

Tests of other folders import it after `sys.path.append(str(Path(__file__).parents[1] / "data"))`.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def picture(size=(32, 32), seed=0, mode="RGB"):
    """A picture of (width, height): smooth colours that depend on the seed, so that JPEG keeps them roughly."""
    width, height = size
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, suffix=".png"):
    """The bytes of an image file; .png and .bmp keep the pixels exactly, .jpg does not."""
    file = io.BytesIO()
    image.save(file, {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP"}[suffix])
    return file.getvalue()


def made_files(classes=("cat", "dog"), per_class=3, size=(32, 32), seed=0, suffix=".png"):
    """{"class/0000.png": bytes}, other pictures for each class, number and seed."""
    return {
        f"{name}/{number:04}{suffix}": encoded(picture(size, seed=(seed, label, number)), suffix)
        for label, name in enumerate(classes)
        for number in range(per_class)
    }


def write_files(root, files):
    """Write {"class/name": bytes} below root; returns root."""
    root = Path(root)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def make_class_folders(root, classes=("cat", "dog"), per_class=3, size=(32, 32), seed=0, suffix=".png"):
    """Write root/class/0000.png and so on; returns root."""
    return write_files(root, made_files(classes, per_class, size, seed, suffix))


def make_train_and_held_out(root, held_out="val", classes=("cat", "dog"), per_class=3, size=(32, 32), suffix=".png"):
    """Write root/train and root/val (or held_out) with different pictures; returns root."""
    make_class_folders(Path(root) / "train", classes, per_class, size, 0, suffix)
    make_class_folders(Path(root) / held_out, classes, per_class, size, 1, suffix)
    return Path(root)


def write_archive(path, files):
    """Write {"folder/class/name": bytes} as a tar archive, compressed as its name says, in the order given."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    compression = {".gz": "gz", ".tgz": "gz", ".bz2": "bz2", ".xz": "xz"}.get(path.suffix, "")
    with tarfile.open(path, f"w:{compression}") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def make_archive(path, top="train", classes=("cat", "dog"), per_class=3, size=(32, 32), seed=0, suffix=".png"):
    """Write one tar archive of top/class/0000.png and so on; returns its path."""
    files = made_files(classes, per_class, size, seed, suffix)
    return write_archive(path, {f"{top}/{name}": content for name, content in files.items()})


def make_cifar10(root, per_class=2, suffix=".png"):
    """Write root/cifar10-train.tar.gz and root/cifar10-test.tar.gz with the ten classes, 32 x 32; returns root."""
    for seed, part in enumerate(("train", "test")):
        path = Path(root) / f"cifar10-{part}.tar.gz"
        make_archive(path, part, CIFAR10_CLASSES, per_class, seed=seed, suffix=suffix)
    return Path(root)


def make_mnist(path, train=40, test=20, seed=0):
    """Write an .npz with the four arrays of MNIST, random pixels, all ten classes in turn; returns its path."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, n in (("train", train), ("test", test)):
        arrays[f"{part}_x"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{part}_y"] = (np.arange(n) % 10).astype(np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return Path(path)
