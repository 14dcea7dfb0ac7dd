"""A misspelt command or option is answered in one sentence, with the nearest one of the same command."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence

from tyro.conf import Positional

from twicing.names import listed, nearest


def unknown_word(commands: Mapping[str, type], given: Sequence[str], parts: Mapping[str, Mapping[str, type]]) -> str:
    """What is wrong with the command or the options that were typed, in one sentence; empty where nothing is.

    parts: the commands of a command, as bench has them. Values are not looked at.
    """
    if not given or given[0].startswith("-"):
        return ""
    name, rest = given[0], given[1:]
    if name not in commands:
        return f"unknown command {name!r}: {listed(name, commands)}"
    options = commands[name]
    if name in parts and rest and not rest[0].startswith("-"):
        if rest[0] not in parts[name]:
            return f"{name} has no {rest[0]!r}: {listed(rest[0], parts[name])}"
        options, name, rest = parts[name][rest[0]], f"{name} {rest[0]}", rest[1:]
    known = _options(options)
    for word in rest:
        option = word.partition("=")[0]
        spelt = option.removeprefix("--").replace("_", "-")
        if option.startswith("--") and spelt not in [*known, "help"]:
            near = nearest(spelt, known)
            hint = f"did you mean --{near}?" if near else f"see twicing {name} --help."
            return f"{name} has no option {option}: {hint}"
    return ""


def _options(command: type) -> list[str]:
    """The options of a command as they are typed, without the dashes."""
    hints = typing.get_type_hints(command, include_extras=True)
    known = []
    for field in dataclasses.fields(command):
        name, hint = field.name.replace("_", "-"), hints[field.name]
        if Positional not in getattr(hint, "__metadata__", ()):
            known += [name, f"no-{name}"] if hint is bool else [name]
    return known
