"""CIFAR-10 comes the same from folders and archives, in any form; the cache saves decoding and never lies."""

import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from made_folders import (
    CIFAR10_CLASSES,
    made_files,
    make_archive,
    make_cifar10,
    make_class_folders,
    make_train_and_held_out,
    write_archive,
)
from PIL import Image

from twicing.data import cifar10
from twicing.data.cifar10 import load_cifar10


def decoded_by_hand(folder):
    pixels = [
        np.asarray(Image.open(folder / name / file)).transpose(2, 0, 1)
        for name in CIFAR10_CLASSES
        for file in sorted(os.listdir(folder / name))
    ]
    return torch.from_numpy(np.stack(pixels))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """train/ and test/ with two JPEGs of each class."""
    root = tmp_path_factory.mktemp("cifar10")
    return make_train_and_held_out(root, "test", CIFAR10_CLASSES, per_class=2, suffix=".jpg")


@pytest.fixture
def form(folders, tmp_path, request):
    """The same images as folders, two archives, two archives beside others, or one archive."""
    if request.param == "folders":
        return folders
    if request.param == "one archive":
        with tarfile.open(tmp_path / "cifar10.tar.gz", "w:gz") as tar:
            tar.add(folders, "cifar10")
        return tmp_path / "cifar10.tar.gz"
    if request.param == "one archive in its folder":
        with tarfile.open(tmp_path / "cifar10-train-test.tar", "w") as tar:
            tar.add(folders, ".")
        return tmp_path
    for part in ("train", "test"):
        with tarfile.open(tmp_path / f"cifar10-jpeg-{part}.tar.gz", "w:gz") as tar:
            tar.add(folders / part, part)
        if request.param == "beside others":
            shutil.copy(tmp_path / f"cifar10-jpeg-{part}.tar.gz", tmp_path / f"imagenet-{part}.tar")
            (tmp_path / f"._cifar10-jpeg-{part}.tar.gz").write_bytes(b"")
            (tmp_path / f"cifar10-{part}.txt").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    "form", ["folders", "two archives", "beside others", "one archive", "one archive in its folder"], indirect=True
)
@pytest.mark.parametrize("cached", [False, True])
def test_every_form_gives_the_same_images(folders, form, cached, tmp_path):
    train, test = load_cifar10(form, tmp_path / "cache" if cached else None)
    for part, images in (("train", train), ("test", test)):
        assert images.pixels.dtype == torch.uint8
        assert torch.equal(images.pixels, decoded_by_hand(folders / part))
        assert images.labels.tolist() == [label for label in range(10) for _ in range(2)]
        assert images.classes == CIFAR10_CLASSES
        assert torch.equal(images.load([7]), images.pixels[7:8] / 255)
    assert not torch.equal(train.pixels, test.pixels)


def count_decoding(monkeypatch):
    """Counts sets that are decoded from now on."""
    decoded = []
    genuine = cifar10._decode
    monkeypatch.setattr(cifar10, "_decode", lambda *of: decoded.append(of[0].path.name) or genuine(*of))
    return decoded


def test_the_cache_is_used_again(folders, tmp_path, monkeypatch):
    decoded = count_decoding(monkeypatch)
    for _ in range(3):
        images = load_cifar10(folders, tmp_path / "deep" / "cache")
    assert decoded == ["train", "test"]
    assert torch.equal(images[1].pixels, decoded_by_hand(folders / "test"))
    assert sorted(os.listdir(tmp_path / "deep" / "cache")) == [
        "cifar10-test.json",
        "cifar10-test.npy",
        "cifar10-train.json",
        "cifar10-train.npy",
    ]


