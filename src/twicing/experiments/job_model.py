"""What is done to a job's model of images and of text alike: it gets its mechanism, and its tokens are measured."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from twicing.analysis.layer_similarity import layer_similarity
from twicing.experiments.parts import Finding, Part
from twicing.experiments.plan import Job
from twicing.experiments.results import BASELINE
from twicing.training.streams import MECHANISM_STREAM, stream_seed

Model = TypeVar("Model", bound=nn.Module)


def with_mechanism(job: Job, model: Model, draw_seed: int, baseline: str = BASELINE) -> Model:
    """The model, in place, as the job's arm has it. Weights that a mechanism brings come from a stream of their own.

    baseline: as of Arm.apply().
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(draw_seed, MECHANISM_STREAM, 0))
        job.arm.apply(model, baseline)
    return model


def has_sites(job: Job) -> bool:
    """Whether the model has layers to measure: where a block attends twice, no output is that of a layer."""
    return job.recipe.attention_passes == 1


def similarity_of(model: nn.Module, inputs: Tensor, when: str) -> Part:
    """Similarity and rank of tokens, by layer; when: "initialisation" or "trained"."""
    found = layer_similarity(model, inputs)
    return Part(
        [
            Finding(metric, value, len(inputs), {"layer": layer, "where": where, "when": when})
            for (where, metric), values in found.items()
            for layer, value in enumerate(values.tolist(), start=1)
        ]
    )
