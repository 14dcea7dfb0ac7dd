"""Perplexity of a text in the two ways that papers have, which must never be mixed: segments and sliding window."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor

from twicing.data.progress import Progress
from twicing.models.language import LanguageModel

SEGMENTS, SLIDING = "segments", "sliding window"


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean of -log p over the tokens that were predicted.

    nats: that mean. tokens: how many were predicted. way: SEGMENTS or SLIDING.
    """

    nats: float
    tokens: int
    way: str

    @property
    def value(self) -> float:
        """The perplexity; infinite where it is beyond what a float holds, NaN where the mean is."""
        return float("inf") if self.nats >= 700 else exp(self.nats)

    def metric(self, part: str, unit: str) -> str:
        """Its full name, as "test perplexity per word, segments"."""
        return perplexity_name(part, unit, self.way)


def perplexity_name(part: str, unit: str, way: str = SEGMENTS) -> str:
    """What a perplexity is called in every output. unit: of the vocabulary, such as "word"."""
    return f"{part} perplexity per {unit}, {way}"


def segment_perplexity(
    model: LanguageModel,
    stream: Tensor,
    *,
    targets: Tensor | None = None,
    length: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Perplexity:
    """Cut the text into windows side by side, and predict every token from those before it in its window.

    stream: [n], what the model reads; all tokens but the first are predicted, n - 1 of them, the last window being as
    short as it has to be. targets: [n], what is to be predicted where that is another text (word swap).
    length: of a window, by default the model's. The mean counts every token once.
    Raises ValueError for a model in training mode or a text of fewer than two tokens.
    Source: the windows of the WikiText-103 protocol of arXiv 2503.00687.
    """
    length, wanted = _checked(model, stream, targets, length, batch_size)
    whole = (len(stream) - 1) // length

    def losses() -> Iterator[Tensor]:
        for first in range(0, whole, batch_size):
            starts = length * torch.arange(first, min(first + batch_size, whole))
            yield _losses(model, stream, wanted, starts, length)
        rest = len(stream) - 1 - whole * length
        if rest:
            yield _losses(model, stream, wanted, torch.tensor([whole * length]), rest)

    return _mean(losses(), len(stream) - 1, SEGMENTS, progress)


def sliding_window_perplexity(
    model: LanguageModel,
    stream: Tensor,
    *,
    targets: Tensor | None = None,
    length: int | None = None,
    tokens: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Perplexity:
    """Predict every token from the `length` tokens before it: a window moves by one, and only its last place counts.

    In the first window all places count, as there is nothing before it. Costs a forward of a whole window for every
    token. tokens: predict so many only, from the beginning; 0 is all. Everything else as in segment_perplexity().
    """
    length, wanted = _checked(model, stream, targets, length, batch_size)
    last = min(tokens or len(stream) - 1, len(stream) - 1)
    length = min(length, last)

    def losses() -> Iterator[Tensor]:
        yield _losses(model, stream, wanted, torch.tensor([0]), length)
        # Windows that begin at 1, 2, ... predict the token after their last one, up to number `last`.
        for first in range(1, last - length + 1, batch_size):
            starts = torch.arange(first, min(first + batch_size, last - length + 1))
            yield _losses(model, stream, wanted, starts, length, last_only=True)

    return _mean(losses(), last, SLIDING, progress)


def _checked(
    model: LanguageModel, stream: Tensor, targets: Tensor | None, length: int | None, batch_size: int
) -> tuple[int, Tensor]:
    wanted = stream if targets is None else targets
    length = model.length if length is None else length
    if model.training:
        raise ValueError("the model must be in eval mode, as dropout would change it: call model.eval() first.")
    if stream.ndim != 1 or len(stream) < 2 or wanted.shape != stream.shape:
        raise ValueError(
            "a text is [n] tokens, n of 2 or more, and targets are as many: got "
            f"{list(stream.shape)} and {list(wanted.shape)}."
        )
    if length < 1 or batch_size < 1:
        raise ValueError(f"length and batch_size must be 1 or larger: got {length} and {batch_size}.")
    return length, wanted


def _losses(
    model: LanguageModel, stream: Tensor, wanted: Tensor, starts: Tensor, length: int, *, last_only: bool = False
) -> Tensor:
    """Losses of windows, flat: of all places, or of the last one of each."""
    places = starts[:, None] + torch.arange(length)
    device = model.embedding.weight.device
    tokens, targets = stream[places].long().to(device), wanted[places + 1].long().to(device)
    with torch.no_grad():
        features = model(tokens)
        if last_only:
            features, targets = features[:, -1], targets[:, -1]
        return model.word_losses(features, targets).flatten()


def _mean(losses: Iterator[Tensor], expected: int, way: str, progress: Progress | None) -> Perplexity:
    total, tokens = 0.0, 0
    for batch in losses:
        # In fp64: a sum over hundreds of thousands of words would lose digits.
        total += batch.double().sum().item()
        tokens += len(batch)
        if progress is not None:
            progress(tokens / expected)
    assert tokens == expected
    return Perplexity(total / tokens, tokens, way)
