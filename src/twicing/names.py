"""How an unknown name is answered: with the known ones, and the nearest of them."""

from collections.abc import Iterable
from difflib import get_close_matches


def listed(name: object, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: "known are 'a', 'b'. Did you mean 'a'?"."""
    known = list(known)
    near = get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"known are {', '.join(map(repr, known)) or 'none'}.{hint}"
