"""Causal linear attention by chunks of tokens: within a chunk its own small matrix, before it what the keys summed to.

With chunks of C tokens, the rows of one are  S V = (tril(phi(Q) phi(K)^T) V + phi(Q) Z) / weights,  Z the sum of
phi(k) v^T over all earlier chunks: O(N D (C + F)) time and O(N) memory. arXiv 2006.16236, section 3.3, in blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# The weights of a row sum to 1 - EPSILON / (phi(q) . sum phi(k)); the released code of arXiv 2006.16236 has this one.
EPSILON = 1e-6


# So many chunks are summed by one small product; more are summed in groups, and the groups in the same way.
GROUP = 16


class ChunkedRows:
    """The rows of the causal S for new tokens, after tokens of which only sums are known; makes S V for any values.

    phi_q, phi_k: [..., H, n, F], features of the new tokens.
    chunk_size: C, tokens per chunk.
    weights_before: [..., H, 1, F], the sum of phi(k) over the tokens before; None where there are none.
    weights: [..., H, chunks, 1, F], what each chunk adds to that.
    """

    def __init__(self, phi_q: Tensor, phi_k: Tensor, chunk_size: int, weights_before: Tensor | None = None) -> None:
        self._tokens = phi_q.shape[-2]
        self._size = max(1, min(chunk_size, self._tokens))
        self._phi_q, self._phi_k = self._in_chunks(phi_q), self._in_chunks(phi_k)
        self._within = (self._phi_q @ self._phi_k.mT).tril()
        self.weights = self._phi_k.sum(-2, keepdim=True)
        earlier = _earlier(self.weights, weights_before)
        self._row_sums = self._within.sum(-1, keepdim=True) + self._phi_q @ earlier.mT + EPSILON

    def smooth(self, values: Tensor, sums_before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """S V for values [..., H, n, Dv], and what each chunk adds to the sum of phi(k) v^T, [..., H, chunks, F, Dv].

        sums_before: [..., H, F, Dv], that sum over the tokens before; None where there are none.
        """
        values = self._in_chunks(values)
        added = self._phi_k.mT @ values
        rows = (self._within @ values + self._phi_q @ _earlier(added, sums_before)) / self._row_sums
        return rows.flatten(-3, -2)[..., : self._tokens, :], added

    def _in_chunks(self, rows: Tensor) -> Tensor:
        """[..., n, D] as [..., chunks, C, D]; zeros after the last token, which weigh nothing."""
        missing = -self._tokens % self._size
        rows = F.pad(rows, (0, 0, 0, missing)) if missing else rows
        return rows.unflatten(-2, (rows.shape[-2] // self._size, self._size))


def sum_after(added: Tensor, before: Tensor | None) -> Tensor:
    """The sum over all tokens so far, [..., F, D], from what each chunk adds to the sum before."""
    return added.sum(-3) if before is None else before + added.sum(-3)


def _earlier(added: Tensor, before: Tensor | None) -> Tensor:
    """From what each chunk adds, [..., chunks, F, D]: what is there before each chunk."""
    earlier = _sums_of_earlier(added.flatten(-2)).unflatten(-1, added.shape[-2:])
    return earlier if before is None else earlier + before.unsqueeze(-3)


def _sums_of_earlier(rows: Tensor) -> Tensor:
    """The sum of all earlier rows for each of [..., n, E]; a cumsum() along such an axis is several times slower."""
    count = rows.shape[-2]
    if count <= GROUP:
        return torch.ones(count, count, dtype=rows.dtype, device=rows.device).tril(-1) @ rows
    missing = -count % GROUP
    grouped = F.pad(rows, (0, 0, 0, missing)) if missing else rows
    grouped = grouped.unflatten(-2, (grouped.shape[-2] // GROUP, GROUP))
    earlier_groups = _sums_of_earlier(grouped.sum(-2))
    earlier = _sums_of_earlier(grouped) + earlier_groups.unsqueeze(-2)
    return earlier.flatten(-3, -2)[..., :count, :]
