"""The figures of a report, each a list of small panels with a caption that says what to look at."""

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np

from twicing.experiments.curves import Curves, Picture, Styles, curves_of, draw, means, seeds_in_words
from twicing.experiments.drawing import INK, Panel, drawing_settings
from twicing.experiments.findings import NOISE_FLOOR, PAPER_COMPAT, Row
from twicing.experiments.metrics import ACCURACY, EPS50
from twicing.experiments.results import Record, select
from twicing.robustness.threat import as_fraction

FLOOR = 0.02
# Metrics by layer, and what an axis has room for.
LAYER_METRICS = {
    "mean pairwise cosine": "cosine",
    "distance to the mean token": "||X - mean|| / ||X||",
    "effective rank of centred tokens": "effective rank",
}
# The title, the condition that holds the strength, and from how many strengths on it makes a curve.
THREATS = {
    "pgd": ("PGD", "eps", 1),
    "fgsm": ("FGSM (a weak attack)", "eps", 1),
    "noise": ("Gaussian noise", "sd", 1),
    "spsa": ("SPSA (without gradients)", "eps", 2),
    "autoattack": ("AutoAttack", "eps", 2),
}


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
    clean = curves_of(select(found, conditions={"threat": "clean"}), styles, lambda _: Fraction(0))
    panels: list[Panel] = []
    for threat, (title, strength, fewest) in THREATS.items():
        of_threat = [record for record in select(found, conditions={"threat": threat}) if strength in record.conditions]
        spelt = _spelt(of_threat, strength)
        if len(spelt) >= fewest:
            curves = curves_of(of_threat, styles, _reader(strength))
            panels.append(_strength_panel(f"strength-{threat}", title, _AXES[strength], clean, curves, spelt, styles))
    if not panels:
        return None
    caption = [
        "Accuracy on held-out images against the strength of the disturbance, in units of the pixel range.",
        seeds_in_words(styles),
        "The headline is eps50, where half of the images are fooled: about where PGD crosses the dotted line."
        if select(records, metric=EPS50)
        else "PGD is the headline.",
        "FGSM takes one step and is a weak attack, so a gain under FGSM alone is not robustness. Where every arm is "
        "below 2 % the point is marked floor and compares nothing. The axis is logarithmic; clean accuracy stands at "
        "its left end.",
    ]
    return Picture("strength", panels, " ".join(caption))


@drawing_settings()
def paper_compat(records: Sequence[Record], styles: Styles, std: Sequence[float]) -> Picture | None:
    """Accuracy under PGD as the papers of this line run it, against eps in normalised units; unverified.

    std: of the normalisation, by channel: eps times their mean is about eps in pixels, the second line of the axis.
    """
    found = select(records, metric=ACCURACY, conditions={"threat": PAPER_COMPAT})
    curves = curves_of(found, styles, _reader("eps"))
    if not curves:
        return None
    spelt = {x: f"{255 * float(x):g}" for x in _spelt(found, "eps")}
    if std:
        spelt = {x: f"{word}\n{255 * float(x) * float(np.mean(std)):.2g}" for x, word in spelt.items()}
    clean = curves_of(select(records, metric=ACCURACY, conditions={"threat": "clean"}), styles, lambda _: Fraction(0))
    title = PAPER_COMPAT.replace("pgd", "PGD")
    label = "eps, in 1/255 of a normalised unit" + ("\n(below: in 1/255 of the pixel range)" if std else "")
    panel = _strength_panel("paper-compat", title, label, clean, curves, spelt, styles, logarithmic=False)
    caption = (
        "Unverified: it follows the released code of a sibling paper, as the attack code of the twicing paper is not "
        "released. It perturbs normalised inputs, clips nothing, and takes the model's own predictions for labels, so "
        "an eps here is a smaller change of the pixels than the same eps above, and the two compare nothing."
    )
    return Picture("paper-compat", [panel], caption)


