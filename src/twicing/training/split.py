"""Data of one training: which images it learns from, which are held out, and which of these attacks work on."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from twicing.data.cifar10 import load_cifar10
from twicing.data.digits import fold, load_digits
from twicing.data.folders import train_and_held_out
from twicing.data.images import Images, MemoryImages
from twicing.data.mnist import load_mnist
from twicing.data.transforms import test_transform
from twicing.training.choice import balanced_order
from twicing.training.loaders import PictureFiles
from twicing.training.order import batch_order
from twicing.training.protocol import Recipe
from twicing.training.streams import stream_seed
from twicing.training.timm_data import timm_images

__all__ = ["ChosenImages", "Split", "load_split", "prepare_data", "stream_seed", "with_classes"]


@dataclass(frozen=True)
class Split:
    """Images to train on and images held out.

    test_index: which of the data's images those held out are, [n], so that arms and seeds can be paired.
    probes: positions among those held out, [m], ascending, that attacks and corruptions work on: a choice with every
    class in its share, the same for every arm and, where the data have a held-out part of their own, every seed.
    """

    train: Images
    test: Images
    test_index: Tensor
    probes: Tensor


@dataclass(frozen=True, eq=False)
class ChosenImages:
    """Some of the images, in the order of `positions` [n]."""

    images: Images
    positions: Tensor

    @property
    def labels(self) -> Tensor:
        """Their classes, [n]."""
        return self.images.labels[self.positions]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of all classes, chosen or not."""
        return self.images.classes

    def __len__(self) -> int:
        return len(self.positions)

    def load(self, indices: Sequence[int]) -> Tensor:
        """Return the images at these positions of the choice, [b, C, H, W]."""
        return self.images.load(self.positions[list(indices)].tolist())

    def open(self, index: int) -> Any:
        """Decode one image, where they are in files."""
        return cast(PictureFiles, self.images).open(int(self.positions[index]))


def with_classes(recipe: Recipe, data_dir: Path | None = None) -> Recipe:
    """The recipe with as many classes as the data have, where it leaves that open; only lists files.

    Raises ValueError where the data are not there, and what their readers raise.
    """
    _check_folder(recipe, data_dir)
    if recipe.classes or not recipe.reads_files:
        return recipe
    return dataclasses.replace(recipe, classes=len(_read(recipe, data_dir, None)[0].classes))


def load_split(recipe: Recipe, fold_number: int, data_dir: Path | None = None, cache: Path | None = None) -> Split:
    """The recipe's images with the given fold held out (fold k of recipe.folds; k wraps around), or their own part.

    data_dir: the folder or file of data that do not come with a package. cache: where decoded pixels may be kept.
    Raises ValueError naming the file or number where the data are missing or do not fit the recipe.
    """
    _check_folder(recipe, data_dir)
    train, test, test_index = _read(recipe, data_dir, cache, fold_number)
    for images in (train, test):
        _check_fit(recipe, images)
    if recipe.train_images:
        if recipe.train_images > len(train):
            raise ValueError(f"train_images must not exceed the {len(train)} there are: got {recipe.train_images}.")
        train = ChosenImages(train, balanced_order(train.labels)[: recipe.train_images])
    # Raises where there is no batch, rather than when the training starts.
    batch_order(recipe, len(train), seed=0)
    return Split(train, test, test_index, _probes(recipe, test))


def prepare_data(recipe: Recipe, data_dir: Path | None = None, cache: Path | None = None) -> None:
    """Look through the data before any training: everything is listed, decoded and checked, and kept where it may be.

    A data set by timm's recipe is too large to be decoded twice: there splits, classes and one image of each are
    checked, and an image that is broken is told by its name when training meets it.
    Raises ValueError, one sentence with the file's name, for what is broken, missing, or does not fit the recipe.
    """
    split = load_split(recipe, 0, data_dir, cache)
    if not recipe.reads_files:
        return
    for images in (split.train, split.test):
        every = range(len(images)) if recipe.data == "imagefolder" else _first_of_each_class(images.labels)
        for index in every:
            images.load([index])


def _read(
    recipe: Recipe, data_dir: Path | None, cache: Path | None, fold_number: int = 0
) -> tuple[Images, Images, Tensor]:
    """Images to train on, images held out, and which of all the data these are."""
    train: Images
    test: Images
    if recipe.data == "digits":
        pixels, labels = load_digits()
        names = tuple(str(digit) for digit in range(10))
        inside, outside = fold(labels, fold_number, recipe.folds)
        train, test = (MemoryImages(pixels[part], labels[part], names) for part in (inside, outside))
        return train, test, outside
    transform = test_transform(recipe.image_size)
    if recipe.dataset:
        train, test = timm_images(recipe.dataset, data_dir, transform)
    else:
        assert data_dir is not None  # _check_folder() was asked
        if recipe.data == "mnist":
            train, test = load_mnist(data_dir)
        elif recipe.data == "cifar10":
            train, test = load_cifar10(data_dir, cache)
        else:
            train, test = train_and_held_out(data_dir, transform=transform)
    return train, test, torch.arange(len(test))


def _probes(recipe: Recipe, test: Images) -> Tensor:
    # Held-out parts may be sorted by class, and then their first images are all of one.
    return balanced_order(test.labels)[: recipe.evaluation.probes or None].sort().values


def _first_of_each_class(labels: Tensor) -> list[int]:
    return [int((labels == label).nonzero()[0]) for label in labels.unique()]


def _check_folder(recipe: Recipe, data_dir: Path | None) -> None:
    if recipe.needs_folder and data_dir is None:
        raise ValueError(f"{recipe.name} needs --data-dir, {FOLDERS[recipe.data]}.")
    if recipe.data == "digits" and data_dir is not None:
        raise ValueError(f"{recipe.name} comes with scikit-learn and reads no folder: leave --data-dir {data_dir} out.")
    if recipe.needs_folder and data_dir is not None and not data_dir.exists():
        raise ValueError(f"{data_dir} does not exist: give --data-dir, {FOLDERS[recipe.data]}.")


FOLDERS = {
    "mnist": "the folder that holds mnist.npz",
    "cifar10": "the folder that holds train/ and test/ with a folder for each class, or an archive of each",
    "imagefolder": "the folder that holds train/ and val/ with a folder for each class",
    "timm": "the folder that holds train/ and val/ with a folder for each class (or set dataset=hfds/...)",
}


def _check_fit(recipe: Recipe, images: Images) -> None:
    if len(images.classes) != recipe.classes:
        raise ValueError(
            f"{recipe.name} is set to {recipe.classes} classes, and the data have {len(images.classes)}: "
            + ("set classes to that." if recipe.reads_files else "give the data it is for.")
        )
    found, wanted = list(images.load([0]).shape[1:]), [recipe.channels, recipe.image_size, recipe.image_size]
    if found != wanted:
        raise ValueError(f"{recipe.name} takes images of {wanted} (channels, height, width): the data have {found}.")
