"""Small vision transformers of timm for the analysis: 3 layers, width 24, 3 heads, 16 patches and a class token."""

import pytest
import torch
from torch import nn

from twicing.torchvision_import import mend_torchvision_import


@pytest.fixture(scope="session")
def make_vit():
    mend_torchvision_import()
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    def make(distilled=False, fused=True, **options):
        family = VisionTransformerDistilled if distilled else VisionTransformer
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
            model = family(**sizes | {"embed_dim": 24, "depth": 3, "num_heads": 3} | options)
            for block in model.blocks:
                block.attn.fused_attn = fused
                # Fresh weights are so small that every token attends to all alike; larger ones tell layers apart.
                nn.init.normal_(block.attn.qkv.weight, std=0.3)
        return model.eval()

    return make
