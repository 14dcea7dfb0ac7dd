"""A value that is missing, or of another kind than its option takes, is answered in one sentence.

tyro says the same in a box of many lines, and says it of Python's types.
"""

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from docstring_parser import parse_from_object
from tyro.conf import Positional

from twicing.cli_unknown import typed_command

# A value, and several values, of a kind; what is not here is a text, and every word is one.
KINDS = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers")}


def wrong_value(commands: Mapping[str, type], given: Sequence[str], parts: Mapping[str, Mapping[str, type]]) -> str:
    """Why tyro refused what was typed, in one sentence; empty where it is for another reason than a value.

    Asked after tyro's refusal, so that a word which is read here in another way than by tyro refuses nothing.
    parts: the commands of a command, as bench has them.
    """
    if given[0].startswith("-"):
        return f"a command comes before its options: got {given[0]!r} first. See twicing --help."
    name, command, words = typed_command(commands, given, parts)
    see = f"See twicing {name} --help."
    if name in parts:
        return f"{name} needs to be told what: {', '.join(parts[name])}. {see}"
    alone: list[str] = []
    for option, kind, several, values in _options(command, words):
        taken = values if several else values[: kind is not bool]
        alone += values[len(taken) :]
        expected = _expected(kind, several)
        if not taken and kind is not bool:
            return f"{option} takes {expected}: got nothing. {see}"
        wrong = [value for value in taken if kind in KINDS and not _is_one(kind, value)]
        if wrong:
            return f"{option} takes {expected}: got {wrong[0]!r}. {see}"
    needed = _positional(command)
    return f"{name} needs {needed}. {see}" if needed and not alone else ""


def empty_list(commands: Mapping[str, type], given: Sequence[str], parts: Mapping[str, Mapping[str, type]]) -> str:
    """Which option for several values has none, in one sentence; empty where there is no such option.

    To tyro it is an empty list, which commands understand as "all", as "the default" or as "none". Whoever types it
    has forgotten something, or has a variable of the shell that is empty.
    """
    name, command, words = typed_command(commands, given, parts)
    for option, kind, several, values in _options(command, words):
        if several and not values:
            return f"{option} takes {_expected(kind, several)}: got nothing. See twicing {name} --help."
    return ""


def _options(command: type, words: Sequence[str]) -> Iterator[tuple[str, Any, bool, list[str]]]:
    """Each option with the kind of its values, whether it takes several, and the words up to the next option."""
    hints = typing.get_type_hints(command, include_extras=True)
    for option, values in _by_option(words):
        yield option, *_kind(hints.get(option.removeprefix("--").replace("-", "_"), bool)), values


def _by_option(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each option with the words up to the next one; first the words before any option, under an empty name."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        # -1 is a number.
        if re.match(r"--?[a-zA-Z]", word):
            option, equals, value = word.partition("=")
            found.append((option, [value] if equals else []))
        else:
            found[-1][1].append(word)
    return found


def _kind(hint: Any) -> tuple[Any, bool]:
    """What one value is, and whether the option takes several: int and True of tuple[int, ...]."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = hint.__origin__
    kinds = [one for one in typing.get_args(hint) if one is not type(None)] or [hint]
    return kinds[0], typing.get_origin(hint) is tuple


def _expected(kind: Any, several: bool) -> str:
    return KINDS.get(kind, ("a value", "values"))[several]


def _is_one(kind: Any, value: str) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True


def _positional(command: type) -> str:
    """What has to be typed after the command's name: MODEL and its help; empty where nothing has to."""
    hints = typing.get_type_hints(command, include_extras=True)
    told = {one.arg_name: one.description or "" for one in parse_from_object(command).params}
    for field in dataclasses.fields(command):
        marked = Positional in getattr(hints[field.name], "__metadata__", ())
        if marked and field.default is dataclasses.MISSING:
            said = " ".join(told[field.name].split()).rstrip(".")
            return f"{field.name.upper()}: {said[:1].lower()}{said[1:]}"
    return ""
