"""What is timed: the shape of one attention call, its dtype and device, and which of its passes."""

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from twicing.names import listed
from twicing.testing import make_inputs

FORWARD = "forward"
TRAINING = "forward + backward"
PASSES = (FORWARD, TRAINING)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Case:
    """One attention call: [B, H, N, D], the same for query, key and value."""

    batch: int
    heads: int
    tokens: int
    width: int
    is_causal: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, H, N, D]."""
        return self.batch, self.heads, self.tokens, self.width

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + ("-causal" if self.is_causal else "")

    def inputs(self, *, needs_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Normal query, key and value of its own, the same numbers every time."""
        query, key, value = (tensor.clone() for tensor in _drawn_inputs(self.shape, self.dtype, self.device))
        return query.requires_grad_(needs_grad), key.requires_grad_(needs_grad), value.requires_grad_(needs_grad)

    def upstream(self) -> Tensor:
        """The gradient of the output, normal and dense."""
        return _drawn_upstream(self.shape, self.dtype, self.device).clone()


# Numbers are drawn by the CPU, for large shapes in many seconds: once for all contenders and passes, and for the causal
# case beside the other.
@lru_cache(maxsize=1)
def _drawn_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    return make_inputs(shape, generator=torch.Generator().manual_seed(0), dtype=dtype, device=device)


@lru_cache(maxsize=1)
def _drawn_upstream(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def parse_case(text: str, dtype: torch.dtype, device: torch.device) -> Case:
    """The case that a shape such as "32x3x197x64" or "2x8x1024x64-causal" names."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)(-causal)?", text)
    if found is None or any(int(size) == 0 for size in found.groups()[:4]):
        raise ValueError(
            f"A shape is batch, heads, tokens and width, as in 32x3x197x64 or 2x8x1024x64-causal: got {text!r}."
        )
    batch, heads, tokens, width = (int(size) for size in found.groups()[:4])
    return Case(batch, heads, tokens, width, found[5] is not None, dtype, device)


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of that name."""
    if name not in DTYPES:
        raise ValueError(f"Unknown dtype {name!r}: {listed(name, DTYPES)}")
    return DTYPES[name]


def parse_device(name: str) -> torch.device:
    """The device of that name, which must be there."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"Unknown device {name!r}: {listed(name, ['cpu', 'cuda'])}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device that this torch can use: leave out --device cuda.")
    return torch.device(name)
