"""Ratio and memory against the number of tokens, as one SVG beside the record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twicing.experiments.bench.cases import PASSES
from twicing.experiments.bench.rows import OpsRow
from twicing.experiments.bench.screen import Screen

PANEL_SIZE = (3.7, 2.9)
# (the label of the axis, the field of a row), one line of panels each.
_QUANTITIES = (("ratio to one SDPA call", "ratio"), ("peak memory [MB]", "peak_memory_mb"))


def draw(rows: Sequence[OpsRow], path: Path, screen: Screen) -> bool:
    """Write the plot, or say that there is none; returns whether it was written. Rows without a time are left out."""
    try:
        import matplotlib  # noqa: F401  (so that an error names the package, not a part of it)
        from matplotlib.figure import Figure

        from twicing.experiments.drawing import LINE_WIDTH, MARK_SIZE, arm_styles, drawing_settings
    except ModuleNotFoundError as error:
        screen.say(f"No plot: {error.name} is missing (pip install 'twicing[lab]').")
        return False
    styles = arm_styles(list(dict.fromkeys(row.contender for row in rows)))
    kinds = sorted({(row.is_causal, row.passes) for row in rows}, key=lambda kind: (kind[0], PASSES.index(kind[1])))
    with drawing_settings():
        figure = Figure((PANEL_SIZE[0] * len(kinds), PANEL_SIZE[1] * len(_QUANTITIES)), layout="constrained")
        grid = figure.subplots(len(_QUANTITIES), len(kinds), squeeze=False)
        for line, (label, field) in zip(grid, _QUANTITIES, strict=True):
            for axes, (is_causal, passes) in zip(line, kinds, strict=True):
                axes.set_title(f"{'causal' if is_causal else 'not causal'}, {passes}")
                axes.set(xlabel="tokens", ylabel=label, xscale="log", yscale="linear" if field == "ratio" else "log")
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
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
                    )
                tokens = sorted({row.tokens for row in rows if row.is_causal == is_causal})
                axes.set_xticks(tokens, [str(count) for count in tokens])
                axes.minorticks_off()
                if field == "ratio":
                    axes.set_ylim(bottom=0.0)
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
