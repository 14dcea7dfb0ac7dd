"""Names in messages: an unknown one is answered with the nearest, then with all; of many, the first are named."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

FEWEST_LETTERS = 3


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that was probably meant; None where none is near.

    Of names with dots, as in evaluation.eps, the last part alone is enough to be found by; so is a beginning that no
    other name has.
    """
    whole = list(known)
    by_last_part = {one.rpartition(".")[2]: one for one in reversed(whole)}
    if str(name) in by_last_part:
        return by_last_part[str(name)]
    for found in (get_close_matches(str(name), whole, n=1), get_close_matches(str(name), by_last_part, n=1)):
        if found:
            return found[0] if found[0] in whole else by_last_part[found[0]]
    begun = [one for one in whole if len(str(name)) >= FEWEST_LETTERS and one.startswith(str(name))]
    return begun[0] if len(begun) == 1 else None


def listed(name: object, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: "did you mean 'a'? Known are 'a', 'b'."."""
    known = list(known)
    near = nearest(name, known)
    hint = "known are" if near is None else f"did you mean {near!r}? Known are"
    return f"{hint} {', '.join(map(repr, known)) or 'none'}."


def few(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
