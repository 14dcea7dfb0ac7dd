"""Twicing Attention in a vision transformer of timm: put in, taken out, learned, and rebuilt from a checkpoint.

Run it: python examples/timm_vit.py
"""

import torch

import twicing
from twicing.torchvision_import import mend_torchvision_import

# Needed only where torchvision was built for another torch (a CPU-only one): timm would not import there.
mend_torchvision_import()

import timm  # noqa: E402

images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
model = timm.create_model("deit_tiny_patch16_224", pretrained=False).eval()  # pretrained=True needs the network
with torch.inference_mode():
    standard = model(images)

# The paper's placement: the last three of twelve layers, counted from 1.
job = twicing.convert(model, "twicing", layers="10-12")
print(job)
with torch.inference_mode():
    twiced = model(images)
print(f"largest change of a logit: {(twiced - standard).abs().max():.4f}")

# Out again: every bit is what it was.
job.undo()
with torch.inference_mode():
    assert torch.equal(model(images), standard)

# A gain for each head that is learned. Convert first, then make the optimiser.
twicing.convert(model, "twicing", options={"learn_gain": True})
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
torch.nn.functional.cross_entropy(model(images), torch.tensor([3, 7])).backward()
optimiser.step()
print("gains of layer 12 after one step:", model.blocks[11].attn.twicing_mechanism.gain.tolist())

# Weights do not know their formula: save the spec beside them.
checkpoint = {"model": model.state_dict(), "spec": twicing.spec(model)}
fresh = timm.create_model("deit_tiny_patch16_224", pretrained=False).eval()
twicing.convert(fresh, spec=checkpoint["spec"])
fresh.load_state_dict(checkpoint["model"])
with torch.inference_mode():
    assert torch.equal(fresh(images), model(images))
print("rebuilt from", checkpoint["spec"])
