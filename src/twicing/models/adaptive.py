"""Adaptive softmax whose weights are those of the input embedding: frequent words first, rare ones in clusters.

Grave et al., arXiv 1609.04309; adaptive input and tied weights: Baevski and Auli, arXiv 1809.10853. Every cluster has
the full width (div_val 1), so that the input is one table, and the output reads the same table row by row.
torch.nn.AdaptiveLogSoftmaxWithLoss keeps weights of its own and cannot be tied.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TiedSoftmax(nn.Module):
    """log p(word | features) with the rows W of the embedding as output weights.

    Without cut-offs: log softmax(W x), and nothing to learn here. With cut-offs 0 < c_0 < c_1 < ... < V, words are
    numbered by falling frequency; a head chooses among the first c_0 words and one entry for each cluster, and word w
    of cluster k has log p(k) + log softmax(W_k x + b_k)_w. Biases b and cluster entries are learned here; W is given
    at every call, so that it exists once.
    Raises ValueError for cut-offs that do not rise from 1 to below the size of the vocabulary.
    Source: arXiv 1609.04309, section 4, with one width for all clusters.
    """

    def __init__(self, vocabulary: int, width: int, cutoffs: Sequence[int] = ()):
        super().__init__()
        ends = [0, *cutoffs, vocabulary]
        if any(low >= high for low, high in pairwise(ends)):
            raise ValueError(
                f"cutoffs must rise from 1 to below {vocabulary}, the size of the vocabulary: got {list(cutoffs)}."
            )
        self.vocabulary, self.width, self.cutoffs = vocabulary, width, tuple(cutoffs)
        self.clusters = list(pairwise(ends[1:])) if cutoffs else []
        self.head_size = ends[1]
        if self.clusters:
            self.bias = nn.Parameter(torch.zeros(vocabulary))
            self.cluster_weight = nn.Parameter(torch.zeros(len(self.clusters), width))
            self.cluster_bias = nn.Parameter(torch.zeros(len(self.clusters)))

    def losses(self, features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """-log p(target), in nats and in fp32 at least.

        features: [..., C]; targets: [...], whole numbers; weight: [V, C]. Returns [...].
        Costs a softmax over the head for every position, and over a cluster for the positions whose target is in it.
        """
        flat, wanted = features.reshape(-1, self.width), targets.reshape(-1).long()
        head = self._head(flat, weight)
        # In the head, a word of cluster k counts as that cluster's entry.
        entry = wanted
        for k, (low, _) in enumerate(self.clusters):
            entry = torch.where(wanted >= low, self.head_size + k, entry)
        found = -head.gather(1, entry[:, None]).squeeze(1)
        for k, (low, high) in enumerate(self.clusters):
            inside = ((wanted >= low) & (wanted < high)).nonzero().squeeze(1)
            scores = self._cluster(flat[inside], weight, k)
            within = -scores.gather(1, (wanted[inside] - low)[:, None]).squeeze(1)
            found = found.index_add(0, inside, within)
        return found.view(targets.shape)

    def log_probabilities(self, features: Tensor, weight: Tensor) -> Tensor:
        """log p of every word: features [..., C] to [..., V], in fp32 at least. For few positions or few words."""
        head = self._head(features, weight)
        parts = [head[..., : self.head_size]]
        for k in range(len(self.clusters)):
            parts.append(head[..., self.head_size + k, None] + self._cluster(features, weight, k))
        return torch.cat(parts, dim=-1)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"{self.vocabulary} words, cut-offs {list(self.cutoffs) or 'none'}"

    def _head(self, features: Tensor, weight: Tensor) -> Tensor:
        if not self.clusters:
            return _log_softmax(F.linear(features, weight))
        rows = torch.cat([weight[: self.head_size], self.cluster_weight])
        bias = torch.cat([self.bias[: self.head_size], self.cluster_bias])
        return _log_softmax(F.linear(features, rows, bias))

    def _cluster(self, features: Tensor, weight: Tensor, k: int) -> Tensor:
        low, high = self.clusters[k]
        return _log_softmax(F.linear(features, weight[low:high], self.bias[low:high]))


def _log_softmax(scores: Tensor) -> Tensor:
    # Sums over ten thousand words would lose digits in half precision.
    return F.log_softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
