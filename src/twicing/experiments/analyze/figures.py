"""The figures of an analysis but those of spectra: products against depth, the bandwidth test."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import NullLocator

from twicing.experiments.analyze.keep import ACCURACY, AGREEMENT, LOG_PROBABILITY, Analysis, Rows
from twicing.experiments.curves import Curves, Picture, Styles, draw
from twicing.experiments.drawing import INK, LINE_WIDTH, TESTED, Panel, drawing_settings
from twicing.experiments.theory.drawing import guide_line, legend

# What the bandwidth test measures, in words.
MEASURES = {
    ACCURACY: "accuracy",
    AGREEMENT: "agreement",
    LOG_PROBABILITY: "log-probability of the last token, in nats",
}
OF_A, OF_P, OWN = TESTED[0], TESTED[1], TESTED[2]


def shown_models(analysis: Analysis) -> list[str]:
    """The models that are drawn one by one."""
    return [name for name, model in analysis.models.items() if model["shown"]]


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
            deepest = max(row["depth"] for row in rows)
            for power, words, dots in ((-0.5, "n^-1/2", 3), (-1.0, "n^-1", 1)):
                if first > 1:
                    # No rank is below 1: there the line ends.
                    end = min(deepest, first ** (-1 / power))
                    guide_line(panel.axes, (1, end), (first, first * end**power), words, dots=dots)
            panel.axes.set_xscale("log")
            panel.axes.set_yscale("log")
            panel.axes.set_ylim(bottom=0.9)
            panel.axes.set_xticks(*plain_ticks(1, deepest))
            panel.axes.set_yticks(*plain_ticks(1, panel.axes.get_ylim()[1]))
            panel.axes.xaxis.set_minor_locator(NullLocator())
            panel.axes.yaxis.set_minor_locator(NullLocator())
            panel.axes.set_xlabel(f"depth n, {way}")
            panel.axes.set_ylabel("effective rank")
            legend(panel.axes)
            panels.append(panel)
    caption = (
        "Effective rank of A_n ... A_1, the attention matrices alone: residual connections, values and feed-forward "
        "parts are left out, so it is no rank of the model's tokens. Our reading: heads are averaged into one matrix a "
        "layer, or each head is multiplied with the head of the same number in the next layer and the ranks are "
        "averaged. 2A - A^2 is made of the same A in every layer, whatever the model does. Thin and broken: n^-1/2 "
        "and n^-1, down to 1, as the theory has it for powers of one matrix with evenly spread eigenvalues. Where all "
        "tokens are the same, it is 1."
    )
    return Picture("products", panels, caption)


@drawing_settings()
def bandwidth(analysis: Analysis, styles: Styles) -> Picture | None:
    """Accuracy, agreement, or the log-probability of a token, against the factor on the logits."""
    if not analysis.bandwidth:
        return None
    measure = analysis.bandwidth[0]["measure"]
    words, curves = MEASURES[measure], curves_of_rows(analysis.bandwidth, "factor", "value", styles)
    title = f"{words.partition(',')[0].capitalize()} with scaled logits"
    axis = words.rpartition(", in ")[2]
    panels = [_bandwidth_panel("bandwidth", title, axis, curves, styles)]
    if measure != AGREEMENT:
        lost = {
            label: {seed: [(x, y - dict(points)[1.0]) for x, y in points] for seed, points in seeds.items()}
            for label, seeds in curves.items()
        }
        panels.append(
            _bandwidth_panel("bandwidth-lost", "Difference to unscaled logits", f"difference in {axis}", lost, styles)
        )
    caption = (
        "All attention logits of a model times a factor, at inference: below 1 a wider kernel, above 1 a narrower one. "
        "Our reading of Remark 2 of arXiv 2503.00687, which says that twicing is less sensitive to the bandwidth. "
    )
    caption += {
        ACCURACY: f"Accuracy on held-out images.{of_seeds(analysis)}",
        AGREEMENT: "Agreement: the share of images for which the model still takes the class that it takes with its "
        "own logits; there are no labels here, so this is no accuracy.",
        LOG_PROBABILITY: "Log-probability that the model gives to the last token of each window after it has seen the "
        f"others, mean over windows: higher is better.{of_seeds(analysis)}",
    }[measure]
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


def curves_of_rows(rows: Sequence[dict[str, Any]], x: str, y: str, styles: Styles) -> Curves:
    """The points (x, y) of every label and seed, labels in the order of the styles."""
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


def plain_ticks(low: float, high: float) -> tuple[list[int], list[str]]:
    """Round numbers between the two, for a logarithmic axis: as many as can be told apart."""
    ones = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if low <= n <= high]
    if high > 48:
        ones = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if low <= n <= high]
    return ones, [str(n) for n in ones]


def of_seeds(analysis: Analysis) -> str:
    """What a caption says of lines of seeds, where there are several."""
    several = len({one["seed"] for one in analysis.models.values()}) > 1
    return " Thick lines are means over seeds, thin lines are seeds." if several else ""
