"""A fixed choice of images in which every class has its share: the same for every arm and seed, on every machine."""

import torch
from torch import Tensor

# Another choice would be as good; that it never changes is what counts.
CHOICE_SEED = 0


def balanced_order(labels: Tensor) -> Tensor:
    """Positions 0 to n - 1 in an order of which every beginning holds the classes in their shares, to one image.

    labels: [n], whole numbers. Within a class the order is shuffled. Returns [n], int64.
    """
    generator = torch.Generator().manual_seed(CHOICE_SEED)
    shuffled = torch.randperm(len(labels), generator=generator)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        # The i-th of m images of a class stands where i + 1/2 of m is, between 0 and 1.
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    # Stable over the shuffle, so that classes of equal size do not always come in the same order.
    return shuffled[place[shuffled].sort(stable=True).indices]
