"""The control `two-attentions`: a timm block that runs its attention sub-layer twice, with the same weights.

It spends a second attention the plain way, so that what twicing gains is not merely what more attention gains.
"""

from torch import Tensor

from twicing.torchvision_import import mend_torchvision_import

mend_torchvision_import()

from timm.models.vision_transformer import Block  # noqa: E402


class TwoPassBlock(Block):
    """x <- x + attn(norm(x)), twice, then x <- x + mlp(norm(x)); parameters as in timm's Block, under the same names.

    A class of its own, so that the adapters find no site in it: its two passes are no layer that could be converted.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: [B, N, C]; attn_mask, is_causal: as timm's Block takes them. Returns [B, N, C]."""
        for _ in range(2):
            attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
            x = x + self.drop_path1(self.ls1(attended))
        fed_forward: Tensor = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x + fed_forward
