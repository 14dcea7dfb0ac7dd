"""Mechanisms by name: the registered ones, and anyone's own by import path, "package.file:Class"."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from twicing.names import listed

# Called as factory(layer, num_heads, head_dim, **options); a subclass of Mechanism is one.
Factory = Callable[..., nn.Module]
F = TypeVar("F", bound=Factory)

_registered: dict[str, Factory] = {}


def register(name: str) -> Callable[[F], F]:
    """Make a mechanism known by a short name: `@register("mine")` above the class, or `register("mine")(factory)`.

    Raises ValueError where the name is taken by another one, or contains a colon, which marks an import path.
    """
    if not name or ":" in name:
        raise ValueError(f"The name of a mechanism must not be empty or contain a colon: got {name!r}.")

    def add(factory: F) -> F:
        taken = _registered.get(name)
        # Running a notebook cell or reloading a module again registers the same thing again.
        if taken is not None and import_path(taken) != import_path(factory):
            raise ValueError(
                f"The mechanism {name!r} is already registered, as {import_path(taken)}: take another name."
            )
        _registered[name] = factory
        return factory

    return add


def known_mechanisms() -> list[str]:
    """The registered names, in alphabetical order."""
    return sorted(_registered)


def find_mechanism(name: str) -> Factory:
    """The factory of a registered name, or of an import path "package.file:Class".

    Raises ValueError, saying what is missing, with the known names and the nearest of them.
    """
    if not isinstance(name, str):
        raise TypeError(f"A mechanism's name must be a string: got {name!r}, a {type(name).__name__}.")
    if ":" in name:
        return _imported(name)
    if name not in _registered:
        raise ValueError(
            f"Unknown mechanism {name!r}: {listed(name, known_mechanisms())} "
            "Your own goes by its import path, 'package.file:Class'."
        )
    return _registered[name]


def name_of(factory: Factory) -> str | None:
    """The name under which find_mechanism() finds the factory, or None (a lambda, a function within a function)."""
    for name, known in _registered.items():
        if known is factory:
            return name
    path = import_path(factory)
    try:
        return path if find_mechanism(path) is factory else None
    except ValueError:
        return None


def import_path(factory: Factory) -> str:
    """Where the factory was defined, "package.file:Class"; a partial or an instance is shown as Python shows it."""
    module, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", None)
    return f"{module}:{name}" if module and name else repr(factory)


def _imported(path: str) -> Factory:
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise ValueError(f"An import path of a mechanism looks like 'package.file:Class': got {path!r}.")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that is there but needs another one that is missing is a different mistake, and says so itself.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"The mechanism {path!r} was not found: there is no module {error.name!r} on Python's path "
            "(PYTHONPATH=. adds the current folder)."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name, entry in vars(found).items() if _is_module_class(entry)]
            raise ValueError(
                f"The mechanism {path!r} was not found: {module_name!r} has no module {attribute!r}: "
                f"{listed(attribute, names)}"
            )
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module) or (inspect.isclass(found) and not _is_module_class(found)):
        raise ValueError(
            f"{path!r} is no mechanism: expected a subclass of torch.nn.Module, or a function "
            f"(layer, num_heads, head_dim) that returns a module, and got {found!r}."
        )
    return found


def _is_module_class(entry: object) -> bool:
    return inspect.isclass(entry) and issubclass(entry, nn.Module)
