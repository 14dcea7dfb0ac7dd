"""What a job consists of: kinds of parts in their order, and the bench on which they are done; one a kind of data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from twicing.experiments.parts import Part
from twicing.experiments.plan import Job, Resources

Progress = Callable[[str, float], None]


class Bench(Protocol):
    """A job's model and data. The model has its initial weights until it is trained or restored."""

    @property
    def model(self) -> nn.Module:
        """The model, on its device from the first part on."""

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
    """All that a comparison needs to know of a kind of recipe (R).

    open: makes the bench; told progress as (part, share of it).
    prepare: (R, resources, progress) reads and checks the data before any training; returns what they are, a sentence,
        or nothing.
    trial_model: R to a standard model, for trying mechanisms on; sizes that the data decide may be others.
    timed: (R, data_dir, device) to (R to a standard model, model to the loss of one step), for timing steps.
    widened: (R, number of twiced layers) to (changes of R with which standard costs as much, what they are in words).
    options: mechanism to options, where the papers' defaults for such data are other than the mechanism's own.
    parts: in their order, before the seed's other arms are looked at. last_parts: those that look at them, and so come
    after all parts of all arms. before_training: the parts that start from the initial weights; all others start from
    the trained ones, whatever was finished before.
    """

    open: Callable[[Job, Progress], Bench]
    prepare: Callable[[Any, Resources, Callable[[float], None]], str]
    trial_model: Callable[[Any], nn.Module]
    timed: Callable[[Any, Path | None, torch.device], tuple[Callable[[Any], nn.Module], Callable[[Any], Tensor]]]
    widened: Callable[[Any, int], tuple[dict[str, Any], str]]
    options: Mapping[str, Mapping[str, Any]]
    parts: Mapping[str, Kind]
    last_parts: Mapping[str, Kind]
    before_training: tuple[str, ...] = ("initialisation", "training")
