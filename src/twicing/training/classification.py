"""Train an image classifier for a recipe: Lightning does the loop, and a killed training goes on to the same weights.

The last weights count; no epoch is chosen.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from twicing.models.vision import PixelModel, vision_transformer
from twicing.training.checkpoint import CHECKPOINT, check_checkpoint, identity, read_checkpoint, save_checkpoint
from twicing.training.hardware import Hardware
from twicing.training.loaders import Batch, held_out_loader, train_loader
from twicing.training.mixing import Mixing
from twicing.training.protocol import Recipe
from twicing.training.schedule import optimizer_and_schedule
from twicing.training.split import Split
from twicing.training.streams import STEP_STREAM, stream_seed

Progress = Callable[[float], None]

ON_ONE_CPU = Hardware()


@dataclass(frozen=True)
class Epoch:
    """One row of a training curve. loss: mean over the epoch, nats. seconds: spent in training steps up to here."""

    epoch: int
    loss: float
    held_out_accuracy: float
    seconds: float


def build_model(recipe: Recipe, seed: int) -> PixelModel:
    """The recipe's standard model, its weights a function of the seed alone; convert() it to put a mechanism in.

    Raises ValueError where the recipe leaves the number of classes open: with_classes() fills it in.
    """
    if not recipe.classes:
        raise ValueError(f"{recipe.name} finds its classes in the data: call with_classes(recipe, data_dir) first.")
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
        attention_passes=recipe.attention_passes,
        drop_path=recipe.drop_path,
        weights=recipe.weights,
    )


def train_classifier(
    model: nn.Module,
    recipe: Recipe,
    split: Split,
    seed: int,
    folder: Path,
    progress: Progress,
    hardware: Hardware = ON_ONE_CPU,
) -> list[Epoch]:
    """Train the model in place and return its curve, one row an epoch; folder/last.ckpt is its last state.

    Where folder holds the checkpoint of an interrupted training, that one goes on: weights and curve come out as if it
    had not been interrupted (seconds go on counting). A kill loses at most the epoch begun. progress is told the share
    that is done. Of several processes (see Hardware) each calls this with the same arguments; the first one writes.
    With fsdp the model's own weights are left cut up: build it anew and load_trained().
    Raises ValueError where that checkpoint belongs to another seed or mechanism, or the hardware does not fit,
    FloatingPointError where the loss is not finite.
    """
    _check_hardware(hardware, recipe)
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        check_checkpoint(read_checkpoint(checkpoint), model, seed, checkpoint)
    # Lightning leaves the mode of a model as it finds it.
    model.train()
    bookkeeping = _Bookkeeping(checkpoint, recipe.all_epochs, progress)
    with _quiet():
        trainer = lightning.Trainer(
            **hardware.trainer_options(),
            max_epochs=recipe.all_epochs,
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
        place = {"rank": trainer.global_rank, "world": trainer.world_size, "workers": hardware.workers}
        trainer.fit(
            _Classifier(model, recipe, seed),
            train_loader(split.train, recipe, seed, **place),
            held_out_loader(split.test, **place),
            ckpt_path=checkpoint if checkpoint.exists() else None,
            weights_only=True,
        )
    return bookkeeping.curve


def load_trained(model: nn.Module, seed: int, folder: Path) -> None:
    """Load the last weights that train_classifier() left in the folder into the model; not those of the running mean.

    Raises ValueError where they are of another mechanism or seed, or the file is damaged.
    """
    saved = read_checkpoint(folder / CHECKPOINT)
    check_checkpoint(saved, model, seed, folder / CHECKPOINT)
    weights = {name.removeprefix("model."): w for name, w in saved["state_dict"].items() if name.startswith("model.")}
    model.load_state_dict(weights)


class _Classifier(lightning.LightningModule):
    def __init__(self, model: nn.Module, recipe: Recipe, seed: int):
        super().__init__()
        self.model, self.recipe, self.seed = model, recipe, seed
        # By default NaN is left out of the mean, and a diverged training would look like a good one.
        self.loss = MeanMetric(nan_strategy="disable")
        self.accuracy = MulticlassAccuracy(num_classes=recipe.classes, average="micro")
        self.mixing = Mixing(recipe.augmentation, recipe.classes, seed) if recipe.augmentation.mixes else None
        self.ema = _running_mean(model, recipe.ema_decay)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels, share = batch
        if self.mixing is None:
            loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.recipe.augmentation.smoothing)
        else:
            images, targets = self.mixing(images, labels, self.trainer.global_step)
            # Shares of classes as targets: timm's SoftTargetCrossEntropy.
            loss = F.cross_entropy(self.model(images), targets)
        # Once for every image: with nan_strategy="disable", torchmetrics 1.9 ignores the weight argument.
        self.loss.update(loss.detach().expand(len(labels) if share else 0))
        # Processes take the plain mean of their gradients, and their slices of a batch may differ in size.
        return loss * share

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels, share = batch
        logits = self.model(images)
        if share:
            self.accuracy.update(logits, labels)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.ema is not None:
            self.ema.update(self.model)

    def configure_optimizers(self) -> Any:
        return optimizer_and_schedule(self.model, self.recipe, int(self.trainer.estimated_stepping_batches))

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if self.recipe.cosine is None:
            scheduler.step()
        else:
            # timm's are told the epoch that comes next.
            scheduler.step(self.current_epoch + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["twicing"] = identity(self.model, self.recipe.name, self.seed)


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
        torch.manual_seed(stream_seed(pl_module.seed, STEP_STREAM, trainer.global_step, trainer.global_rank))
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
        save_checkpoint(trainer, self.checkpoint)

    def state_dict(self) -> dict[str, Any]:
        return {"curve": [vars(epoch) for epoch in self.curve], "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = [Epoch(**row) for row in state_dict["curve"]]
        self.seconds = state_dict["seconds"]


def _running_mean(model: nn.Module, decay: float) -> Any:
    if not decay:
        return None
    from timm.utils.model_ema import ModelEmaV3

    # Without gradients: several processes would wait for them.
    return ModelEmaV3(model, decay=decay).requires_grad_(False)


def _check_hardware(hardware: Hardware, recipe: Recipe) -> None:
    hardware.check_processes()
    if hardware.strategy == "fsdp" and recipe.ema_decay:
        raise ValueError("--strategy fsdp cuts the weights up and no running mean is kept then: set ema_decay=0.")


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Data in memory need no worker processes, which Lightning advises.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # The running mean of the weights is one that is only evaluated.
        warnings.filterwarnings("ignore", message=".*module.s. in eval mode at the start of training.*")
        # The first token's weight lies in memory as its gradient does not: a matter of speed.
        warnings.filterwarnings("ignore", message=".*Grad strides do not match bucket view strides.*")
        # Lightning 2.6 calls pytree names that torch 2.13 has renamed.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        yield
