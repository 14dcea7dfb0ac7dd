"""The one formula of this library: smooth, then smooth again what the smoother left behind.

Twicing is Tukey's name for order 2. arXiv 2503.00687, Definition 2 and Algorithm 1 (with A as the smoother).
"""

from collections.abc import Callable

from torch import Tensor

Smoother = Callable[[Tensor], Tensor]


def boosted_values(smooth: Smoother, values: Tensor, order: int = 2, gain: float | Tensor = 1.0) -> Tensor:
    """The values r whose smoothing is the boosted result: r = v, then (order - 1) times r <- r + g (v - S r)."""
    boosted = values
    for _ in range(order - 1):
        boosted = boosted + gain * (values - smooth(boosted))
    return boosted


def boost(smooth: Smoother, values: Tensor, order: int = 2, gain: float | Tensor = 1.0) -> Tensor:
    """U = S r with r = boosted_values(...), so U = (I - (I - S)(I - gS)^(order - 1)) v."""
    return smooth(boosted_values(smooth, values, order, gain))
