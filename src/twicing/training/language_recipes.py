"""Recipes of language models: the papers' protocols, for who has the data and a GPU, and small ones for two CPU cores.

Protocols of the large ones: arXiv 2503.00687 (its released code where it is silent) and arXiv 2604.03190. The small
ones are this library's own: no paper trains these models on these texts.
"""

import dataclasses
from collections.abc import Callable

from twicing.names import listed
from twicing.training.language_recipe import LanguageEvaluation, LanguageRecipe
from twicing.training.protocol import Primary

SWAP_SHARE = "0.04"
SIMILARITY = Primary(
    "token similarity after the last block",
    "mean pairwise cosine",
    {"layer": "last", "where": "block output", "when": "trained"},
    "neither",
)

FIXED_BY_DATA = ("vocabulary",)


def primaries(unit: str) -> tuple[Primary, ...]:
    """The three metrics that every language recipe declares; unit: of its tokens, as in "per word"."""
    metric = f"test perplexity per {unit}, segments"
    swapped = {"threat": "word swap", "mode": "inputs only", "share": SWAP_SHARE}
    return (
        Primary("test perplexity", metric, {"threat": "clean"}, "lower"),
        Primary("test perplexity, 4 % of the words swapped", metric, swapped, "lower"),
        SIMILARITY,
    )


def wikitext103_small() -> LanguageRecipe:
    """The papers' small language model on WikiText-103: 16 layers of width 128, half a million steps; for a GPU."""
    return LanguageRecipe(
        name="wikitext103_small",
        title="a language model of {depth} layers on WikiText-103",
        limits="one training takes days on a GPU, and the papers publish one run each, without seeds",
        data="files",
        tokens="words",
        vocabulary=267_735,
        depth=16,
        width=128,
        heads=8,
        inner=2048,
        length=256,
        cutoffs=(20_000, 40_000, 200_000),
        epochs=500,
        steps_per_epoch=1000,
        batch_size=96,
        learning_rate=2.5e-4,
        warmup_steps=2000,
        primary=primaries("word"),
        evaluation=LanguageEvaluation(swap_modes=("inputs only", "inputs and targets", "paper_compat"), probes=100),
    )


def wikitext103_medium() -> LanguageRecipe:
    """The papers' medium language model on WikiText-103: width 256, windows of 384 words."""
    return dataclasses.replace(
        wikitext103_small(),
        name="wikitext103_medium",
        width=256,
        length=384,
        batch_size=56,
        epochs=400,
    )


def wikitext103_linear() -> LanguageRecipe:
    """The small model of WikiText-103 with linear attention (elu + 1) in all layers, to be compared with its twicing.

    That the papers' linear model has the small one's sizes is likely, not known.
    """
    return dataclasses.replace(
        wikitext103_small(),
        name="wikitext103_linear",
        title="a language model of {depth} layers with linear attention on WikiText-103",
        baseline="linear",
    )


def wikitext103_10m() -> LanguageRecipe:
    """The protocol of arXiv 2604.03190: 10 million tokens of WikiText-103, BPE, 4 layers of width 256, 15 passes.

    Differences: BPE works on bytes and is learned from the whole part to train on; the last weights are evaluated and
    not those that were best on the valid part; windows are of 256 tokens and not of 255.
    """
    return LanguageRecipe(
        name="wikitext103_10m",
        title="a language model of {depth} layers on ten million tokens of WikiText-103",
        limits="perplexity per BPE token, which another tokenizer moves: not comparable with perplexities per word",
        data="files",
        tokens="bpe",
        vocabulary=16_384,
        train_tokens=10_000_000,
        depth=4,
        width=256,
        heads=4,
        inner=1024,
        length=256,
        norm="pre",
        positions="learned",
        activation="gelu",
        attention_bias=True,
        attention_dropout=0.1,
        # 1,220 batches of 32 windows are a pass over ten million tokens.
        epochs=15,
        steps_per_epoch=1220,
        batch_size=32,
        order="shuffled",
        learning_rate=3e-4,
        weight_decay=0.01,
        warmup_steps=1500,
        clip=1.0,
        primary=primaries("BPE token"),
        evaluation=LanguageEvaluation(probes=100),
        fixed=FIXED_BY_DATA,
    )


