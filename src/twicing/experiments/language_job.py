"""What is done to one language model of a comparison: its training and its evaluation, part by part."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from twicing.data.text import Corpus
from twicing.experiments.job_model import has_sites, similarity_of, with_mechanism
from twicing.experiments.metrics import STEP_TIME, TRAINING_LOSS, TRAINING_TIME
from twicing.experiments.parts import Finding, Part
from twicing.experiments.plan import Job, Resources
from twicing.experiments.programme import Kind, Programme, Progress
from twicing.models.language import LanguageModel
from twicing.robustness.word_swap import swap_words
from twicing.training.classification import load_trained
from twicing.training.language import build_language_model, train_language_model
from twicing.training.language_cost import equal_cost_inner
from twicing.training.language_data import load_text, prepare_text, probe_windows
from twicing.training.language_perplexity import Perplexity, segment_perplexity, sliding_window_perplexity
from twicing.training.language_recipe import LanguageRecipe
from twicing.training.streams import stream_seed

SWAP_STREAM = 40
# Where paper_compat swaps, as the code that it follows has it; at other shares nobody knows what it would be.
COMPAT_SHARE = "0.015"
# For models that are only tried on, where the text decides how many words there are.
FEW_WORDS = 64


@dataclass
class LanguageBench:
    """What the parts of one job work on. The model has its initial weights until it is trained or restored."""

    job: Job
    recipe: LanguageRecipe
    corpus: Corpus
    model: LanguageModel
    draw_seed: int
    progress: Progress
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = self.job.resources.device

    def initialisation(self) -> Part:
        """Tokens before training."""
        return self._similarity("initialisation")

    def train(self) -> Part:
        """Train, or go on training."""
        recipe = self.recipe
        curve = train_language_model(
            self.model,
            recipe,
            self.corpus,
            self.draw_seed,
            self.job.folder,
            progress=self._of("training"),
            hardware=self.job.resources.hardware,
        )
        tokens = recipe.epoch_steps * recipe.batch_size * recipe.length
        valid = Perplexity(0.0, len(self.corpus.valid) - 1, "segments").metric("valid", self.corpus.vocabulary.unit)
        part = Part()
        for row in curve:
            when = {"epoch": row.epoch, "step": row.step}
            part.findings += [
                Finding(TRAINING_LOSS, row.loss, tokens, when),
                Finding(valid, row.valid_perplexity, len(self.corpus.valid) - 1, when),
                Finding(TRAINING_TIME, row.seconds, tokens, when),
            ]
        part.findings.append(Finding(STEP_TIME, curve[-1].seconds / recipe.steps, recipe.steps))
        return part

    def perplexity(self) -> Part:
        """Perplexity of the valid and the test part by segments, and of the test part by the sliding window."""
        self._ready()
        part, batch = Part(), self.recipe.batch_size
        for name, stream in (("valid", self.corpus.valid), ("test", self.corpus.test)):
            self._add(part, segment_perplexity(self.model, stream, batch_size=batch), name, {"threat": "clean"})
        evaluation = self.recipe.evaluation
        if evaluation.sliding:
            slid = sliding_window_perplexity(
                self.model,
                self.corpus.test,
                tokens=evaluation.sliding_tokens,
                batch_size=batch,
                progress=self._of("perplexity"),
            )
            self._add(part, slid, "test", {"threat": "clean"})
        return part

    def word_swap(self) -> Part:
        """Perplexity of the test part with swapped words; the same words in every arm of a seed."""
        self._ready()
        part, evaluation = Part(), self.recipe.evaluation
        plan = [
            (mode, share)
            for mode in evaluation.swap_modes
            for share in ((COMPAT_SHARE,) if mode == "paper_compat" else evaluation.swap_shares)
            if float(share)
        ]
        for count, (mode, share) in enumerate(plan):
            generator = torch.Generator().manual_seed(stream_seed(self.job.seed, SWAP_STREAM, 0))
            swapped = swap_words(self.corpus.test, self.corpus.vocabulary, share, mode=mode, generator=generator)
            found = segment_perplexity(
                self.model, swapped.inputs, targets=swapped.targets, batch_size=self.recipe.batch_size
            )
            self._add(part, found, "test", {"threat": "word swap", "mode": mode, "share": share})
            note = f"Word swap: {swapped.became}"
            if note not in part.notes:
                part.notes.append(note)
            self.progress("word swap", (count + 1) / len(plan))
        return part

    def trained_similarity(self) -> Part:
        """Tokens after training."""
        return self._similarity("trained")

    def restore(self) -> None:
        """Load the trained weights."""
        # Into a new model, as after an interruption: a training may leave its own in half precision.
        self.model = converted_language_model(self.job, self.draw_seed, len(self.corpus.vocabulary))
        load_trained(self.model, self.draw_seed, self.job.folder)

    def examples(self) -> dict[str, Any]:
        """Nothing: a word is not right or wrong."""
        return {"index": [], "probes": None}

    def _add(self, part: Part, found: Perplexity, of: str, conditions: dict[str, Any]) -> None:
        metric = found.metric(of, self.corpus.vocabulary.unit)
        part.findings.append(Finding(metric, found.value, found.tokens, conditions))

    def _similarity(self, when: str) -> Part:
        self._ready()
        return similarity_of(self.model, probe_windows(self.recipe, self.corpus).to(self.device), when)

    def _of(self, part: str) -> Callable[[float], None]:
        return lambda share: self.progress(part, share)

    def _ready(self) -> None:
        self.model.to(self.device).eval()


def converted_language_model(job: Job, draw_seed: int, vocabulary: int) -> LanguageModel:
    """The job's model before training."""
    assert isinstance(job.recipe, LanguageRecipe)
    model = build_language_model(job.recipe, draw_seed, vocabulary)
    return with_mechanism(job, model, draw_seed, job.recipe.baseline)


