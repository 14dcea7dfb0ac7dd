"""The trained models of a run folder, each against initialisations that its recipe draws, on what was held out."""

from pathlib import Path

from torch import nn

from twicing.adapters.surgery import find_sites
from twicing.experiments.diagnose.cases import Case, refuse
from twicing.experiments.diagnose.inputs import Inputs, held_out_inputs
from twicing.experiments.diagnose.options import Diagnose
from twicing.experiments.diagnose.windows import stream_inputs
from twicing.experiments.evaluate.subjects import HeldOut
from twicing.experiments.evaluate.weights import fingerprint
from twicing.experiments.language_job import converted_language_model
from twicing.experiments.plan import Job
from twicing.experiments.trained import trained_jobs
from twicing.experiments.vision_job import converted_model
from twicing.names import listed
from twicing.training.checkpoint import CHECKPOINT
from twicing.training.choice import balanced_order
from twicing.training.classification import load_trained
from twicing.training.language_data import load_text
from twicing.training.language_recipe import LanguageRecipe
from twicing.training.split import load_split

OF_OTHERS = ("images", "text", "tokens", "checkpoint", "pretrained", "convert", "layers", "options", "model_args")
SHOWN = 6


def run_folder_cases(run: Path, options: Diagnose) -> tuple[list[Case], list[str]]:
    """The arms and seeds that the options name, and what is left out, in sentences.

    Raises ValueError for an unknown arm or seed, a folder of something else, or one without a trained model.
    """
    refuse(options, OF_OTHERS, "a run folder, whose models have weights, mechanisms and held-out data of their own")
    jobs, untrained = trained_jobs(run, options.data_dir)
    notes = [f"Not trained yet, and left out: {_few(untrained)}."] if untrained else []
    labels = list(dict.fromkeys(job.arm.label for job in jobs))
    seeds = sorted({job.seed for job in jobs})
    for label in options.arms:
        if label not in labels:
            raise ValueError(f"{run} has no trained arm {label!r}: {listed(label, labels)}")
    for seed in options.seeds:
        if seed not in seeds:
            raise ValueError(f"{run} has no trained seed {seed}: it has {', '.join(map(str, seeds))}.")
    wanted = options.seeds or seeds[:1]
    if not options.seeds and len(seeds) > 1:
        notes.append(f"Only seed {seeds[0]} is shown: the run has {_few(list(map(str, seeds)))}, see --seeds.")
    cases = []
    for job in jobs:
        if job.seed not in wanted or (options.arms and job.arm.label not in options.arms):
            continue
        reason = _hidden(job)
        if reason:
            notes.append(f"{job.name} is left out: {reason}")
        else:
            cases.append(_case(job, options.inputs))
    if not cases:
        raise ValueError(f"nothing is left to diagnose in {run}. {' '.join(notes)}")
    return cases, notes


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _hidden(job: Job) -> str:
    """Why the job's model cannot be looked into, or nothing."""
    if job.recipe.attention_passes > 1:
        return "its blocks attend twice, so that the attention of a layer has no meaning."
    model = _drawn(job, 0)
    try:
        find_sites(model)
    except ValueError as error:
        return str(error)
    return ""


def _drawn(job: Job, seed: int) -> nn.Module:
    """The job's model before training, its weights drawn from the seed."""
    if not isinstance(job.recipe, LanguageRecipe):
        return converted_model(job, seed)
    return converted_language_model(job, seed, len(load_text(job.recipe, _cache(job)).vocabulary))


def _case(job: Job, count: int) -> Case:
    draw_seed = job.seed + job.arm.seed_offset

    def build() -> nn.Module:
        model = _drawn(job, draw_seed)
        load_trained(model, draw_seed, job.folder)
        return model.eval()

    return Case(
        label=job.arm.label,
        seed=job.seed,
        mechanism=job.arm.mechanism,
        layers=job.arm.layers,
        weights=f"{CHECKPOINT} {fingerprint(job.folder / CHECKPOINT)}",
        folder_name=job.folder.name,
        build=build,
        draw=lambda seed: _drawn(job, seed).eval(),
        inputs=lambda: _inputs(job, count),
    )


def _inputs(job: Job, count: int) -> Inputs:
    if isinstance(job.recipe, LanguageRecipe):
        corpus = load_text(job.recipe, _cache(job))
        return stream_inputs(corpus.test, corpus.name, count=count, tokens=job.recipe.length)
    split = load_split(job.recipe, job.seed, job.resources.data_dir, job.resources.cache)
    return held_out_inputs(HeldOut(split.test, split.test_index, balanced_order(split.test.labels)), count)


def _cache(job: Job) -> Path:
    assert job.resources.cache is not None  # trained_jobs() says where
    return job.resources.cache
