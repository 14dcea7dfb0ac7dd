"""Random numbers per image: those of image i depend on the seed and on i, never on how the images were batched.

One stream per image, so that a batch size or a dropped neighbour cannot change what is done to an image.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def draw_seed(generator: torch.Generator | None) -> int:
    """Draw the seed of one attack or one noise from the generator (None: torch's default one)."""
    device = "cpu" if generator is None else generator.device
    # 31 bits: the Mersenne Twister of torch reads 32, and an image's index is added.
    return int(torch.randint(2**31, (), generator=generator, device=device))


def image_streams(seed: int, indices: Tensor) -> Iterator[torch.Generator]:
    """Yield one CPU generator per image, image i's being seeded with seed + i: the same numbers on every device."""
    for index in indices.tolist():
        yield torch.Generator().manual_seed(seed + index)


def uniform(streams: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Draw from [-1, 1], one image of `like` from each stream."""
    draws = [torch.rand(like.shape[1:], generator=stream, dtype=like.dtype) for stream in streams]
    return (2 * torch.stack(draws) - 1).to(like.device)
