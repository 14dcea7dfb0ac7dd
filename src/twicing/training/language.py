"""Train a language model for a recipe: Lightning does the loop, and a killed training goes on to the same weights.

The twin of classification.py. The last weights count; no epoch is chosen.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from twicing.data.text import Corpus
from twicing.models.language import LanguageModel, language_model
from twicing.training.checkpoint import CHECKPOINT, check_checkpoint, identity, read_checkpoint, save_checkpoint
from twicing.training.hardware import Hardware
from twicing.training.language_order import Windows, window_loader
from twicing.training.language_perplexity import segment_perplexity
from twicing.training.language_recipe import LanguageRecipe
from twicing.training.streams import STEP_STREAM, stream_seed

Progress = Callable[[float], None]

ON_ONE_CPU = Hardware()


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
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        check_checkpoint(read_checkpoint(checkpoint), model, seed, checkpoint)
    # Lightning leaves the mode of a model as it finds it.
    model.train()
    bookkeeping = _Bookkeeping(checkpoint, recipe, corpus.valid, progress)
    with _quiet():
        trainer = lightning.Trainer(
            **hardware.trainer_options(),
            max_epochs=recipe.epochs,
            gradient_clip_val=recipe.clip,
            callbacks=[bookkeeping],
            default_root_dir=folder,
            # Curves, checkpoints and progress are ours: they have to survive a kill and be read by the report.
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        trainer.fit(
            _Trained(model, recipe, seed),
            window_loader(corpus.train, recipe, seed, rank=trainer.global_rank, world=trainer.world_size),
            ckpt_path=checkpoint if checkpoint.exists() else None,
            weights_only=True,
        )
    return bookkeeping.curve


def learning_rate_factor(step: int, recipe: LanguageRecipe) -> float:
    """What the learning rate is multiplied by in a step, counted from 0: up a line, then down a cosine to 0."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


class _Trained(lightning.LightningModule):
    def __init__(self, model: LanguageModel, recipe: LanguageRecipe, seed: int):
        super().__init__()
        self.model, self.recipe, self.seed = model, recipe, seed
        # By default NaN is left out of the mean, and a diverged training would look like a good one.
        self.loss = MeanMetric(nan_strategy="disable")

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["twicing"] = identity(self.model, self.recipe.name, self.seed)


class _Bookkeeping(lightning.Callback):
    """Keeps the curve, saves a checkpoint after every epoch, and makes what is random a function of (seed, step)."""

    def __init__(self, checkpoint: Path, recipe: LanguageRecipe, valid: Tensor, progress: Progress):
        self.checkpoint, self.recipe, self.valid, self.progress = checkpoint, recipe, valid, progress
        self.curve: list[LanguageEpoch] = []
        self.seconds = 0.0
        self._step_started = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.loss.reset()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # Dropout draws from the global generator, which Lightning does not restore on resume.
        torch.manual_seed(stream_seed(pl_module.seed, STEP_STREAM, trainer.global_step, trainer.global_rank))
        self._step_started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds += time.perf_counter() - self._step_started
        self.progress((trainer.global_step) / self.recipe.steps)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        loss = pl_module.loss.compute().item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training diverged: the loss of epoch {trainer.current_epoch + 1} is {loss}. "
                "Lower learning_rate, or see whether the mechanism is sound (twicing.testing.check_mechanism)."
            )
        pl_module.model.eval()
        with trainer.precision_plugin.forward_context():
            valid = segment_perplexity(pl_module.model, self.valid, batch_size=self.recipe.batch_size)
        pl_module.model.train()
        row = LanguageEpoch(trainer.current_epoch + 1, trainer.global_step, loss, valid.value, self.seconds)
        self.curve.append(row)
        save_checkpoint(trainer, self.checkpoint)

    def state_dict(self) -> dict[str, Any]:
        return {"curve": [vars(epoch) for epoch in self.curve], "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = [LanguageEpoch(**row) for row in state_dict["curve"]]
        self.seconds = state_dict["seconds"]


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Data in memory need no worker processes, which Lightning advises.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning 2.6 calls pytree names that torch 2.13 has renamed.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        yield
