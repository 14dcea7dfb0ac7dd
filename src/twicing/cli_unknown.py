"""A misspelt command or option is answered in one sentence, with the nearest one of the same command."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tyro.conf import Positional

from twicing.names import listed, nearest


class Typed(NamedTuple):
    """A command as it was typed: its name, as in "bench ops", the class of its options, and the words after it."""

    name: str
    options: type
    words: Sequence[str]


def typed_command(commands: Mapping[str, type], given: Sequence[str], parts: Mapping[str, Mapping[str, type]]) -> Typed:
    """The command that `given`, whose first word is a known one, begins with. parts: as for unknown_word()."""
    name, *words = given
    if name in parts and words and words[0] in parts[name]:
        return Typed(f"{name} {words[0]}", parts[name][words[0]], words[1:])
    return Typed(name, commands[name], words)


def unknown_word(commands: Mapping[str, type], given: Sequence[str], parts: Mapping[str, Mapping[str, type]]) -> str:
    """What is wrong with the command or the options that were typed, in one sentence; empty where nothing is.

    parts: the commands of a command, as bench has them. Values are not looked at.
    """
    if given[0].startswith("-"):
        return ""
    if given[0] not in commands:
        return f"unknown command {given[0]!r}: {listed(given[0], commands)}"
    name, options, words = typed_command(commands, given, parts)
    if name in parts and words and not words[0].startswith("-"):
        return f"{name} has no {words[0]!r}: {listed(words[0], parts[name])}"
    known = _options(options)
    for word in words:
        option, equals, _ = word.partition("=")
        spelt = option.removeprefix("--").replace("_", "-")
        if not option.startswith("--") or spelt == "help":
            continue
        if spelt not in known:
            near = nearest(spelt, known)
            hint = f"did you mean --{near}?" if near else f"see twicing {name} --help."
            return f"{name} has no option {option}: {hint}"
        if equals and known[spelt] is bool:
            return f"{option} takes no value: leave out {word.removeprefix(option)!r}. See twicing {name} --help."
    return ""


def _options(command: type) -> dict[str, Any]:
    """The options of a command as they are typed, without the dashes, and the types of their values."""
    hints = typing.get_type_hints(command, include_extras=True)
    known: dict[str, Any] = {}
    for field in dataclasses.fields(command):
        name, hint = field.name.replace("_", "-"), hints[field.name]
        if Positional not in getattr(hint, "__metadata__", ()):
            known |= {name: hint, f"no-{name}": hint} if hint is bool else {name: hint}
    return known
