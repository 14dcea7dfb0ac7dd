"""The order in which a training sees its images: which batch comes in which step, and a process's slice of it.

A function of (seed, step) alone, so that all mechanisms see the same batches, a resumed training goes on exactly where
it stopped, and several processes share the batches that one alone would have.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from twicing.training.protocol import Recipe
from twicing.training.streams import ORDER_STREAM, stream_seed


@dataclass(frozen=True)
class Slice:
    """A process's part of one batch, by the images' numbers.

    repeats: which augmented version of each, from 0. pass_number: the pass over the data, which augmentation goes by.
    share: what its mean loss counts in the mean over all processes; 0 for an image that only keeps a process busy.
    """

    images: tuple[int, ...]
    repeats: tuple[int, ...]
    pass_number: int
    share: float


class BatchOrder(Sampler[Slice]):
    """Slices of the batches of one epoch: shuffled passes over n images, each by (seed, number of the pass).

    repeats: every image that often, one after the other, n in all (arXiv 1902.05509, as timm's sampler does it).
    length: factor on an epoch's steps. whole_batches: leave out a smaller last batch of a pass.
    Raises ValueError where there is not one batch in a pass.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        *,
        repeats: int = 1,
        length: float = 1.0,
        whole_batches: bool = False,
        rank: int = 0,
        world: int = 1,
    ):
        self.n, self.batch_size, self.seed, self.repeats = n, batch_size, seed, repeats
        self.rank, self.world = rank, world
        self.batches_in_a_pass = n // batch_size if whole_batches else -(-n // batch_size)
        if self.batches_in_a_pass < 1:
            raise ValueError(
                f"mixing needs whole batches, so batch_size must not exceed the images to train on: got {batch_size} "
                f"and {n}."
            )
        self.steps = max(1, round(self.batches_in_a_pass * length))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch, also the first one after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Slice]:
        current, order = -1, torch.empty(0, dtype=torch.int64)
        for step in range(self.epoch * self.steps, (self.epoch + 1) * self.steps):
            number, place = divmod(step, self.batches_in_a_pass)
            if number != current:
                current, order = number, self._pass(number)
            first = place * self.batch_size
            batch = order[first : first + self.batch_size].tolist()
            mine, share = mirrored_slice(len(batch), self.rank, self.world)
            yield Slice(
                images=tuple(batch[i] for i in mine),
                repeats=tuple((first + i) % self.repeats for i in mine),
                pass_number=number,
                share=share,
            )

    def _pass(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(stream_seed(self.seed, ORDER_STREAM, number))
        order = torch.randperm(self.n, generator=generator)
        return order.repeat_interleave(self.repeats)[: self.n]


class Consecutive(Sampler[Slice]):
    """Slices of consecutive batches of n images, each image once: for those held out."""

    def __init__(self, n: int, batch_size: int, *, rank: int = 0, world: int = 1):
        self.n, self.batch_size, self.rank, self.world = n, batch_size, rank, world

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Slice]:
        for first in range(0, self.n, self.batch_size):
            mine, share = mirrored_slice(min(self.batch_size, self.n - first), self.rank, self.world)
            yield Slice(tuple(first + i for i in mine), (0,) * len(mine), 0, share)


def mirrored_slice(n: int, rank: int, world: int) -> tuple[list[int], float]:
    """The places of a process in a batch of n, and the share of its mean loss: places * world / n.

    It has the mirror image, n - 1 - i, of every place i that it has, at the mirrored place of its slice: mixup and
    CutMix mix these, so that the processes together mix as one alone would. With fewer pairs than processes, one that
    has none gets the first place with a share of 0: all processes must take every step.
    """
    pairs = n // 2
    half = list(range(pairs * rank // world, pairs * (rank + 1) // world))
    middle = [pairs] if n % 2 and rank == world - 1 else []
    places = half + middle + [n - 1 - i for i in reversed(half)]
    return (places, len(places) * world / n) if places else ([0], 0.0)


def batch_order(recipe: Recipe, n: int, seed: int, *, rank: int = 0, world: int = 1) -> BatchOrder:
    """The order of a recipe's training on n images."""
    return BatchOrder(
        n,
        recipe.batch_size,
        seed,
        repeats=recipe.augmentation.repeats,
        length=recipe.training_length,
        # timm mixes an even number of images, and the last batch has any.
        whole_batches=recipe.augmentation.mixes,
        rank=rank,
        world=world,
    )


def training_steps(recipe: Recipe, n: int) -> int:
    """Optimiser steps of a whole training on n images."""
    return recipe.all_epochs * len(batch_order(recipe, n, seed=0))
