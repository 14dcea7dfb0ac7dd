"""`--set key=value` on the command line: change fields of a frozen configuration, and refuse what it does not have."""

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from twicing.names import listed

Config = TypeVar("Config")


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


SCALARS: dict[Any, typing.Callable[[str], Any]] = {int: int, float: float, str: str, bool: _flag}


def apply_settings(config: Config, settings: Iterable[str]) -> Config:
    """The configuration with each "key=value" applied; a dot reaches into a part, as in "evaluation.eps=1/16,1/8".

    A value takes the type of its field: a whole number, a number, a text, true or false, or several of one kind with
    commas between. All are applied at once, so their order does not matter.
    Raises ValueError, one sentence, for an unknown key (naming the nearest), and for a value of another type.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"a setting is key=value: got {setting!r}.")
        _collect(changes, config, key.split("."), text, key)
    return _changed(config, changes)


def settable_keys(config: object, prefix: str = "") -> dict[str, Any]:
    """All keys that apply_settings() takes, with their values; fields marked as fixed are none."""
    keys: dict[str, Any] = {}
    fixed = {field.name for field in dataclasses.fields(config) if not field.metadata.get("settable", True)}  # type: ignore[arg-type]
    fixed |= set(getattr(config, "fixed", ()))
    for name, annotation in _fields(config).items():
        if name in fixed:
            continue
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            keys |= settable_keys(value, f"{prefix}{name}.")
        elif _converter(annotation) is not None:
            keys[prefix + name] = value
    return keys


def parse_options(options: Iterable[str]) -> dict[str, Any]:
    """Mechanism options from "name=value": true and false, whole numbers, numbers, and text otherwise."""
    parsed: dict[str, Any] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or not name:
            raise ValueError(f"an option is name=value: got {option!r}.")
        parsed[name] = _literal(text)
    return parsed


def _collect(changes: dict[str, Any], config: Any, path: list[str], text: str, key: str, prefix: str = "") -> None:
    annotations = _fields(config)
    name, rest = path[0], path[1:]
    known = settable_keys(config, prefix)
    part = getattr(config, name, None)
    if name in annotations and rest and dataclasses.is_dataclass(part):
        _collect(changes.setdefault(name, {}), part, rest, text, key, f"{prefix}{name}.")
        return
    if rest or prefix + name not in known:
        raise ValueError(f"unknown key {key!r}: {listed(key, known)}")
    convert = _converter(annotations[name])
    assert convert is not None  # settable_keys() lists only what can be converted
    try:
        changes[name] = convert(text)
    except ValueError:
        raise ValueError(f"{key} takes a value like {_written(known[prefix + name])}: got {text!r}.") from None


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    # All at once: two values that fit each other need not fit what the other was before.
    new = {name: _changed(getattr(config, name), v) if isinstance(v, dict) else v for name, v in changes.items()}
    return dataclasses.replace(config, **new)


def _fields(config: object) -> dict[str, Any]:
    hints = typing.get_type_hints(type(config))
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}  # type: ignore[arg-type]


def _converter(annotation: Any) -> typing.Callable[[str], Any] | None:
    if annotation in SCALARS:
        return SCALARS[annotation]
    if typing.get_origin(annotation) is tuple and typing.get_args(annotation)[0] in SCALARS:
        of_one = typing.get_args(annotation)[0]
        return lambda text: tuple(of_one(item.strip()) for item in text.split(","))
    return None


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _literal(text: str) -> Any:
    if text in ("true", "True", "false", "False"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
