"""The one formula of this library: smooth, then smooth again what the smoother left behind.

    r = v;   (m - 1) times:  r <- r + g (v - S r);   u = S r            order m, gain g

Order 2 is Tukey's twicing; with S = softmax attention it is Twicing Attention (arXiv 2503.00687, Definition 2, Alg. 1).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Smoother = Callable[[Tensor], Tensor]


def boosted_values(smooth: Smoother, values: Tensor, order: int = 2, gain: float | Tensor = 1.0) -> Tensor:
    """The values r whose smoothing S r is the boosted result: r = v, then (m - 1) times r <- r + g (v - S r).

    smooth: v -> S v, linear, in any layout; it keeps the shape, or broadcasts it.
    order: m, how many times the result was smoothed: the degree of the polynomial in S, not the order of a kernel
        in the statistician's sense. 1 returns the values themselves.
    gain: g, a finite number or a tensor that broadcasts to the values; its values are not inspected.
    Returns r in the dtype of the values; for half precision the sums are formed in fp32 and rounded once.
    Raises TypeError or ValueError where order is no positive integer, or gain no finite number.
    Source: arXiv 2503.00687, Algorithm 1 (order 2, gain 1).
    """
    check_order(order)
    check_number(gain)
    wide = torch.promote_types(values.dtype, torch.float32)
    boosted = values.to(wide)
    for _ in range(order - 1):
        left_behind = values.to(wide) - smooth(boosted.to(values.dtype))
        boosted = boosted + gain * left_behind
    return boosted.to(values.dtype)


def boost(smooth: Smoother, values: Tensor, order: int = 2, gain: float | Tensor = 1.0) -> Tensor:
    """The values smoothed and boosted, u = S r = (I - (I - S)(I - g S)^(m - 1)) v, with r = boosted_values(...).

    It boosts any smoother there is: `boost(lambda v: flex_attention(q, k, v), v)` twices FlexAttention, and with
    order 2 and gain 1 gives S v + S (v - S v) = (2 S - S S) v. Where the rows of S sum to 1, so do those of the result.
    Arguments, rounding and errors are those of boosted_values(); order 1 is smooth(values).
    Source: arXiv 2503.00687, Definition 2 and equation 18.
    """
    return smooth(boosted_values(smooth, values, order, gain))


def check_order(order: int) -> None:
    """Raise where the order is not a positive integer."""
    if not isinstance(order, int) or isinstance(order, bool):
        raise TypeError(f"order must be an integer, how many times to smooth: got {order!r}, a {type(order).__name__}.")
    if order < 1:
        raise ValueError(f"order must be at least 1 (1 is plain smoothing, 2 is twicing): got {order}.")


def check_number(gain: float | Tensor) -> None:
    """Raise where the gain is neither a tensor nor a finite number; what is inside a tensor is not looked at."""
    if isinstance(gain, Tensor):
        return
    if not isinstance(gain, (int, float)) or isinstance(gain, bool):
        raise TypeError(f"gain must be a number or a tensor: got {gain!r}, a {type(gain).__name__}.")
    # math.isfinite() would break the graph of torch.compile, which makes a changing number symbolic.
    if not -math.inf < gain < math.inf:
        raise ValueError(f"gain must be finite (1 is twicing, 0 is plain smoothing): got {gain}.")
