"""Twicing Attention in a transformer of one's own, in plain PyTorch: one call changes.

Run it: python examples/plain_torch.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import twicing


class SelfAttention(nn.Module):
    def __init__(self, width=32, heads=4, twice=True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attend = twicing.twicing_attention if twice else F.scaled_dot_product_attention

    def forward(self, x):  # [B, N, C]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
        return self.proj(self.attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Places(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(12, 32))

    def forward(self, x):
        return x + self.embedding


def train(twice, steps=150):
    """Learn to say which token stood two places before. One seed: it shows that both learn, not which is better."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 32), Places(), SelfAttention(twice=twice), nn.Linear(32, 8))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(8, (32, 12))
        loss = F.cross_entropy(model(tokens)[:, 2:].flatten(0, 1), tokens[:, :-2].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for name, twice in (("standard", False), ("twicing", True)):
        losses = train(twice)
        print(f"{name:8} loss {losses[0]:.2f} -> {losses[-1]:.2f} nats")
