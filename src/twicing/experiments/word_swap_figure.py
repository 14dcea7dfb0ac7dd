"""Perplexity against the share of words that were swapped, a panel for each place that they stand in."""

from collections.abc import Sequence

from twicing.experiments.curves import Picture, Styles, curves_of, draw, seeds_in_words
from twicing.experiments.drawing import Panel, drawing_settings
from twicing.experiments.metrics import is_perplexity
from twicing.experiments.results import Record, select

SWAPPED = {"threat": "word swap"}


@drawing_settings()
def word_swap(records: Sequence[Record], styles: Styles) -> Picture | None:
    """Test perplexity by share; the text as it is stands at 0. A mode with one share only has no curve."""
    swapped = [record for record in select(records, conditions=SWAPPED) if is_perplexity(record.metric)]
    panels: list[Panel] = []
    for mode in dict.fromkeys(str(record.conditions["mode"]) for record in swapped):
        of_mode = select(swapped, conditions={"mode": mode})
        if len({record.conditions["share"] for record in of_mode}) < 2:
            continue
        clean = select(records, metric=of_mode[0].metric, conditions={"threat": "clean"})
        curves = curves_of([*clean, *of_mode], styles, lambda record: 100 * float(record.conditions.get("share", 0)))
        panel = Panel(f"swap-{len(panels)}", mode)
        draw(panel.axes, curves, styles)
        panel.axes.set_xlabel("words swapped, in %")
        panel.axes.set_ylabel(of_mode[0].metric.replace(", ", ",\n"))
        panels.append(panel)
    caption = (
        f"Exactly that share of the test part's words was replaced, the same words in every arm. "
        f"{seeds_in_words(styles)} Swapped targets are easy to predict, so that curves with them lie lower."
    )
    return Picture("word-swap", panels, caption) if panels else None
