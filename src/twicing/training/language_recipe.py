"""What a recipe of a language model is made of: one frozen value that, with the seed, defines all that is done."""

from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from math import isfinite

from twicing.data.text_vocabulary import check_kind
from twicing.models.language import ACTIVATIONS, NORMS, POSITIONS
from twicing.robustness.threat import as_fraction
from twicing.robustness.word_swap import MODES
from twicing.training.protocol import FIXED, Primary

# Where the text comes from, and what --data-dir has to name; None where it needs nothing.
TEXTS = {
    "files": "the folder with a text file for each of train, valid and test",
    "imdb": "the folder with train.jsonl.xz and test.jsonl.xz of IMDB",
    "python": None,
}
ORDERS = ("contiguous", "shuffled")


@dataclass(frozen=True)
class LanguageEvaluation:
    """What a trained language model is put through. Shares of words are fractions, as "0.04" or "1/25"."""

    swap_shares: tuple[str, ...] = ("0", "0.015", "0.02", "0.04", "0.06", "0.08", "0.1")
    """Shares of the words of the test part that are swapped, ascending; 0 is the text as it is."""
    swap_modes: tuple[str, ...] = ("inputs only", "inputs and targets")
    """What the swapped words stand in; paper_compat is a third mode, at the share that it was found with."""
    sliding: bool = True
    """Whether the sliding window is run as well, which costs a forward of the whole window for every word."""
    sliding_tokens: int = 0
    """Words that the sliding window predicts, from the beginning of the test part; 0 is all of them."""
    probes: int = 0
    """Windows of the test part, the first ones, on which similarity and rank are measured; 0 is all of them."""

    def __post_init__(self) -> None:
        shares = [as_fraction(share, "evaluation.swap_shares") for share in self.swap_shares]
        rising = all(low < high for low, high in pairwise(shares))
        if not shares or not rising or shares[0] < 0 or shares[-1] > Fraction(1):
            raise ValueError(
                "evaluation.swap_shares must be shares from 0 to 1 in ascending order: got "
                f"{', '.join(self.swap_shares)}."
            )
        unknown = [mode for mode in self.swap_modes if mode not in MODES]
        if unknown:
            raise ValueError(f"evaluation.swap_modes must be of {', '.join(MODES)}: got {unknown[0]!r}.")
        for name in ("sliding_tokens", "probes"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluation.{name} must be 0 or larger: got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """All that defines a training of a language model and its evaluation; everything else follows from it and the seed.

    Adam (AdamW where weight_decay is not 0), a linear warm-up by steps and a cosine to 0. The last weights count.
    """

    name: str = field(metadata=FIXED)
    title: str = field(metadata=FIXED)
    """What is trained on what, in a few words; {depth} stands for the number of layers."""
    limits: str = field(metadata=FIXED)
    """What the experiment cannot tell, said first in its report."""
    data: str = field(metadata=FIXED)
    """Where the text comes from: one of TEXTS."""
    tokens: str = field(metadata=FIXED)
    """How text is cut: "words", "words and marks", "characters" or "bpe"."""
    vocabulary: int = 0
    """How many tokens the text must turn out to have; 0 is as many as there are. For "bpe", how many to learn."""
    min_count: int = 1
    """Words that are rarer in the part to train on become <unk>."""
    vocabulary_limit: int = 0
    """Only so many of the most frequent words are kept, the others become <unk>; 0 is all."""
    train_tokens: int = 0
    """Tokens to train on, from the beginning of that part; 0 is all."""
    baseline: str = field(default="standard", metadata=FIXED)
    """The mechanism that all layers of the baseline have, and that others are compared with."""
    depth: int
    width: int
    heads: int
    inner: int
    """Hidden units of the feed-forward part."""
    length: int
    """Tokens of a window, in training and evaluation."""
    cutoffs: tuple[int, ...] = ()
    """Cut-offs of the adaptive softmax; none is a plain softmax."""
    norm: str = "post"
    positions: str = "sinusoidal"
    activation: str = "relu"
    attention_bias: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.0
    attention_passes: int = field(default=1, metadata=FIXED)
    """2 is the control `two-attentions`: every attention sub-layer runs twice with the same weights."""
    epochs: int
    """Points of the training curve; after each one a checkpoint is written. Not passes over the text."""
    steps_per_epoch: int
    batch_size: int
    """Windows of a step, over all processes."""
    order: str = "contiguous"
    """Which windows make a step: "contiguous" cuts the text into batch_size columns and reads all of them from top to
    bottom, as the released code does, whatever the seed; "shuffled" draws windows by (seed, pass)."""
    learning_rate: float
    weight_decay: float = 0.0
    warmup_steps: int
    clip: float = 0.25
    """Largest norm of a step's gradient; larger ones are scaled down to it."""
    training_length: float = 1.0
    """Factor on the number of steps of every epoch."""
    primary: tuple[Primary, ...]
    """At most three metrics, declared before the runs."""
    evaluation: LanguageEvaluation = field(default_factory=LanguageEvaluation)
    fixed: tuple[str, ...] = field(default=(), metadata=FIXED)
    """Further fields that are facts of this recipe's data."""

    @property
    def headline(self) -> str:
        """The title with what it names filled in."""
        return self.title.format(depth=self.depth)

    @property
    def needs_folder(self) -> bool:
        """Whether the text is in a folder or file that has to be named."""
        return TEXTS[self.data] is not None

    @property
    def all_epochs(self) -> int:
        """Epochs that are trained, as recipes of images name them."""
        return self.epochs

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch, training_length counted."""
        return max(1, round(self.steps_per_epoch * self.training_length))

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self.epochs * self.epoch_steps

    def __post_init__(self) -> None:
        check_kind(self.tokens)
        for name, known in (
            ("data", TEXTS),
            ("norm", NORMS),
            ("positions", POSITIONS),
            ("activation", ACTIVATIONS),
            ("order", ORDERS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}: got {getattr(self, name)!r}.")
        lowest = dict.fromkeys(
            ("depth", "width", "heads", "inner", "length", "epochs", "steps_per_epoch", "batch_size", "min_count"), 1
        ) | dict.fromkeys(("vocabulary", "vocabulary_limit", "train_tokens", "warmup_steps"), 0)
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be {low} or larger: got {getattr(self, name)}.")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width must be even and a multiple of heads: got {self.width} and {self.heads}.")
        if self.attention_passes not in (1, 2):
            raise ValueError(f"attention_passes must be 1 or 2: got {self.attention_passes}.")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1: got {getattr(self, name)}.")
        for name in ("learning_rate", "clip", "training_length"):
            if not isfinite(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(f"{name} must be a finite number above 0: got {getattr(self, name)}.")
        if not isfinite(self.weight_decay) or self.weight_decay < 0:
            raise ValueError(f"weight_decay must be a finite number 0 or larger: got {self.weight_decay}.")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps must be below the {self.steps} steps of the training: got {self.warmup_steps}."
            )
        if self.tokens == "bpe" and not self.vocabulary:
            raise ValueError("vocabulary must say how many BPE tokens to learn: got 0.")
