"""A converted model as a file that needs neither timm nor this library to run: torch.export.

Run it: python examples/export.py
"""

import tempfile
from pathlib import Path

import torch

import twicing
from twicing.torchvision_import import mend_torchvision_import

# Needed only where torchvision was built for another torch (a CPU-only one): timm would not import there.
mend_torchvision_import()

from timm.models.vision_transformer import VisionTransformer  # noqa: E402

model = VisionTransformer(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=10).eval()
twicing.convert(model, "twicing", layers="last-2")

images = torch.randn(4, 3, 32, 32)
batch = torch.export.Dim("batch", min=1, max=64)
program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: batch}})

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "twiced.pt2"
    torch.export.save(program, file)
    print(f"saved {file.name}, {file.stat().st_size / 1e6:.1f} MB")
    loaded = torch.export.load(file).module()

for size in (4, 1, 17):
    images = torch.randn(size, 3, 32, 32)
    with torch.inference_mode():
        difference = (loaded(images) - model(images)).abs().max().item()
    print(f"batch of {size}: largest difference {difference:.1e}")
    assert difference < 1e-5

attention = [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]
print(f"{len(attention)} calls of fused attention in the file: 1 for each standard layer, 2 for each twiced one")
