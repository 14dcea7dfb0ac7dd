import pytest
import torch

from twicing.torchvision_import import mend_torchvision_import

mend_torchvision_import()


@pytest.fixture
def small_vit():
    """A real timm ViT of three layers; keyword arguments are the constructor's."""
    from timm.models.vision_transformer import VisionTransformer

    def build(cls=VisionTransformer, **changes):
        torch.manual_seed(0)
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
        model = cls(**{**sizes, **changes}).eval()
        with torch.no_grad():
            # timm's own initialisation leaves attention nearly uniform, where many formulas look alike.
            for name, parameter in model.named_parameters():
                if "qkv.weight" in name:
                    parameter.normal_(std=0.3)
        return model

    return build


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
