"""What a text is cut into: words, words and marks, characters, or pieces of words by BPE; each as a number from 0.

A vocabulary is built once, from the part to train on, and kept with the run: numbers mean nothing without it.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from twicing.names import listed

END, UNKNOWN = "<eos>", "<unk>"
KINDS = ("words", "words and marks", "characters", "bpe")

# A run of letters and digits, or one other character that is no space. <unk> stays whole.
_WORD_OR_MARK = re.compile(rf"{UNKNOWN}|\w+|[^\w\s]")


class NoTextError(ValueError):
    """There are no words to build a vocabulary from."""


class Vocabulary(Protocol):
    """Text to numbers and back.

    unit: what a token is, as in "perplexity per word". line_end: the number that ends a line.
    """

    unit: str

    @property
    def line_end(self) -> int:
        """The token that ends a line."""

    def __len__(self) -> int:
        """How many tokens there are."""

    def encode(self, piece: str) -> array[int]:
        """The numbers of the tokens of a piece of text; lines end in a token of their own."""

    def text(self, tokens: Iterable[int]) -> list[str]:
        """The tokens as text, one by one."""

    def of_word(self, word: str) -> tuple[int, ...] | None:
        """The numbers of a word within a line; None where the vocabulary does not have it."""

    def separators(self) -> Tensor:
        """Which tokens are no part of a word, [size] bool: ends of lines and white space."""

    def word_starts(self) -> Tensor:
        """Which tokens always begin a new word, [size] bool; others begin one only after a separator."""

    def save(self, folder: Path) -> None:
        """Write vocabulary.json into the folder."""


class Listed:
    """A vocabulary that is a list of strings: words, words and marks, or characters."""

    def __init__(self, kind: str, tokens: Iterable[str]):
        self.kind = kind
        self.tokens = tuple(tokens)
        self.unit = {"words": "word", "words and marks": "word or mark", "characters": "character"}[kind]
        self._number = {token: number for number, token in enumerate(self.tokens)}
        self._unknown = self._number.get(UNKNOWN, -1)

    @property
    def line_end(self) -> int:
        """The token that ends a line."""
        return self._number["\n" if self.kind == "characters" else END]

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, piece: str) -> array[int]:
        """The numbers of the tokens of a piece of text.

        Raises ValueError for a token that is not in the vocabulary where that has no <unk> either.
        """
        number, unknown = self._number, self._unknown
        found = array("i", [number.get(token, unknown) for token in split(self.kind, piece)])
        if unknown < 0 and -1 in found:
            word = next(token for token in split(self.kind, piece) if token not in number)
            raise ValueError(
                f"{word!r} does not occur in the part to train on, and nothing there is rare enough to be {UNKNOWN}: "
                "set min_count to 2 or more, or limit vocabulary_size."
            )
        return found

    def text(self, tokens: Iterable[int]) -> list[str]:
        """The tokens as text, one by one."""
        return [self.tokens[token] for token in tokens]

    def of_word(self, word: str) -> tuple[int, ...] | None:
        """The numbers of a word; None where the vocabulary does not have it."""
        pieces = tuple(word) if self.kind == "characters" else (word,)
        known = tuple(self._number[piece] for piece in pieces if piece in self._number)
        return known if known and len(known) == len(pieces) else None

    def separators(self) -> Tensor:
        """Which tokens are no part of a word, [size] bool."""
        if self.kind == "characters":
            return torch.tensor([token.isspace() for token in self.tokens])
        return torch.tensor([token == END for token in self.tokens])

    def word_starts(self) -> Tensor:
        """Which tokens always begin a new word, [size] bool."""
        return torch.full((len(self.tokens),), self.kind != "characters") & ~self.separators()

    def save(self, folder: Path) -> None:
        """Write vocabulary.json into the folder."""
        saved = {"kind": self.kind, "tokens": self.tokens}
        (folder / "vocabulary.json").write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")


def split(kind: str, piece: str) -> Iterator[str]:
    """The tokens of a piece of text as they stand there. Words are cut at white space, and no letter is changed."""
    if kind == "characters":
        yield from piece
        return
    lines = piece.split("\n")
    for number, line in enumerate(lines, start=1):
        yield from line.split() if kind == "words" else _WORD_OR_MARK.findall(line)
        if number < len(lines):
            yield END


def build_listed(kind: str, pieces: Iterable[str], *, vocabulary_size: int = 0, min_count: int = 1) -> Listed:
    """A vocabulary of all tokens that occur min_count times or more, at most vocabulary_size of them (0: no limit).

    The most frequent one is number 0, ties in alphabetical order: adaptive softmax needs that order. What is left out
    becomes <unk>, which then is one of the tokens.
    Raises NoTextError, a ValueError, where there is nothing to build it from.
    """
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(split(kind, piece))
    if not any(token.strip() and token != END for token in counts):
        raise NoTextError("there is no text to build a vocabulary from.")
    line_end = "\n" if kind == "characters" else END
    # A text may be a single line whose end is not there.
    counts[line_end] += 0
    words = sorted(counts.keys() - {UNKNOWN, line_end}, key=lambda word: (-counts[word], word))
    kept = [word for word in words if counts[word] >= min_count]
    has_unknown = UNKNOWN in counts or len(kept) < len(words)
    if vocabulary_size and len(kept) + 1 + has_unknown > vocabulary_size:
        # Room for <unk> and the end of a line, which stay in any case.
        kept = kept[: max(0, vocabulary_size - 2)]
        has_unknown = True
    counts[UNKNOWN] += sum(counts[word] for word in words) - sum(counts[word] for word in kept)
    tokens = [*kept, line_end, *([UNKNOWN] if has_unknown else [])]
    return Listed(kind, sorted(tokens, key=lambda token: (-counts[token], token)))


def load_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary that save() wrote there. Raises ValueError where it is missing or damaged."""
    file = folder / "vocabulary.json"
    try:
        saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if saved["kind"] == "bpe":
            from twicing.data.text_bpe import Bpe

            return Bpe(saved["tokenizer"])
        return Listed(saved["kind"], saved["tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is missing or damaged ({type(error).__name__}): delete {folder} and prepare the text again."
        ) from error


def check_kind(kind: str) -> None:
    """Raise ValueError where text is not cut in that way."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of tokens {kind!r}: {listed(kind, KINDS)}")
