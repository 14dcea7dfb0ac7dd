"""A vision transformer of timm as a case: the one that `twicing evaluate` would take, and its fresh weights."""

import dataclasses

from torch import nn

from twicing.adapters.site import AttentionSite
from twicing.adapters.surgery import find_sites
from twicing.experiments.cases.case import Case, drawn, follow
from twicing.experiments.cases.inputs import Wanted, picture_inputs
from twicing.experiments.evaluate.options import Evaluate
from twicing.experiments.evaluate.pretrained import timm_subject
from twicing.experiments.evaluate.subjects import Subject
from twicing.models.vision import PixelModel
from twicing.training.settings import parse_options


def timm_case(asked: Evaluate, wanted: Wanted, purpose: str) -> Case:
    """The model of timm that is asked for, with its pictures. purpose: what for, as in "to diagnose".

    Raises ValueError for an unknown name, or where arguments, weights or the mechanism do not fit.
    """
    if parse_options(asked.model_args).get("in_chans", 3) != 3:
        raise ValueError("pictures have three colours: leave in_chans out of --model-args.")
    subject = _subject(asked, purpose)
    plain = Evaluate(asked.model, model_args=asked.model_args)

    def draw(seed: int) -> nn.Module:
        model = _subject(dataclasses.replace(plain, seed=seed), purpose).build()
        # A checkpoint of ours may have brought its conversion along.
        drawn(seed, lambda: follow(model, subject.build()))
        return model.eval()

    if not _sites(subject, asked.model):
        raise ValueError(f"{asked.model} has no attention layers that the library knows: there is nothing {purpose}.")
    inputs = picture_inputs(wanted, subject.image_size)
    return Case(
        label=subject.label,
        seed=None,
        mechanism=subject.mechanism,
        layers=subject.layers,
        weights=subject.weights,
        folder_name=subject.folder_name,
        build=subject.build,
        draw=draw,
        inputs=lambda: inputs,
    )


def _sites(subject: Subject, name: str) -> list[AttentionSite]:
    try:
        return find_sites(subject.build())
    except ValueError as error:
        # The class around timm's model is ours: whoever typed a name knows that alone.
        raise ValueError(str(error).replace(PixelModel.__name__, name)) from error


def _subject(options: Evaluate, purpose: str) -> Subject:
    try:
        return timm_subject(options)
    except ValueError as error:
        # Its sentences name the option of `twicing evaluate`, and do not know folders of transformers.
        sentence = str(error).replace("--mechanism", "--convert").replace("to evaluate", purpose)
        raise ValueError(
            sentence.replace("neither a run folder (with a config.json) nor", "neither a folder nor")
        ) from error
