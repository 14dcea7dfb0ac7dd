"""Word swap: words of a text are replaced by "AAA", and the language model has to predict it all the same.

The test of arXiv 2503.00687 (table of WikiText-103) and of the papers that it follows, whose exact setting is not
known. Ours swaps exactly the stated share; `paper_compat` is what the related released code does.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import floor

import torch
from torch import Tensor

from twicing.data.text_vocabulary import UNKNOWN, Listed, Vocabulary
from twicing.robustness.stop_words import STOP_WORDS
from twicing.robustness.threat import FractionLike, as_fraction

REPLACEMENT = "AAA"
MODES = ("inputs only", "inputs and targets", "paper_compat")


@dataclass(frozen=True, eq=False)
class Swapped:
    """A text with swapped words.

    inputs: what the model reads, [n]; targets: what it has to predict, [n]; token i is predicted from inputs before i.
    words, swapped: how many words there are (marks among them) and how many were swapped.
    became: what "AAA" is in this vocabulary, a sentence.
    """

    inputs: Tensor
    targets: Tensor
    words: int
    swapped: int
    became: str

    @property
    def share(self) -> float:
        """The share of words that were swapped."""
        return self.swapped / self.words


def swap_words(
    stream: Tensor,
    vocabulary: Vocabulary,
    share: FractionLike,
    *,
    mode: str = "inputs only",
    generator: torch.Generator,
) -> Swapped:
    """Replace words of a text by "AAA", chosen by the generator: round(share x words) of them, to the word.

    stream: [n] numbers of the vocabulary's tokens; word ends of lines are no words. share: "0.04", "1/25", 0 to 1.
    mode: "inputs only" leaves what has to be predicted as it is; "inputs and targets" swaps there as well;
    "paper_compat" swaps in both, line by line: floor(share x the line's words), at least one, never a stop-word or a
    mark without a letter or digit; none at a share of 0.
    From one state of the generator, the words swapped at a smaller share are among those at a larger one (in every line
    of paper_compat too). Every word keeps its number of tokens: where "AAA" has fewer or more, its tokens are repeated
    or cut off. Where the vocabulary does not have it, it becomes <unk>; `became` says so.
    Raises ValueError for another mode, a share outside [0, 1], a text without words, or where neither is there.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}: got {mode!r}.")
    exact = as_fraction(share, "share")
    if not 0 <= exact <= 1:
        raise ValueError(f"share must be from 0 to 1: got {share}.")
    tokens = stream.long()
    word, words = _word_of_each_token(tokens, vocabulary)
    if not words:
        raise ValueError("the text holds no words to swap: give one with words in it.")
    replacement, became = what_becomes(vocabulary)
    order = torch.randperm(words, generator=generator)
    if mode == "paper_compat":
        chosen = _by_line(tokens, word, words, order, exact, vocabulary)
    else:
        # To the nearest word, a half upwards.
        chosen = torch.zeros(words, dtype=torch.bool)
        chosen[order[: floor(exact * words + Fraction(1, 2))]] = True
    inputs = _replaced(tokens, word, chosen, replacement)
    targets = tokens if mode == "inputs only" else inputs
    return Swapped(inputs.to(stream.dtype), targets.to(stream.dtype), words, int(chosen.sum()), became)


def what_becomes(vocabulary: Vocabulary, word: str = REPLACEMENT) -> tuple[tuple[int, ...], str]:
    """The numbers of the word that is put in, and a sentence that says what it is in this vocabulary.

    Raises ValueError where the vocabulary has neither the word nor <unk>.
    """
    numbers = vocabulary.of_word(word)
    if numbers is not None:
        # A bare space before it stands between words, and is no part of one.
        separators = vocabulary.separators()
        numbers = tuple(number for number in numbers if not separators[number])
        if vocabulary.unit in ("word", "word or mark"):
            return numbers, f'"{word}" is a word of the vocabulary.'
        pieces = ", ".join(f'"{piece}"' for piece in vocabulary.text(numbers))
        return numbers, f'"{word}" became the {vocabulary.unit}s {pieces}, repeated or cut to the length of each word.'
    unknown = vocabulary.of_word(UNKNOWN) if isinstance(vocabulary, Listed) else None
    if unknown is None:
        raise ValueError(f'the vocabulary has neither "{word}" nor {UNKNOWN}: swap with a word that it has.')
    return unknown, f'"{word}" is not in the vocabulary and became {UNKNOWN}.'


def _word_of_each_token(tokens: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, int]:
    """The number of the word that each token is a part of, -1 for separators; and how many words there are."""
    separates = vocabulary.separators()[tokens]
    after_separator = torch.cat([torch.ones(1, dtype=torch.bool), separates[:-1]])
    begins = ~separates & (vocabulary.word_starts()[tokens] | after_separator)
    word = begins.cumsum(0) - 1
    return word.masked_fill(separates, -1), int(begins.sum())


def _first_token(word: Tensor, words: int) -> Tensor:
    """The place of the first token of each word."""
    places = torch.arange(len(word))
    inside = word >= 0
    return torch.full((words,), len(word)).scatter_reduce(0, word[inside], places[inside], "amin")


def _replaced(tokens: Tensor, word: Tensor, chosen: Tensor, replacement: tuple[int, ...]) -> Tensor:
    of_word = word.clamp(min=0)
    swapped = (word >= 0) & chosen[of_word]
    within = torch.arange(len(tokens)) - _first_token(word, len(chosen))[of_word]
    return torch.where(swapped, torch.tensor(replacement)[within % len(replacement)], tokens)


def _by_line(
    tokens: Tensor, word: Tensor, words: int, order: Tensor, share: Fraction, vocabulary: Vocabulary
) -> Tensor:
    """Which words paper_compat swaps, [words] bool; of a line's words those that come first in `order`."""
    chosen = torch.zeros(words, dtype=torch.bool)
    if not share:
        return chosen
    line_of_token = (tokens == vocabulary.line_end).cumsum(0)
    line = line_of_token[_first_token(word, words)]
    may = _carries_content(tokens, word, words, vocabulary)
    in_line = line.bincount()
    quota = (in_line * share.numerator // share.denominator).clamp(min=1)
    candidates = order[may[order]]
    candidates = candidates[line[candidates].sort(stable=True).indices]
    of_line = line[candidates]
    # The place of a candidate among those of its line.
    before = torch.searchsorted(of_line, of_line)
    chosen[candidates[torch.arange(len(candidates)) - before < quota[of_line]]] = True
    return chosen


def _carries_content(tokens: Tensor, word: Tensor, words: int, vocabulary: Vocabulary) -> Tensor:
    pieces: list[list[str]] = [[] for _ in range(words)]
    for number, text in zip(word.tolist(), vocabulary.text(tokens.tolist()), strict=True):
        if number >= 0:
            pieces[number].append(text)
    spelled = ("".join(parts).strip().lower() for parts in pieces)
    return torch.tensor([text not in STOP_WORDS and any(map(str.isalnum, text)) for text in spelled])
