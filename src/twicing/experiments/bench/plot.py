"""Ratio and memory against the number of tokens, as one SVG beside the record."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from twicing.experiments.bench.cases import PASSES
from twicing.experiments.bench.rows import OpsRow
from twicing.experiments.bench.screen import Screen

PANEL_SIZE = (3.7, 2.9)
# Neighbours on the axis of tokens whose ratio is less than this would touch if they were written level.
CLOSE = 1.5
# What the plot is for, in full colours; what anyone can write without the library is muted.
_LOOKED_FOR = ("SDPA", "twicing: ")
# (the label of the axis, the field of a row, ticks in every power of ten), one line of panels each.
_QUANTITIES = (
    ("ratio to one SDPA call", "ratio", (1.0, 1.5, 2.0, 3.0, 5.0)),
    ("peak memory [MB]", "peak_memory_mb", (1.0, 2.0, 5.0)),
)


def draw(rows: Sequence[OpsRow], path: Path, screen: Screen) -> bool:
    """Write the plot, or say that there is none; returns whether it was written. Rows without a time are left out."""
    try:
        import matplotlib  # noqa: F401  (so that an error names the package, not a part of it)
        from matplotlib.figure import Figure

        from twicing.experiments.drawing import LINE_WIDTH, MARK_SIZE, arm_styles, drawing_settings
    except ModuleNotFoundError as error:
        screen.say(f"No plot: {error.name} is missing (pip install 'twicing[lab]').")
        return False
    names = list(dict.fromkeys(row.contender for row in rows))
    styles = arm_styles(names, controls=[name for name in names if not name.startswith(_LOOKED_FOR)])
    kinds = sorted({(row.is_causal, row.passes) for row in rows}, key=lambda kind: (kind[0], PASSES.index(kind[1])))
    with drawing_settings():
        figure = Figure((PANEL_SIZE[0] * len(kinds), PANEL_SIZE[1] * len(_QUANTITIES)), layout="constrained")
        grid = figure.subplots(len(_QUANTITIES), len(kinds), squeeze=False)
        for line, (label, field, steps) in zip(grid, _QUANTITIES, strict=True):
            for axes, (is_causal, passes) in zip(line, kinds, strict=True):
                axes.set_title(f"{'causal' if is_causal else 'not causal'}, {passes}")
                axes.set(xlabel="tokens", ylabel=label, xscale="log", yscale="log")
                for name, style in styles.items():
                    points = _points(rows, name, is_causal, passes, field)
                    if not points:
                        continue
                    axes.plot(
                        *zip(*points, strict=True),
                        label=name,
                        color=style.color,
                        marker=style.marker,
                        markersize=MARK_SIZE,
                        linewidth=LINE_WIDTH * style.weight,
                        linestyle=style.line,
                    )
                tokens = sorted({row.tokens for row in rows if row.is_causal == is_causal})
                close = any(later / earlier < CLOSE for earlier, later in pairwise(tokens))
                axes.set_xticks(tokens, [str(count) for count in tokens], rotation=45 if close else 0)
                low, high = axes.get_ylim()
                ticks = _ticks(low, high, steps)
                axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
                axes.minorticks_off()
        drawn: dict[str, Any] = {}
        for axes in grid.flat:
            handles, labels = axes.get_legend_handles_labels()
            drawn |= dict(zip(labels, handles, strict=True))
        figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=4)
        figure.savefig(path, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    screen.say(f"Plot: {path}")
    return True


def _points(
    rows: Sequence[OpsRow], contender: str, is_causal: bool, passes: str, field: str
) -> list[tuple[int, float]]:
    """(tokens, value) of one line, by the number of tokens."""
    chosen = [row for row in rows if (row.contender, row.is_causal, row.passes) == (contender, is_causal, passes)]
    return sorted((row.tokens, getattr(row, field)) for row in chosen if getattr(row, field) is not None)


def _ticks(low: float, high: float, steps: Sequence[float]) -> list[float]:
    """Those of the steps times a power of ten that lie between low and high: the usual ones are a decade apart."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for step in steps if low <= (tick := step * 10.0**power) <= high]
