"""The test transforms give, bit for bit, the pixels of torchvision's and timm's."""

import pickle

import numpy as np
import pytest
import torch
from made_folders import picture
from PIL import Image

from twicing.data import transforms
from twicing.torchvision_import import mend_torchvision_import

# Width and height: larger, smaller, wide, tall, odd; 256 and 248 on one side, so that nothing is resized.
SIZES = [(500, 375), (333, 512), (256, 400), (248, 251), (60, 41), (224, 224), (1000, 257)]
SMALL = [(32, 32), (40, 31), (36, 50), (28, 29), (9, 200)]


def noise(size):
    """Fine detail, so that an interpolation or a crop that is off by one shows everywhere."""
    width, height = size
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def torchvision_transforms():
    mend_torchvision_import()
    from torchvision import transforms as others

    return others


@pytest.mark.parametrize(("size", "resized"), [(224, 256), (32, 36), (28, 32), (384, 438)])
def test_the_papers_transform_is_torchvisions(torchvision_transforms, size, resized):
    others = torchvision_transforms
    expected = others.Compose(
        [others.Resize(resized, others.InterpolationMode.BICUBIC), others.CenterCrop(size), others.ToTensor()]
    )
    ours = transforms.test_transform(size, "papers")
    for shape in SIZES[: 7 if size == 224 else 2] + SMALL:
        image = noise(shape)
        assert torch.equal(ours(image), expected(image)), shape


@pytest.mark.parametrize(("crop", "share"), [("papers", 0.875), ("0.9", 0.9)])
@pytest.mark.parametrize("size", [224, 32])
def test_the_transforms_are_timms(torchvision_transforms, crop, share, size):
    from timm.data import create_transform

    expected = create_transform(
        size, interpolation="bicubic", crop_pct=share, mean=(0, 0, 0), std=(1, 1, 1), normalize=False
    )
    ours = transforms.test_transform(size, crop)
    for shape in SIZES[:4] + SMALL:
        image = noise(shape)
        theirs = expected(image)
        # Without normalisation timm returns bytes.
        theirs = theirs.float() / 255 if theirs.dtype == torch.uint8 else theirs
        assert torch.equal(ours(image), theirs), shape


def test_resized_sides_of_the_papers_and_of_timm():
    assert transforms.test_transform(224) == transforms.ResizeAndCrop(256, 224)
    assert transforms.test_transform(224, "0.9") == transforms.ResizeAndCrop(248, 224)
    for size in range(1, 600):
        # timm: floor(size / crop_pct), in floating point.
        assert transforms.test_transform(size) == transforms.ResizeAndCrop(int(size / 0.875), size)
        assert transforms.test_transform(size, "0.9") == transforms.ResizeAndCrop(int(size / 0.9), size)


def test_pixels_are_in_range_and_not_normalised():
    pixels = transforms.test_transform(24)(picture((50, 40)).point(lambda level: 255 * (level > 127)))
    assert (pixels.dtype, pixels.shape) == (torch.float32, (3, 24, 24))
    assert (pixels.min().item(), pixels.max().item()) == (0.0, 1.0)


def test_grey_pictures_keep_one_channel():
    assert transforms.test_transform(24)(picture((50, 40), mode="L")).shape == (1, 24, 24)


def test_transforms_go_to_worker_processes():
    ours = transforms.test_transform(24, "0.9")
    assert pickle.loads(pickle.dumps(ours)) == ours


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(lambda: transforms.test_transform(224, "0.8"), "one of 'papers', '0.9': got '0.8'", id="crop"),
        pytest.param(lambda: transforms.test_transform(0), "size must be 1 pixel or more: got 0", id="size"),
        pytest.param(lambda: transforms.ResizeAndCrop(20, 21), "a crop of 21 out of 20 pixels", id="crop too large"),
        pytest.param(lambda: transforms.ResizeAndCrop(20, 0), "a crop of 0 out of 20 pixels", id="no crop"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
