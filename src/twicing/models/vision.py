"""Vision transformers of timm behind pixel space: images in [0, 1] go in, and the normalisation is part of the model.

Attacks are bounded in pixels, so the model must take pixels.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from twicing.torchvision_import import mend_torchvision_import

# What timm calls them.
TIMM_WEIGHTS: dict[str, Literal["moco", ""]] = {"xavier": "moco", "timm": ""}


class PixelModel(nn.Module):
    """network((images - mean) / std): pixels in [0, 1] to logits."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.network = network
        # Constants of the data set: they move with the model, and they are not part of what is learned or saved.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, C, height, width] in [0, 1]. Returns logits, [B, classes]."""
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


def vision_transformer(
    *,
    image_size: int,
    patch_size: int,
    channels: int,
    classes: int,
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: float,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    attention_passes: int = 1,
    drop_path: float = 0.0,
    weights: str = "xavier",
) -> PixelModel:
    """A ViT with a class token, as in DeiT, its weights drawn from `seed` and nothing else.

    weights: "xavier" is Xavier-uniform, those of queries, keys and values each on its own. A deep model then collapses
    before it is trained, which is what is to be studied: at width 64, N(0, 0.02) would leave the residual stream as it
    came in. "timm" is N(0, 0.02) cut off at two, as in DeiT: with its sizes this is timm's deit_tiny_patch16_224.
    attention_passes: 2 runs every attention sub-layer twice (two_passes.py). drop_path: share of a layer's branches
    that are dropped in the last layer, rising from 0 in the first.
    The global random state is left as it was, so what a caller draws next does not depend on the model's size.
    Raises ValueError for other weights or passes.
    Source: arXiv 2010.11929 (ViT), arXiv 2104.02057 (initialisation, section 5), arXiv 2012.12877 (DeiT).
    """
    if weights not in TIMM_WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(TIMM_WEIGHTS)}: got {weights!r}.")
    if attention_passes not in (1, 2):
        raise ValueError(f"attention_passes must be 1 or 2: got {attention_passes}.")
    mend_torchvision_import()
    from timm.models.vision_transformer import Block, VisionTransformer

    from twicing.models.two_passes import TwoPassBlock

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            in_chans=channels,
            num_classes=classes,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path,
            weight_init=TIMM_WEIGHTS[weights],
            block_fn=Block if attention_passes == 1 else TwoPassBlock,
        )
    return PixelModel(network, mean, std)
