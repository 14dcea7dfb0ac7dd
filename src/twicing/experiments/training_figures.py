"""How training went: loss and accuracy by epoch, and accuracy against the seconds that it took."""

from collections.abc import Sequence

import numpy as np

from twicing.experiments.curves import Picture, Styles, curves_of, draw, draw_mean, draw_seed, means, seeds_in_words
from twicing.experiments.drawing import Panel, drawing_settings
from twicing.experiments.metrics import HELD_OUT_ACCURACY, TRAINING_LOSS, TRAINING_TIME
from twicing.experiments.results import Record, select


@drawing_settings()
def training(records: Sequence[Record], styles: Styles) -> Picture | None:
    """Training loss and held-out accuracy by epoch."""
    panels: list[Panel] = []
    for metric in (TRAINING_LOSS, HELD_OUT_ACCURACY):
        curves = curves_of(select(records, metric=metric), styles, lambda record: record.conditions["epoch"])
        if curves:
            panel = Panel(f"training-{len(panels)}", metric)
            draw(panel.axes, curves, styles, markers=False)
            panel.axes.set_xlabel("epoch")
            panels.append(panel)
    caption = (
        f"{seeds_in_words(styles)} The held-out images chose no epoch: the last one is evaluated. "
        "They did see the recipe being made, so accuracies are a little flattering, to every arm alike."
    )
    return Picture("training", panels, caption) if panels else None


@drawing_settings()
def against_seconds(records: Sequence[Record], styles: Styles) -> Picture | None:
    """Held-out accuracy against the seconds spent in training steps."""
    seconds = {
        (record.arm, record.seed, record.conditions["epoch"]): record.value
        for record in select(records, metric=TRAINING_TIME)
    }
    timed = [
        record
        for record in select(records, metric=HELD_OUT_ACCURACY)
        if (record.arm, record.seed, record.conditions["epoch"]) in seconds
    ]
    # The mean at an epoch is over the seeds' seconds too, so curves are first keyed by epoch.
    curves = curves_of(timed, styles, lambda record: record.conditions["epoch"])
    if not curves:
        return None
    panel = Panel("seconds", HELD_OUT_ACCURACY)
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
        "The same accuracy against the seconds spent in training steps instead of epochs: what a mechanism gains has "
        "to be worth its time. Evaluation between epochs is not counted; what else ran on the machine slows the steps "
        "too. The mark is the last epoch."
    )
    return Picture("seconds", [panel], caption)
