"""Text for language models: a file, Python's own documentation, or what a run held out, cut into windows.

Windows are full, so that no padding enters what is measured.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from twicing.experiments.cases.inputs import ONE_SOURCE, WINDOWS, Inputs, Wanted

# Ids of the windows of a text, special tokens included, each of as many tokens but the last.
Cut = Callable[[str, int], Sequence[Sequence[int]]]

DOCUMENTATION = "Python's documentation of its own language, as no --text was given"
# With fewer there is hardly a matrix to look at.
FEWEST_TOKENS = 8
# A tokenizer need not see a whole library for a few windows.
CHARACTERS_PER_TOKEN = 64


def read_text(path: Path | None) -> tuple[str, str, str]:
    """The text, what it is in words, and a name for it. Raises ValueError where the file cannot be read as UTF-8."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics)), DOCUMENTATION, "Python's documentation"
    if not path.is_file():
        raise ValueError(f"--text {path} is no file: give a text in UTF-8.")
    try:
        return path.read_text(encoding="utf-8"), f"the text {path}", str(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8 ({error.reason}): convert it, or give another text.") from error


def window_inputs(wanted: Wanted, cut: Cut) -> Inputs:
    """So many windows of the text that is wanted, evenly spaced over it.

    Raises ValueError where the text is too short for two windows.
    """
    text, words, name = read_text(wanted.text)
    count, tokens = wanted.count, wanted.tokens
    # Evenly spaced pieces, so that a long text is not tokenised as a whole.
    share = CHARACTERS_PER_TOKEN * tokens
    if len(text) > count * share:
        text = "\n".join(text[start : start + share] for start in range(0, len(text) - share, len(text) // count))
    full = torch.tensor([list(window) for window in cut(text, tokens) if len(window) == tokens])
    return _spread(full, name, words, count=count, tokens=tokens)


def stream_inputs(stream: Tensor, name: str, *, count: int, tokens: int) -> Inputs:
    """So many windows of the held-out part of a text in numbers, [n], evenly spaced over it.

    Raises ValueError where it is too short for two windows.
    """
    full = stream[: len(stream) // tokens * tokens].view(-1, tokens).long()
    return _spread(full, name, f"the part of {name} that was held out from training", count=count, tokens=tokens)


def _spread(full: Tensor, name: str, words: str, *, count: int, tokens: int) -> Inputs:
    if len(full) < 2:
        raise ValueError(
            f"{name} gives too few windows of {tokens} tokens ({len(full)}): a band over inputs needs 2 or more. Give "
            "a longer text, or fewer --tokens."
        )
    count = min(count, len(full))
    ids = full[[place * len(full) // count for place in range(count)]]
    return Inputs(
        count,
        f"{count} windows of {tokens} tokens from {words}",
        ONE_SOURCE.format("one text"),
        lambda wanted: ids[list(wanted)],
        unit=WINDOWS,
        sorted=True,
    )
