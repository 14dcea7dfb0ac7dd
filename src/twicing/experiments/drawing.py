"""How a panel looks and becomes SVG: one colour, line and marker per arm, text as text, the same bytes every time.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; in a page they are CSS variables, so that a
dark page can lighten them. Controls are muted, thin and broken lines: they are there, but not what is looked for.
"""

import io
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Line = str | tuple[float, tuple[float, ...]]

# Stands for the page's text colour; replaced in the SVG, so no arm may have it.
INK = "#1a1b1c"
TESTED = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
CONTROLS = ("#7f8ba0", "#a08a6a", "#6f9a94", "#a07a9a", "#8f9164")
# In this order they are the CSS variables --arm-0, --arm-1, ... of the page.
PALETTE = (*TESTED, *CONTROLS)
MARKERS = ("o", "s", "^", "D", "v", "P")
SIGNS = ("●", "■", "▲", "◆", "▼", "✚")
CONTROL_MARKERS = ("x", "*", "d", "<", ">")
CONTROL_SIGNS = ("✕", "★", "♦", "◀", "▶")
# Seven arms need a second colour of the same name: then the line tells them apart as well.
LINES: tuple[Line, ...] = ("solid", (0, (6, 1.5)), (0, (1, 1)))
CONTROL_LINES: tuple[Line, ...] = ((0, (4, 2)), (0, (1.2, 1.4)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (2.5, 1)))
CONTROL_WEIGHT = 0.65
PANEL_SIZE = (3.6, 2.5)
TITLE_WIDTH = 42
LINE_WIDTH = 1.7
MARK_SIZE = 4.5

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "twicing",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    "grid.color": INK,
}


@dataclass(frozen=True)
class Style:
    """What one arm looks like in every figure.

    sign: the marker as a character, for keys written in text. name: its colour as a CSS variable. line: its dashes.
    weight: scales lines and marks; earlier arms are heavier, so that a later one on top does not hide them.
    control: drawn thin and muted, without the lines of single seeds.
    """

    color: str
    marker: str
    sign: str
    name: str
    weight: float
    line: Line = "solid"
    control: bool = False


def arm_styles(labels: Sequence[str], controls: Collection[str] = ()) -> dict[str, Style]:
    """One style per arm, in the order given; controls: those of the labels that are drawn as controls.

    Past six tested arms, or five controls, colours repeat with another marker and another line.
    """
    tested = [label for label in labels if label not in controls]
    muted = [label for label in labels if label in controls]
    styles = {
        label: Style(
            *_cycle(place, TESTED, MARKERS, SIGNS),
            f"arm-{place % len(TESTED)}",
            max(0.7, 1.4 - 0.3 * place),
            LINES[place // len(TESTED) % len(LINES)],
        )
        for place, label in enumerate(tested)
    }
    styles |= {
        label: Style(
            *_cycle(place, CONTROLS, CONTROL_MARKERS, CONTROL_SIGNS),
            f"arm-{len(TESTED) + place % len(CONTROLS)}",
            CONTROL_WEIGHT,
            CONTROL_LINES[(place + place // len(CONTROLS)) % len(CONTROL_LINES)],
            control=True,
        )
        for place, label in enumerate(muted)
    }
    return {label: styles[label] for label in labels}


def _cycle(place: int, colors: Sequence[str], markers: Sequence[str], signs: Sequence[str]) -> tuple[str, str, str]:
    # The second time round, the marker moves on by one, so that no colour and marker meet twice.
    other = (place + place // len(colors)) % len(markers)
    return colors[place % len(colors)], markers[other], signs[other]


@contextmanager
def drawing_settings() -> Iterator[None]:
    """Fonts, line widths and colours of every panel; also a decorator of the functions that draw."""
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # The reader's browser has the glyph; matplotlib only measures the text.
        warnings.filterwarnings("ignore", message="Glyph")
        yield


class Panel:
    """One set of axes that becomes one inline SVG. name: unique in its page. title: what it shows, in words."""

    def __init__(self, name: str, title: str, size: tuple[float, float] = PANEL_SIZE) -> None:
        self.name = name
        self.title = title
        with drawing_settings():
            self.figure = Figure(figsize=size, layout="constrained")
            self.axes: Axes = self.figure.add_subplot()
            self.axes.set_title(textwrap.fill(title, TITLE_WIDTH))

    def svg(self) -> Markup:
        """The panel as an SVG element with a title, without anything that differs from one run to the next."""
        file = io.StringIO()
        with drawing_settings():
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        drawn = file.getvalue()
        drawn = drawn[drawn.index("<svg") :]
        drawn = re.sub(r"<style.*?</style>", "", drawn, flags=re.DOTALL)
        # Several SVGs share one page, where an id may occur once.
        drawn = re.sub(r'\bid="', f'id="{self.name}-', drawn)
        drawn = drawn.replace("url(#", f"url(#{self.name}-").replace('href="#', f'href="#{self.name}-')
        drawn = re.sub(r"font: ([^';]*?)([0-9.]+px) '[^;\"]*", r"font: \1\2 var(--sans, sans-serif)", drawn)
        drawn = drawn.replace(INK, "currentColor")
        for place, color in enumerate(PALETTE):
            drawn = drawn.replace(color, f"var(--arm-{place}, {color})")
        title = escape(self.title)
        drawn = drawn.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
        head = drawn.index(">") + 1
        return Markup(f"{drawn[:head]}<title>{title}</title>{drawn[head:]}")
