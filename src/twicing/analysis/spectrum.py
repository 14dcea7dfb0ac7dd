"""The spectrum of attention matrices: eigenvalues, complex ones as such, singular values, and what of it fits theory.

The theory of twicing (arXiv 2503.00687, section 3) takes eigenvalues that are real and in [0, 1]. Trained matrices are
not symmetric, so theirs need not be, and singular values are another matter than eigenvalues.
"""

import torch
from torch import Tensor

# A in float64 has eigenvalues to about 1e-8 where two of them meet (the root of the rounding error); beyond this an
# imaginary part is none of rounding's, and an eigenvalue is outside of [0, 1].
ROUNDING = 1e-6


def eigenvalues(matrices: Tensor) -> Tensor:
    """The eigenvalues of [..., N, N], as [..., N], complex128, the largest moduli first.

    Those of causal matrices are their diagonals, exactly. Raises ValueError where a matrix is not square or not finite.
    """
    precise = _precise(matrices)
    found = (
        precise.diagonal(dim1=-2, dim2=-1).to(torch.complex128) if is_causal(precise) else torch.linalg.eigvals(precise)
    )
    return found.gather(-1, found.abs().argsort(dim=-1, descending=True, stable=True))


def is_causal(matrices: Tensor) -> bool:
    """Whether nothing lies above the diagonals of matrices [..., N, N]: no token takes from a later one."""
    return not matrices.triu(1).any()


def singular_values(matrices: Tensor) -> Tensor:
    """The singular values of [..., N, N], as [..., N], float64, descending.

    Raises ValueError where a matrix is not square or not finite.
    """
    return torch.linalg.svdvals(_precise(matrices))


def is_real(spectrum: Tensor, tolerance: float = ROUNDING) -> Tensor:
    """Whether each eigenvalue is real: its imaginary part at most the tolerance, in absolute terms."""
    return spectrum.imag.abs() <= tolerance


def fits_theory(spectrum: Tensor, tolerance: float = ROUNDING) -> Tensor:
    """Whether each eigenvalue is real and in [0, 1], as the theory takes them, both up to the tolerance."""
    return is_real(spectrum, tolerance) & (spectrum.real >= -tolerance) & (spectrum.real <= 1 + tolerance)


def rank_of(singular: Tensor) -> Tensor:
    """The effective rank exp(-sum_i p_i log p_i), p_i = s_i / sum s, of singular values [..., N]; 0 where all are 0.

    N equal ones have rank N, a single one rank 1. Unlike similarity.effective_rank() nothing is centred: of a product
    of attention matrices the constant vector, which every layer keeps, counts as one dimension.
    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    total = singular.sum(-1, keepdim=True)
    entropy = torch.special.entr(torch.where(total == 0, 0.0, singular / total)).sum(-1)
    return torch.where(total.squeeze(-1) == 0, 0.0, entropy.exp())


def _precise(matrices: Tensor) -> Tensor:
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"a spectrum is of square matrices, [..., N, N]: got the shape {list(matrices.shape)}.")
    if not matrices.isfinite().all():
        raise ValueError("an attention matrix holds values that are not finite: the model has diverged.")
    return matrices.double()
