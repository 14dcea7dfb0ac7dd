"""The functional behind attention: neighbours that look alike should have alike values, and stay near the data.

    E(u) = J_w(u) + lambda G(u),   J_w(u) = 1/2 sum_ij w_ij |u_i - u_j|^2,   G(u) = 1/2 sum_i |u_i - f_i|^2

One step down its gradient, with the right step size, is attention. arXiv 2503.00687, section 2.2, equation 7 and
appendix A.3; Gilboa and Osher, 2007. The factors 1/2, the quadratic G and the step size are our reading.
"""

import torch
from torch import Tensor


def nonlocal_energy(values: Tensor, weights: Tensor, data: Tensor, fidelity: float = 0.0) -> Tensor:
    """E(u), a scalar. values: u, [N, D]; weights: w, [N, N], not negative; data: f, [N, D]; fidelity: lambda."""
    apart = (values[:, None] - values[None]).square().sum(2)
    return 0.5 * (weights * apart).sum() + 0.5 * fidelity * (values - data).square().sum()


def nonlocal_gradient(values: Tensor, weights: Tensor, data: Tensor, fidelity: float = 0.0) -> Tensor:
    """The gradient of E, [N, D]: sum_j (w_ij + w_ji)(u_i - u_j) + lambda (u_i - f_i).

    Only the symmetric part of the weights matters: an energy cannot tell w from its transpose.
    Source: arXiv 2503.00687, appendix A.3.
    """
    symmetric = weights + weights.T
    pull = symmetric.sum(1, keepdim=True) * values - symmetric @ values
    return pull + fidelity * (values - data)


def gradient_step(values: Tensor, weights: Tensor, data: Tensor, fidelity: float = 0.0) -> Tensor:
    """One step down the gradient with step size t_i = 1 / sum_j (w_ij + w_ji): u <- A u + lambda t (f - u), [N, D].

    A is the row-normalised symmetric part of the weights. Without fidelity the step is A u, an attention layer; with
    it, what the layers smooth away is pulled back from the data. It converges where A has no eigenvalue below 0
    and lambda t_i < 1; a stronger pull may overshoot. Source: arXiv 2503.00687, equation 7.
    """
    size = 1 / (weights + weights.T).sum(1, keepdim=True)
    return values - size * nonlocal_gradient(values, weights, data, fidelity)


def similarity_matrix(weights: Tensor) -> Tensor:
    """A of gradient_step(): (w + w^T) with rows divided by their sums, [N, N]."""
    symmetric = weights + weights.T
    return symmetric / symmetric.sum(1, keepdim=True)


def minimiser(weights: Tensor, data: Tensor, fidelity: float) -> Tensor:
    """Where the gradient is zero, [N, D]: (L + lambda I) u = lambda f, L = D - (w + w^T) the graph's Laplacian.

    Raises ValueError without fidelity: then every constant is a minimiser.
    """
    if fidelity <= 0:
        raise ValueError(f"fidelity must be positive, else every constant minimises the energy: got {fidelity}.")
    symmetric = weights + weights.T
    laplacian = torch.diag(symmetric.sum(1)) - symmetric
    return torch.linalg.solve(laplacian + fidelity * torch.eye(len(weights), dtype=weights.dtype), fidelity * data)