@pytest.mark.parametrize("change", ["time", "size", "name", "content"])
def test_a_cache_of_another_archive_is_not_used(tmp_path, monkeypatch, change):
    root = make_cifar10(tmp_path / "data")
    load_cifar10(root, tmp_path / "cache")
    archive = root / "cifar10-test.tar.gz"
    state = archive.stat()
    if change == "time":
        os.utime(archive, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    elif change == "size":
        # Padding after the end; the time is put back.
        archive.write_bytes(archive.read_bytes() + bytes(512))
        os.utime(archive, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "name":
        archive.rename(root / "cifar10-test-2.tar.gz")
    else:
        make_archive(archive, "test", CIFAR10_CLASSES, per_class=3, seed=9)
    decoded = count_decoding(monkeypatch)
    _, test = load_cifar10(root, tmp_path / "cache")
    assert len(decoded) == 1
    assert decoded[0].startswith("cifar10-test")
    assert len(test) == (30 if change == "content" else 20)
    load_cifar10(root, tmp_path / "cache")
    assert len(decoded) == 1


@pytest.mark.parametrize("change", ["time", "size", "content", "renamed", "added"])
def test_a_cache_of_other_files_is_not_used(tmp_path, monkeypatch, change):
    root = make_train_and_held_out(tmp_path / "data", "test", CIFAR10_CLASSES, per_class=1, suffix=".bmp")
    load_cifar10(root, tmp_path / "cache")
    file = root / "train" / "cat" / "0000.bmp"
    state = file.stat()
    if change == "time":
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    elif change == "size":
        # Beyond the picture's end; the time is put back.
        file.write_bytes(file.read_bytes() + b"0")
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "content":
        shutil.copy(root / "train" / "dog" / "0000.bmp", file)
    elif change == "renamed":
        file.rename(file.with_name("0001.bmp"))
    else:
        shutil.copy2(file, file.with_name("0001.bmp"))
    decoded = count_decoding(monkeypatch)
    train, _ = load_cifar10(root, tmp_path / "cache")
    assert decoded == ["train"]
    assert torch.equal(train.pixels, decoded_by_hand(root / "train"))


def test_progress_rises_to_one(folders, tmp_path):
    for cache in (None, tmp_path, tmp_path):
        seen = []
        load_cifar10(folders, cache, progress=seen.append)
        assert seen == sorted(seen)
        assert 0 < seen[0] < 1
        assert seen[-1] == pytest.approx(1)


def test_a_broken_image_is_named_and_nothing_is_kept(tmp_path):
    root = make_train_and_held_out(tmp_path / "data", "test", CIFAR10_CLASSES, per_class=2)
    broken = root / "train" / "frog" / "0001.png"
    broken.write_bytes(broken.read_bytes()[:90])
    with pytest.raises(ValueError, match=r"train/frog/0001\.png cannot be read as an image"):
        load_cifar10(root, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_link_to_nowhere_is_named(tmp_path):
    root = make_train_and_held_out(tmp_path / "data", "test", CIFAR10_CLASSES, per_class=1)
    (root / "train" / "frog" / "0001.png").symlink_to(root / "gone")
    with pytest.raises(ValueError, match=r"train/frog/0001\.png cannot be read as an image \(.*No such file"):
        load_cifar10(root, tmp_path / "cache")


def test_a_broken_image_of_an_archive_is_named_and_nothing_is_kept(tmp_path):
    root = make_cifar10(tmp_path / "data")
    files = {f"test/{name}": content for name, content in made_files(CIFAR10_CLASSES).items()}
    write_archive(root / "cifar10-test.tar.gz", files | {"test/frog/0001.png": b"no image"})
    with pytest.raises(ValueError, match=r"cifar10-test\.tar\.gz: test/frog/0001\.png cannot be read as an image"):
        load_cifar10(root, tmp_path / "cache")
    # The training images were complete.
    assert sorted(os.listdir(tmp_path / "cache")) == ["cifar10-train.json", "cifar10-train.npy"]


def test_images_of_another_size_are_refused(tmp_path):
    root = make_train_and_held_out(tmp_path, "test", CIFAR10_CLASSES, per_class=1, size=(33, 32))
    with pytest.raises(ValueError, match=r"train/airplane/0000\.png must be of 32 x 32 pixels: got 33 x 32\. Is this"):
        load_cifar10(root)


def test_another_number_of_classes_is_refused(tmp_path):
    root = make_train_and_held_out(tmp_path, "test", CIFAR10_CLASSES[:9], per_class=1)
    with pytest.raises(
        ValueError, match=r"train must have 10 classes: it has 9 \(airplane, automobile, bird, \.\.\.\)"
    ):
        load_cifar10(root)


@pytest.mark.parametrize("cached", [False, True])
def test_other_held_out_classes_are_refused(tmp_path, cached):
    root = make_cifar10(tmp_path)
    make_archive(root / "cifar10-test.tar.gz", "test", (*CIFAR10_CLASSES[:9], "lorry"), per_class=1)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"cifar10-test\.tar\.gz must have the 10 .*: truck missing, lorry unknown"
        ):
            load_cifar10(root, tmp_path / "cache" if cached else None)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(ValueError, match="gone does not exist: give the folder that holds train/ and test/"):
        load_cifar10(tmp_path / "gone")
    with pytest.raises(ValueError, match=rf"{tmp_path} must hold .*no archive with 'train' in its name"):
        load_cifar10(tmp_path)
    make_archive(tmp_path / "cifar10-train.tar.gz", "train", CIFAR10_CLASSES, per_class=1)
    with pytest.raises(ValueError, match="no archive with 'test' in its name"):
        load_cifar10(tmp_path)
    make_class_folders(tmp_path / "test", CIFAR10_CLASSES, per_class=1)
    with pytest.raises(ValueError, match="no archive with 'test' in its name"):
        load_cifar10(tmp_path)


def test_two_archives_of_one_part_are_refused(tmp_path):
    root = make_cifar10(tmp_path, per_class=1)
    shutil.copy(root / "cifar10-train.tar.gz", root / "cifar10-train-2.tar.gz")
    message = r"one archive with 'train' in its name: got cifar10-train-2\.tar\.gz, cifar10-train\.tar\.gz\. Move"
    with pytest.raises(ValueError, match=message):
        load_cifar10(root)


def test_a_truncated_archive_is_named(tmp_path):
    root = make_cifar10(tmp_path)
    archive = root / "cifar10-train.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cifar10-train\.tar\.gz is truncated or damaged"):
        load_cifar10(root, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_real_set(real_data, tmp_path):
    """The held-out archive only: decoding the other takes ten seconds."""
    source = cifar10._Source(real_data / "vision" / "cifar10-jpeg-test.tar.gz")
    images = cifar10._decoded(source, "test", tmp_path, None)
    assert images.pixels.shape == (10000, 3, 32, 32)
    assert images.labels.bincount().tolist() == [1000] * 10
    assert images.classes == CIFAR10_CLASSES
    # The published means of the set's pixels are 0.4942, 0.4851, 0.4504: JPEG moves them by less than 0.001.
    means = images.pixels.float().mean((0, 2, 3)) / 255
    assert torch.allclose(means, torch.tensor([0.4942, 0.4851, 0.4504]), atol=1e-3)
