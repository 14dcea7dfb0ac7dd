import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from twicing.data.images import MemoryImages
from twicing.training.settings import apply_settings

CLASSES, TRAIN, HELD_OUT = 4, 9, 3


@pytest.fixture
def tiny():
    """Settings that make any recipe small."""
    return lambda recipe, *more: apply_settings(recipe, ["depth=2", "width=16", "heads=2", *more])


@pytest.fixture
def grey_images():
    """made(n): n grey images of 8 x 8, three classes, in memory."""

    def made(n, seed=0):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
        return MemoryImages(pixels, torch.arange(n) % 3, ("a", "b", "c"))

    return made


@pytest.fixture(scope="session")
def made_up_folder(tmp_path_factory):
    """train/ and val/ with four classes of noisy PNG files of different sizes."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("val", HELD_OUT)):
        for label in range(CLASSES):
            (root / part / f"class-{label}").mkdir(parents=True)
            for i in range(count):
                height, width = draw.integers(34, 50, size=2)
                pixels = draw.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / f"class-{label}" / f"{i}.png")
    return root


@pytest.fixture
def picture_folder(request, made_up_folder, tmp_path):
    """The same made of CIFAR-10 images where these are there."""
    try:
        archive = request.getfixturevalue("real_data") / "vision" / "cifar10-jpeg-test.tar.gz"
    except pytest.skip.Exception:
        return made_up_folder
    root, wanted = tmp_path / "cifar", {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isfile():
                continue
            label = member.name.split("/")[-2]
            count = wanted.setdefault(label, 0) if len(wanted) < CLASSES or label in wanted else TRAIN + HELD_OUT
            if count < TRAIN + HELD_OUT:
                wanted[label] += 1
                folder = root / ("train" if count < TRAIN else "val") / label
                folder.mkdir(parents=True, exist_ok=True)
                (folder / member.name.split("/")[-1]).write_bytes(tar.extractfile(member).read())
            elif len(wanted) == CLASSES and min(wanted.values()) == TRAIN + HELD_OUT:
                break
    return root
