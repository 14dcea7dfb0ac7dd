"""The floor: what twicing must cost beside one SDPA call when A is kept, in units of N^2 D multiply-adds per head.

Standard attention takes 2 units forward and 5 backward (it makes A again), twicing 3 and 7: one product more forward,
and two more backward.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from twicing.experiments.bench.cases import Case

STANDARD_FORWARD, STANDARD_BACKWARD = 2, 5
TWICING_FORWARD, TWICING_BACKWARD = 3, 7
# (7 + 3) / (5 + 2), for forward and backward together, by arithmetic.
TRAINING_UNITS = (TWICING_BACKWARD + TWICING_FORWARD) / (STANDARD_BACKWARD + STANDARD_FORWARD)

# Blocks of rows of a causal product, each as wide as its last row: a sixteenth more than the triangle.
CAUSAL_BLOCKS = 16
# Products of fewer rows would measure the calls, not the arithmetic.
LEAST_ROWS = 64
# Beyond it, one matrix stands for those of several heads.
MOST_BYTES = 1 << 30


def forward_floor(sdpa: float, product: float) -> float:
    """The least ratio to one SDPA call, (t_sdpa + t_product) / t_sdpa, of the two times."""
    return (sdpa + (TWICING_FORWARD - STANDARD_FORWARD) * product) / sdpa


def training_floor(sdpa: float, product: float) -> float:
    """The same of forward and backward together, (t_sdpa + 3 t_product) / t_sdpa, but at least that of the arithmetic.

    Where heads are narrow a fused kernel has its products for less than a product of its own costs.
    """
    more = TWICING_FORWARD + TWICING_BACKWARD - STANDARD_FORWARD - STANDARD_BACKWARD
    return max(TRAINING_UNITS, (sdpa + more * product) / sdpa)


def product_of(case: Case) -> Callable[[], object]:
    """A call that makes one product A R of the case's shape, of its triangle where it is causal."""
    heads, tokens = case.batch * case.heads, case.tokens
    element = torch.empty((), dtype=case.dtype).element_size()
    together = max(1, min(heads, MOST_BYTES // (tokens * tokens * element)))
    generator = torch.Generator().manual_seed(2)
    # The numbers do not matter, unless they were zeros or denormals.
    row = torch.rand(tokens, generator=generator).to(case.device, case.dtype) / tokens
    attn = row.expand(together, tokens, tokens).contiguous()
    _, _, value = case.inputs()
    value = value.flatten(0, 1)

    def product() -> list[Tensor]:
        return [
            part
            for start in range(0, heads, together)
            for part in _products(attn, value[start : start + together], case.is_causal)
        ]

    return product


def _products(attn: Tensor, value: Tensor, is_causal: bool) -> list[Tensor]:
    attn = attn[: len(value)]
    if not is_causal:
        return [torch.bmm(attn, value)]
    tokens = value.shape[1]
    rows = max(LEAST_ROWS, -(-tokens // CAUSAL_BLOCKS))
    blocks = [(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]
    return [torch.bmm(attn[:, start:end, :end], value[:, :end]) for start, end in blocks]
