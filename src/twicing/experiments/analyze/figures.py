"""The figures of an analysis: shares by layer, spectra, products against depth, the bandwidth test."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, NullLocator

from twicing.experiments.analyze.keep import Analysis, Rows
from twicing.experiments.curves import Curves, Picture, Styles, draw
from twicing.experiments.drawing import INK, LINE_WIDTH, TESTED, Panel, drawing_settings
from twicing.experiments.theory.drawing import guide_line, legend

# Of each matrix: the rest lies nearer to 0 and would be one blot.
MOST_POINTS = 250
OF_A, OF_P, OWN = TESTED[0], TESTED[1], TESTED[2]


def shown_models(analysis: Analysis) -> list[str]:
    """The models that are drawn one by one."""
    return [name for name, model in analysis.models.items() if model["shown"]]


@drawing_settings()
def shares(analysis: Analysis, styles: Styles) -> Picture:
    """By layer: how much of the spectrum is as the theory takes it, and the largest singular value."""
    panels = []
    for name, title, axis in (
        ("fits_theory", "Real eigenvalues of A in [0, 1]", "share"),
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
            panel.axes.set_ylim(bottom=0)
        panels.append(panel)
    caption = (
        "Means over heads and images. The theory takes every eigenvalue of A as real and in [0, 1], which also makes "
        "the largest singular value of a symmetric A 1. Effective rank as Roy and Vetterli define it, not centred. "
        "Thick lines are means over seeds, thin lines are seeds."
    )
    return Picture("spectrum-by-layer", panels, caption)


@drawing_settings()
def eigenvalues(analysis: Analysis) -> Picture | None:
    """The complex plane, for the first and the last layer of each drawn model."""
    panels = []
    for place, model in enumerate(shown_models(analysis)):
        about = analysis.models[model]
        for layer in sorted({1, about["layers"]}):
            of_a = analysis.arrays.get(model, {}).get(f"eigenvalues/{layer}")
            if of_a is None:
                continue
            panel = Panel(f"eigenvalues-{place}-{layer}", f"{about['label']}, layer {layer}")
            of_p = analysis.arrays[model].get(f"eigenvalues_p/{layer}")
            _unit_circle(panel)
            _points(panel, of_a, OF_A, "o", "A")
            if of_p is not None:
                _points(panel, of_p, OF_P, "s", _formula(analysis, model, layer))
            panel.axes.set_xlabel("real part")
            panel.axes.set_ylabel("imaginary part")
            legend(panel.axes)
            panels.append(panel)
    caption = (
        f"Eigenvalues of the matrices of all heads on one image; of each matrix's, the {MOST_POINTS} of largest "
        "modulus over all heads. Between the dotted ends lies what the theory takes. Those of a polynomial of A are "
        "that polynomial of A's eigenvalues, complex or not."
    )
    return Picture("eigenvalues", panels, caption) if panels else None


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
            panel.axes.set_xscale("log")
            panel.axes.set_xticks(*_plain_ticks(1, len(x)))
            panel.axes.xaxis.set_minor_locator(NullLocator())
            panel.axes.set_xlabel("place by size")
            panel.axes.set_ylabel("singular value")
            panel.axes.set_ylim(bottom=0)
            legend(panel.axes, "upper right")
            panels.append(panel)
    caption = (
        "Singular values on one image, in the head where they miss the polynomial most. Unlike eigenvalues they need "
        "not follow 2 x - x^2 where A is not normal: the distance between the blue and the dotted line."
    )
    return Picture("singular-values", panels, caption) if panels else None


@drawing_settings()
def products(analysis: Analysis) -> Picture | None:
    """The effective rank of the product of the first n layers' matrices, against n."""
    if not analysis.products:
        return None
    panels = []
    for place, label in enumerate(_shown_labels(analysis)):
        rows = [row for row in analysis.products if row["label"] == label]
        for number, way in enumerate(("mean over heads", "chains of heads")):
            panel = Panel(f"products-{place}-{number}", label)
            first = 0.0
            for kind, color, mark in (("A", OF_A, "o"), ("2A - A^2", OF_P, "s"), ("as the layers do", OWN, "^")):
                depths, means = _by_depth(rows, f"{kind}, {way}")
                if depths:
                    panel.axes.plot(
                        depths, means, color=color, marker=mark, markersize=4, linewidth=LINE_WIDTH, label=kind
                    )
                    first = means[0] if kind == "A" else first
            guide = sorted({row["depth"] for row in rows})
            for power, words in ((-1.0, "n^-1"), (-0.5, "n^-1/2")):
                line = [first * n**power for n in guide]
                guide_line(panel.axes, guide, line)
                # Where the line is still inside: no rank is below 1.
                end = max(place for place, value in enumerate(line) if place == 0 or value > 1)
                panel.axes.annotate(words, (guide[end], line[end]), fontsize=7.5, color=INK, ha="right")
            panel.axes.set_xscale("log")
            panel.axes.set_yscale("log")
            panel.axes.set_ylim(bottom=0.9)
            panel.axes.set_xticks(*_plain_ticks(1, guide[-1]))
            panel.axes.set_yticks(*_plain_ticks(1, panel.axes.get_ylim()[1]))
            panel.axes.xaxis.set_minor_locator(NullLocator())
            panel.axes.yaxis.set_minor_locator(NullLocator())
            panel.axes.set_xlabel(f"depth n, {way}")
            panel.axes.set_ylabel("effective rank")
            legend(panel.axes, "lower left")
            panels.append(panel)
    caption = (
        "Effective rank of A_n ... A_1, the attention matrices alone: residual connections, values and feed-forward "
        "parts are left out, so it is no rank of the model's tokens. Our reading: heads are averaged into one matrix a "
        "layer, or each head is multiplied with the head of the same number in the next layer and the ranks are "
        "averaged. 2A - A^2 is made of the same A in every layer, whatever the model does. Dotted: n^-1 and n^-1/2, as "
        "the theory has it for powers of one matrix with evenly spread eigenvalues. Where all tokens are the same, it "
        "is 1."
    )
    return Picture("products", panels, caption)


