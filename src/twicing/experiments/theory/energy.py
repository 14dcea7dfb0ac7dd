"""Attention as one step down the gradient of a functional, and what a pull towards the data prevents."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from twicing.classical.eigencapacity import boosted_eigenvalue
from twicing.classical.nonlocal_energy import (
    gradient_step,
    minimiser,
    nonlocal_energy,
    nonlocal_gradient,
    similarity_matrix,
)
from twicing.experiments.curves import Picture
from twicing.experiments.drawing import Panel, drawing_settings
from twicing.experiments.theory.drawing import kind_line, legend, log_scale
from twicing.experiments.theory.experiment import LIMIT, OUR_READING, TWICING, Claim, Experiment, yes
from twicing.ops.boost import boost
from twicing.ops.reference import attention_matrix

TOKENS, WIDTH = 48, 8
FIDELITIES = (0.0, 0.05, 0.2)
# Too strong a pull for attention's step size, whatever the draw: where t_i is 1, A_ii - lambda t_i is below -1.
TOO_STRONG = 2.0
STEPS = 60
# Steps to the end, but no more than a spectral radius of .998 needs.
MOST_STEPS, AT_REST = 10_000, 1e-12
DIGITS = 1e-10


@dataclass(frozen=True)
class Energy:
    """Tokens of one draw, weights exp(x_i x_j / sqrt D), divided by twice the smallest row sum.

    gradient: autograd against the formula, relative, with weights that are not symmetric and fidelity 0.2.
    step: the step without fidelity against A u. symmetric_part: how far A is from the row-normalised w alone, relative:
    0 where w is symmetric. energies: E along the steps, as a share of its start, by fidelity.
    kept: distance to the mean token along the steps, as a share of the start, by fidelity, and for twicing.
    limit: after many steps, the distance to the solution of the linear system, relative, largest over fidelities.
    radius: the spectral radius of the step, A - lambda diag(t), by fidelity: above 1 it diverges.
    smallest, second: the smallest and the second largest eigenvalue of A.
    """

    gradient: float
    step: float
    symmetric_part: float
    energies: dict[float, tuple[float, ...]]
    kept: dict[str, tuple[float, ...]]
    limit: float
    radius: dict[float, float]
    smallest: float
    second: float


def measure(seed: int) -> Energy:
    """Random tokens; queries and keys are the tokens."""
    draw = torch.Generator().manual_seed(seed)
    data = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64)
    other = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64)
    uneven = _weights(data, other)
    point = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64, requires_grad=True)
    (by_autograd,) = torch.autograd.grad(nonlocal_energy(point, uneven, data, 0.2), point)
    by_formula = nonlocal_gradient(point.detach(), uneven, data, 0.2)
    weights = _weights(data, data)
    A = similarity_matrix(weights)
    energies: dict[float, tuple[float, ...]] = {}
    kept: dict[str, tuple[float, ...]] = {}
    distances: list[float] = []
    for fidelity in FIDELITIES:
        values, along, left = data, [], []
        for _ in range(STEPS + 1):
            along.append(float(nonlocal_energy(values, weights, data, fidelity)))
            left.append(_spread(values) / _spread(data))
            values = gradient_step(values, weights, data, fidelity)
        energies[fidelity] = tuple(energy / along[0] for energy in along)
        kept[f"lambda = {fidelity:g}"] = tuple(left)
        if fidelity > 0:
            for _ in range(MOST_STEPS):
                before, values = values, gradient_step(values, weights, data, fidelity)
                if _relative(before, values) < AT_REST:
                    break
            distances.append(_relative(values, minimiser(weights, data, fidelity)))
    values, left = data, []
    for _ in range(STEPS + 1):
        left.append(_spread(values) / _spread(data))
        values = boost(lambda v: A @ v, values)
    kept["twicing, lambda = 0"] = tuple(left)
    step_sizes = 1 / (weights + weights.T).sum(1)
    radius = {
        fidelity: float(torch.linalg.eigvals(A - fidelity * torch.diag(step_sizes)).abs().max())
        for fidelity in (*FIDELITIES, TOO_STRONG)
    }
    # Those of a row-normalised symmetric matrix are real.
    eigenvalues = torch.linalg.eigvals(A).real.sort().values
    return Energy(
        gradient=_relative(by_formula, by_autograd),
        step=_relative(gradient_step(data, weights, data), attention_matrix(data, data) @ data),
        symmetric_part=_relative(similarity_matrix(uneven), uneven / uneven.sum(1, keepdim=True)),
        energies=energies,
        kept=kept,
        # Unlike Python's, torch's maximum is not a number where one of them is not.
        limit=float(torch.tensor(distances).max()),
        radius=radius,
        smallest=float(eigenvalues[0]),
        second=float(eigenvalues[-2]),
    )


def claims(numbers: Energy) -> tuple[Claim, ...]:
    """What the numbers show."""
    falls = all(
        # What is left to rounding once the steps have converged is no rise.
        after <= before * (1 + 1e-12)
        for along in numbers.energies.values()
        for before, after in pairwise(along)
    )
    kept = {name: values[-1] for name, values in numbers.kept.items()}
    twiced = float(boosted_eigenvalue(torch.tensor(numbers.second, dtype=torch.float64)))
    return (
        Claim(
            "The gradient of E is sum_j (w_ij + w_ji)(u_i - u_j) + lambda (u_i - f_i).",
            f"{TWICING}, appendix A.3",
            OUR_READING,
            f"against autograd, weights not symmetric: relative difference {numbers.gradient:.1e}",
            numbers.gradient < DIGITS,
        ),
        Claim(
            "With step size 1 / sum_j (w_ij + w_ji) and lambda = 0 a gradient step is an attention layer, A u.",
            f"{TWICING}, equation 7 and appendix A.3",
            OUR_READING,
            f"against attention_matrix(x, x) u: relative difference {numbers.step:.1e}; E falls at each of {STEPS} "
            f"steps: {yes(falls)}; smallest eigenvalue of A {numbers.smallest:.3f}",
            numbers.step < DIGITS and falls and numbers.smallest > 0,
        ),
        Claim(
            "Without fidelity the tokens become one token; with lambda > 0 they stop at the solution of a linear "
            "system.",
            f"{TWICING}, equation 7",
            OUR_READING,
            f"after {STEPS} steps {100 * kept['lambda = 0']:.2g} % of the distance to the mean token is left at "
            f"lambda = 0 and {100 * kept['lambda = 0.2']:.3g} % at 0.2; distance to the solution {numbers.limit:.1e}",
            kept["lambda = 0"] < 0.1 < kept["lambda = 0.2"] and numbers.limit < 1e-8,
        ),
        Claim(
            "Attention's step size suits the smoothing only: too strong a pull diverges.",
            "our derivation, docs/theory.md",
            LIMIT,
            "spectral radius of the step "
            + ", ".join(f"{value:.3f} at lambda = {fidelity:g}" for fidelity, value in numbers.radius.items()),
            all((value < 1) == (0 < fidelity < TOO_STRONG) for fidelity, value in numbers.radius.items() if fidelity),
        ),
        Claim(
            "Twicing slows the collapse and does not prevent it.",
            "our measurement",
            LIMIT,
            f"after {STEPS} layers with one A, {100 * kept['twicing, lambda = 0']:.2g} % is left with twicing and "
            f"{100 * kept['lambda = 0']:.2g} % without; in the long run a layer leaves {twiced:.4f} instead of "
            f"{numbers.second:.4f} of it",
            kept["lambda = 0"] < kept["twicing, lambda = 0"] and numbers.second < twiced < 1,
        ),
        Claim(
            "The functional only sees the symmetric part of the weights: with queries other than the keys, "
            "attention is "
            "not its gradient step.",
            "our derivation, docs/theory.md",
            LIMIT,
            f"the step's matrix differs from row-normalised w by {100 * numbers.symmetric_part:.0f} % (Frobenius)",
            numbers.symmetric_part > 0.05,
        ),
    )


@drawing_settings()
def picture(numbers: Energy) -> Picture:
    """Energy and distance to the mean token along the steps."""
    falling = Panel("energy-falling", "Energy along the steps")
    for place, (fidelity, along) in enumerate(numbers.energies.items()):
        kind_line(falling.axes, place, range(STEPS + 1), along, f"lambda = {fidelity:g}")
    log_scale(falling.axes, x=False)
    falling.axes.set(xlabel="step", ylabel="E / E at the start", ylim=(5e-4, 1.5))
    legend(falling.axes)
    left = Panel("energy-kept", "Distance to the mean token, left")
    for place, (name, along) in enumerate(numbers.kept.items()):
        kind_line(left.axes, place, range(STEPS + 1), along, name)
    log_scale(left.axes, x=False)
    left.axes.set(xlabel="step", ylabel="share of the start", ylim=(0.01, 1.5))
    legend(left.axes)
    caption = (
        f"{TOKENS} random tokens of width {WIDTH}, weights exp(x_i x_j / sqrt D). Twicing with lambda = 0 collapses "
        "later; only a pull towards the data stops it."
    )
    return Picture("energy", [falling, left], caption)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    weights = torch.exp(query @ key.T / key.shape[1] ** 0.5)
    # Only lambda's size against the weights depends on this: then the largest step size t_i is 1 in every draw.
    return weights / (2 * weights.sum(1).min())


def _spread(values: Tensor) -> float:
    return float((values - values.mean(0)).norm())


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


ABOUT = (
    "E(u) = 1/2 sum_ij w_ij |u_i - u_j|^2 + lambda/2 sum_i |u_i - f_i|^2 asks that tokens which look alike have alike "
    "values, and that they stay near the data f. The factors, the quadratic data term and the step size are our "
    "reading of the paper."
)
EXPERIMENT = Experiment("energy", "The functional behind attention", ABOUT, measure, claims, picture)
