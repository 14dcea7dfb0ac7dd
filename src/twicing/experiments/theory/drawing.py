"""Lines of the theory's figures: one colour for each order or kind, labelled at the legend."""

import math
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, NullFormatter

from twicing.experiments.drawing import INK, LINE_WIDTH, MARK_SIZE, TESTED

Place = Literal["best", "upper left", "upper right", "lower left", "lower right", "center right"]

# As in the report: standard attention, which is order 1, is grey; twicing, order 2, is blue.
ORDER_COLORS = {1: TESTED[0], 2: TESTED[1], 3: TESTED[2], 4: TESTED[3]}
ORDER_NAMES = {1: "order 1 (standard)", 2: "order 2 (twicing)", 3: "order 3", 4: "order 4"}
ORDER_MARKS = {1: "o", 2: "s", 3: "^", 4: "D"}


def order_line(axes: Axes, order: int, x: Sequence[float], y: Sequence[float], *, marks: bool = True) -> None:
    """Draw y against x in the colour, marker and name of an order."""
    mark = ORDER_MARKS[order] if marks else ""
    name, color = ORDER_NAMES[order], ORDER_COLORS[order]
    axes.plot(x, y, marker=mark, markersize=MARK_SIZE, linewidth=LINE_WIDTH, color=color, label=name)


def kind_line(axes: Axes, place: int, x: Sequence[float], y: Sequence[float], name: str, mark: str = "") -> None:
    """Draw y against x in the colour of a place in the palette."""
    axes.plot(x, y, marker=mark, markersize=MARK_SIZE, linewidth=LINE_WIDTH, color=TESTED[place], label=name)


def guide_line(axes: Axes, x: Sequence[float], y: Sequence[float], name: str | None = None, *, dots: float = 1) -> None:
    """Draw what the theory predicts, thin and dotted. dots: how long they are, where there are two such lines."""
    axes.plot(x, y, color=INK, linewidth=0.9, linestyle=(0, (dots, 2)), alpha=0.7, label=name)


def log_scale(axes: Axes, *, x: bool = True, y: bool = True) -> None:
    """Logarithmic axes with powers of ten as plain text, which a page keeps as text."""
    for wanted, axis, change in ((x, axes.xaxis, axes.set_xscale), (y, axes.yaxis, axes.set_yscale)):
        if wanted:
            change("log")
            _plain_powers(axis)


def _plain_powers(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
    axis.set_minor_formatter(NullFormatter())


def power_of_ten(value: float) -> str:
    """10⁻⁴ for 0.0001; 0.01 to 1000 are written out."""
    if 0.01 <= value <= 1000:
        return f"{value:g}"
    return "10" + f"{round(math.log10(value))}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def legend(axes: Axes, place: Place = "best") -> None:
    """The key of a panel, small."""
    axes.legend(loc=place, fontsize=7.5, handlelength=1.6, borderaxespad=0.2)
