"""A set of images gives the pixels that Pillow reads, as float32 in [0, 1], by position and nothing else."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_folders import encoded, make_class_folders, picture, write_files
from PIL import Image

from twicing.data.folders import class_folders
from twicing.data.images import FolderImages, MemoryImages, expect_classes
from twicing.data.transforms import ResizeAndCrop

CLASSES = ("cat", "dog")


def memory(pixels=None, labels=None, classes=CLASSES):
    pixels = torch.arange(3 * 2 * 4 * 5, dtype=torch.uint8).view(3, 2, 4, 5) if pixels is None else pixels
    return MemoryImages(pixels, torch.tensor([0, 1, 1]) if labels is None else labels, classes)


def by_hand(path):
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) / np.float32(255))


def test_memory_images_divide_grey_levels_by_255():
    pixels = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8).view(1, 1, 2, 3)
    loaded = memory(pixels, torch.tensor([0])).load([0])
    assert loaded.dtype == torch.float32
    assert loaded.flatten().tolist() == [np.float32(level) / np.float32(255) for level in (0, 1, 127, 128, 254, 255)]


def test_memory_images_of_floats_come_as_they_are():
    pixels = torch.rand(3, 1, 2, 2)
    images = memory(pixels)
    assert torch.equal(images.load([2, 0, 2]), pixels[[2, 0, 2]])
    # What is loaded may be changed: an attack that works in place must not reach the data.
    images.load([0, 1, 2]).zero_()
    assert pixels.max() > 0


def test_images_are_loaded_in_the_order_asked_for():
    images = memory()
    assert len(images) == 3
    assert torch.equal(images.load([2, 0]) * 255, images.pixels[[2, 0]].float())
    assert torch.equal(images.load(torch.tensor([1])), images.load([1]))
    assert torch.equal(images.load(range(3)), images.load(np.arange(3)))


def test_folder_images_agree_with_pillow(tmp_path):
    images = class_folders(make_class_folders(tmp_path, suffix=".jpg"))
    loaded = images.load([4, 0, 5])
    assert (loaded.dtype, loaded.shape) == (torch.float32, (3, 3, 32, 32))
    for row, index in zip(loaded, (4, 0, 5), strict=True):
        assert torch.equal(row, by_hand(images.paths[index]))


def test_folder_images_apply_their_transform(tmp_path):
    images = class_folders(make_class_folders(tmp_path, size=(40, 30)), transform=ResizeAndCrop(16, 12))
    assert images.load([0, 1]).shape == (2, 3, 12, 12)
    assert replace(images, transform=ResizeAndCrop(9, 8)).load([3]).shape == (1, 3, 8, 8)
    assert images.open(0).size == (40, 30)
    assert images.open(0).mode == "RGB"


def test_folder_images_go_to_worker_processes(tmp_path):
    images = class_folders(make_class_folders(tmp_path), transform=ResizeAndCrop(16, 12))
    sent = pickle.loads(pickle.dumps(images))
    assert sent.paths == images.paths
    assert torch.equal(sent.load([1, 5]), images.load([1, 5]))


def test_opening_leaves_no_file_open(tmp_path, recwarn):
    images = class_folders(make_class_folders(tmp_path))
    for index in range(len(images)):
        images.open(index)
    assert not recwarn.list


def test_broken_image_is_named(tmp_path):
    root = make_class_folders(tmp_path)
    broken = root / "dog" / "0001.png"
    broken.write_bytes(broken.read_bytes()[:100])
    images = class_folders(root)
    images.load([0, 1, 2, 3, 5])
    with pytest.raises(ValueError, match=r"dog/0001\.png cannot be read as an image .*replace the file or remove it"):
        images.load([0, 4])


def test_images_of_different_sizes_need_a_transform(tmp_path):
    files = {"cat/a.png": encoded(picture((8, 6))), "cat/b.png": encoded(picture((7, 6)))}
    images = class_folders(write_files(tmp_path, files))
    assert images.load([1]).shape == (1, 3, 6, 7)
    message = r"cat/b\.png is 6 x 7 with 3 channels after the transform, and .*cat/a\.png 6 x 8.*use a transform to one"
    with pytest.raises(ValueError, match=message):
        images.load([0, 1])


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda image: torch.zeros(1, 3, 2, 2), id="four axes"),
        pytest.param(lambda image: torch.zeros(3, 2, 2, dtype=torch.uint8), id="bytes"),
        pytest.param(lambda image: torch.zeros(3, 2, 2, dtype=torch.float64), id="doubles"),
    ],
)
def test_transform_must_give_pixels(tmp_path, wrong):
    images = class_folders(make_class_folders(tmp_path), transform=wrong)
    with pytest.raises(ValueError, match=r"transform must return float32 of \[C, H, W\]: got torch\."):
        images.load([0])


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_positions_are_checked(tmp_path, kind):
    images = memory() if kind == "memory" else class_folders(make_class_folders(tmp_path))
    last = len(images) - 1
    images.load([last])
    for wrong in (-1, last + 1):
        with pytest.raises(IndexError, match=f"indices must be from 0 to {last}: got {wrong}"):
            images.load([0, wrong])
    with pytest.raises(ValueError, match="indices must name one image or more: got none"):
        images.load([])
    with pytest.raises(TypeError):
        images.load([0.5])


def test_opening_checks_the_position(tmp_path):
    images = class_folders(make_class_folders(tmp_path))
    with pytest.raises(IndexError, match="from 0 to 5: got -1"):
        images.open(-1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param(
            {"pixels": torch.zeros(3, 1, 2, 2, dtype=torch.float64)}, TypeError, "got torch.float64", id="f64"
        ),
        pytest.param(
            {"pixels": torch.zeros(3, 2, 2)}, ValueError, r"\[n, C, H, W\].*got \[3, 2, 2\]", id="no channels"
        ),
        pytest.param({"pixels": torch.zeros(0, 1, 2, 2)}, ValueError, "with an image or more", id="no image"),
        pytest.param(
            {"pixels": torch.full((3, 1, 2, 2), 1.5)}, ValueError, "from 1.5 to 1.5; leave the norm", id="high"
        ),
        pytest.param({"pixels": torch.full((3, 1, 2, 2), -0.5)}, ValueError, "from -0.5 to -0.5", id="low"),
        pytest.param({"pixels": torch.full((3, 1, 2, 2), torch.nan)}, ValueError, "from nan to nan", id="NaN"),
        pytest.param(
            {"labels": torch.tensor([0, 1])}, ValueError, r"int64 of \[3\]: got torch.int64 of \[2\]", id="few"
        ),
        pytest.param({"labels": torch.tensor([0.0, 1, 1])}, ValueError, "got torch.float32", id="float labels"),
        pytest.param(
            {"labels": torch.tensor([0, 1, 2])}, ValueError, "from 0 to 1.*got labels from 0 to 2", id="large"
        ),
        pytest.param({"labels": torch.tensor([0, 1, -1])}, ValueError, "got labels from -1 to 1", id="negative"),
        pytest.param({"classes": ("cat", "cat")}, ValueError, "different names: got 'cat' twice", id="same names"),
    ],
)
def test_memory_images_refuse(changes, error, message):
    with pytest.raises(error, match=message):
        memory(**changes)


def test_folder_images_refuse_nothing_and_wrong_labels(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no image"):
        FolderImages(tmp_path, (), torch.tensor([]), CLASSES, lambda image: image)
    with pytest.raises(ValueError, match=r"int64 of \[2\]"):
        FolderImages(tmp_path, ("cat/a", "dog/b"), torch.tensor([0]), CLASSES, lambda image: image)


def test_number_of_classes_is_checked(tmp_path):
    expect_classes(memory(), 2)
    with pytest.raises(ValueError, match=r"the data must have 3 classes: it has 2 \(cat, dog\)\. Change"):
        expect_classes(memory(), 3)
    with pytest.raises(ValueError, match=r"digits\.npz must have 1 classes"):
        expect_classes(memory(), 1, "digits.npz")
    images = class_folders(make_class_folders(tmp_path, classes="abcd", per_class=1))
    with pytest.raises(ValueError, match=rf"{tmp_path} must have 2 classes: it has 4 \(a, b, c, \.\.\.\)"):
        expect_classes(images, 2)
