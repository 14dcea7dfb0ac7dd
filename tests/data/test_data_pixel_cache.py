"""Kept images are those that were kept, from the same source, undamaged; else there are none."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from twicing.data import pixel_cache
from twicing.data.images import MemoryImages
from twicing.data.pixel_cache import keep, kept

SOURCE = {"archive": "set.tar", "bytes": 12}


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8, generator=generator)
    # A class without an image in the middle.
    return MemoryImages(pixels, torch.tensor([0, 0, 0, 2, 2, 3]), ("a", "b", "c", "d"))


@pytest.fixture
def folder(tmp_path):
    keep(images(), tmp_path, "set", SOURCE)
    return tmp_path


def test_what_was_kept_comes_back(folder):
    found = kept(folder, "set", SOURCE)
    assert torch.equal(found.pixels, images().pixels)
    assert torch.equal(found.labels, images().labels)
    assert found.classes == images().classes
    assert kept(folder, "other", SOURCE) is None


def test_pixels_are_mapped_and_writing_does_not_reach_the_file(folder):
    found = kept(folder, "set", SOURCE)
    assert str(folder / "set.npy") in Path("/proc/self/maps").read_text()
    found.pixels.zero_()
    assert torch.equal(kept(folder, "set", SOURCE).pixels, images().pixels)


@pytest.mark.parametrize("source", [{}, SOURCE | {"bytes": 13}, SOURCE | {"part": None}])
def test_another_source_is_not_this_one(folder, source):
    assert kept(folder, "set", source) is None


def test_a_source_is_compared_as_it_was_written(folder):
    keep(images(), folder, "tuple", {"shape": (1, 2)})
    assert kept(folder, "tuple", {"shape": (1, 2)}) is not None


def test_another_version_is_not_used(folder, monkeypatch):
    monkeypatch.setattr(pixel_cache, "VERSION", pixel_cache.VERSION + 1)
    assert kept(folder, "set", SOURCE) is None


def flip(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a pixel": lambda folder: flip(folder / "set.npy", -1),
    "an inner pixel": lambda folder: flip(folder / "set.npy", 200),
    "header": lambda folder: flip(folder / "set.npy", 3),
    "cut": lambda folder: os.truncate(folder / "set.npy", 300),
    "empty": lambda folder: os.truncate(folder / "set.npy", 0),
    "gone": lambda folder: (folder / "set.npy").unlink(),
    "other pixels": lambda folder: np.save(folder / "set.npy", images(1).pixels.numpy()),
    "other shape": lambda folder: np.save(folder / "set.npy", images().pixels.numpy().reshape(6, 3, 5, 4)),
    "other dtype": lambda folder: np.save(folder / "set.npy", images().pixels.numpy().view(np.int8)),
    "pickled": lambda folder: np.save(folder / "set.npy", np.array([None]), allow_pickle=True),
    "record gone": lambda folder: (folder / "set.json").unlink(),
    "record cut": lambda folder: os.truncate(folder / "set.json", 40),
    "record of something else": lambda folder: (folder / "set.json").write_text("[1, 2]"),
    "record without labels": lambda folder: edit(folder, images_per_class=None),
    "too few labels": lambda folder: edit(folder, images_per_class=[1, 2, 2]),
    "more labels than classes": lambda folder: edit(folder, images_per_class=[1, 1, 1, 1, 2]),
}


def edit(folder, **changes):
    record = json.loads((folder / "set.json").read_text())
    (folder / "set.json").write_text(json.dumps(record | changes))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_anew(folder, damage):
    DAMAGES[damage](folder)
    assert kept(folder, "set", SOURCE) is None
    keep(images(), folder, "set", SOURCE)
    assert torch.equal(kept(folder, "set", SOURCE).pixels, images().pixels)


def test_an_interrupted_write_leaves_the_old_files_alone(folder, monkeypatch):
    def interrupted(file, pixels):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        keep(images(1), folder, "set", SOURCE)
    assert sorted(os.listdir(folder)) == ["set.json", "set.npy"]
    assert torch.equal(kept(folder, "set", SOURCE).pixels, images().pixels)


def test_files_appear_whole(folder, monkeypatch):
    """Whoever reads while another process writes sees the old file or the new one."""
    during = []
    genuine = np.save
    monkeypatch.setattr(
        np, "save", lambda file, pixels: (genuine(file, pixels), during.append(kept(folder, "set", SOURCE)))
    )
    keep(images(1), folder, "set", SOURCE)
    assert torch.equal(during[0].pixels, images().pixels)
    assert torch.equal(kept(folder, "set", SOURCE).pixels, images(1).pixels)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file cannot hold the decoded images \(.*\): give another folder"):
        keep(images(), tmp_path / "file", "set", SOURCE)
