"""The loop of every training: Lightning does it, and a killed training goes on to the same weights.

What a step computes and what a row of the curve says is in classification.py and language.py.
"""

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from twicing.training.checkpoint import CHECKPOINT, check_checkpoint, identity, read_checkpoint, save_checkpoint
from twicing.training.hardware import Hardware, wait_for
from twicing.training.language_recipe import LanguageRecipe
from twicing.training.protocol import Recipe
from twicing.training.streams import STEP_STREAM, stream_seed

Progress = Callable[[float], None]

ON_ONE_CPU = Hardware()

# A row of a training curve: a dataclass.
Row = TypeVar("Row")


class Training(lightning.LightningModule, ABC, Generic[Row]):
    """A model, its recipe and its seed; subclasses say what a step is. row_type: of the rows of its curve."""

    row_type: type[Row]

    def __init__(self, model: nn.Module, recipe: Recipe | LanguageRecipe, seed: int):
        super().__init__()
        self.model, self.seed = model, seed
        self.recipe_name, self.epochs = recipe.name, recipe.all_epochs
        # By default NaN is left out of the mean, and a diverged training would look like a good one.
        self.loss = MeanMetric(nan_strategy="disable")

    @abstractmethod
    def row(self, loss: float, seconds: float) -> Row:
        """What the curve keeps of the epoch that ends. loss: its mean; seconds: in training steps up to here."""

    def on_train_epoch_start(self) -> None:
        self.loss.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["twicing"] = identity(self.model, self.recipe_name, self.seed)


def run_training(
    training: Training[Row],
    loaders: Callable[[int, int], tuple[DataLoader[Any], DataLoader[Any] | None]],
    folder: Path,
    progress: Progress,
    hardware: Hardware,
    *,
    clip: float | None = None,
) -> list[Row]:
    """Train the model in place, or go on where folder has a checkpoint; its curve, one row an epoch.

    loaders(rank, world): what one of world processes learns from and, where Lightning validates, what it validates on.
    clip: largest norm of a step's gradient. progress is told the share that is done.
    Raises ValueError where the checkpoint belongs to another seed or mechanism, FloatingPointError where the loss is
    not finite.
    """
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        check_checkpoint(read_checkpoint(checkpoint), training.model, training.seed, checkpoint)
    # Lightning leaves the mode of a model as it finds it.
    training.model.train()
    bookkeeping = _Bookkeeping(checkpoint, training.row_type, progress)
    with _quiet():
        trainer = lightning.Trainer(
            **hardware.trainer_options(),
            max_epochs=training.epochs,
            gradient_clip_val=clip,
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
        learned, held_out = loaders(trainer.global_rank, trainer.world_size)
        trainer.fit(
            training,
            learned,
            held_out,
            ckpt_path=checkpoint if checkpoint.exists() else None,
            weights_only=True,
        )
    return bookkeeping.curve


# Checkpoints keep its state under its name: a training that was begun under another one would lose its curve.
class _Bookkeeping(lightning.Callback, Generic[Row]):
    """Keeps the curve, saves a checkpoint after every epoch, and makes what is random a function of (seed, step)."""

    def __init__(self, checkpoint: Path, row_type: type[Row], progress: Progress):
        self.checkpoint, self.row_type, self.progress = checkpoint, row_type, progress
        self.curve: list[Row] = []
        self.seconds = 0.0
        self._step_started = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # Dropout draws from the global generator, which Lightning does not restore on resume.
        torch.manual_seed(stream_seed(pl_module.seed, STEP_STREAM, trainer.global_step, trainer.global_rank))
        wait_for(pl_module.device)
        self._step_started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Else the seconds of a GPU's work would be counted nowhere.
        wait_for(pl_module.device)
        self.seconds += time.perf_counter() - self._step_started
        self.progress(trainer.global_step / (pl_module.epochs * trainer.num_training_batches))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        loss = pl_module.loss.compute().item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training diverged: the loss of epoch {trainer.current_epoch + 1} is {loss}. "
                "Lower learning_rate, or see whether the mechanism is sound (twicing.testing.check_mechanism)."
            )
        self.curve.append(pl_module.row(loss, self.seconds))
        save_checkpoint(trainer, self.checkpoint)

    def state_dict(self) -> dict[str, Any]:
        return {"curve": [vars(row) for row in self.curve], "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = [self.row_type(**row) for row in state_dict["curve"]]
        self.seconds = state_dict["seconds"]


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Small data in memory need no worker processes, which Lightning advises.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # The running mean of the weights is one that is only evaluated.
        warnings.filterwarnings("ignore", message=".*module.s. in eval mode at the start of training.*")
        # The first token's weight lies in memory as its gradient does not: a matter of speed.
        warnings.filterwarnings("ignore", message=".*Grad strides do not match bucket view strides.*")
        # Lightning 2.6 calls pytree names that torch 2.13 has renamed.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        yield
