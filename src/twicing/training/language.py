"""Train a language model for a recipe; the loop is in loop.py.

The twin of classification.py. The last weights count; no epoch is chosen.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from twicing.data.text import Corpus
from twicing.models.language import LanguageModel, language_model
from twicing.training.hardware import Hardware
from twicing.training.language_order import Windows, window_loader
from twicing.training.language_perplexity import segment_perplexity
from twicing.training.language_recipe import LanguageRecipe
from twicing.training.loop import ON_ONE_CPU, Progress, Training, run_training


@dataclass(frozen=True)
class LanguageEpoch:
    """One row of a training curve.

    step: steps done. loss: mean over the epoch's tokens, nats. valid_perplexity: by segments, per token.
    seconds: spent in training steps up to here.
    """

    epoch: int
    step: int
    loss: float
    valid_perplexity: float
    seconds: float


def build_language_model(recipe: LanguageRecipe, seed: int, vocabulary: int) -> LanguageModel:
    """The recipe's model with standard attention, its weights a function of seed and sizes alone.

    vocabulary: how many tokens the text has, len(corpus.vocabulary). convert() puts a mechanism in.
    """
    return language_model(
        seed=seed,
        vocabulary=vocabulary,
        length=recipe.length,
        depth=recipe.depth,
        width=recipe.width,
        heads=recipe.heads,
        inner=recipe.inner,
        cutoffs=recipe.cutoffs,
        norm=recipe.norm,
        positions=recipe.positions,
        activation=recipe.activation,
        attention_bias=recipe.attention_bias,
        dropout=recipe.dropout,
        attention_dropout=recipe.attention_dropout,
        attention_passes=recipe.attention_passes,
    )


def train_language_model(
    model: LanguageModel,
    recipe: LanguageRecipe,
    corpus: Corpus,
    seed: int,
    folder: Path,
    progress: Progress,
    hardware: Hardware = ON_ONE_CPU,
) -> list[LanguageEpoch]:
    """Train the model in place and return its curve, one row an epoch; folder/last.ckpt is its last state.

    Where folder holds the checkpoint of an interrupted training, that one goes on: weights and curve come out as if it
    had not been interrupted (seconds go on counting). A kill loses at most the epoch begun. progress is told the share
    that is done. Of several processes (see Hardware) each calls this with the same arguments; the first one writes.
    The weights are read back by classification.load_trained().
    Raises ValueError where that checkpoint belongs to another seed or mechanism, or the hardware does not fit,
    FloatingPointError where the loss is not finite.
    """
    hardware.check_processes()
    if hardware.strategy == "fsdp":
        raise ValueError("--strategy fsdp would cut the tied embedding up: take ddp for language models.")

    def loaders(rank: int, world: int) -> tuple[DataLoader[Windows], None]:
        return window_loader(corpus.train, recipe, seed, rank=rank, world=world), None

    training = _Trained(model, recipe, seed, corpus.valid)
    return run_training(training, loaders, folder, progress, hardware, clip=recipe.clip)


def learning_rate_factor(step: int, recipe: LanguageRecipe) -> float:
    """What the learning rate is multiplied by in a step, counted from 0: up a line, then down a cosine to 0."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


class _Trained(Training[LanguageEpoch]):
    row_type = LanguageEpoch
    model: LanguageModel

    def __init__(self, model: LanguageModel, recipe: LanguageRecipe, seed: int, valid: Tensor):
        super().__init__(model, recipe, seed)
        self.recipe, self.valid = recipe, valid

    def training_step(self, windows: Windows, batch_idx: int) -> Tensor:
        loss = self.model.losses(windows[:, :-1], windows[:, 1:]).mean()
        self.loss.update(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
            # One pass over all weights; with scaled losses Lightning cannot clip what a fused optimiser unscales.
            fused=self.trainer.precision != "16-mixed",
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, self.recipe))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def row(self, loss: float, seconds: float) -> LanguageEpoch:
        self.model.eval()
        with self.trainer.precision_plugin.forward_context():
            found = segment_perplexity(self.model, self.valid, batch_size=self.recipe.batch_size)
        self.model.train()
        return LanguageEpoch(self.current_epoch + 1, self.trainer.global_step, loss, found.value, seconds)
