"""The figures of a report, each a list of small panels with a caption that says what to look at."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from twicing.experiments.drawing import INK, LINE_WIDTH, MARK_SIZE, Panel, Style, drawing_settings
from twicing.experiments.findings import ACCURACY, NOISE_FLOOR, Row
from twicing.experiments.results import Record, select

FLOOR = 0.02
# Metrics by layer, and what an axis has room for.
LAYER_METRICS = {
    "mean pairwise cosine": "cosine",
    "distance to the mean token": "||X - mean|| / ||X||",
    "effective rank of centred tokens": "effective rank",
}
THREATS = {
    "pgd": ("PGD (the headline)", "eps"),
    "fgsm": ("FGSM (a weak attack)", "eps"),
    "noise": ("Gaussian noise", "sd"),
}

Styles = Mapping[str, Style]
Point = tuple[Any, float]
# arm -> seed -> points (x, y), sorted by x
Curves = dict[str, dict[int, list[Point]]]


@dataclass(frozen=True)
class Picture:
    """Panels that belong together, and the sentence below them."""

    name: str
    panels: Sequence[Panel]
    caption: str


@drawing_settings()
def differences(rows: Sequence[Row], styles: Styles) -> Picture | None:
    """Every seed's difference to standard as a dot, with the mean and its interval, one panel per primary metric."""
    panels: list[Panel] = []
    for measure in dict.fromkeys(row.measure.name for row in rows):
        mine = [row for row in rows if row.measure.name == measure and row.difference is not None]
        if mine:
            panels.append(_difference_panel(f"differences-{len(panels)}", mine, styles))
    caption = (
        "Small marks are seeds: the arm minus standard, on the same seed. The large mark is their mean, the bar its "
        "95 % interval before correction. A bar that crosses the zero line shows no difference."
    )
    if any(row.arm.label == NOISE_FLOOR for row in rows):
        caption += " The shaded row compares standard with itself under other seeds: the noise floor."
    return Picture("differences", panels, caption) if panels else None


@drawing_settings()
def accuracy_against_strength(records: Sequence[Record], styles: Styles) -> Picture | None:
    """Accuracy against eps (or noise level): PGD, FGSM and noise; thin lines are seeds."""
    found = select(records, metric=ACCURACY)
    clean = _curves(select(found, conditions={"threat": "clean"}), styles, lambda _: Fraction(0))
    panels: list[Panel] = []
    for threat, (title, strength) in THREATS.items():
        of_threat = [record for record in select(found, conditions={"threat": threat}) if strength in record.conditions]
        if of_threat:
            curves = _curves(of_threat, styles, _strength(strength))
            panels.append(_strength_panel(f"strength-{threat}", title, strength, clean, curves, styles))
    caption = (
        "Accuracy on held-out images against the strength of the disturbance, in units of the pixel range. "
        "Thick lines are means, thin lines are seeds. PGD is the headline; FGSM takes one step and is a weak attack, "
        "so a gain under FGSM alone is not robustness. Where every arm is below 2 % the point is marked floor and "
        "compares nothing. The axis is logarithmic; clean accuracy stands at its left end."
    )
    return Picture("strength", panels, caption) if panels else None


@drawing_settings()
def by_layer(records: Sequence[Record], styles: Styles) -> list[Picture]:
    """Similarity and rank by layer: initialisation and trained, attention outputs and block outputs."""
    return [picture for metric in LAYER_METRICS if (picture := _layer_picture(records, metric, styles))]


@drawing_settings()
def training(records: Sequence[Record], styles: Styles) -> Picture | None:
    """Training loss and held-out accuracy by epoch."""
    panels: list[Panel] = []
    for metric in ("training loss [nats]", "held-out accuracy [share of images]"):
        curves = _curves(select(records, metric=metric), styles, lambda record: record.conditions["epoch"])
        if curves:
            panel = Panel(f"training-{len(panels)}", metric)
            _draw(panel.axes, curves, styles, markers=False)
            panel.axes.set_xlabel("epoch")
            panels.append(panel)
    caption = (
        "Thick lines are means, thin lines are seeds. The held-out images chose no epoch: the last one is evaluated. "
        "They did see the recipe being made, so accuracies are a little flattering, to every arm alike."
    )
    return Picture("training", panels, caption) if panels else None