def ptb() -> LanguageRecipe:
    """Penn Treebank, 10,000 words, 8 layers of width 64: a minute and a half of one core for a training."""
    return LanguageRecipe(
        name="ptb",
        title="a language model of {depth} layers on Penn Treebank",
        limits="undertrained (less than a pass) and small (width 64): far above published perplexities of this text, "
        "and a comparison of arms, not a record",
        data="files",
        tokens="words",
        vocabulary=10_000,
        depth=8,
        width=64,
        heads=4,
        inner=256,
        length=64,
        # A third less time than a plain softmax over 10,000 words.
        cutoffs=(1000, 4000),
        norm="pre",
        epochs=5,
        steps_per_epoch=145,
        batch_size=16,
        order="shuffled",
        learning_rate=5e-3,
        warmup_steps=75,
        primary=primaries("word"),
        evaluation=LanguageEvaluation(
            swap_shares=("0", "0.02", SWAP_SHARE, "0.1"),
            swap_modes=("inputs only", "inputs and targets", "paper_compat"),
            sliding_tokens=5000,
            probes=100,
        ),
        fixed=FIXED_BY_DATA,
    )


def imdb_lm() -> LanguageRecipe:
    """Reviews of IMDB, cut into words and marks, the 20,000 most frequent kept; half an hour of one core."""
    return LanguageRecipe(
        name="imdb_lm",
        title="a language model of {depth} layers on reviews of IMDB",
        limits="undertrained (less than a pass) and small (width 64); words outside the most frequent 20,000 are "
        "<unk>, so that its perplexity is of this vocabulary only",
        data="imdb",
        tokens="words and marks",
        vocabulary_limit=20_000,
        depth=8,
        width=64,
        heads=4,
        inner=256,
        length=128,
        cutoffs=(2000, 8000),
        norm="pre",
        epochs=10,
        steps_per_epoch=150,
        batch_size=32,
        order="shuffled",
        learning_rate=2e-3,
        warmup_steps=200,
        primary=primaries("word or mark"),
        evaluation=LanguageEvaluation(swap_shares=("0", "0.02", SWAP_SHARE, "0.1"), sliding_tokens=2000, probes=100),
    )


def text_demo() -> LanguageRecipe:
    """Python's own help texts, words and marks, 6 layers of width 48: no data needed, a minute of one core."""
    return LanguageRecipe(
        name="text_demo",
        title="a language model of {depth} layers on Python's own documentation",
        limits="smoke demonstration: 80,000 words, a tiny model; texts differ between versions of Python, so that its "
        "numbers do as well; it says nothing about WikiText-103",
        data="python",
        tokens="words and marks",
        min_count=2,
        depth=6,
        width=48,
        heads=4,
        inner=192,
        length=64,
        norm="pre",
        epochs=8,
        steps_per_epoch=75,
        batch_size=16,
        order="shuffled",
        learning_rate=3e-3,
        warmup_steps=60,
        primary=primaries("word or mark"),
        evaluation=LanguageEvaluation(sliding_tokens=2000, probes=60),
    )


LANGUAGE_RECIPES: dict[str, Callable[[], LanguageRecipe]] = {
    "text_demo": text_demo,
    "ptb": ptb,
    "imdb_lm": imdb_lm,
    "wikitext103_10m": wikitext103_10m,
    "wikitext103_small": wikitext103_small,
    "wikitext103_medium": wikitext103_medium,
    "wikitext103_linear": wikitext103_linear,
}


def find_language_recipe(name: str) -> LanguageRecipe:
    """The language recipe of that name. Raises ValueError that lists the known ones for any other."""
    if name not in LANGUAGE_RECIPES:
        raise ValueError(f"unknown recipe {name!r}: {listed(name, LANGUAGE_RECIPES)}")
    return LANGUAGE_RECIPES[name]()
