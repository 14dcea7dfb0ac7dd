"""An attention mechanism of one's own: written, checked, put into a vision transformer, and entered in a comparison.

Run it: python examples/own_mechanism.py (docs/own_mechanism.md says more)
"""

import torch
import torch.nn.functional as F
from torch import nn

import twicing
from twicing.mechanisms import Mechanism
from twicing.testing import check_mechanism
from twicing.torchvision_import import mend_torchvision_import


class GiveBack(Mechanism):
    """U = A V + s (V - A V): each head learns how much of what smoothing removed it gives back unsmoothed."""

    def __init__(self, layer, num_heads, head_dim, *, share=0.25):
        super().__init__(layer, num_heads, head_dim)
        self.share = nn.Parameter(torch.full((num_heads, 1, 1), float(share)))

    # sdpa: attn_mask, is_causal, scale, dropout_p and enable_gqa, as scaled_dot_product_attention takes them.
    def forward(self, query, key, value, *, context=None, **sdpa):  # noqa: ARG002
        smoothed = F.scaled_dot_product_attention(query, key, value, **sdpa)
        return smoothed + self.share.to(value.dtype) * (value - smoothed)


def main():
    # Sound, and what it claims to be? Raises, and names each check that fails.
    check_mechanism(GiveBack, formula=lambda smooth, v: smooth(v) + 0.25 * (v - smooth(v)))
    print("GiveBack is sound.")

    # Into a model of timm. Convert first, then make the optimiser: there is something new to learn.
    mend_torchvision_import()
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)
    print(twicing.convert(model, GiveBack, layers="last-2", options={"share": 0.5}))

    # Against standard attention, from this folder: twicing compare digits --mechanisms standard own_mechanism:GiveBack
    # Here with models so small that it takes seconds, and shows nothing.
    from twicing.cli import main as twicing_command

    settings = ["epochs=1", "depth=2", "width=16", "heads=2", "batch_size=64", "evaluation.eps=1/16"]
    settings += ["evaluation.probes=40", "evaluation.pgd_steps=2", "evaluation.verdict_seeds=0"]
    mechanisms = ["standard", "own_mechanism:GiveBack"]
    options = ["--mechanisms", *mechanisms, "--seeds", "2", "--out", "runs/own_mechanism", "--set", *settings]
    twicing_command(["compare", "digits", *options])


if __name__ == "__main__":
    main()