@drawing_settings()
def against_seconds(records: Sequence[Record], styles: Styles) -> Picture | None:
    """Held-out accuracy against the seconds spent in training steps."""
    seconds = {
        (record.arm, record.seed, record.conditions["epoch"]): record.value
        for record in select(records, metric="training time [s]")
    }
    timed = [
        record
        for record in select(records, metric="held-out accuracy [share of images]")
        if (record.arm, record.seed, record.conditions["epoch"]) in seconds
    ]
    # The mean at an epoch is over the seeds' seconds too, so curves are first keyed by epoch.
    curves = _curves(timed, styles, lambda record: record.conditions["epoch"])
    if not curves:
        return None
    panel = Panel("seconds", "held-out accuracy [share of images]")
    for arm, seeds in curves.items():
        style = styles[arm]
        for seed, points in seeds.items():
            panel.axes.plot(
                [seconds[arm, seed, epoch] for epoch, _ in points],
                [value for _, value in points],
                color=style.color,
                alpha=0.35,
                linewidth=0.7,
            )
        means = _means(seeds)
        x = [
            float(np.mean([seconds[arm, seed, epoch] for seed in seeds if (arm, seed, epoch) in seconds]))
            for epoch, _ in means
        ]
        _draw_mean(panel.axes, x, [value for _, value in means], style, markevery=[-1])
    panel.axes.set_xlabel("seconds spent in training steps")
    caption = (
        "The same accuracy against the seconds spent in training steps instead of epochs: what a mechanism gains has "
        "to be worth its time. Evaluation between epochs is not counted; what else ran on the machine slows the steps "
        "too. The mark is the last epoch."
    )
    return Picture("seconds", [panel], caption)


def _difference_panel(name: str, rows: Sequence[Row], styles: Styles) -> Panel:
    measure = rows[0].measure
    panel = Panel(name, measure.title, size=(3.6, 0.9 + 0.6 * len(rows)))
    axes = panel.axes
    for place, row in enumerate(rows):
        difference, style = row.difference, styles[row.arm.label]
        if difference is None:
            continue
        if row.arm.label == NOISE_FLOOR:
            axes.axhspan(place - 0.5, place + 0.5, color=style.color, alpha=0.12, linewidth=0)
        n = len(difference.seeds)
        # Spread over the height of the row in the order of the seeds, so that equal differences stay visible.
        heights = place + (np.linspace(0.2, 0.4, n) if n > 1 else np.array([0.3]))
        axes.plot(difference.differences, heights, style.marker, color=style.color, alpha=0.65, markersize=3.4)
        if difference.low is not None and difference.high is not None:
            axes.plot([difference.low, difference.high], [place, place], color=style.color, linewidth=2.2)
        axes.plot([difference.mean], [place], style.marker, color=style.color, markersize=7)
        axes.text(0.01, place - 0.22, row.arm.label, transform=axes.get_yaxis_transform(), fontsize=8)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=5)
    unit = re.search(r"\[.*\]", measure.metric)
    axes.set_xlabel(f"arm − standard {unit[0]}" if unit else "arm − standard")  # noqa: RUF001
    return panel


def _strength_panel(name: str, title: str, strength: str, clean: Curves, curves: Curves, styles: Styles) -> Panel:
    panel = Panel(name, title)
    axes = panel.axes
    strengths = sorted({x for seeds in curves.values() for points in seeds.values() for x, _ in points})
    positive = [float(x) for x in strengths if x > 0]
    # Zero has no logarithm: clean accuracy takes the place one factor of two left of the weakest disturbance.
    at_zero = min(positive, default=1.0) / 2
    joined: Curves = {}
    for arm, seeds in curves.items():
        joined[arm] = {
            seed: [(float(x) or at_zero, y) for x, y in clean.get(arm, {}).get(seed, []) + points]
            for seed, points in seeds.items()
        }
    _draw(axes, joined, styles)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    labels = ["clean"] if clean else []
    ticks = [at_zero] if clean else []
    axes.set_xticks([*ticks, *positive], [*labels, *(str(x) for x in strengths if x > 0)])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xlabel("eps" if strength == "eps" else "standard deviation of the noise")
    axes.set_ylabel("accuracy")
    means = {arm: dict(_means(seeds)) for arm, seeds in joined.items()}
    for x in positive:
        if all(mean[x] < FLOOR for mean in means.values() if x in mean):
            axes.annotate("floor", (x, 0.05), ha="center", fontsize=8, fontstyle="italic")
    return panel


