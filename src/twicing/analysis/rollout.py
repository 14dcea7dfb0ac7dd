"""Attention rollout: how much of each input token is in each token after n layers, if attention were all that mixes.

S. Abnar and W. Zuidema, "Quantifying Attention Flow in Transformers", arXiv 2005.00928, section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def rollout(matrices: Sequence[Tensor]) -> list[Tensor]:
    """R_n = (A_n / 2 + I / 2) R_(n-1), rows normalised to sum to 1, R_0 = I; for n = 1 to L, each [..., N, N].

    matrices: A_1 to A_L, [..., H, N, N], whose mean over heads is A_n; the I / 2 stands for the residual connection.
    Of 2 A - A A in place of A (ours, not in the paper) rows sum to 1 as well, and entries may be negative.
    A row of A that is zero (a query that may attend to nothing) leaves its token as it is.
    Raises ValueError where there is no matrix, or one of them has no heads.
    Source: arXiv 2005.00928, equation 1; the average over heads is theirs.
    """
    if not matrices:
        raise ValueError("rollout takes one matrix or more: got none.")
    rolled: list[Tensor] = []
    for matrix in matrices:
        if matrix.ndim < 3:
            raise ValueError(f"rollout takes matrices with heads, [..., H, N, N]: got {list(matrix.shape)}.")
        mean = matrix.mean(-3)
        mixed = (mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)) / 2
        # Not by absolute values: rows of A and of 2 A - A A alike sum to 1, and with the identity to something above 0.
        mixed = mixed / mixed.sum(-1, keepdim=True)
        rolled.append(mixed @ rolled[-1] if rolled else mixed)
    return rolled
