"""Class folders are listed in one order everywhere, what is not a picture is not seen, and what is wrong is named."""

import os
import sys

import pytest
import torch
from made_folders import encoded, make_class_folders, make_train_and_held_out, picture, write_files

from twicing.data.folders import class_folders, train_and_held_out, whole_picture

PICTURE = encoded(picture((4, 4)))


def test_classes_and_files_are_sorted_by_name(tmp_path):
    names = ["b/10.png", "a/2.png", "b/1.png", "a/10.png", "B/x.png", "a-b/z.png", "a/sub/1.png"]
    images = class_folders(write_files(tmp_path, dict.fromkeys(names, PICTURE)))
    assert images.classes == ("B", "a", "a-b", "b")
    assert images.files == ("B/x.png", "a/10.png", "a/2.png", "a/sub/1.png", "a-b/z.png", "b/1.png", "b/10.png")
    assert images.labels.tolist() == [0, 1, 1, 1, 2, 3, 3]
    assert images.labels.dtype == torch.int64
    assert images.paths == tuple(tmp_path / file for file in images.files)
    assert len(images) == 7
    assert images.transform is whole_picture


def test_the_order_is_that_of_torchvisions_image_folder(tmp_path):
    from twicing.torchvision_import import mend_torchvision_import

    mend_torchvision_import()
    from torchvision.datasets import ImageFolder

    make_class_folders(tmp_path, classes=("dog", "Cat", "n01", "cat"), per_class=12, size=(4, 4), suffix=".jpg")
    theirs = ImageFolder(tmp_path)
    ours = class_folders(tmp_path)
    assert list(ours.classes) == theirs.classes
    assert [(str(path), label) for path, label in zip(ours.paths, ours.labels.tolist(), strict=True)] == theirs.samples


def test_hidden_files_and_other_files_are_not_seen(tmp_path):
    wanted = ["cat/a.png", "cat/b.JPG", "cat/c.JpEg", "dog/d.webp", "dog/e.tiff"]
    others = [
        "cat/._a.png",
        "cat/.DS_Store",
        "cat/notes.txt",
        "cat/png",
        ".git/x.png",
        "cat/.thumbs/x.png",
        "readme.png",
    ]
    images = class_folders(write_files(tmp_path, dict.fromkeys(wanted + others, PICTURE)))
    assert images.classes == ("cat", "dog")
    assert images.files == tuple(wanted)


def test_links_are_followed_and_a_link_to_nowhere_is_named_when_it_is_opened(tmp_path):
    elsewhere = make_class_folders(tmp_path / "elsewhere", per_class=1)
    root = tmp_path / "root"
    root.mkdir()
    (root / "cat").symlink_to(elsewhere / "cat")
    (root / "dog").mkdir()
    (root / "dog" / "a.png").symlink_to(elsewhere / "dog" / "0000.png")
    (root / "dog" / "b.png").symlink_to(elsewhere / "dog" / "none.png")
    images = class_folders(root)
    assert images.files == ("cat/0000.png", "dog/a.png", "dog/b.png")
    images.load([0, 1])
    with pytest.raises(ValueError, match=r"dog/b\.png cannot be read as an image \(.*No such file"):
        images.load([2])


def test_a_folder_named_like_a_picture_is_a_folder(tmp_path):
    images = class_folders(write_files(tmp_path, {"cat/more.png/x.png": PICTURE}))
    assert images.files == ("cat/more.png/x.png",)


def test_given_classes_decide_the_labels(tmp_path):
    make_class_folders(tmp_path, classes=("cat", "dog"), per_class=1)
    images = class_folders(tmp_path, classes=("dog", "cat"))
    assert images.classes == ("dog", "cat")
    assert images.files == ("dog/0000.png", "cat/0000.png")
    assert images.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat", "cow", "dog"), "the 3 class folders of the training images: cow missing"),
        (("cat",), "the 1 class folders of the training images: dog unknown"),
        (("cat", "cow"), "the 2 class folders of .*: cow missing, dog unknown. Rename, add or remove"),
        ([*"abcdefg", "cat", "dog"], "the 9 class folders of .*: a, b, c, d, e and 2 more missing"),
    ],
)
def test_other_classes_than_the_given_are_named(tmp_path, classes, message):
    make_class_folders(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} must have {message}"):
        class_folders(tmp_path, classes=classes)