@drawing_settings()
def by_layer(records: Sequence[Record], styles: Styles) -> list[Picture]:
    """Similarity and rank by layer: initialisation and trained, attention outputs and block outputs."""
    return [picture for metric in LAYER_METRICS if (picture := _layer_picture(records, metric, styles))]


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


def _strength_panel(
    name: str,
    title: str,
    label: str,
    clean: Curves,
    curves: Curves,
    spelt: Mapping[Fraction, str],
    styles: Styles,
    *,
    logarithmic: bool = True,
) -> Panel:
    panel = Panel(name, title)
    axes = panel.axes
    positive = [float(x) for x in spelt if x > 0]
    # Zero has no logarithm: clean accuracy takes the place one factor of two left of the weakest disturbance.
    at_zero = min(positive, default=1.0) / 2 if logarithmic else 0.0
    joined: Curves = {}
    for arm, seeds in curves.items():
        joined[arm] = {
            seed: [(float(x) or at_zero, y) for x, y in clean.get(arm, {}).get(seed, []) + points]
            for seed, points in seeds.items()
        }
    draw(axes, joined, styles)
    if logarithmic:
        axes.set_xscale("log", base=2)
    axes.minorticks_off()
    words = [word for x, word in spelt.items() if x > 0]
    if words and all(word.endswith("/255") for word in words):
        words, label = [word.removesuffix("/255") for word in words], f"{label}, in steps of 1/255"
    labels = ["clean"] if clean else []
    ticks = [at_zero] if clean else []
    axes.set_xticks([*ticks, *positive], [*labels, *words])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy")
    if title == THREATS["pgd"][0]:
        axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=(0, (1, 3)), alpha=0.6)
    at = {arm: dict(means(seeds)) for arm, seeds in joined.items()}
    for x in positive:
        if all(mean[x] < FLOOR for mean in at.values() if x in mean):
            axes.annotate("floor", (x, 0.05), ha="center", fontsize=8, fontstyle="italic")
    return panel


def _layer_picture(records: Sequence[Record], metric: str, styles: Styles) -> Picture | None:
    found = select(records, metric=metric)
    panels: list[Panel] = []
    place = list(LAYER_METRICS).index(metric)
    for where in ("attention output", "block output"):
        for when in ("initialisation", "trained"):
            chosen = select(found, conditions={"where": where, "when": when})
            curves = curves_of(chosen, styles, lambda record: record.conditions["layer"])
            if curves:
                panel = Panel(f"layers-{place}-{len(panels)}", f"{where}s, {when}")
                draw(panel.axes, curves, styles, seeds=False, band=True)
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
        "mean pairwise cosine": "1 means that all tokens of an image or text point the same way. Lower is a property "
        "of a mechanism, not by itself a benefit.",
        "distance to the mean token": "||X - mean|| / ||X||: 0 means that only the tokens' common mean is left.",
        "effective rank of centred tokens": "How many directions the tokens use once their common mean is taken away: "
        "a cosine can fall while this does not rise.",
    }[metric]
    name = f"{metric[0].upper()}{metric[1:]}"
    lines = "Lines are means, bands one standard deviation over seeds"
    lines += " (controls have none)." if any(style.control for style in styles.values()) else "."
    caption = f"{name}, by layer. {meaning} {lines}"
    return Picture(f"layers-{place}", panels, caption)


_AXES = {"eps": "eps", "sd": "standard deviation of the noise"}


def _reader(name: str) -> Callable[[Record], Fraction]:
    # "4/255 normalised": the unit stands on the axis.
    return lambda record: as_fraction(str(record.conditions[name]).split()[0], name)


def _spelt(records: Sequence[Record], name: str) -> dict[Fraction, str]:
    """Every size that occurs, ascending, as the recipe spells it: 1/16/255 says more than 1/4080."""
    size = _reader(name)
    found = {size(record): str(record.conditions[name]) for record in records}
    return dict(sorted(found.items()))
