"""Where text comes from: plain files, reviews of IMDB, Python's own documentation. Read piece by piece, never whole.

Every source has the parts train, valid and test. WikiText: arXiv 1609.07843; Penn Treebank as prepared by Mikolov et
al., Interspeech 2010; IMDB: Maas et al., ACL 2011.
"""

import codecs
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("train", "valid", "test")

# How WikiText, Penn Treebank and people name the file of a part.
FILE_NAMES = ("{part}.txt", "{part}.tokens", "wiki.{part}.tokens", "ptb.{part}.txt")
# A file by itself: this share of it, from its beginning, is to train on; the rest is cut in halves.
TRAIN_SHARE = 0.9
BLOCK = 1 << 16

# Of 20 reviews to train on this one is held out, so that the test part is not looked at before the end.
IMDB_VALID_EVERY = 20
# Documentation is cut into blocks of so many paragraphs; of ten blocks one is valid and one is test.
PYDOC_PARAGRAPHS, PYDOC_BLOCKS = 8, 10


@dataclass(frozen=True)
class TextPart:
    """One part of a text.

    where: what stands for it in errors. pieces: yields the text in order, cut after white space only.
    stamp: what tells this text from another one, as JSON values. size: for progress, in the unit that pieces have.
    """

    where: str
    pieces: Callable[[], Iterator[str]]
    stamp: Callable[[], dict[str, Any]]
    size: int


@dataclass(frozen=True)
class TextSource:
    """A text with its parts, by the names train, valid and test."""

    name: str
    parts: Mapping[str, TextPart]


def plain_text(path: str | Path) -> TextSource:
    """A folder with a UTF-8 file for each part, or one file, of which the last tenth is held out (half and half).

    Files are found by the names that WikiText (wiki.train.tokens) and Penn Treebank (train.txt) have.
    Raises ValueError, one sentence, where a part is missing or named twice; reading raises it for what is no UTF-8.
    """
    path = Path(path)
    if path.is_file():
        return TextSource(path.name, _cut(path))
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: give a text file, or a folder with a file for each part.")
    return TextSource(path.name, {part: _whole(_file_of(path, part)) for part in PARTS})


def imdb(folder: str | Path) -> TextSource:
    """Reviews of IMDB, one a line: {train,test}.jsonl.xz with a JSON object a line whose "text" is the review.

    Every 20th review of the train part is the valid part. The reviews without a label are left out, since they may be
    of films of the test part. Line breaks of HTML become spaces.
    Raises ValueError naming the file that is missing; reading raises it for a damaged one.
    """
    folder = Path(folder)
    train, test = (folder / f"{part}.jsonl.xz" for part in ("train", "test"))
    for file in (train, test):
        if not file.is_file():
            raise ValueError(f"{file} does not exist: give the folder with train.jsonl.xz and test.jsonl.xz of IMDB.")

    def part(file: Path, takes: Callable[[int], bool]) -> TextPart:
        # There are about 3.5 characters to a compressed byte: good enough for progress.
        size = round(3.5 * file.stat().st_size)
        return TextPart(str(file), lambda: _reviews(file, takes), lambda: _file_stamp(file), size)

    return TextSource(
        "IMDB",
        {
            "train": part(train, lambda number: number % IMDB_VALID_EVERY != IMDB_VALID_EVERY - 1),
            "valid": part(train, lambda number: number % IMDB_VALID_EVERY == IMDB_VALID_EVERY - 1),
            "test": part(test, lambda _: True),
        },
    )