def test_empty_class_folder_is_named(tmp_path):
    make_class_folders(tmp_path)
    write_files(tmp_path, {"cow/notes.txt": b"", "cow/._0.png": PICTURE})
    with pytest.raises(
        ValueError, match=r"cow holds no image \(\.bmp, .*\): put its images there or remove the folder"
    ):
        class_folders(tmp_path)


def test_a_folder_without_class_folders_is_named(tmp_path):
    write_files(tmp_path, {"0.png": PICTURE, "1.png": PICTURE})
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no class folder: put the images of each class into a"):
        class_folders(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="gone is not a folder: give the folder that holds one folder of images"):
        class_folders(tmp_path / "gone")


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_train_and_held_out(tmp_path, held_out):
    root = make_train_and_held_out(tmp_path, held_out)
    train, other = train_and_held_out(root)
    assert (train.root, other.root) == (tmp_path / "train", tmp_path / held_out)
    assert train.classes == other.classes == ("cat", "dog")
    assert not torch.equal(train.load([0]), other.load([0]))


def test_val_is_held_out_where_there_is_a_test_too(tmp_path):
    make_train_and_held_out(tmp_path, "val")
    make_class_folders(tmp_path / "test")
    assert train_and_held_out(tmp_path)[1].root == tmp_path / "val"


def test_held_out_folder_has_the_classes_of_the_training_folder(tmp_path):
    make_class_folders(tmp_path / "train", classes=("cat", "cow", "dog"))
    make_class_folders(tmp_path / "val", classes=("cat", "dog"))
    with pytest.raises(ValueError, match=rf"{tmp_path}/val must have the 3 class folders .*: cow missing\."):
        train_and_held_out(tmp_path)


def test_both_parts_get_the_transform(tmp_path):
    def transform(image):
        return torch.zeros(3, 1, 1)

    train, held_out = train_and_held_out(make_train_and_held_out(tmp_path), transform=transform)
    assert train.transform is held_out.transform is transform


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}/train is missing: put the class folders to train on there"):
        train_and_held_out(tmp_path)
    make_class_folders(tmp_path / "train")
    with pytest.raises(ValueError, match=rf"{tmp_path}/val and {tmp_path}/test are both missing: put the class fold"):
        train_and_held_out(tmp_path)


def test_progress_rises_to_one(tmp_path):
    make_train_and_held_out(tmp_path, classes="abcd", per_class=1, size=(4, 4))
    seen = []
    class_folders(tmp_path / "train", progress=seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]
    seen.clear()
    train_and_held_out(tmp_path, progress=seen.append)
    assert seen == sorted(seen)
    assert len(seen) == 8
    assert seen[-1] == pytest.approx(1)


def test_listing_asks_the_system_about_no_file(tmp_path, monkeypatch):
    """A million calls of stat() take minutes on a file server; the folder's own entries say enough."""
    make_class_folders(tmp_path, per_class=20, size=(4, 4))
    asked = []
    genuine = os.stat
    monkeypatch.setattr(os, "stat", lambda *of, **options: asked.append(of) or genuine(*of, **options))
    assert len(class_folders(tmp_path)) == 40
    assert len(asked) < 5


def test_listing_needs_no_pillow(tmp_path, monkeypatch):
    make_class_folders(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL" or name == "twicing.data.decode"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    images = class_folders(tmp_path)
    assert len(images) == 6
    with pytest.raises(ImportError, match=r"read by Pillow, which is missing: pip install 'twicing\[lab\]'"):
        images.open(0)
