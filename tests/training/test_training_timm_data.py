"""Data sets by timm's names: what can be indexed is read, strictly; streams and missing packages are told."""

import sys
import types

import pytest
import torch
from PIL import Image

from twicing.training.loaders import TrainingImages
from twicing.training.order import Slice
from twicing.training.recipe import imagenet_deit_tiny
from twicing.training.settings import apply_settings
from twicing.training.split import load_split, prepare_data, with_classes
from twicing.training.timm_data import timm_images

NAMED = ["dataset=torch/image_folder", "image_size=32", "batch_size=8"]


def test_a_name_gives_what_the_folder_gives(made_up_folder):
    by_name = apply_settings(imagenet_deit_tiny(), NAMED)
    by_folder = apply_settings(by_name, ["dataset="])
    recipes = [with_classes(recipe, made_up_folder) for recipe in (by_name, by_folder)]
    assert [recipe.classes for recipe in recipes] == [4, 4]
    for recipe in recipes:
        prepare_data(recipe, made_up_folder)
    named, listed = (load_split(recipe, 0, made_up_folder) for recipe in recipes)
    for ours, theirs in ((named.train, listed.train), (named.test, listed.test)):
        assert ours.classes == theirs.classes
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.load([0, 7]), theirs.load([0, 7]))
    part = Slice((3, 20), (0, 1), 2, 1.0)
    augmented = [TrainingImages(s.train, r, 0)[part][0] for s, r in zip((named, listed), recipes, strict=True)]
    assert torch.equal(*augmented)


@pytest.mark.parametrize("name", ["tfds/imagenet2012", "wds/imagenet", "HFIDS/some/name"])
def test_streams_are_refused(name):
    with pytest.raises(ValueError, match=rf"^{name} is read as a stream, which cannot be shuffled by \(seed, epoch\)"):
        timm_images(name, None, lambda picture: picture)


def test_other_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dataset must read like hfds/owner/name or torch/name: got 'imagenet'"):
        timm_images("imagenet", None, lambda picture: picture)
    with pytest.raises(ValueError, match=r"^timm cannot read the split train of torch/nothing: Unknown torchvision"):
        timm_images("torch/nothing", tmp_path, lambda picture: picture)
    with pytest.raises(ValueError, match=r"^timm cannot read the split train of torch/cifar10: .*not found"):
        timm_images("torch/cifar10", tmp_path, lambda picture: picture)


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    with pytest.raises(ImportError, match=r"^hfds/owner/name needs the package datasets: pip install it\.$"):
        timm_images("hfds/owner/name", None, lambda picture: picture)


class _Table:
    """As much of a table of the package `datasets` as timm's reader asks for."""

    def __init__(self, paths):
        self.paths = paths
        label = types.SimpleNamespace(names=["cat", "dog"])
        label.str2int = label.names.index
        self.info = types.SimpleNamespace(features={"label": label}, splits={})

    def cast_column(self, column, kind):
        return self

    def remove_columns(self, column):
        return [{"label": i % 2} for i in range(len(self.paths))]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return {"image": {"bytes": self.paths[index].read_bytes(), "path": None}, "label": index % 2}


def test_sets_of_the_hub_are_read_and_a_broken_image_is_not_skipped(made_up_folder, monkeypatch):
    """timm's own data set puts the next image in the place of a broken one, with a line in the log."""
    tables = {
        "train": _Table(sorted((made_up_folder / "train" / "class-0").iterdir())),
        "validation": _Table(sorted((made_up_folder / "val" / "class-0").iterdir())),
    }
    package = types.ModuleType("datasets")
    package.load_dataset = lambda name, split, **rest: tables[split]
    package.Image = lambda decode: None
    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    train, held_out = timm_images("hfds/owner/name", None, lambda picture: torch.ones(3, 2, 2) * picture.size[0])
    assert train.classes == held_out.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    with Image.open(tables["train"].paths[4]) as picture:
        width = picture.size[0]
    assert torch.equal(train.load([4])[0], torch.full((3, 2, 2), float(width)))
    tables["train"].paths[4] = types.SimpleNamespace(read_bytes=lambda: b"\x89PNG nothing")
    with pytest.raises(ValueError, match=r"^image 4 of the split train of hfds/owner/name is broken: cannot identify"):
        train.load([4])