@drawing_settings()
def bandwidth(analysis: Analysis, styles: Styles) -> Picture | None:
    """Accuracy, or agreement, against the factor on the logits."""
    if not analysis.bandwidth:
        return None
    measure = analysis.bandwidth[0]["measure"]
    curves = _curves(analysis.bandwidth, "factor", "value", styles)
    panels = [_bandwidth_panel("bandwidth", f"{measure.capitalize()} with scaled logits", measure, curves, styles)]
    if measure == "accuracy":
        lost = {
            label: {seed: [(x, y - dict(points)[1.0]) for x, y in points] for seed, points in seeds.items()}
            for label, seeds in curves.items()
        }
        panels.append(_bandwidth_panel("bandwidth-lost", "Difference to unscaled logits", "difference", lost, styles))
    caption = (
        "All attention logits of a model times a factor, at inference: below 1 a wider kernel, above 1 a narrower one. "
        "Our reading of Remark 2 of arXiv 2503.00687, which says that twicing is less sensitive to the bandwidth. "
    )
    caption += (
        "Accuracy on held-out images. Thick lines are means over seeds, thin lines are seeds."
        if measure == "accuracy"
        else "Agreement: the share of images for which the model still takes the class that it takes with its own "
        "logits; there are no labels here, so this is no accuracy."
    )
    return Picture("bandwidth", panels, caption)


def _bandwidth_panel(name: str, title: str, axis: str, curves: Curves, styles: Styles) -> Panel:
    panel = Panel(name, title)
    draw(panel.axes, curves, styles)
    panel.axes.set_xscale("log", base=2)
    panel.axes.set_xticks([0.5, 0.71, 1, 1.41, 2], ["0.5", "0.71", "1", "1.41", "2"])
    panel.axes.xaxis.set_minor_locator(NullLocator())
    panel.axes.axvline(1, color=INK, linewidth=0.7, alpha=0.4)
    panel.axes.set_xlabel("factor on the logits")
    panel.axes.set_ylabel(axis)
    return panel


def _by_layer(rows: Rows, name: str, styles: Styles) -> Curves:
    """Mean over the heads, by label, seed and layer."""
    found: dict[tuple[str, int, int], list[float]] = {}
    for row in rows:
        found.setdefault((row["label"], row["seed"], row["layer"]), []).append(row[name])
    means: Rows = [
        {"label": label, "seed": seed, "layer": layer, name: float(np.mean(values))}
        for (label, seed, layer), values in found.items()
    ]
    return _curves(means, "layer", name, styles)


def _curves(rows: Sequence[dict[str, Any]], x: str, y: str, styles: Styles) -> Curves:
    curves: Curves = {}
    for label in styles:
        for row in rows:
            if row["label"] == label:
                curves.setdefault(label, {}).setdefault(row["seed"], []).append((row[x], row[y]))
    return {label: {seed: sorted(points) for seed, points in seeds.items()} for label, seeds in curves.items()}


def _by_depth(rows: Rows, kind: str) -> tuple[list[int], list[float]]:
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault(row["depth"], []).append(row["effective_rank"])
    return sorted(found), [float(np.mean(found[depth])) for depth in sorted(found)]


def _shown_labels(analysis: Analysis) -> list[str]:
    return list(dict.fromkeys(analysis.models[name]["label"] for name in shown_models(analysis)))


def _plain_ticks(low: float, high: float) -> tuple[list[int], list[str]]:
    """Round numbers between the two, for a logarithmic axis: as many as can be told apart."""
    ones = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if low <= n <= high]
    if high > 48:
        ones = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if low <= n <= high]
    return ones, [str(n) for n in ones]


def _formula(analysis: Analysis, model: str, layer: int) -> str:
    """What p(A) is there."""
    rows = (row for row in analysis.spectrum if row["model"] == model and row["layer"] == layer)
    return str(next(rows)["p"])


def _widest_miss(analysis: Analysis, model: str, layer: int) -> int:
    rows = [row for row in analysis.spectrum if row["model"] == model and row["layer"] == layer]
    return int(np.argmax([row["singular_miss"] or 0.0 for row in rows]))


def _unit_circle(panel: Panel) -> None:
    angle = np.linspace(0, 2 * np.pi, 200)
    panel.axes.plot(np.cos(angle), np.sin(angle), color=INK, linewidth=0.6, alpha=0.35)
    panel.axes.plot([0, 1], [0, 0], color=INK, linewidth=0.9, alpha=0.7, linestyle=(0, (1, 2)), marker="|")
    panel.axes.set_aspect("equal", adjustable="datalim")


def _points(panel: Panel, values: np.ndarray[Any, Any], color: str, mark: str, words: str) -> None:
    flat = values.flatten()
    largest = flat[np.argsort(-np.abs(flat), kind="stable")[:MOST_POINTS]]
    panel.axes.plot(
        largest.real.round(5), largest.imag.round(5), mark, color=color, markersize=2.6, alpha=0.55, label=words,
        markeredgewidth=0,
    )  # fmt: skip
