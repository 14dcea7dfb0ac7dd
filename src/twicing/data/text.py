"""A text as streams of numbers that lie in files: one int32 a token, mapped into memory, with the vocabulary beside.

So 100 million tokens are 400 MB of a file, of which memory holds what is being read, and no Python objects.
"""

import json
import os
import shutil
import uuid
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from twicing.data.progress import Progress
from twicing.data.text_sources import PARTS, TextPart, TextSource
from twicing.data.text_vocabulary import NoTextError, Vocabulary, build_listed, check_kind, load_vocabulary

# Raise it when text is cut otherwise.
VERSION = 1
RECORD = "corpus.json"


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in numbers: each part one stream [n] int32, in the order of the text, lines ended by a token.

    counts: tokens of each part, line ends included.
    """

    name: str
    vocabulary: Vocabulary
    train: Tensor
    valid: Tensor
    test: Tensor

    @property
    def counts(self) -> dict[str, int]:
        """Tokens of each part, the ends of lines among them."""
        return {part: len(getattr(self, part)) for part in PARTS}

    def __str__(self) -> str:
        parts = ", ".join(f"{count:,} {part}" for part, count in self.counts.items())
        return f"{self.name}: {parts} tokens, a vocabulary of {len(self.vocabulary):,} (unit: {self.vocabulary.unit})"


def prepare_corpus(
    source: TextSource,
    folder: Path,
    kind: str = "words",
    *,
    vocabulary_size: int = 0,
    min_count: int = 1,
    train_tokens: int = 0,
    progress: Progress | None = None,
) -> Corpus:
    """Build the vocabulary from the part to train on, write all parts as numbers into the folder, and load them.

    kind: "words" (cut at white space; for texts that are cut already), "words and marks" (for those that are not),
    "characters", or "bpe", which needs a vocabulary_size and the package tokenizers. min_count, vocabulary_size: rarer
    words become <unk>. train_tokens: only so many from the beginning of the part to train on; 0 is all.
    Where the folder holds the same text, cut in the same way, that is taken as it is; it appears whole or not at all.
    Raises ValueError, one sentence, where it holds another one, where a part is empty, and what its readers raise.
    """
    check_kind(kind)
    wanted = {
        "version": VERSION,
        "kind": kind,
        "vocabulary_size": vocabulary_size,
        "min_count": min_count,
        "train_tokens": train_tokens,
        "stamps": {name: part.stamp() for name, part in source.parts.items()},
    }
    if (folder / RECORD).exists():
        _refuse_other(folder, wanted)
        return load_corpus(folder)
    steps = _Steps(progress, 2 * source.parts["train"].size + sum(source.parts[p].size for p in ("valid", "test")))
    vocabulary = _build(kind, source.parts["train"], vocabulary_size, min_count, steps)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        vocabulary.save(unfinished)
        tokens = {}
        for name in PARTS:
            with open(unfinished / f"{name}.int32", "wb") as file:
                limit = train_tokens if name == "train" else 0
                tokens[name] = _encode(source.parts[name], vocabulary, file, limit, steps)
        record = wanted | {"name": source.name, "tokens": tokens}
        (unfinished / RECORD).write_text(json.dumps(record), encoding="utf-8")
        _move(unfinished, folder, wanted)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return load_corpus(folder)


def load_corpus(folder: Path) -> Corpus:
    """What prepare_corpus() left in the folder, the streams mapped into memory; nothing is read before it is needed.

    Raises ValueError where it is not there, or a file is not as long as it must be.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        tokens = {part: int(record["tokens"][part]) for part in PARTS}
        name = str(record["name"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no prepared text ({type(error).__name__}): prepare it again.") from error
    return Corpus(name, load_vocabulary(folder), *(_mapped(folder / f"{part}.int32", tokens[part]) for part in PARTS))


def _mapped(file: Path, tokens: int) -> Tensor:
    size = file.stat().st_size if file.exists() else 0
    if size != 4 * tokens:
        raise ValueError(
            f"{file} must hold {4 * tokens} bytes and has {size}: delete {file.parent} and prepare the text again."
        )
    # Not shared: the file stays as it is, whatever is written into the tensor.
    return torch.from_file(str(file), shared=False, size=tokens, dtype=torch.int32)


def _build(kind: str, train: TextPart, vocabulary_size: int, min_count: int, steps: "_Steps") -> Vocabulary:
    pieces = steps.through(train)
    try:
        if kind == "bpe":
            from twicing.data.text_bpe import build_bpe

            return build_bpe(pieces, vocabulary_size)
        return build_listed(kind, pieces, vocabulary_size=vocabulary_size, min_count=min_count)
    except NoTextError as error:
        raise _empty(train) from error


def _encode(part: TextPart, vocabulary: Vocabulary, file: BinaryIO, limit: int, steps: "_Steps") -> int:
    """Write the part as numbers, and return how many there are. limit: stop after so many; 0 is none."""
    count, has_words, last = 0, False, ""
    line_end = vocabulary.line_end
    for piece in steps.through(part):
        try:
            numbers = vocabulary.encode(piece)
        except ValueError as error:
            raise ValueError(f"{part.where}: {error}") from error
        if limit:
            numbers = numbers[: limit - count]
        has_words = has_words or numbers.count(line_end) < len(numbers)
        count += len(numbers)
        numbers.tofile(file)
        last = piece[-1:]
        if limit and count == limit:
            break
    if not has_words:
        raise _empty(part)
    if count < limit:
        raise ValueError(f"train_tokens must not exceed the {count} tokens there are: got {limit}.")
    # The last line of a file may lack its end, and is a line all the same.
    if not limit and last != "\n" and vocabulary.unit != "character":
        array("i", [line_end]).tofile(file)
        count += 1
    return count


def _empty(part: TextPart) -> ValueError:
    return ValueError(f"{part.where} holds no text: it is empty or white space only. Give a part with words in it.")


def _refuse_other(folder: Path, wanted: dict[str, Any]) -> None:
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / RECORD} is damaged: delete {folder} and prepare the text again.") from error
    for key, value in json.loads(json.dumps(wanted)).items():
        if found.get(key) != value:
            raise ValueError(
                f"{folder} holds a text that was prepared from other files or settings ({key}: "
                f"{found.get(key)!r} there, {value!r} here): name another folder, or delete that one."
            )


def _move(unfinished: Path, folder: Path, wanted: dict[str, Any]) -> None:
    try:
        # Onto an empty folder as well, but not onto one that another process has just filled.
        os.rename(unfinished, folder)
    except OSError:
        if not (folder / RECORD).exists():
            raise ValueError(f"{folder} is not empty and holds no prepared text: name another folder.") from None
        _refuse_other(folder, wanted)


class _Steps:
    """Tells progress how much text went through, of all there is."""

    def __init__(self, progress: Progress | None, everything: int):
        self.progress, self.everything, self.done = progress, max(1, everything), 0

    def through(self, part: TextPart) -> Iterator[str]:
        for piece in part.pieces():
            yield piece
            self.done += len(piece)
            if self.progress is not None:
                self.progress(min(1.0, self.done / self.everything))
