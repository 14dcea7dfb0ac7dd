"""Train an image classifier for a recipe; the loop is in loop.py.

The last weights count; no epoch is chosen.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from twicing.models.vision import PixelModel, vision_transformer
from twicing.training.checkpoint import CHECKPOINT, check_checkpoint, read_checkpoint
from twicing.training.hardware import Hardware
from twicing.training.loaders import Batch, held_out_loader, train_loader
from twicing.training.loop import ON_ONE_CPU, Progress, Training, run_training
from twicing.training.mixing import Mixing
from twicing.training.protocol import Recipe
from twicing.training.schedule import optimizer_and_schedule
from twicing.training.split import Split


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

    def loaders(rank: int, world: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
        place = {"rank": rank, "world": world, "workers": hardware.workers}
        return train_loader(split.train, recipe, seed, **place), held_out_loader(split.test, **place)

    return run_training(_Classifier(model, recipe, seed), loaders, folder, progress, hardware)


def load_trained(model: nn.Module, seed: int, folder: Path) -> None:
    """Load the last weights that train_classifier() left in the folder into the model; not those of the running mean.

    Raises ValueError where they are of another mechanism or seed, or the file is damaged.
    """
    saved = read_checkpoint(folder / CHECKPOINT)
    check_checkpoint(saved, model, seed, folder / CHECKPOINT)
    weights = {name.removeprefix("model."): w for name, w in saved["state_dict"].items() if name.startswith("model.")}
    model.load_state_dict(weights)


class _Classifier(Training[Epoch]):
    row_type = Epoch

    def __init__(self, model: nn.Module, recipe: Recipe, seed: int):
        super().__init__(model, recipe, seed)
        self.recipe = recipe
        self.accuracy = MulticlassAccuracy(num_classes=recipe.classes, average="micro")
        self.mixing = Mixing(recipe.augmentation, recipe.classes, seed) if recipe.augmentation.mixes else None
        self.ema = _running_mean(model, recipe.ema_decay)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.accuracy.reset()

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

    def row(self, loss: float, seconds: float) -> Epoch:
        return Epoch(self.current_epoch + 1, loss, self.accuracy.compute().item(), seconds)


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
