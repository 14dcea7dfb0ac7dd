"""How alike the tokens of one image or text are: mean pairwise cosine, distance to the mean token, effective rank.

The cosine is the measure of arXiv 2503.00687; the distance that of Dong et al., arXiv 2103.03404, in the
Frobenius norm; the effective rank is Roy and Vetterli's, EUSIPCO 2007.
"""

import torch
from torch import Tensor


def mean_pairwise_cosine(tokens: Tensor) -> Tensor:
    """Mean over the pairs i < j of the signed cosine between token i and token j.

    tokens: [B, N, C], N >= 2, every token (a class token too) counting alike. Returns [B], float64, in [-1, 1].
    A token of zeros has cosine 0 with every other.
    By the sum: (||sum_i u_i||^2 - sum_i ||u_i||^2) / (N (N - 1)), u_i = x_i / ||x_i||: O(N C), exact.
    Near 1 the tokens point the same way; a common mean token alone suffices for that. Source: arXiv 2503.00687.
    """
    tokens = _precise(tokens)
    n = tokens.shape[1]
    length = torch.linalg.vector_norm(tokens, dim=2, keepdim=True)
    directions = torch.where(length == 0, 0.0, tokens / length)
    return (directions.sum(1).square().sum(1) - directions.square().sum((1, 2))) / (n * (n - 1))


def distance_to_mean(tokens: Tensor) -> Tensor:
    """||X - 1 mean(X)|| / ||X||, Frobenius: the share of the tokens that is not the token they have in common.

    tokens: [B, N, C], N >= 2. Returns [B], float64, in [0, 1]: 0 where all tokens are the same (all zeros too),
    1 where their mean is zero. Source: arXiv 2103.03404, its residual.
    """
    tokens = _precise(tokens)
    size = torch.linalg.vector_norm(tokens, dim=(1, 2))
    distance = torch.linalg.vector_norm(tokens - tokens.mean(1, keepdim=True), dim=(1, 2))
    return torch.where(size == 0, 0.0, distance / size)


def effective_rank(tokens: Tensor) -> Tensor:
    """exp(-sum_i p_i log p_i), p_i = s_i / sum s, s the singular values of the centred tokens X - 1 mean(X).

    tokens: [B, N, C], N >= 2. Returns [B], float64: from 1 to min(N - 1, C), in "dimensions"; 0 where all tokens are
    the same. Unlike the cosine it does not see the mean token. NaN where a token is not finite, as the others give.
    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    tokens = _precise(tokens)
    finite = tokens.isfinite().all(2).all(1)
    centred = tokens - tokens.mean(1, keepdim=True)
    # The decomposition raises on values that are not finite, and one diverged sample must not hide the others.
    singular = torch.linalg.svdvals(torch.where(finite[:, None, None], centred, 0.0))
    # What rounding leaves of the mean is not a dimension.
    noise = max(tokens.shape[1:]) * torch.finfo(tokens.dtype).eps * torch.linalg.vector_norm(tokens, dim=(1, 2))
    singular = torch.where(singular > noise.unsqueeze(1), singular, 0.0)
    total = singular.sum(1, keepdim=True)
    entropy = torch.special.entr(torch.where(total == 0, 0.0, singular / total)).sum(1)
    rank = torch.where(total.squeeze(1) == 0, 0.0, entropy.exp())
    return torch.where(finite, rank, torch.nan)


def _precise(tokens: Tensor) -> Tensor:
    if tokens.ndim != 3 or tokens.shape[1] < 2 or not tokens.is_floating_point():
        raise ValueError(
            "tokens must be floating point of shape [B, N, C] with N >= 2 tokens, as there are no pairs of one: "
            f"got {tokens.dtype} of shape {list(tokens.shape)}."
        )
    # Apple's GPUs have no float64.
    return tokens.float() if tokens.device.type == "mps" else tokens.double()
