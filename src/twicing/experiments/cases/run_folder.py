"""The trained models of a run folder as cases: what they have learned, what their recipe draws, what was held out."""

from pathlib import Path

from torch import Tensor, nn

from twicing.adapters.surgery import find_sites
from twicing.experiments.cases.case import Case
from twicing.experiments.cases.inputs import Inputs, held_out_inputs
from twicing.experiments.cases.windows import stream_inputs
from twicing.experiments.evaluate.subjects import HeldOut
from twicing.experiments.evaluate.weights import fingerprint
from twicing.experiments.language_job import converted_language_model
from twicing.experiments.plan import Job
from twicing.experiments.vision_job import converted_model
from twicing.models.language import LanguageModel
from twicing.training.checkpoint import CHECKPOINT
from twicing.training.choice import balanced_order
from twicing.training.classification import load_trained
from twicing.training.language_data import load_text
from twicing.training.language_recipe import LanguageRecipe
from twicing.training.split import load_split

# Options that a run folder has no use for, and why.
OF_OTHERS = ("images", "text", "tokens", "checkpoint", "pretrained", "convert", "layers", "options", "model_args")
OWN = "is a run folder, whose models have weights, mechanisms and held-out data of their own"


class NextWord(nn.Module):
    """A language model as what it says comes next: windows, [B, N], to log p of every word, [B, V]."""

    def __init__(self, network: LanguageModel):
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [B, N], whole numbers."""
        last = self.network(tokens)[:, -1]
        return self.network.softmax.log_probabilities(last, self.network.embedding.weight)


def job_case(job: Job, count: int, *, answers: bool) -> Case:
    """The job's model with so many inputs that its seed held out. answers: whether a language model says the next word.

    Nothing is read yet. See hidden() for models that cannot be looked into.
    """
    draw_seed = job.seed + job.arm.seed_offset

    def build() -> nn.Module:
        model = _drawn(job, draw_seed)
        load_trained(model, draw_seed, job.folder)
        return answering(model).eval()

    def answering(model: nn.Module) -> nn.Module:
        return NextWord(model) if answers and isinstance(model, LanguageModel) else model

    return Case(
        label=job.arm.label,
        seed=job.seed,
        mechanism=job.arm.mechanism,
        layers=job.arm.layers,
        weights=f"{CHECKPOINT} {fingerprint(job.folder / CHECKPOINT)}",
        folder_name=job.folder.name,
        build=build,
        draw=lambda seed: answering(_drawn(job, seed)).eval(),
        inputs=lambda: _inputs(job, count),
        control=job.arm.control,
    )


def hidden(job: Job) -> str:
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


def _inputs(job: Job, count: int) -> Inputs:
    if isinstance(job.recipe, LanguageRecipe):
        corpus = load_text(job.recipe, _cache(job))
        return stream_inputs(corpus.test, corpus.name, count=count, tokens=job.recipe.length)
    split = load_split(job.recipe, job.seed, job.resources.data_dir, job.resources.cache)
    return held_out_inputs(HeldOut(split.test, split.test_index, balanced_order(split.test.labels)), count)


def _cache(job: Job) -> Path:
    assert job.resources.cache is not None  # trained_jobs() says where
    return job.resources.cache
