"""Pieces of words by byte-pair encoding, learned from the part to train on: the package tokenizers does the work.

Sennrich et al., arXiv 1508.07909; on bytes, so that no text is unknown and none is lost (as in GPT-2).
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twicing.data.text_vocabulary import END

# How a space looks within a token of the byte-level alphabet.
SPACE = "\u0120"
SMALLEST = 256 + 1


class Bpe:
    """A vocabulary of pieces of words. serialised: what the package's to_str() gave, the whole tokenizer as JSON.

    Every line begins with a space that is added, so that a word has one spelling, and ends with <eos>. Spaces at the
    end of a line are dropped. Raises ValueError where that JSON is damaged.
    """

    unit = "BPE token"

    def __init__(self, serialised: str):
        package = _package()
        try:
            self._tokenizer = package.Tokenizer.from_str(serialised)
        # The package raises Exception itself.
        except Exception as error:
            raise ValueError(f"this is no tokenizer as JSON: {error}.") from error
        self._names = [self._tokenizer.id_to_token(number) for number in range(self._tokenizer.get_vocab_size())]

    @property
    def line_end(self) -> int:
        """The token that ends a line."""
        number: int = self._tokenizer.token_to_id(END)
        return number

    def __len__(self) -> int:
        return len(self._names)

    def encode(self, piece: str) -> array[int]:
        """The numbers of the tokens of a piece of text; lines end in a token of their own."""
        lines = piece.split("\n")
        encoded = self._tokenizer.encode_batch([line.rstrip() for line in lines], add_special_tokens=False)
        found, line_end = array("i"), self.line_end
        for number, line in enumerate(encoded, start=1):
            found.extend(line.ids)
            if number < len(lines):
                found.append(line_end)
        return found

    def text(self, tokens: Iterable[int]) -> list[str]:
        """The tokens by their names, spaces as spaces; other bytes that are no letters stay spelt as letters."""
        return [self._names[token].replace(SPACE, " ") for token in tokens]

    def of_word(self, word: str) -> tuple[int, ...] | None:
        """The numbers of a word within a line; every word has some."""
        return tuple(self._tokenizer.encode(word, add_special_tokens=False).ids) or None

    def separators(self) -> Tensor:
        """Which tokens are no part of a word, [size] bool: ends of lines and bare spaces."""
        return torch.tensor([name == END or not name.strip(SPACE) for name in self._names])

    def word_starts(self) -> Tensor:
        """Which tokens always begin a new word, [size] bool: those with a space before them."""
        return torch.tensor([name.startswith(SPACE) for name in self._names]) & ~self.separators()

    def save(self, folder: Path) -> None:
        """Write vocabulary.json into the folder."""
        saved = {"kind": "bpe", "tokenizer": self._tokenizer.to_str()}
        (folder / "vocabulary.json").write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")


def build_bpe(pieces: Iterable[str], vocabulary_size: int) -> Bpe:
    """Learn a vocabulary of that size from text: all 256 bytes, <eos>, and the most frequent merges.

    Raises ImportError where tokenizers is missing, ValueError for a size that does not hold the bytes.
    """
    package = _package()
    if vocabulary_size < SMALLEST:
        raise ValueError(
            f"vocabulary_size must be {SMALLEST} or more for BPE (all bytes and {END}): got {vocabulary_size}."
        )
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END],
        initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(pieces), trainer)
    # <eos> in a text is text: only the end of a line is a token of its own.
    return Bpe(_without_special(tokenizer.to_str()))


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    for piece in pieces:
        yield from (line.rstrip() for line in piece.split("\n"))


def _without_special(serialised: str) -> str:
    """The tokenizer without the rule that finds <eos> in text; the token itself stays."""
    saved = json.loads(serialised)
    saved["added_tokens"] = []
    return json.dumps(saved, ensure_ascii=False)


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("BPE needs the package tokenizers, which is missing: pip install 'twicing[hf]'") from error
    return tokenizers
