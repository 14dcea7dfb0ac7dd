"""Which windows of a text make which step: a function of (seed, step) alone, as for images in order.py."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from twicing.training.language_recipe import LanguageRecipe
from twicing.training.streams import ORDER_STREAM, stream_seed

Windows = Tensor
"""[b, length + 1] int64: a window, and the token after it."""


class WindowOrder(Sampler[Tensor]):
    """The first places of a step's windows, [b] each, for the steps of one epoch.

    contiguous: the text is cut into as many columns as a batch has windows, and a step takes the next window of every
    column; at the bottom it starts again at the top. The seed has no say in it.
    shuffled: a pass over the text begins at an offset below the length, by (seed, pass), and takes all windows after
    one another in an order by (seed, pass); what does not fill a batch is left out.
    Raises ValueError where the text is too short for one batch, or the batch cannot be shared among the processes.
    """

    def __init__(self, tokens: int, recipe: LanguageRecipe, seed: int, *, rank: int = 0, world: int = 1):
        self.tokens, self.recipe, self.seed, self.rank, self.world = tokens, recipe, seed, rank, world
        length, batch = recipe.length, recipe.batch_size
        if batch % world:
            raise ValueError(f"batch_size must be a multiple of the {world} processes: got {batch}.")
        if recipe.order == "contiguous":
            self.column = tokens // batch
            # The token after the last window has to be in the column.
            self.steps_in_a_pass = (self.column - 1) // length
        else:
            # With any offset all windows, and the token after the last one, lie in the text.
            self.windows = (tokens - length) // length
            self.steps_in_a_pass = self.windows // batch
        if self.steps_in_a_pass < 1:
            raise ValueError(
                f"the part to train on must have more than {batch} windows of {length} tokens: it has {tokens} tokens. "
                "Lower batch_size or length."
            )
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch, also the first one after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.recipe.epoch_steps

    def __iter__(self) -> Iterator[Tensor]:
        steps, current, order = self.recipe.epoch_steps, -1, torch.empty(0, dtype=torch.int64)
        for step in range(self.epoch * steps, (self.epoch + 1) * steps):
            number, place = divmod(step, self.steps_in_a_pass)
            if number != current:
                current, order = number, self._pass(number)
            first = place * self.recipe.batch_size
            yield order[first : first + self.recipe.batch_size][self.rank :: self.world]

    def _pass(self, number: int) -> Tensor:
        """The first places of all windows of a pass, batch after batch."""
        length = self.recipe.length
        if self.recipe.order == "contiguous":
            tops = torch.arange(self.recipe.batch_size) * self.column
            return (torch.arange(self.steps_in_a_pass)[:, None] * length + tops).flatten()
        generator = torch.Generator().manual_seed(stream_seed(self.seed, ORDER_STREAM, number))
        offset = torch.randint(length, (), generator=generator)
        return offset + length * torch.randperm(self.windows, generator=generator)


class TextWindows(Dataset[Windows]):
    """Windows of a stream by their first places."""

    def __init__(self, stream: Tensor, length: int):
        self.stream, self.length = stream, length

    def __getitem__(self, starts: Tensor) -> Windows:
        return self.stream[starts[:, None] + torch.arange(self.length + 1)].long()


def window_loader(
    stream: Tensor, recipe: LanguageRecipe, seed: int, *, rank: int = 0, world: int = 1
) -> DataLoader[Windows]:
    """Batches of windows to learn from. They are read from memory or a mapped file, so that workers would not help."""
    order = WindowOrder(len(stream), recipe, seed, rank=rank, world=world)
    return DataLoader(TextWindows(stream, recipe.length), sampler=order, batch_size=None)
