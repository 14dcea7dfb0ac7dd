"""Which layers are meant: "all", "10-12", "last-3", "1,4,7-9", 5 or [10, 11], counted from 1 as the papers count."""

import re

Layers = str | int | list[int] | tuple[int, ...] | range
_EXPECTED = "'all', a range such as '10-12', 'first-3', 'last-3', '1,4,7-9', a number or a list of numbers"


def chosen_layers(layers: Layers, count: int) -> list[int]:
    """The layer numbers in ascending order, each between 1 and count.

    Raises TypeError or ValueError where they are empty, named twice, out of range, or not understood.
    """
    numbers = _numbers(layers, count)
    if not numbers:
        raise ValueError(f"No layers are given: layers is {layers!r}; expected {_EXPECTED}.")
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise ValueError(f"A layer is to be named once: layers={layers!r} names {_listed(twice)} more than once.")
    outside = [number for number in numbers if not 1 <= number <= count]
    if outside:
        raise ValueError(
            f"layers={layers!r} is out of range: the model has {count} attention layers, counted from 1 to {count}; "
            f"got {_listed(outside)}."
        )
    return sorted(numbers)


def _numbers(layers: Layers, count: int) -> list[int]:
    if isinstance(layers, str):
        return [number for part in layers.split(",") for number in _part(part.strip(), layers, count)]
    if isinstance(layers, int) and not isinstance(layers, bool):
        return [layers]
    if isinstance(layers, (list, tuple, range)) and all(isinstance(n, int) and not isinstance(n, bool) for n in layers):
        return list(layers)
    raise TypeError(f"layers must be {_EXPECTED}: got {layers!r}.")


def _part(part: str, layers: str, count: int) -> list[int]:
    if part == "all":
        return list(range(1, count + 1))
    if re.fullmatch(r"\d+", part):
        return [int(part)]
    if match := re.fullmatch(r"(first|last)-(\d+)", part):
        size = int(match[2])
        return list(range(1, size + 1)) if match[1] == "first" else list(range(count - size + 1, count + 1))
    if match := re.fullmatch(r"(\d+)-(\d+)", part):
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise ValueError(f"layers={layers!r} runs backwards: write '{last}-{first}'.")
        return list(range(first, last + 1))
    raise ValueError(f"layers={layers!r} was not understood: expected {_EXPECTED}.")


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown if len(numbers) <= 5 else f"{shown}, ..."
