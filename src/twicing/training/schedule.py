"""The optimiser and its learning rates, as Lightning takes them: AdamW by one cycle of steps, or timm's by epochs."""

from typing import Any

import torch
from torch import nn

from twicing.training.protocol import Recipe


def optimizer_and_schedule(model: nn.Module, recipe: Recipe, steps: int) -> dict[str, Any]:
    """Optimiser and schedule of a recipe's training of so many steps in all."""
    if recipe.cosine is not None:
        return _timm_cosine(model, recipe)
    # Fused: one pass over all weights instead of one loop for each, a tenth of a step of this size.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    rising = recipe.warmup_share
    if rising * steps == 1:
        # A rise of one step has no length, by which torch would divide: it begins at the top, as a shorter one does.
        rising *= 1 - 1e-9
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=steps, pct_start=rising
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _timm_cosine(model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # timm names no exports
    from timm.scheduler.cosine_lr import CosineLRScheduler

    assert recipe.cosine is not None  # the caller looked
    optimizer = create_optimizer_v2(
        # Without the wrapper for pixels, so that timm finds the names whose weights are not to be decayed.
        getattr(model, "network", model),
        opt="adamw",
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
    )
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs,
        lr_min=recipe.cosine.last_rate,
        warmup_t=recipe.cosine.warmup_epochs,
        warmup_lr_init=recipe.cosine.warmup_rate,
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}