def _open_bench(job: Job, progress: Progress) -> LanguageBench:
    assert isinstance(job.recipe, LanguageRecipe)
    assert job.resources.cache is not None  # run_plan() prepared the text there
    corpus = load_text(job.recipe, job.resources.cache)
    draw_seed = job.seed + job.arm.seed_offset
    model = converted_language_model(job, draw_seed, len(corpus.vocabulary))
    return LanguageBench(job, job.recipe, corpus, model, draw_seed, progress)


def _prepare(recipe: LanguageRecipe, resources: Resources, progress: Callable[[float], None]) -> str:
    assert resources.cache is not None  # run_plan() says where
    return f"{prepare_text(recipe, resources.cache, resources.data_dir, progress)}."


def _trial_model(recipe: LanguageRecipe) -> LanguageModel:
    words = recipe.vocabulary or (recipe.cutoffs[-1] + 1 if recipe.cutoffs else FEW_WORDS)
    return build_language_model(recipe, 0, words)


def _timed(
    recipe: LanguageRecipe, data_dir: Path | None, device: torch.device
) -> tuple[Callable[[LanguageRecipe], LanguageModel], Callable[[LanguageModel], Tensor]]:
    words = recipe.vocabulary or recipe.vocabulary_limit
    if not words:
        with TemporaryDirectory() as folder:
            words = len(prepare_text(recipe, Path(folder) / "text", data_dir).vocabulary)
    windows = torch.randint(words, (recipe.batch_size, recipe.length + 1), device=device)

    def build(followed: LanguageRecipe) -> LanguageModel:
        return build_language_model(followed, 0, words)

    def loss(model: LanguageModel) -> Tensor:
        return model.losses(windows[:, :-1], windows[:, 1:]).mean()

    return build, loss


def _widened(recipe: LanguageRecipe, twiced_layers: int) -> tuple[dict[str, Any], str]:
    inner = equal_cost_inner(recipe, twiced_layers)
    return {"inner": inner}, f"a feed-forward part of {inner} instead of {recipe.inner} hidden units"


# Shares of time as measured for `ptb`.
LANGUAGE = Programme(
    open=_open_bench,
    prepare=_prepare,
    trial_model=_trial_model,
    timed=_timed,
    widened=_widened,
    # arXiv 2312.00751, on WikiText-103.
    options={"neutreno": {"lam": 0.4}},
    parts={
        "initialisation": Kind(LanguageBench.initialisation, 1, has_sites),
        "training": Kind(LanguageBench.train, 70),
        "perplexity": Kind(LanguageBench.perplexity, 12),
        "word swap": Kind(LanguageBench.word_swap, 16),
        "similarity": Kind(LanguageBench.trained_similarity, 1, has_sites),
    },
    last_parts={},
)
