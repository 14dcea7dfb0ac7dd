"""How training went: loss and accuracy by epoch, and accuracy against the seconds that it took."""

from collections.abc import Sequence

import numpy as np

from twicing.experiments.curves import Picture, Styles, curves_of, draw, draw_mean, draw_seed, means, seeds_in_words
from twicing.experiments.drawing import Panel, drawing_settings
from twicing.experiments.metrics import HELD_OUT_ACCURACY, TRAINING_LOSS, TRAINING_TIME, is_perplexity
from twicing.experiments.results import Record, select


@drawing_settings()
def training(records: Sequence[Record], styles: Styles) -> Picture | None:
    """Training loss and what was held out, by epoch, or by step where steps were recorded."""
    panels: list[Panel] = []
    held_out = _held_out_metric(records)
    along = _along(records)
    for metric in (TRAINING_LOSS, held_out):
        curves = curves_of(_by_epoch(records, metric), styles, lambda record: record.conditions[along])
        if curves:
            panel = Panel(f"training-{len(panels)}", metric)
            draw(panel.axes, curves, styles, markers=False)
            panel.axes.set_xlabel(along)
            panels.append(panel)
    return Picture("training", panels, f"{seeds_in_words(styles)} {_what_was_seen(held_out)}") if panels else None


@drawing_settings()
def against_seconds(records: Sequence[Record], styles: Styles) -> Picture | None:
    """What was held out against the seconds spent in training steps."""
    held_out = _held_out_metric(records)
    seconds = {
        (record.arm, record.seed, record.conditions["epoch"]): record.value
        for record in _by_epoch(records, TRAINING_TIME)
    }
    timed = [
        record
        for record in _by_epoch(records, held_out)
        if (record.arm, record.seed, record.conditions["epoch"]) in seconds
    ]
    # The mean at an epoch is over the seeds' seconds too, so curves are first keyed by epoch.
    curves = curves_of(timed, styles, lambda record: record.conditions["epoch"])
    if not curves:
        return None
    panel = Panel("seconds", held_out)
    for arm, seeds in curves.items():
        style = styles[arm]
        for seed, points in seeds.items():
            if not style.control:
                x = [seconds[arm, seed, epoch] for epoch, _ in points]
                draw_seed(panel.axes, x, [value for _, value in points], style=style)
        mean = means(seeds)
        x = [
            float(np.mean([seconds[arm, seed, epoch] for seed in seeds if (arm, seed, epoch) in seconds]))
            for epoch, _ in mean
        ]
        draw_mean(panel.axes, x, [value for _, value in mean], style, markevery=[-1])
    panel.axes.set_xlabel("seconds spent in training steps")
    caption = (
        "The same against the seconds spent in training steps: what a mechanism gains has to be worth its time. "
        "Evaluation between epochs is not counted; what else ran on the machine slows the steps too. The mark is the "
        "last epoch."
    )
    return Picture("seconds", [panel], caption)


def _by_epoch(records: Sequence[Record], metric: str) -> list[Record]:
    return [record for record in select(records, metric=metric) if "epoch" in record.conditions]


def _held_out_metric(records: Sequence[Record]) -> str:
    """Accuracy of images; of a text the perplexity of its valid part."""
    found = (one.metric for one in records if "epoch" in one.conditions and is_perplexity(one.metric))
    return next(found, HELD_OUT_ACCURACY)


def _along(records: Sequence[Record]) -> str:
    steps = all("step" in record.conditions for record in _by_epoch(records, TRAINING_LOSS))
    return "step" if steps and records else "epoch"


def _what_was_seen(metric: str) -> str:
    if is_perplexity(metric):
        return "The valid part chose no epoch: the last one is evaluated."
    return (
        "The held-out images chose no epoch: the last one is evaluated. "
        "They did see the recipe being made, so accuracies are a little flattering, to every arm alike."
    )
