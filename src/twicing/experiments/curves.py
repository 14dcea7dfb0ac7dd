"""Curves over seeds: what a figure with lines is made of, and how one arm's line is drawn."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from twicing.experiments.drawing import LINE_WIDTH, MARK_SIZE, Panel, Style
from twicing.experiments.results import Record

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


def seeds_in_words(styles: Styles) -> str:
    """What a caption says of the lines: which are means and which are seeds."""
    if not any(style.control for style in styles.values()):
        return "Thick lines are means, thin lines are seeds."
    return "Thick lines are means, thin lines are seeds; of the controls, broken and muted, only the mean is drawn."


def curves_of(records: Iterable[Record], styles: Styles, x: Callable[[Record], Any]) -> Curves:
    """The points (x(record), value) of every arm and seed, arms in the order of the styles."""
    curves: Curves = {}
    for record in records:
        if record.arm in styles:
            curves.setdefault(record.arm, {}).setdefault(record.seed, []).append((x(record), record.value))
    ordered = {arm: curves[arm] for arm in styles if arm in curves}
    return {arm: {seed: sorted(points) for seed, points in sorted(seeds.items())} for arm, seeds in ordered.items()}


def draw(
    axes: Axes, curves: Curves, styles: Styles, *, markers: bool = True, seeds: bool = True, band: bool = False
) -> None:
    """Draw every arm's mean, and its seeds as thin lines or its spread as a band; of a control the mean alone."""
    for arm, by_seed in curves.items():
        style = styles[arm]
        if seeds and not style.control:
            for points in by_seed.values():
                draw_seed(axes, *zip(*points, strict=True), style=style)
        x, mean = zip(*means(by_seed), strict=True)
        if band and len(by_seed) > 1 and not style.control:
            sd = np.array([_spread(by_seed, at) for at in x])
            axes.fill_between(x, mean - sd, mean + sd, color=style.color, alpha=0.18, linewidth=0)
        draw_mean(axes, x, mean, style, markevery=None if markers else [-1])


def draw_seed(axes: Axes, x: Sequence[Any], y: Sequence[float], *, style: Style) -> None:
    """One seed, as a thin line."""
    axes.plot(x, y, color=style.color, alpha=0.35, linewidth=0.7)


def draw_mean(
    axes: Axes, x: Sequence[Any], mean: Sequence[float], style: Style, *, markevery: list[int] | None
) -> None:
    """The mean of an arm, as its line with its marker."""
    axes.plot(
        x,
        mean,
        color=style.color,
        linestyle=style.line,
        linewidth=LINE_WIDTH * style.weight,
        marker=style.marker,
        # A control's mark is as small as its shape allows; thinner than this a triangle looks like a dot.
        markersize=MARK_SIZE * max(style.weight, 0.8 if style.control else 0.0),
        markevery=markevery,
        # What is looked for lies above the controls.
        zorder=2 if style.control else 2.5,
    )


def means(by_seed: Mapping[int, Sequence[Point]]) -> list[Point]:
    """The mean over seeds at every x that any seed has."""
    values: dict[Any, list[float]] = {}
    for points in by_seed.values():
        for x, y in points:
            values.setdefault(x, []).append(y)
    return [(x, float(np.mean(ys))) for x, ys in sorted(values.items())]


def _spread(by_seed: Mapping[int, Sequence[Point]], at: Any) -> float:
    values = [y for points in by_seed.values() for x, y in points if x == at]
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