def python_documentation() -> TextSource:
    """The help texts that come with Python (pydoc_data.topics): no data set is needed, but versions of Python differ.

    Paragraphs that occur more than once are taken once, since many topics repeat others and what is held out must not
    have been trained on. Of every ten blocks of eight paragraphs the ninth is valid and the tenth test.
    Raises ImportError where Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError("Python's help texts (pydoc_data) are not installed: use another Python or text.") from error
    # Of equal paragraphs the first one stays, at its place.
    unique: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            if paragraph.strip():
                unique.setdefault(" ".join(paragraph.split()), paragraph.strip("\n") + "\n")
    paragraphs = list(unique.values())
    blocks = [paragraphs[i : i + PYDOC_PARAGRAPHS] for i in range(0, len(paragraphs), PYDOC_PARAGRAPHS)]
    numbers = {
        "train": range(PYDOC_BLOCKS - 2),
        "valid": (PYDOC_BLOCKS - 2,),
        "test": (PYDOC_BLOCKS - 1,),
    }
    return TextSource(
        "Python's documentation",
        {
            part: _in_memory(
                f"the {part} part of Python's documentation",
                [p for number, block in enumerate(blocks) if number % PYDOC_BLOCKS in wanted for p in block],
            )
            for part, wanted in numbers.items()
        },
    )


def _in_memory(where: str, pieces: list[str]) -> TextPart:
    text = "".join(pieces).encode()
    stamp = {"bytes": len(text), "crc32": zlib.crc32(text)}
    return TextPart(where, lambda: iter(pieces), lambda: stamp, sum(map(len, pieces)))


def _file_of(folder: Path, part: str) -> Path:
    names = [name.format(part=part) for name in FILE_NAMES]
    found = [name for name in names if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{folder} holds no {part} part: it must have one of {', '.join(names)}.")
    if len(found) > 1:
        raise ValueError(f"{folder} holds the {part} part more than once ({', '.join(found)}): leave one of them.")
    return folder / found[0]


def _whole(file: Path) -> TextPart:
    size = file.stat().st_size
    return TextPart(str(file), lambda: _pieces(file, 0, size), lambda: _file_stamp(file), size)


def _cut(file: Path) -> dict[str, TextPart]:
    size = file.stat().st_size
    ends = [_line_end(file, round(size * share)) for share in (TRAIN_SHARE, (1 + TRAIN_SHARE) / 2)]
    bounds = zip([0, *ends], [*ends, size], strict=True)

    def one(name: str, start: int, stop: int) -> TextPart:
        stamp = {"from": start, "to": stop}
        where = f"{file} ({name} part)"
        return TextPart(
            where, lambda: _pieces(file, start, stop), lambda: _file_stamp(file) | stamp, max(1, stop - start)
        )

    return {name: one(name, start, stop) for name, (start, stop) in zip(PARTS, bounds, strict=True)}


def _line_end(file: Path, place: int) -> int:
    """The first byte after the line that the place is in."""
    with open(file, "rb") as opened:
        opened.seek(place)
        opened.readline()
        return opened.tell()


def _pieces(file: Path, start: int, stop: int) -> Iterator[str]:
    """The text between two places of a UTF-8 file in pieces of about 64 KiB, each but the last cut after white space.

    Lines may be as long as they like. Line ends of Windows become those of Unix, and a mark of byte order is dropped.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig" if start == 0 else "utf-8")()
    kept = ""
    with open(file, "rb") as opened:
        opened.seek(start)
        while (left := stop - opened.tell()) > 0:
            before = opened.tell()
            block = opened.read(min(BLOCK, left))
            if not block:
                raise ValueError(f"{file} became shorter while it was read: start again when it is written to no more.")
            try:
                kept += decoder.decode(block, final=len(block) == left)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file} is not UTF-8 text (byte {error.object[error.start]:#04x} near place "
                    f"{before + error.start}): save it as UTF-8."
                ) from error
            if "\0" in kept:
                raise ValueError(f"{file} holds zero bytes, which no UTF-8 text has: save it as UTF-8 (not UTF-16).")
            cut = max(kept.rfind("\n"), kept.rfind(" ")) + 1
            if cut:
                yield kept[:cut].replace("\r\n", "\n")
                kept = kept[cut:]
    if kept:
        yield kept.replace("\r\n", "\n")


def _reviews(file: Path, takes: Callable[[int], bool]) -> Iterator[str]:
    try:
        with lzma.open(file, "rt", encoding="utf-8", newline="\n") as opened:
            for number, line in enumerate(opened):
                if takes(number):
                    yield " ".join(json.loads(line)["text"].replace("<br />", " ").split()) + "\n"
    except (lzma.LZMAError, EOFError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged, or its lines are no JSON objects with a text ({type(error).__name__}: {error}): "
            "get it again."
        ) from error


def _file_stamp(file: Path) -> dict[str, Any]:
    crc = 0
    with open(file, "rb") as opened:
        while block := opened.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return {"bytes": file.stat().st_size, "crc32": crc}
