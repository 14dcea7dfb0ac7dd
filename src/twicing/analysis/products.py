"""What is left after n layers of attention alone: the effective rank of the product A_n ... A_1, layer by layer.

arXiv 2503.00687, section 3.1, argues with powers of one matrix: what n equal layers keep falls as n^-1, twiced as
n^-1/2. A trained model has a different matrix in every layer and head, and residual connections, projections and
feed-forward parts between them, all of which are left out here. How heads become one matrix is our reading.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from twicing.analysis.spectrum import rank_of, singular_values


def mean_of_heads(matrices: Sequence[Tensor]) -> list[Tensor]:
    """One matrix a layer, [..., N, N], from [..., H, N, N]: the mean over the heads, as rollout has it."""
    return [matrix.mean(-3) for matrix in matrices]


def product_ranks(matrices: Sequence[Tensor]) -> Tensor:
    """The effective rank of A_n ... A_1 for n = 1 to L, [L, ...], float64.

    matrices: A_1 to A_L, [..., N, N]. With heads in the shape, [..., H, N, N], each head is multiplied with the head
    of the same number in the next layer: a chain for every head, though which heads meet is arbitrary.
    A product that is one common row, where all tokens are the same, has rank 1. See spectrum.rank_of().
    Raises ValueError where there is no matrix, or one is not square or not finite.
    """
    if not matrices:
        raise ValueError("a product takes one matrix or more: got none.")
    ranks, so_far = [], None
    for matrix in matrices:
        so_far = matrix.double() if so_far is None else matrix.double() @ so_far
        ranks.append(rank_of(singular_values(so_far)))
    return torch.stack(ranks)