def _layer_picture(records: Sequence[Record], metric: str, styles: Styles) -> Picture | None:
    found = select(records, metric=metric)
    panels: list[Panel] = []
    place = list(LAYER_METRICS).index(metric)
    for where in ("attention output", "block output"):
        for when in ("initialisation", "trained"):
            chosen = select(found, conditions={"where": where, "when": when})
            curves = _curves(chosen, styles, lambda record: record.conditions["layer"])
            if curves:
                panel = Panel(f"layers-{place}-{len(panels)}", f"{where}s, {when}")
                _draw(panel.axes, curves, styles, seeds=False, band=True)
                panel.axes.set_xlabel("layer")
                panel.axes.set_ylabel(LAYER_METRICS[metric])
                panel.axes.locator_params(axis="x", integer=True)
                panels.append(panel)
    if not panels:
        return None
    limits = [panel.axes.get_ylim() for panel in panels]
    for panel in panels:
        panel.axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    meaning = {
        "mean pairwise cosine": "1 means that all tokens of an image point the same way. Lower is a property of a "
        "mechanism, not by itself a benefit.",
        "distance to the mean token": "||X - mean|| / ||X||: 0 means that only the tokens' common mean is left.",
        "effective rank of centred tokens": "How many directions the tokens use once their common mean is taken away: "
        "a cosine can fall while this does not rise.",
    }[metric]
    name = f"{metric[0].upper()}{metric[1:]}"
    caption = f"{name}, by layer. {meaning} Lines are means, bands one standard deviation over seeds."
    return Picture(f"layers-{place}", panels, caption)


def _strength(name: str) -> Callable[[Record], Fraction]:
    return lambda record: Fraction(str(record.conditions[name]))


def _curves(records: Iterable[Record], styles: Styles, x: Callable[[Record], Any]) -> Curves:
    curves: Curves = {}
    for record in records:
        if record.arm in styles:
            curves.setdefault(record.arm, {}).setdefault(record.seed, []).append((x(record), record.value))
    ordered = {arm: curves[arm] for arm in styles if arm in curves}
    return {arm: {seed: sorted(points) for seed, points in sorted(seeds.items())} for arm, seeds in ordered.items()}


def _draw(
    axes: Axes, curves: Curves, styles: Styles, *, markers: bool = True, seeds: bool = True, band: bool = False
) -> None:
    for arm, by_seed in curves.items():
        style = styles[arm]
        if seeds:
            for points in by_seed.values():
                axes.plot(*zip(*points, strict=True), color=style.color, alpha=0.35, linewidth=0.7)
        x, mean = zip(*_means(by_seed), strict=True)
        if band and len(by_seed) > 1:
            sd = np.array([_spread(by_seed, at) for at in x])
            axes.fill_between(x, mean - sd, mean + sd, color=style.color, alpha=0.18, linewidth=0)
        _draw_mean(axes, x, mean, style, markevery=None if markers else [-1])


def _draw_mean(
    axes: Axes, x: Sequence[Any], mean: Sequence[float], style: Style, *, markevery: list[int] | None
) -> None:
    axes.plot(
        x,
        mean,
        color=style.color,
        linewidth=LINE_WIDTH * style.weight,
        marker=style.marker,
        markersize=MARK_SIZE * style.weight,
        markevery=markevery,
    )


def _means(by_seed: Mapping[int, Sequence[Point]]) -> list[Point]:
    values: dict[Any, list[float]] = {}
    for points in by_seed.values():
        for x, y in points:
            values.setdefault(x, []).append(y)
    return [(x, float(np.mean(ys))) for x, ys in sorted(values.items())]


def _spread(by_seed: Mapping[int, Sequence[Point]], at: Any) -> float:
    values = [y for points in by_seed.values() for x, y in points if x == at]
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
