"""Train an image classifier for a recipe: Lightning does the loop, and a killed training goes on to the same weights.

AdamW with a one-cycle learning rate (arXiv 1708.07120). The last weights count; no epoch is chosen.
"""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from twicing.adapters.surgery import spec
from twicing.models.vision import PixelModel, vision_transformer
from twicing.training.recipe import Recipe
from twicing.training.split import STEP_STREAM, Split, stream_seed, test_loader, train_loader

CHECKPOINT = "last.ckpt"

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Epoch:
    """One row of a training curve. loss: mean over the epoch, nats. seconds: spent in training steps up to here."""

    epoch: int
    loss: float
    held_out_accuracy: float
    seconds: float


def build_model(recipe: Recipe, seed: int) -> PixelModel:
    """The recipe's standard model, its weights a function of the seed alone; convert() it to put a mechanism in."""
    return vision_transformer(
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
        channels=recipe.channels,
        classes=recipe.classes,
        width=recipe.width,
        depth=recipe.depth,
        heads=recipe.heads,
        mlp_ratio=recipe.mlp_ratio,
        mean=recipe.mean,
        std=recipe.std,
        seed=seed,
    )


def train_classifier(
    model: nn.Module, recipe: Recipe, split: Split, seed: int, folder: Path, progress: Progress
) -> list[Epoch]:
    """Train the model in place and return its curve, one row an epoch; folder/last.ckpt is its last state.

    Where folder holds the checkpoint of an interrupted training, that one goes on: weights and curve come out as if it
    had not been interrupted (seconds go on counting). progress is told the share that is done.
    Raises ValueError where that checkpoint belongs to another seed or mechanism, FloatingPointError where the loss is
    not finite.
    """
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        _check_checkpoint(_read_checkpoint(checkpoint), model, seed, checkpoint)
    # Lightning leaves the mode of a model as it finds it.
    model.train()
    bookkeeping = _Bookkeeping(checkpoint, recipe.epochs, progress)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=recipe.epochs,
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
    with warnings.catch_warnings():
        # Data in memory need no worker processes, which Lightning advises.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning 2.6 calls pytree names that torch 2.13 has renamed.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        trainer.fit(
            _Classifier(model, recipe, seed),
            train_loader(split, recipe.batch_size, seed),
            test_loader(split),
            ckpt_path=checkpoint if checkpoint.exists() else None,
            weights_only=True,
        )
    return bookkeeping.curve


def load_trained(model: nn.Module, seed: int, folder: Path) -> None:
    """Load the weights that train_classifier() left in the folder into the model.

    Raises ValueError where they are of another mechanism or seed, or the file is damaged.
    """
    saved = _read_checkpoint(folder / CHECKPOINT)
    _check_checkpoint(saved, model, seed, folder / CHECKPOINT)
    weights = {name.removeprefix("model."): w for name, w in saved["state_dict"].items() if name.startswith("model.")}
    model.load_state_dict(weights)


class _Classifier(lightning.LightningModule):
    def __init__(self, model: nn.Module, recipe: Recipe, seed: int):
        super().__init__()
        self.model, self.recipe, self.seed = model, recipe, seed
        # By default NaN is left out of the mean, and a diverged training would look like a good one.
        self.loss = MeanMetric(nan_strategy="disable")
        self.accuracy = MulticlassAccuracy(num_classes=recipe.classes, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        # Once for every image: with nan_strategy="disable", torchmetrics 1.9 ignores the weight argument.
        self.loss.update(loss.detach().expand(len(labels)))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy.update(self.model(images), labels)

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        # Fused: one pass over all weights instead of one loop for each, a tenth of a step of this size.
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=recipe.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=recipe.warmup_share,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Weights do not know their formula.
        checkpoint["twicing"] = {"spec": spec(self.model), "recipe": self.recipe.name, "seed": self.seed}


class _Bookkeeping(lightning.Callback):
    """Keeps the curve, saves a checkpoint after every epoch, and makes what is random a function of (seed, step)."""

    def __init__(self, checkpoint: Path, epochs: int, progress: Progress):
        self.checkpoint, self.epochs, self.progress = checkpoint, epochs, progress
        self.curve: list[Epoch] = []
        self.seconds = 0.0
        self._step_started = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.loss.reset()
        pl_module.accuracy.reset()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # Dropout draws from the global generator, which Lightning does not restore on resume.
        torch.manual_seed(stream_seed(pl_module.seed, STEP_STREAM, trainer.global_step))
        self._step_started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds += time.perf_counter() - self._step_started
        self.progress((trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches) / self.epochs)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        loss = pl_module.loss.compute().item()
        if not torch.isfinite(torch.tensor(loss)):
            raise FloatingPointError(
                f"the training diverged: the loss of epoch {trainer.current_epoch + 1} is {loss}. "
                "Lower learning_rate, or see whether the mechanism is sound (twicing.testing.check_mechanism)."
            )
        accuracy = pl_module.accuracy.compute().item()
        self.curve.append(Epoch(trainer.current_epoch + 1, loss, accuracy, self.seconds))
        # Written beside it and renamed: a kill while writing leaves the one before.
        unfinished = self.checkpoint.with_suffix(".unfinished")
        trainer.save_checkpoint(unfinished)
        os.replace(unfinished, self.checkpoint)

    def state_dict(self) -> dict[str, Any]:
        return {"curve": [vars(epoch) for epoch in self.curve], "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = [Epoch(**row) for row in state_dict["curve"]]
        self.seconds = state_dict["seconds"]


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: delete training.json beside it and run the same command again.") from None
    except PermissionError:
        raise
    except (RuntimeError, EOFError, UnpicklingError, OSError) as error:
        raise ValueError(
            f"{path} is damaged: delete it and training.json beside it, and run the same command again."
        ) from error
    return checkpoint


def _check_checkpoint(checkpoint: dict[str, Any], model: nn.Module, seed: int, path: Path) -> None:
    saved, own = checkpoint["twicing"]["spec"], spec(model)
    if saved != own:
        raise ValueError(
            f"{path} holds weights of another formula: it was trained with {saved or 'standard attention'}, and the "
            f"model has {own or 'standard attention'}. Convert the model with the checkpoint's spec first."
        )
    if checkpoint["twicing"]["seed"] != seed:
        raise ValueError(
            f"{path} is one of seed {checkpoint['twicing']['seed']}, and this training's is {seed}: "
            "give each training a folder of its own."
        )
