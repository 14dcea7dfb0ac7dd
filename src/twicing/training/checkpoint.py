"""The last state of a training, folder/last.ckpt: Lightning's checkpoint with what is needed to trust it.

Written at the end of every epoch, so that a kill loses at most the epoch that had begun.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twicing.adapters.surgery import spec
from twicing.models.two_passes import TwoPassBlock

CHECKPOINT = "last.ckpt"


def save_checkpoint(trainer: Any, path: Path) -> None:
    """Write the trainer's state; every process has to call it, and the first one writes.

    Written beside it and renamed: a kill while writing leaves the one before.
    """
    unfinished = path.with_suffix(".unfinished")
    trainer.save_checkpoint(unfinished, weights_only=False)
    if trainer.is_global_zero:
        os.replace(unfinished, path)
    trainer.strategy.barrier()


def formula(model: nn.Module) -> list[dict[str, Any]]:
    """spec(model), or what stands for it where every block attends twice: there no layer is to be converted."""
    # Blocks of the language model say it of themselves.
    blocks = sum(
        isinstance(module, TwoPassBlock) or getattr(module, "attention_passes", 1) > 1 for module in model.modules()
    )
    if blocks:
        return [{"mechanism": "two attentions a block", "layers": list(range(1, blocks + 1)), "options": {}}]
    return spec(model)


def identity(model: nn.Module, recipe_name: str, seed: int) -> dict[str, Any]:
    """What a checkpoint says of itself: weights do not know their formula."""
    return {"spec": formula(model), "recipe": recipe_name, "seed": seed}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Everything in the checkpoint, on the CPU. Raises ValueError where it is missing or damaged."""
    try:
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: delete training.json beside it and run the same command again.") from None
    except (PermissionError, MemoryError):
        # The file may be whole.
        raise
    # Of other bytes the unpickler may make anything: struct.error, IndexError, KeyError, UnicodeDecodeError, ...
    except Exception as error:
        raise ValueError(
            f"{path} is damaged: delete it and training.json beside it, and run the same command again."
        ) from error
    return checkpoint


def check_checkpoint(checkpoint: dict[str, Any], model: nn.Module, seed: int, path: Path) -> None:
    """Raise ValueError where the checkpoint is of another mechanism or seed than the model's."""
    saved, own = checkpoint["twicing"]["spec"], formula(model)
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
