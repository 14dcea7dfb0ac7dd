"""Sentences on the terminal."""

from rich.console import Console


def tell(console: Console, sentence: str) -> None:
    """Print a sentence as it is: brackets are no markup, and a path can be copied, as no line break is put into it."""
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)
