"""Feature maps of linear attention: A_ij is proportional to phi(q_i) . phi(k_j), with phi nowhere negative.

All act on one token's query or key [..., D] and have no parameters.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from twicing.names import listed
from twicing.ops.call import to_query_heads

FeatureMap = Callable[[Tensor], Tensor]


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, [..., D] -> [..., D]. "Transformers are RNNs", arXiv 2006.16236, equation 7."""
    # The same number as F.elu(x) + 1, which loses the digits of exp(x) against the 1 where x is far below zero.
    return F.relu(x) + x.clamp(max=0.0).exp()


def relu(x: Tensor) -> Tensor:
    """max(x, 0), [..., D] -> [..., D]; a query without a positive number gets zero.

    The generalised attention of Performer, arXiv 2009.14794; the linear attention of EfficientViT, arXiv 2205.14756.
    """
    return F.relu(x)


def dpfp(x: Tensor) -> Tensor:
    """r_i r_{i-1} with r = max([x, -x], 0), cyclic in i, [..., D] -> [..., 2 D]: features that rarely meet.

    The deterministic parameter-free projection with nu = 1 of "Linear Transformers Are Secretly Fast Weight
    Programmers", arXiv 2102.11174.
    """
    rectified = F.relu(torch.cat([x, -x], dim=-1))
    return rectified * rectified.roll(1, dims=-1)


FEATURE_MAPS: dict[str, FeatureMap] = {"elu+1": elu_plus_one, "relu": relu, "dpfp": dpfp}


def find_feature_map(name: str) -> FeatureMap:
    """The feature map of that name, or a ValueError with the known ones."""
    if name not in FEATURE_MAPS:
        raise ValueError(f"Unknown feature map {name!r}: {listed(name, FEATURE_MAPS)}")
    return FEATURE_MAPS[name]


def features_of(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, enable_gqa: bool, feature_map: str
) -> tuple[Tensor, Tensor]:
    """phi(Q) [..., H, N, F] and phi(K) [..., H, S, F], zero where a key is masked, in fp32 for half precision.

    attn_mask: bool, [..., any, S], the same for every query; its first row is taken.
    """
    phi = find_feature_map(feature_map)
    wide = torch.promote_types(query.dtype, torch.float32)
    phi_q, phi_k = phi(query.to(wide)), to_query_heads(phi(key.to(wide)), query, enable_gqa)
    if attn_mask is not None:
        phi_k = torch.where(attn_mask[..., :1, :].mT, phi_k, 0.0)
    return phi_q, phi_k
