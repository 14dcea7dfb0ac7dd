"""The options of a mechanism: checked against its constructor, filled with its defaults, and such as JSON can hold."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from twicing.mechanisms.registry import Factory
from twicing.names import listed

# factory(layer, num_heads, head_dim, **options)
_POSITIONAL = 3
_FORWARD_OPTIONS = ("attn_mask", "is_causal", "scale", "dropout_p", "enable_gqa")


def complete_options(factory: Factory, name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options with the constructor's defaults filled in, so that a record of them names the formula in full.

    name: how messages call the mechanism.
    Raises ValueError for an unknown or missing option, TypeError for a value that JSON cannot hold.
    """
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options must be a dict, such as {{'gain': 0.5}}: got {options!r}.")
    given = dict(options or {})
    for key, option in given.items():
        if not is_json(option):
            raise TypeError(
                f"The option {key!r} of {name!r} must be a JSON value (a finite number, a string, true, false, null, "
                f"or lists and dicts of these), so that a checkpoint can hold it: got {option!r}."
            )
    parameters = list(inspect.signature(factory).parameters.values())
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {
        parameter.name: parameter.default
        for parameter in parameters[_POSITIONAL:]
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }
    for key in given:
        if key not in named and not takes_any:
            raise ValueError(f"Unknown option {key!r} of the mechanism {name!r}: {listed(key, named)}")
    missing = [key for key, default in named.items() if default is inspect.Parameter.empty and key not in given]
    if missing:
        raise ValueError(f"The mechanism {name!r} needs the options {missing}: pass options={{{missing[0]!r}: ...}}.")
    # In the constructor's order, so that equal options print alike.
    defaults = {key: default for key, default in named.items() if key in given or is_json(default)}
    return {**defaults, **given}


def build(factory: Factory, name: str, options: Mapping[str, Any], layer: int, heads: int, width: int) -> nn.Module:
    """One layer's mechanism, factory(layer, heads, width, **options), checked to be a module that can be called as one.

    Raises TypeError where it is no module, or where its forward() does not take what hosts pass.
    """
    mechanism = factory(layer, heads, width, **options)
    if not isinstance(mechanism, nn.Module):
        raise TypeError(
            f"The mechanism {name!r} must build a torch.nn.Module: for layer {layer} it built a "
            f"{type(mechanism).__name__}."
        )
    try:
        inspect.signature(mechanism.forward).bind(None, None, None, **dict.fromkeys((*_FORWARD_OPTIONS, "context")))
    except TypeError as error:
        raise TypeError(
            f"The forward() of the mechanism {name!r} must take (query, key, value, *, "
            f"{', '.join(_FORWARD_OPTIONS)}, context): {error}."
        ) from error
    return mechanism


def is_json(entry: object) -> bool:
    """Whether JSON can hold it and give it back unchanged."""
    if entry is None or isinstance(entry, (str, bool, int)):
        return True
    if isinstance(entry, float):
        return math.isfinite(entry)
    if isinstance(entry, list):
        return all(is_json(item) for item in entry)
    if isinstance(entry, dict):
        return all(isinstance(key, str) and is_json(item) for key, item in entry.items())
    return False
