"""Mixup and CutMix of a batch, by timm: every image with its mirror image in the batch, all by the same share.

arXiv 1710.09412 and 1905.04899. In pixels both do what they do after a normalisation, as their shares add up to one.
"""

from torch import Tensor

from twicing.training.augmentation import Augmentation
from twicing.training.streams import MIX_STREAM, drawing_from, stream_seed


class Mixing:
    """What is drawn is a function of (seed, step); processes that hold mirror images draw the same (see order.py)."""

    def __init__(self, augmentation: Augmentation, classes: int, seed: int):
        from timm.data.mixup import Mixup

        self.seed = seed
        self.mix = Mixup(
            mixup_alpha=augmentation.mixup,
            cutmix_alpha=augmentation.cutmix,
            switch_prob=augmentation.switch,
            label_smoothing=augmentation.smoothing,
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """images: [B, C, H, W], changed in place; labels: [B]. Returns images and [B, classes] shares."""
        with drawing_from(stream_seed(self.seed, MIX_STREAM, step)):
            mixed: tuple[Tensor, Tensor] = self.mix(images, labels)
        return mixed
