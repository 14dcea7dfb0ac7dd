"""What an experiment on the theory is: it measures, it claims what the numbers show, and it draws them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twicing.experiments.curves import Picture

# Whose statement it is, in the words of the page.
STATED = "as stated"
OUR_READING = "our reading"
LIMIT = "a limit of the theory"
OWN = "our addition"
TWICING = "2503.00687"
FILTERING = "2506.10371"


@dataclass(frozen=True)
class Claim:
    """One statement and what was measured.

    source: paper and place. reading: as stated, our reading, a limit of the theory, or our addition.
    measured: the numbers, in words. holds: whether they fit the statement, decided by a comparison that can fail.
    """

    statement: str
    source: str
    reading: str
    measured: str
    holds: bool


def yes(fact: bool) -> str:
    """The word for it."""
    return "yes" if fact else "no"


@dataclass(frozen=True)
class Experiment:
    """One question to the theory.

    about: what is computed and how, a few sentences for the page. measure: seed -> a frozen dataclass of numbers.
    claims and picture: what that dataclass shows, in words and as a figure.
    """

    name: str
    title: str
    about: str
    measure: Callable[[int], Any]
    claims: Callable[[Any], tuple[Claim, ...]]
    picture: Callable[[Any], Picture]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y against log x by least squares: the exponent of a power law."""
    return float(np.polyfit(np.log(np.asarray(x)), np.log(np.asarray(y)), 1)[0])
