"""What a job consists of: kinds of parts in their order, and the bench on which they are done; one a kind of data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from twicing.experiments.parts import Part
from twicing.experiments.plan import Job

Progress = Callable[[str, float], None]


class Bench(Protocol):
    """A job's model and data. The model has its initial weights until it is trained or restored."""

    model: nn.Module

    def train(self) -> Part:
        """Train, or go on training."""

    def restore(self) -> None:
        """Load the trained weights. Raises ValueError where they are missing, damaged, or of another formula."""

    def examples(self) -> dict[str, Any]:
        """What each finished part keeps about its examples: "index" and "probes" (see results.Correctness)."""


def always(_job: Job) -> bool:
    """Every job has the part."""
    return True


@dataclass(frozen=True)
class Kind:
    """One kind of part. percent: its share of a job's time. applies: to which jobs."""

    run: Callable[[Any], Part]
    percent: int
    applies: Callable[[Job], bool] = always


@dataclass(frozen=True)
class Programme:
    """open: makes the bench; told progress as (part, share of it). parts: before the seed's other arms are looked at.

    last_parts: those that look at them, and so come after all parts of all arms. before_training: the parts that
    start from the initial weights; all others start from the trained ones, whatever was finished before.
    """

    open: Callable[[Job, Progress], Bench]
    parts: Mapping[str, Kind]
    last_parts: Mapping[str, Kind]
    before_training: tuple[str, ...] = ("initialisation", "training")
