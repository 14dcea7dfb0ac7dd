"""What the theory assumes of A, and which matrices are not like that: asymmetric, causal, different, trained."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from twicing.classical.eigencapacity import boosted_eigenvalue, eigencapacity
from twicing.experiments.curves import Picture
from twicing.experiments.drawing import TESTED, Panel, drawing_settings
from twicing.experiments.theory.drawing import guide_line, legend, log_scale, order_line
from twicing.experiments.theory.experiment import LIMIT, OWN, STATED, TWICING, Claim, Experiment, slope
from twicing.experiments.theory.trained_attention import held_out_images, train_digit_classifier
from twicing.ops.reference import attention_matrix, effective_matrix

TOKENS, WIDTH = 64, 16
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# The place of 16 layers, deep enough for most models.
SHALLOW = 4
IMAGES = 64
# What of the slowest eigenvalue is left where the late slopes begin: there, few others are.
SLOWEST_LEFT = math.exp(-4)
# Below this an imaginary part is rounding, and an eigenvalue outside of [0, 1] by less is inside.
ROUNDING = 1e-6
DIGITS = 1e-9


@dataclass(frozen=True)
class Spectrum:
    """Of many matrices together: the share of eigenvalues that are real and in [0, 1], and of those below 0.1.

    real, imaginary: the eigenvalues of some of them, for the figure. singular: the largest singular value.
    """

    in_range: float
    small: float
    real: tuple[float, ...]
    imaginary: tuple[float, ...]
    singular: float


@dataclass(frozen=True)
class Assumptions:
    """One draw of random tokens, and one small trained classifier per order.

    spectra: by kind of matrix. mapping: the largest distance between an eigenvalue of 2 A - A A and 2 x - x^2 of one
    of A, asymmetric A. singular_mapping: of singular values, the same, relative to the largest.
    causal_diagonal: the largest distance between eigenvalues and diagonal of a causal A.
    depths, capacity: the mean of p(x)^n over the eigenvalues of one matrix, by order, with kappa_n beside it;
    late_depths: at which the second largest eigenvalue has SLOWEST_LEFT left, by order.
    late_slopes: of the mean's logarithm, after the largest eigenvalue is taken out, from there to twice the depth.
    product: what is left of centred tokens after n different matrices, by order.
    accuracy: of the trained classifiers on held-out digits, by order.
    """

    spectra: dict[str, Spectrum]
    mapping: float
    singular_mapping: float
    causal_diagonal: float
    depths: tuple[int, ...]
    capacity: dict[int, tuple[float, ...]]
    kappa: dict[int, tuple[float, ...]]
    late_depths: dict[int, int]
    late_slopes: dict[int, float]
    product: dict[int, tuple[float, ...]]
    accuracy: dict[int, float]


def measure(seed: int) -> Assumptions:
    """Draw queries and keys; train two small classifiers on digits."""
    draw = torch.Generator().manual_seed(seed)

    def tokens() -> Tensor:
        return torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64)

    x = tokens()
    query, key = tokens(), tokens()
    symmetric, asymmetric = attention_matrix(x, x), attention_matrix(query, key)
    causal = attention_matrix(query, key, is_causal=True)
    spectra = {
        "queries = keys": _spectrum(symmetric[None]),
        "queries, keys apart": _spectrum(asymmetric[None]),
        "causal": _spectrum(causal[None]),
    }
    accuracy = {}
    for order in (1, 2):
        model, accuracy[order] = train_digit_classifier(order, seed)
        with torch.no_grad():
            trained = torch.cat([one.flatten(0, 1) for one in model.matrices(held_out_images(seed, IMAGES))])
        spectra[f"trained, order {order}"] = _spectrum(trained.double())
    twiced = effective_matrix(query, key)
    eigenvalues = torch.linalg.eigvals(symmetric).real.clamp(0, 1).sort().values
    capacity = {order: _capacity(eigenvalues, order) for order in (1, 2)}
    # The eigenvalue 1 belongs to the constant vector, which every layer keeps.
    late = {order: _late(eigenvalues[:-1], order) for order in (1, 2)}
    return Assumptions(
        spectra=spectra,
        mapping=_farthest(torch.linalg.eigvals(twiced), boosted_eigenvalue(torch.linalg.eigvals(asymmetric))),
        singular_mapping=_singular_mapping(asymmetric, twiced),
        causal_diagonal=_farthest(torch.linalg.eigvals(causal), torch.diagonal(causal).to(torch.complex128)),
        depths=DEPTHS,
        capacity=capacity,
        kappa={order: tuple(eigencapacity(n, order) for n in DEPTHS) for order in (1, 2)},
        late_depths={order: depth for order, (depth, _) in late.items()},
        late_slopes={order: steepness for order, (_, steepness) in late.items()},
        product=_products(draw),
        accuracy=accuracy,
    )


def claims(numbers: Assumptions) -> tuple[Claim, ...]:
    """What the numbers show."""
    share = {name: 100 * spectrum.in_range for name, spectrum in numbers.spectra.items()}
    same, apart = numbers.spectra["queries = keys"], numbers.spectra["queries, keys apart"]
    trained = [numbers.spectra[f"trained, order {order}"] for order in (1, 2)]
    late, depth = numbers.late_slopes, numbers.late_depths
    return (
        Claim(
            "The eigenvalues of 2 A - A A are 2 x - x^2 of those of A, for any A.",
            f"{TWICING}, section 3.2",
            STATED,
            f"asymmetric A, complex eigenvalues: farthest {numbers.mapping:.1e}",
            numbers.mapping < DIGITS,
        ),
        Claim(
            "Singular values are not mapped so where A is not normal.",
            "our measurement",
            LIMIT,
            f"2 s - s^2 misses the singular values of 2 A - A A by up to {100 * numbers.singular_mapping:.0f} % of the "
            "largest",
            numbers.singular_mapping > 0.05,
        ),
        Claim(
            "With equal queries and keys the eigenvalues of A are real and in [0, 1], although A is not symmetric.",
            "our derivation, docs/theory.md",
            OWN,
            f"{share['queries = keys']:.0f} % are; largest singular value {same.singular:.2f}",
            same.in_range == 1.0 and same.singular > 1,
        ),
        Claim(
            "With queries apart from keys most are not: the theory's spectrum is no spectrum of such an A.",
            "our measurement",
            LIMIT,
            f"{share['queries, keys apart']:.0f} % are real and in [0, 1]",
            apart.in_range < 0.5,
        ),
        Claim(
            "A causal A has its diagonal for eigenvalues: real, in (0, 1], and near 0 for late tokens.",
            "our derivation, docs/theory.md",
            LIMIT,
            f"farthest from the diagonal {numbers.causal_diagonal:.1e}; {100 * numbers.spectra['causal'].small:.0f} % "
            "lie below 0.1, where an even spread has 10 %",
            numbers.causal_diagonal < DIGITS and numbers.spectra["causal"].small > 0.5,
        ),
        Claim(
            "Trained matrices are like neither: part of their spectrum is complex or negative, and most of it is "
            "near 0.",
            "our measurement",
            LIMIT,
            f"a two-layer classifier of digits (accuracy {numbers.accuracy[1]:.3f} and, twiced, "
            f"{numbers.accuracy[2]:.3f}): {100 * trained[0].in_range:.0f} % and {100 * trained[1].in_range:.0f} % real "
            f"and in [0, 1], {100 * trained[0].small:.0f} % and {100 * trained[1].small:.0f} % smaller than 0.1 "
            "in size",
            all(spectrum.in_range < 0.99 and spectrum.small > 0.5 for spectrum in trained),
        ),
        Claim(
            "Any one matrix loses what is not constant exponentially, with twicing and without: n^-1 and n^-1/2 "
            "are the "
            "mean over a spectrum that reaches up to 1 without a gap.",
            "our derivation, docs/theory.md",
            LIMIT,
            f"log-log slopes {late[1]:.1f} from {depth[1]} to {2 * depth[1]} layers and, twiced, {late[2]:.1f} from "
            f"{depth[2]} to {2 * depth[2]}, instead of -1 and -0.5; after "
            f"{numbers.depths[SHALLOW]} layers with an A of their own {100 * numbers.product[1][SHALLOW]:.2g} % and "
            f"{100 * numbers.product[2][SHALLOW]:.2g} % of the tokens' differences are left, where n^-1 and n^-1/2 are "
            f"{100 / numbers.depths[SHALLOW]:.0f} % and {100 / numbers.depths[SHALLOW] ** 0.5:.0f} %",
            late[1] < -1.5 and late[2] < -0.75 and all(values[SHALLOW] < 0.01 for values in numbers.product.values()),
        ),
    )


@drawing_settings()
def picture(numbers: Assumptions) -> Picture:
    """Eigenvalues in the complex plane, the mean of a real spectrum against kappa_n, and products of matrices."""
    plane = Panel("assumptions-plane", "Eigenvalues, one and many matrices")
    guide_line(plane.axes, (0, 1), (0, 0), "assumed: evenly on [0, 1]")
    for name, place, mark in (
        ("queries, keys apart", 2, "."),
        ("trained, order 1", 0, "."),
        ("queries = keys", 1, "x"),
    ):
        found = numbers.spectra[name]
        plane.axes.plot(found.real, found.imaginary, mark, markersize=3, color=TESTED[place], label=name, alpha=0.6)
    plane.axes.set(xlabel="real part", ylabel="imaginary part")
    legend(plane.axes)
    capacity = Panel("assumptions-capacity", "Mean of a spectrum after n layers")
    for order in (1, 2):
        guide_line(capacity.axes, numbers.depths, numbers.kappa[order])
        order_line(capacity.axes, order, numbers.depths, numbers.capacity[order])
    log_scale(capacity.axes)
    capacity.axes.set(xlabel="layers n", ylabel="mean of p(x)^n")
    legend(capacity.axes)
    product = Panel("assumptions-product", "Tokens' differences after n layers")
    for order in (1, 2):
        order_line(product.axes, order, numbers.depths, numbers.product[order])
    log_scale(product.axes)
    product.axes.set(xlabel="layers n, each with its own A", ylabel="share left", ylim=(1e-8, 2))
    share = Panel("assumptions-share", "Real and in [0, 1]", size=(3.6, 2.5))
    names = list(numbers.spectra)
    share.axes.barh(names[::-1], [100 * numbers.spectra[name].in_range for name in names[::-1]], color=TESTED[1])
    share.axes.set(xlabel="share of eigenvalues [%]")
    caption = (
        "Dotted in the second panel: kappa_n, for eigenvalues spread evenly; the curves level off at 1 / N, the "
        "constant vector's share. No residual connections here: they, not the order, are what keeps deep tokens apart."
    )
    return Picture("assumptions", [plane, share, capacity, product], caption)


def _spectrum(matrices: Tensor) -> Spectrum:
    eigenvalues = torch.linalg.eigvals(matrices).flatten()
    real, imaginary = eigenvalues.real, eigenvalues.imag
    fits = (imaginary.abs() < ROUNDING) & (real > -ROUNDING) & (real < 1 + ROUNDING)
    some = eigenvalues[:: max(1, len(eigenvalues) // 300)]
    return Spectrum(
        in_range=float(fits.double().mean()),
        small=float((eigenvalues.abs() < 0.1).double().mean()),
        real=tuple(some.real.tolist()),
        imaginary=tuple(some.imag.tolist()),
        singular=float(torch.linalg.matrix_norm(matrices, 2).max()),
    )


def _farthest(found: Tensor, expected: Tensor) -> float:
    """The largest distance from one of the found to the nearest of the expected, and back."""
    apart = (found[:, None] - expected[None]).abs()
    return max(float(apart.min(0).values.max()), float(apart.min(1).values.max()))


def _singular_mapping(A: Tensor, twiced: Tensor) -> float:
    found = torch.linalg.svdvals(twiced)
    mapped = boosted_eigenvalue(torch.linalg.svdvals(A)).abs().sort(descending=True).values
    return float((found - mapped).abs().max() / found[0])


def _capacity(eigenvalues: Tensor, order: int) -> tuple[float, ...]:
    return tuple(float((boosted_eigenvalue(eigenvalues, order) ** n).mean()) for n in DEPTHS)


def _late(eigenvalues: Tensor, order: int) -> tuple[int, float]:
    """A depth n at which the largest of the eigenvalues, ascending, is nearly gone, and the slope from n to 2 n.

    How deep that is depends on the gap below 1, which twicing squares: at a fixed depth a draw may not be there yet.
    """
    depth = math.ceil(math.log(SLOWEST_LEFT) / math.log(float(boosted_eigenvalue(eigenvalues[-1], order))))
    left = [float((boosted_eigenvalue(eigenvalues, order) ** n).mean()) for n in (depth, 2 * depth)]
    return depth, slope((depth, 2 * depth), left)


def _products(draw: torch.Generator) -> dict[int, tuple[float, ...]]:
    """|centred| after n layers without residual connections, each with tokens of its own for A, relative."""
    start = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64)
    values = dict.fromkeys((1, 2), start)
    left: dict[int, list[float]] = {1: [], 2: []}
    for n in range(1, DEPTHS[-1] + 1):
        x = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64)
        for order in (1, 2):
            layer = attention_matrix(x, x) if order == 1 else effective_matrix(x, x)
            values[order] = layer @ values[order]
            if n in DEPTHS:
                centred = values[order] - values[order].mean(0)
                left[order].append(float(centred.norm() / (start - start.mean(0)).norm()))
    return {order: tuple(shares) for order, shares in left.items()}


ABOUT = (
    "Proposition 1 assumes one symmetric A for all layers, with eigenvalues spread evenly over [0, 1]. Here the "
    "assumptions are taken away one at a time; the trained matrices come from two small classifiers of scikit-learn's "
    "digits, trained for a few seconds."
)
EXPERIMENT = Experiment("assumptions", "Where the assumptions end", ABOUT, measure, claims, picture)
