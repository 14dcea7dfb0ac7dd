"""Kernels by name, as logarithms: weights are formed as a softmax, which neither overflows nor underflows.

t = distance / bandwidth. Constants are left out: Nadaraya-Watson divides by the sum of the weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LogKernel = Callable[[Tensor], Tensor]


def _box(t: Tensor) -> Tensor:
    return torch.where(t <= 1, 0.0, -torch.inf).to(t.dtype)


def _log_of_positive(weight: Tensor) -> Tensor:
    return weight.clamp_min(0).log()


# Both tails and compact supports; each is even, and 0 < K(0).
KERNELS: dict[str, LogKernel] = {
    "gaussian": lambda t: -0.5 * t.square(),
    "laplace": lambda t: -t,
    "box": _box,
    "triangular": lambda t: _log_of_positive(1 - t),
    "epanechnikov": lambda t: _log_of_positive(1 - t.square()),
    "biweight": lambda t: 2 * _log_of_positive(1 - t.square()),
    "tricube": lambda t: 3 * _log_of_positive(1 - t**3),
}


def log_kernel(name: str) -> LogKernel:
    """log K(t) for t >= 0, by name; minus infinity outside of the support.

    Raises ValueError with the names that there are.
    """
    if name not in KERNELS:
        raise ValueError(f"there is no kernel {name!r}: choose one of {', '.join(KERNELS)}.")
    return KERNELS[name]
