"""Entropy of attention: how many keys a query spreads its attention over, in nats and as a share of the largest.

Rows that are uniform average all tokens, which is what makes tokens alike; rows of entropy near zero copy one token.
"""

import torch
from torch import Tensor

from twicing.analysis.attention_inputs import AttentionInputs

# At or below this, a number that is added to the scores is a mask: hosts write -inf, the dtype's lowest, -1e9 or -1e4.
MASKED = -1e4


def keys_allowed(inputs: AttentionInputs) -> Tensor:
    """How many keys each query may attend to, [B, H, N], int64: what the mask and is_causal leave of the N keys."""
    batch, heads, queries = inputs.query.shape[:3]
    keys = inputs.key.shape[-2]
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=inputs.query.device)
    if inputs.is_causal:
        allowed = allowed.tril()
    mask = inputs.attn_mask
    if mask is not None:
        allowed = mask if mask.dtype == torch.bool else mask > MASKED
    # The last axis may have been left to broadcasting.
    return allowed.expand(*allowed.shape[:-1], keys).sum(-1).expand(batch, heads, queries)


def attention_entropy(inputs: AttentionInputs) -> Tensor:
    """Mean over heads and queries of H_i = -sum_j A_ij log A_ij, and of its share H_i / log n_i of the largest.

    n_i: the number of keys that query i may attend to. Returns [B, 2], float64: nats, in [0, log N], and share, in
    [0, 1]: 1 where attention is uniform, 0 where every query attends to one key. Left out are queries that may attend
    to nothing, and in the share also those with one key, which have no choice (the first token of a causal layer).
    NaN where no query is left.
    Of a converted layer it is the entropy of A, not of what the mechanism makes of it, which may be negative.
    """
    entropy = torch.special.entr(_precise(inputs.matrix())).sum(-1)
    keys = keys_allowed(inputs).to(entropy.dtype)
    nats = _mean_where(entropy, keys > 0)
    share = _mean_where(entropy / keys.clamp(min=2).log(), keys > 1)
    return torch.stack([nats, share], dim=1).double()


def _mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of [B, H, N] over heads and queries that count, [B]; NaN where none does."""
    total = torch.where(counted, values, 0.0).sum((1, 2))
    return total / counted.sum((1, 2))


def _precise(matrix: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return matrix if matrix.device.type == "mps" else matrix.double()
