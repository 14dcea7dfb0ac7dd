"""How much of a spectrum is left when a smoother is applied n times: kappa_n(p), the integral of p(x)^n over [0, 1].

x is an eigenvalue of the smoother and p the polynomial by which boosting moves it; kappa_n is the mean of what n equal
layers leave of eigenvalues spread evenly over [0, 1]. arXiv 2503.00687, section 3.1 and Proposition 1.
"""

import math

import numpy as np
import torch
from torch import Tensor

from twicing.ops.boost import boost, check_order

# Fine enough for the narrowest peak of interest: of p^n at x = 1 it is as wide as 1 / n for order 1.
PANELS = 512
NODES = 32


def boosted_eigenvalue(x: Tensor, order: int = 2, gain: float = 1.0) -> Tensor:
    """p(x) = 1 - (1 - x)(1 - g x)^(m - 1), where boosting sends the eigenvalue x of a smoother.

    x: any shape, real or complex. Order 1 leaves x; order 2 with gain 1 gives 2 x - x^2. A smoother with the one
    eigenvalue x multiplies by x, so this is boost() of ops/boost.py itself. Raises as boost() does.
    Source: arXiv 2503.00687, section 3.2 (order 2, gain 1).
    """
    return boost(lambda values: x * values, torch.ones_like(x), order, gain)


def eigencapacity(n: int, order: int = 2) -> float:
    """kappa_n of the boosted smoother with gain 1, in closed form: Gamma(1 + 1/m) n! / Gamma(n + 1 + 1/m).

    With y = 1 - x it is the integral of (1 - y^m)^n, a beta function. Order 1 gives 1 / (n + 1), order 2 gives
    4^n (n!)^2 / (2 n + 1)!. Raises TypeError or ValueError where n or the order is no positive integer.
    Source: arXiv 2503.00687, Proposition 1 (orders 1 and 2).
    """
    _check_times(n)
    check_order(order)
    root = 1 / order
    return math.exp(math.lgamma(1 + root) + math.lgamma(n + 1) - math.lgamma(n + 1 + root))


def asymptote(n: int, order: int = 2) -> float:
    """What kappa_n comes to for large n: Gamma(1 + 1/m) n^(-1/m); 1 / n for order 1, sqrt(pi / n) / 2 for order 2.

    Source: arXiv 2503.00687, Proposition 1 (orders 1 and 2).
    """
    _check_times(n)
    check_order(order)
    return math.gamma(1 + 1 / order) * n ** (-1 / order)


def eigencapacity_by_quadrature(n: int, order: int = 2, gain: float = 1.0) -> float:
    """The integral of p(x)^n over [0, 1] by Gauss-Legendre on 512 panels, for any order and gain.

    Good to about 12 digits up to n = 10,000. For gains above 1 the integrand exceeds 1 and grows with n.
    Raises TypeError or ValueError where n or the order is no positive integer, or the gain no finite number.
    """
    _check_times(n)
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    left = np.arange(PANELS)[:, None] / PANELS
    x = torch.from_numpy(left + (nodes + 1) / (2 * PANELS))
    values = boosted_eigenvalue(x, order, gain) ** n
    return float((values * torch.from_numpy(weights)).sum() / (2 * PANELS))


def admissible(a: float, points: int = 4001) -> bool:
    """Whether q(x) = a x + (1 - a) x^2 keeps x <= q(x) <= 1 on [0, 1]: no eigenvalue falls, none passes 1.

    Looked at on a grid; by algebra it is so for 1 <= a <= 2. q fixes 0 and 1 for every a, a = 1 is the smoother itself
    and a = 2 twicing; a - 1 is the gain of order 2. Source: arXiv 2503.00687, section 3.2.
    """
    x = torch.linspace(0, 1, points, dtype=torch.float64)
    q = boosted_eigenvalue(x, 2, a - 1)
    # Rounding may put q a little above 1 near x = 1, where it is flat for a = 2.
    return bool((q >= x - 1e-12).all() and (q <= 1 + 1e-12).all())


def _check_times(n: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n must be an integer, how often the smoother is applied: got {n!r}.")
    if n < 1:
        raise ValueError(f"n must be at least 1, how often the smoother is applied: got {n}.")
