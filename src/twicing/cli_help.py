"""Help that reads as prose: paragraphs joined and wrapped anew, and words where tyro would show types."""

import dataclasses
import inspect
import io
import operator
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro
from docstring_parser import parse_from_object

SUBCOMMANDS = "subcommands"
WIDTH = 80
# What stands for a value of a type; a text is called by the name of its option.
WORDS: dict[Any, str] = {int: "N", float: "SECONDS", Path: "PATH"}
# Where the option's name is no name of its value.
NAMES = {"convert": "MECHANISM", "only": "NAME", "layers": "LAYERS", "eps": "EPS"}
# Defaults that say no more than the sentence before them.
UNSAID = ("", "''", "None")
# tyro breaks lines at commas; in place of those inside a word, as in 1,2,3, it gets a character of no meaning.
COMMA = "\ue000"
STYLES = re.compile(r"\x1b\[[0-9;]*m")


def subcommands(commands: Mapping[str, type], asked: Sequence[str]) -> Any:
    """The union of commands by name, for tyro.cli; a field's metadata may name its own under SUBCOMMANDS.

    asked: what was typed. A command that it names describes itself at length, the others in one sentence.
    """
    return reduce(
        operator.or_,
        (
            Annotated[
                _in_words(options, asked),
                tyro.conf.subcommand(name, description=_description(options, whole=name in asked[:2])),
            ]
            for name, options in commands.items()
        ),
    )


class Wrapped(io.TextIOBase):
    """A stream for tyro to print to: it breaks long lines of paragraphs between words, and passes boxes on."""

    def __init__(self, stream: TextIO):
        self._stream, self._begun = stream, ""
        self._width = min(shutil.get_terminal_size().columns, WIDTH)

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read-only in Python as well
        """The encoding of the stream below, by which tyro chooses how to draw boxes."""
        return self._stream.encoding

    def write(self, text: str) -> int:
        """Pass on the lines that are whole, the long ones broken."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            # Where a default is not said and the line before is full, tyro leaves a line without words.
            if STYLES.sub("", line).strip("│ ") or not line:
                self._stream.write(f"{self._broken(line.replace(COMMA, ','))}\n")
        return len(text)

    def isatty(self) -> bool:
        """Whether the stream below shows colours."""
        return self._stream.isatty()

    def flush(self) -> None:
        """Flush the stream below."""
        self._stream.flush()

    def _broken(self, line: str) -> str:
        if len(line) <= self._width or not line[0].isalnum():
            return line
        # A command that was broken can be pasted as it stands.
        typed = line.startswith("Example:")
        lines = textwrap.wrap(
            line,
            self._width - 2 * typed,
            subsequent_indent="    " if typed else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        return (" \\\n" if typed else "\n").join(lines)


def _description(options: type, *, whole: bool) -> str:
    paragraphs = [" ".join(one.split()) for one in (inspect.getdoc(options) or "").split("\n\n")]
    return "\n\n".join(paragraphs) if whole else paragraphs[0]


def _in_words(options: type, asked: Sequence[str]) -> type:
    """A subclass whose fields tell tyro their help, and what their values are called."""
    hints = typing.get_type_hints(options, include_extras=True)
    told = {one.arg_name: one.description for one in parse_from_object(options).params}
    annotations: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        if SUBCOMMANDS in field.metadata:
            annotations[field.name] = subcommands(field.metadata[SUBCOMMANDS], asked)
            continue
        hint, said = hints[field.name], told.get(field.name)
        words: dict[str, Any] = {"metavar": _metavar(field.name, hint), "help_behavior_hint": _default}
        if said is not None:
            words["help"] = re.sub(r",(?=\S)", COMMA, " ".join(said.split()))
        annotations[field.name] = Annotated[hint, tyro.conf.arg(**{k: v for k, v in words.items() if v})]
    return type(
        options.__name__,
        (options,),
        {"__annotations__": annotations, "__module__": options.__module__, "__doc__": options.__doc__},
    )


def _default(label: str) -> str:
    return "" if label in UNSAID else f"(default: {label})"


def _metavar(name: str, hint: Any) -> str | None:
    """What stands for an option's value, as "MECHANISM ..."; None for a flag, and where tyro takes the field's name."""
    metadata: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *rest = typing.get_args(hint)
        metadata = tuple(rest)
    if hint is bool or (tyro.conf.Positional in metadata and typing.get_origin(hint) is not tuple):
        return None
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    several = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if several else hint
    own = next((one.metavar for one in metadata if getattr(one, "metavar", None)), None)
    word = name.rpartition("_")[2].upper()
    single = NAMES.get(name, word.removesuffix("S") if several else word)
    return (own or WORDS.get(kind, single)) + (" ..." if several else "")
