"""The curves by layer: a model against its random initialisation, and several models beside each other."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from twicing.analysis.capture import ATTENTION_OUTPUT, BLOCK_OUTPUT
from twicing.analysis.collapse import (
    ATTENTION,
    ATTENTION_METRICS,
    COSINE,
    DISTANCE,
    ENTROPY,
    ENTROPY_SHARE,
    RANK,
    SHARE,
    TOKEN_METRICS,
)
from twicing.experiments.curves import Picture
from twicing.experiments.diagnose.diagnosis import INITIAL, MODEL, Diagnosis
from twicing.experiments.drawing import LINE_WIDTH, MARK_SIZE, Panel, Style, arm_styles, drawing_settings

# Muted and broken, as controls are drawn: no model of a page has this look.
INITIAL_STYLE = arm_styles([INITIAL], [INITIAL])[INITIAL]
TITLES = {
    COSINE: "Mean pairwise cosine",
    SHARE: "||X - mean|| / ||X||",
    RANK: "Effective rank of centred tokens",
    DISTANCE: "Rms distance to the mean token",
    ENTROPY: "Entropy of attention, in nats",
    ENTROPY_SHARE: "Entropy, share of the largest",
}
# Those whose scale has fixed ends.
SHARES = (SHARE, ENTROPY_SHARE)
# More marks than this touch each other.
MOST_MARKS = 16
BESIDE = (COSINE, SHARE, RANK)


def model_styles(diagnoses: Sequence[Diagnosis]) -> dict[str, Style]:
    """How each model is drawn, by its name: the same on all of a page."""
    return arm_styles([one.case.name for one in diagnoses])


def pictures(diagnosis: Diagnosis, place: int, style: Style) -> list[Picture]:
    """The figures of one model, the block outputs first. place: which model of the page it is. style: how it looks."""
    n, draws = diagnosis.model.inputs, len(diagnosis.draws)
    lines = f"Means over {n} inputs with 95 % bands over inputs; thin lines are the {draws} draws of random weights."
    kinds = (
        (BLOCK_OUTPUT, tuple(TOKEN_METRICS), f"Block outputs, on which the verdict rests. {lines}"),
        (ATTENTION_OUTPUT, tuple(TOKEN_METRICS), "Attention outputs: heads side by side, before the projection."),
        (
            ATTENTION,
            ATTENTION_METRICS,
            "Attention itself, means over heads and queries. The share is of the logarithm of as many keys as a query "
            "may attend to: at 1 it averages them all.",
        ),
    )
    return [
        Picture(
            f"d{place}-{where.replace(' ', '-')}",
            [
                _panel(diagnosis, f"d{place}-{where.replace(' ', '-')}-{number}", (where, m), style)
                for number, m in enumerate(metrics)
            ],
            caption,
        )
        for where, metrics, caption in kinds
    ]


@drawing_settings()
def side_by_side(diagnoses: Sequence[Diagnosis], styles: Mapping[str, Style]) -> Picture:
    """All models in one figure, their block outputs."""
    panels = []
    for number, metric in enumerate(BESIDE):
        panel = Panel(f"all-{number}", TITLES[metric])
        for one in diagnoses:
            curve = one.curve(MODEL, (BLOCK_OUTPUT, metric))
            _line(panel.axes, curve.value.tolist(), styles[one.case.name])
        _finish(panel.axes, metric)
        panels.append(panel)
    return Picture("all", panels, "Block outputs of all models, means over inputs.")


@drawing_settings()
def _panel(diagnosis: Diagnosis, name: str, key: tuple[str, str], own: Style) -> Panel:
    panel = Panel(name, TITLES[key[1]])
    axes = panel.axes
    layers = range(1, diagnosis.model.layers + 1)
    for which, style in ((INITIAL, INITIAL_STYLE), (MODEL, own)):
        curve = diagnosis.curve(which, key)
        axes.fill_between(layers, curve.low, curve.high, color=style.color, alpha=0.18, linewidth=0)
        if which == INITIAL:
            for draw in diagnosis.draws:
                axes.plot(layers, draw.values[key].mean(0), color=style.color, alpha=0.45, linewidth=0.6)
        _line(axes, curve.value.tolist(), style)
    _finish(axes, key[1])
    return panel


def _line(axes: Axes, values: Sequence[float], style: Style) -> None:
    marked = len(values) <= MOST_MARKS
    axes.plot(
        range(1, len(values) + 1),
        values,
        color=style.color,
        linestyle=style.line,
        linewidth=LINE_WIDTH * style.weight,
        marker=style.marker if marked else "",
        markersize=MARK_SIZE * style.weight,
    )


def _finish(axes: Axes, metric: str) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if metric in SHARES:
        axes.set_ylim(0, 1.05)
    elif metric == COSINE:
        axes.set_ylim(min(0.0, 1.05 * axes.dataLim.y0), 1.05)
    else:
        axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1.0)
