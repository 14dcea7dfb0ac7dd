"""The text of a language recipe: found, cut and turned into numbers once; all trainings of a run map the same files."""

from pathlib import Path

from torch import Tensor

from twicing.data.progress import Progress
from twicing.data.text import Corpus, load_corpus, prepare_corpus
from twicing.data.text_sources import TextSource, imdb, plain_text, python_documentation
from twicing.training.language_order import WindowOrder
from twicing.training.language_recipe import TEXTS, LanguageRecipe


def prepare_text(
    recipe: LanguageRecipe, folder: Path, data_dir: Path | None = None, progress: Progress | None = None
) -> Corpus:
    """Read the recipe's text, write vocabulary and numbers into the folder (of the run), and check that they fit.

    Where they are there already and of the same text, they are taken as they are.
    Raises ValueError, one sentence, where the text is missing, damaged, of another data set, or too short.
    """
    limit = recipe.vocabulary if recipe.tokens == "bpe" else recipe.vocabulary_limit
    corpus = prepare_corpus(
        find_text(recipe, data_dir),
        folder,
        recipe.tokens,
        vocabulary_size=limit,
        min_count=recipe.min_count,
        train_tokens=recipe.train_tokens,
        progress=progress,
    )
    check_text(recipe, corpus)
    return corpus


def load_text(recipe: LanguageRecipe, folder: Path) -> Corpus:
    """What prepare_text() left in the folder. Raises ValueError where it is missing, damaged or of another recipe."""
    corpus = load_corpus(folder)
    check_text(recipe, corpus)
    return corpus


def check_text(recipe: LanguageRecipe, corpus: Corpus) -> None:
    """Raise ValueError where the text is not the one that the recipe is for, or too short to train on."""
    if recipe.vocabulary and len(corpus.vocabulary) != recipe.vocabulary:
        raise ValueError(
            f"{recipe.name} is for a vocabulary of {recipe.vocabulary:,}, and {corpus.name} has "
            f"{len(corpus.vocabulary):,}: give the text it is for."
        )
    # Raises where there is not one batch.
    WindowOrder(len(corpus.train), recipe, seed=0)


def probe_windows(recipe: LanguageRecipe, corpus: Corpus) -> Tensor:
    """The first windows of the test part, side by side, as the model takes them: [n, length] int64.

    n is recipe.evaluation.probes, or as many as there are. Similarity and rank are measured on these.
    """
    windows = len(corpus.test) // recipe.length
    windows = min(windows, recipe.evaluation.probes or windows)
    return corpus.test[: windows * recipe.length].view(windows, recipe.length).long()


def find_text(recipe: LanguageRecipe, data_dir: Path | None) -> TextSource:
    """Where the recipe's text is; nothing is read yet. Raises ValueError, one sentence, where it is not there."""
    needed = TEXTS[recipe.data]
    if needed is None:
        if data_dir is not None:
            raise ValueError(f"{recipe.name} comes with Python and reads no folder: leave --data-dir {data_dir} out.")
        return python_documentation()
    if data_dir is None:
        raise ValueError(f"{recipe.name} needs --data-dir, {needed}.")
    return imdb(data_dir) if recipe.data == "imdb" else plain_text(data_dir)
