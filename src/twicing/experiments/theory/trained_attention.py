"""A small trained attention layer, to ask whether trained matrices are what the theory assumes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twicing.data.digits import load_digits
from twicing.ops.attention import twicing_attention
from twicing.ops.reference import attention_matrix

PATCH, WIDTH, HEADS, LAYERS = 2, 32, 4, 2
TOKENS = (8 // PATCH) ** 2
STEPS, BATCH, LEARNING_RATE = 300, 64, 3e-3
HELD_OUT = 297


class DigitClassifier(nn.Module):
    """Patches of a digit, two blocks of attention and a feed-forward layer, the mean token, ten logits."""

    def __init__(self, order: int) -> None:
        super().__init__()
        self.order = order
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS))
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.outs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.forwards = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Ten logits for each image."""
        tokens = self._embedded(images)
        for layer in range(LAYERS):
            tokens = self._block(layer, tokens)
        return self.head(tokens.mean(1))

    def matrices(self, images: Tensor) -> list[Tensor]:
        """Each layer's attention matrices, [B, heads, tokens, tokens]."""
        tokens, found = self._embedded(images), []
        for layer in range(LAYERS):
            query, key, _ = self._heads(layer, tokens)
            found.append(attention_matrix(query, key))
            tokens = self._block(layer, tokens)
        return found

    def _embedded(self, images: Tensor) -> Tensor:
        return self.embed(F.unfold(images, PATCH, stride=PATCH).mT) + self.position

    def _heads(self, layer: int, tokens: Tensor) -> Tensor:
        inside = self.projections[layer](self.norms[2 * layer](tokens))
        return inside.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def _block(self, layer: int, tokens: Tensor) -> Tensor:
        query, key, value = self._heads(layer, tokens)
        mixed = twicing_attention(query, key, value, order=self.order)
        tokens = tokens + self.outs[layer](mixed.transpose(1, 2).flatten(2))
        return tokens + self.forwards[layer](self.norms[2 * layer + 1](tokens))


def train_digit_classifier(order: int, seed: int, steps: int = STEPS) -> tuple[DigitClassifier, float]:
    """Train on scikit-learn's digits for a second or two. Returns the model in eval mode and its held-out accuracy."""
    images, labels = load_digits()
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, rest = shuffled[:HELD_OUT], shuffled[HELD_OUT:]
    # Weights are drawn from the global state; the fork gives it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier(order)
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        batch = rest[torch.randint(len(rest), (BATCH,), generator=draw)]
        optimiser.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        accuracy = float((model(images[held_out]).argmax(1) == labels[held_out]).double().mean())
    return model, accuracy


def held_out_images(seed: int, count: int) -> Tensor:
    """The first held-out images of a seed, [count, 1, 8, 8]."""
    images, labels = load_digits()
    return images[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]]
