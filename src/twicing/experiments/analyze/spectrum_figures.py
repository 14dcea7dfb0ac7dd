"""The figures of spectra: numbers by layer, eigenvalues, and singular values."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, NullLocator

from twicing.experiments.analyze.figures import OF_A, OF_P, curves_of_rows, of_seeds, plain_ticks, shown_models
from twicing.experiments.analyze.keep import Analysis, Rows
from twicing.experiments.curves import Curves, Picture, Styles, draw
from twicing.experiments.drawing import INK, LINE_WIDTH, Panel, drawing_settings
from twicing.experiments.theory.drawing import guide_line, legend

# Of a layer: the rest lies nearer to 0 and would be one blot.
MOST_POINTS = 250
# Values by head, [H, N], their colour, mark and words.
Drawn = tuple[np.ndarray[Any, Any], str, str, str]


@drawing_settings()
def shares(analysis: Analysis, styles: Styles) -> Picture:
    """By layer: how much of the spectrum is as the theory takes it, and the largest singular value."""
    panels = []
    # Of a causal A all eigenvalues are so, and a line at 1 shows nothing.
    shown = () if analysis.causal else (("fits_theory", "Real eigenvalues of A in [0, 1]", "share"),)
    for name, title, axis in (
        *shown,
        ("largest_singular", "Largest singular value of A", "singular value"),
        ("effective_rank", "Effective rank of A", "dimensions"),
    ):
        panel = Panel(f"spectrum-{name}", title)
        draw(panel.axes, _by_layer(analysis.spectrum, name, styles), styles)
        panel.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.axes.set_xlabel("layer")
        panel.axes.set_ylabel(axis)
        if name == "fits_theory":
            panel.axes.set_ylim(-0.03, 1.03)
        else:
            panel.axes.set_ylim(0, 1.08 * panel.axes.dataLim.y1)
        panels.append(panel)
    caption = (
        f"Means over heads and {analysis.unit}. The theory takes every eigenvalue of A as real and in [0, 1], which "
        "also makes the largest singular value of a symmetric A 1. Effective rank as Roy and Vetterli define it, not "
        f"centred.{of_seeds(analysis)}"
    )
    return Picture("spectrum-by-layer", panels, caption)


@drawing_settings()
def eigenvalues(analysis: Analysis) -> Picture | None:
    """For the first and the last layer of each drawn model: the complex plane, or where they are real, their sizes."""
    panels, left_out = [], False
    for place, model in enumerate(shown_models(analysis)):
        about = analysis.models[model]
        for layer in sorted({1, about["layers"]}):
            of_a = analysis.arrays.get(model, {}).get(f"eigenvalues/{layer}")
            if of_a is None:
                continue
            panel = Panel(f"eigenvalues-{place}-{layer}", f"{about['label']}, layer {layer}")
            drawn = [(of_a, OF_A, "o", "A")]
            of_p = analysis.arrays[model].get(f"eigenvalues_p/{layer}")
            if of_p is not None:
                drawn.append((of_p, OF_P, "s", _formula(analysis, model, layer)))
            (_by_size if analysis.causal else _in_the_plane)(panel, drawn)
            left_out |= of_a.size > MOST_POINTS
            panels.append(panel)
    return Picture("eigenvalues", panels, _of_eigenvalues(analysis, left_out)) if panels else None


def _of_eigenvalues(analysis: Analysis, left_out: bool) -> str:
    """What the figure shows, in words."""
    polynomial = "The eigenvalues of a polynomial of A are that polynomial of A's eigenvalues"
    if analysis.causal:
        return (
            f"Eigenvalues of the causal matrices on one of the {analysis.unit}, of each head from the largest down, "
            f"means over heads. They are the diagonal of A: the shares that tokens take from themselves. {polynomial}."
        )
    all_drawn = f"All eigenvalues of a layer's matrices, every head's, on one of the {analysis.unit}."
    farthest = (
        f"Eigenvalues of a layer's matrices, every head's, on one of the {analysis.unit}: of all that a layer has, "
        f"only the {MOST_POINTS} farthest from 0 are drawn, of A and of p(A) alike; the others, which lie nearer to 0, "
        "are left out."
    )
    return (
        f"{farthest if left_out else all_drawn} Between the dotted ends lies what the theory takes. {polynomial}, "
        "complex or not."
    )


@drawing_settings()
def singular(analysis: Analysis) -> Picture | None:
    """Singular values in order, beside what they would be if they followed the polynomial."""
    panels = []
    for place, model in enumerate(shown_models(analysis)):
        about, arrays = analysis.models[model], analysis.arrays.get(model, {})
        for layer in sorted({1, about["layers"]}):
            of_a, of_p = arrays.get(f"singular/{layer}"), arrays.get(f"singular_p/{layer}")
            if of_a is None:
                continue
            head = _widest_miss(analysis, model, layer)
            panel = Panel(f"singular-{place}-{layer}", f"{about['label']}, layer {layer}, head {head + 1}")
            x = np.arange(1, of_a.shape[1] + 1)
            panel.axes.plot(x, of_a[head], color=OF_A, linewidth=LINE_WIDTH, label="A")
            if of_p is not None:
                words = _formula(analysis, model, layer)
                panel.axes.plot(x, of_p[head], color=OF_P, linewidth=LINE_WIDTH, label=words)
                if words == "2A - A^2":
                    mapped = np.sort(np.abs(2 * of_a[head] - of_a[head] ** 2))[::-1]
                    guide_line(panel.axes, x.tolist(), mapped.tolist(), "2s - s^2 of A's")
            _by_place(panel, len(x))
            panel.axes.set_ylabel("singular value")
            legend(panel.axes, "upper right")
            panels.append(panel)
    caption = (
        f"Singular values on one of the {analysis.unit}, in the head where they miss the polynomial most. Unlike "
        "eigenvalues they need not follow 2 x - x^2 where A is not normal: the distance between the blue and the "
        "dotted line."
    )
    return Picture("singular-values", panels, caption) if panels else None


def _by_layer(rows: Rows, name: str, styles: Styles) -> Curves:
    """Mean over the heads, by label, seed and layer."""
    found: dict[tuple[str, int, int], list[float]] = {}
    for row in rows:
        found.setdefault((row["label"], row["seed"], row["layer"]), []).append(row[name])
    means: Rows = [
        {"label": label, "seed": seed, "layer": layer, name: float(np.mean(values))}
        for (label, seed, layer), values in found.items()
    ]
    return curves_of_rows(means, "layer", name, styles)


def _formula(analysis: Analysis, model: str, layer: int) -> str:
    """What p(A) is there."""
    rows = (row for row in analysis.spectrum if row["model"] == model and row["layer"] == layer)
    return str(next(rows)["p"])


def _widest_miss(analysis: Analysis, model: str, layer: int) -> int:
    rows = [row for row in analysis.spectrum if row["model"] == model and row["layer"] == layer]
    return int(np.argmax([row["singular_miss"] or 0.0 for row in rows]))


def _in_the_plane(panel: Panel, drawn: Sequence[Drawn]) -> None:
    """As points of the complex plane, within the unit circle."""
    angle = np.linspace(0, 2 * np.pi, 200)
    panel.axes.plot(np.cos(angle), np.sin(angle), color=INK, linewidth=0.6, alpha=0.35)
    panel.axes.plot([0, 1], [0, 0], color=INK, linewidth=0.9, alpha=0.7, linestyle=(0, (1, 2)), marker="|")
    panel.axes.set_aspect("equal", adjustable="datalim")
    for values, color, mark, words in drawn:
        flat = values.flatten()
        largest = flat[np.argsort(-np.abs(flat), kind="stable")[:MOST_POINTS]]
        panel.axes.plot(
            largest.real.round(5), largest.imag.round(5), mark, color=color, markersize=2.6, alpha=0.55, label=words,
            markeredgewidth=0,
        )  # fmt: skip
    panel.axes.set_xlabel("real part")
    panel.axes.set_ylabel("imaginary part")
    legend(panel.axes)


def _by_size(panel: Panel, drawn: Sequence[Drawn]) -> None:
    """As lines from the largest down, for spectra that are real."""
    for values, color, _, words in drawn:
        sizes = -np.sort(-values.real, axis=-1)
        x = np.arange(1, sizes.shape[-1] + 1)
        panel.axes.plot(x, sizes.mean(0), color=color, linewidth=LINE_WIDTH, label=words)
    _by_place(panel, len(x))
    panel.axes.set_ylabel("eigenvalue")
    legend(panel.axes, "upper right")


def _by_place(panel: Panel, n: int) -> None:
    """Axes for values in order of their size."""
    panel.axes.set_xscale("log")
    panel.axes.set_xticks(*plain_ticks(1, n))
    panel.axes.xaxis.set_minor_locator(NullLocator())
    panel.axes.set_xlabel("place by size")
    panel.axes.set_ylim(bottom=0)
