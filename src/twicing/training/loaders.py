"""Batches for Lightning: a sampler says which images a process needs, and they are read and augmented where it wants.

Worker processes may finish in any order, and any one may do any batch: nothing that is drawn depends on them.
"""

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from twicing.data.images import Images
from twicing.training.augmentation import FileTransform, augment_pixels
from twicing.training.order import Consecutive, Slice, batch_order
from twicing.training.protocol import Recipe
from twicing.training.streams import AUGMENT_STREAM, drawing_from, stream_seed

# Held-out images in one forward.
HELD_OUT_BATCH = 512

Batch = tuple[Tensor, Tensor, float]
"""Images [b, C, H, W], labels [b], and the share of their mean loss in the mean over all processes."""


class PictureFiles(Images, Protocol):
    """Images that are in files."""

    def open(self, index: int) -> Any:
        """Decode one image, as RGB picture of Pillow."""


class TrainingImages(Dataset[Batch]):
    """Images to train on, augmented; indexed by slices of batches."""

    def __init__(self, images: Images, recipe: Recipe, seed: int):
        self.images, self.recipe, self.seed = images, recipe, seed
        augmentation = recipe.augmentation
        self.transform = None
        if recipe.reads_files and (augmentation.flip or augmentation.for_files_only):
            self.transform = FileTransform(augmentation, recipe.image_size, recipe.mean, recipe.std)

    def __getitem__(self, part: Slice) -> Batch:
        return self._pixels(part), self.images.labels[list(part.images)], part.share

    def _pixels(self, part: Slice) -> Tensor:
        if self.transform is None:
            return augment_pixels(
                self.images.load(part.images),
                part.images,
                part.repeats,
                augmentation=self.recipe.augmentation,
                seed=self.seed,
                pass_number=part.pass_number,
                n=len(self.images),
            )
        files = cast(PictureFiles, self.images)
        augmented = []
        for number, repeat in zip(part.images, part.repeats, strict=True):
            picture = files.open(number)
            with drawing_from(stream_seed(self.seed, AUGMENT_STREAM, part.pass_number, number, repeat)):
                augmented.append(self.transform(picture))
        return torch.stack(augmented)


class HeldOutImages(Dataset[Batch]):
    """Images as they are, indexed by slices of batches."""

    def __init__(self, images: Images):
        self.images = images

    def __getitem__(self, part: Slice) -> Batch:
        return self.images.load(part.images), self.images.labels[list(part.images)], part.share


def train_loader(
    images: Images, recipe: Recipe, seed: int, *, rank: int = 0, world: int = 1, workers: int = 0
) -> DataLoader[Any]:
    """Batches to learn from, in an order and augmented by (seed, epoch)."""
    order = batch_order(recipe, len(images), seed, rank=rank, world=world)
    # The sampler hands whole batches to the dataset, which indexes tensors at once: no collating image by image.
    return DataLoader(
        TrainingImages(images, recipe, seed),
        sampler=order,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def held_out_loader(images: Images, *, rank: int = 0, world: int = 1, workers: int = 0) -> DataLoader[Any]:
    """The held-out images, in order."""
    order = Consecutive(len(images), HELD_OUT_BATCH, rank=rank, world=world)
    return DataLoader(
        HeldOutImages(images), sampler=order, batch_size=None, num_workers=workers, persistent_workers=workers > 0
    )
