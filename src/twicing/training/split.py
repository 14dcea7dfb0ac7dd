"""Data of one training: which images it learns from, which it is tested on, and in which order it sees them.

The order is a function of (seed, epoch) alone, so that all mechanisms see the same batches and a resumed run goes on
exactly where it stopped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from twicing.data.digits import fold, load_digits
from twicing.training.recipe import Recipe

# Numbers drawn for one purpose must not be those drawn for another: each has its own stream.
ORDER_STREAM, STEP_STREAM = 1, 2

SOURCES = {"digits": load_digits}


@dataclass(frozen=True)
class Split:
    """Images [n, C, H, W] in [0, 1] and labels [n] to train on, those held out, and which images of all these are."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    test_index: Tensor


def load_split(recipe: Recipe, fold_number: int) -> Split:
    """The recipe's images with the given fold held out (fold k of recipe.folds; k wraps around)."""
    images, labels = SOURCES[recipe.data]()
    train, test = fold(labels, fold_number, recipe.folds)
    return Split(images[train], labels[train], images[test], labels[test], test)


def stream_seed(seed: int, stream: int, count: int) -> int:
    """A 32-bit seed (all that torch's CPU generator reads) for the count-th draw of one of a run's streams."""
    return int(np.random.SeedSequence([seed, stream, count]).generate_state(1)[0])


class ShuffledBatches(Sampler[list[int]]):
    """Batches of indices in an order that depends on (seed, epoch) alone; the last batch may be smaller."""

    def __init__(self, n: int, batch_size: int, seed: int):
        self.n, self.batch_size, self.seed, self.epoch = n, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch, also the first one after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(stream_seed(self.seed, ORDER_STREAM, self.epoch))
        order = torch.randperm(self.n, generator=generator)
        for batch in order.split(self.batch_size):
            yield batch.tolist()


def train_loader(split: Split, batch_size: int, seed: int) -> DataLoader[Any]:
    """Batches to learn from, shuffled by (seed, epoch)."""
    batches = ShuffledBatches(len(split.train_labels), batch_size, seed)
    # The sampler hands whole batches to the dataset, which indexes tensors at once: no collating image by image.
    return DataLoader(TensorDataset(split.train_images, split.train_labels), sampler=batches, batch_size=None)


def test_loader(split: Split) -> DataLoader[Any]:
    """The held-out images as one batch."""
    everything = [list(range(len(split.test_labels)))]
    return DataLoader(TensorDataset(split.test_images, split.test_labels), sampler=everything, batch_size=None)
