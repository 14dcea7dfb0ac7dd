"""What the figures draw, read from their axes and compared with values worked out by hand from made-up records."""

import pytest
from made_up_run import ACCURACY, PRIMARY, one_by_seed, one_record, write_folder

from twicing.experiments import figures, training_figures
from twicing.experiments.drawing import arm_styles
from twicing.experiments.findings import primary_rows, read_run

STYLES = arm_styles(("standard", "twicing"))
HELD_OUT = "held-out accuracy [share of images]"


def drawn(panel, arm):
    """The points of an arm's mean, which is the line with its marker."""
    (mean,) = [line for line in panel.axes.lines if is_of(line, arm) and line.get_marker() == STYLES[arm].marker]
    return mean.get_xydata().tolist()


def drawn_seeds(panel, arm):
    lines = [line for line in panel.axes.lines if is_of(line, arm) and line.get_marker() == "None"]
    return [line.get_xydata().tolist() for line in lines]


def is_of(line, arm):
    return line.get_color() == STYLES[arm].color


def near(points):
    return [pytest.approx(point) for point in points]


def test_accuracy_against_strength_stands_under_its_own_title_with_its_own_clean_point():
    value = {
        ("standard", "clean", ""): [0.90, 0.94],
        ("twicing", "clean", ""): [0.80, 0.84],
        ("standard", "pgd", "1/16"): [0.10, 0.20],
        ("twicing", "pgd", "1/16"): [0.30, 0.40],
        ("standard", "fgsm", "1/16"): [0.50, 0.60],
        ("twicing", "fgsm", "1/16"): [0.60, 0.70],
        ("standard", "noise", "1/4"): [0.70, 0.80],
        ("twicing", "noise", "1/4"): [0.75, 0.85],
    }
    records = [
        record
        for (arm, threat, size), values in value.items()
        for record in one_by_seed(
            ACCURACY,
            values,
            arm,
            {"threat": threat} | ({"sd" if threat == "noise" else "eps": size} if size else {}),
        )
    ]
    panels = {panel.title: panel for panel in figures.accuracy_against_strength(records, STYLES).panels}
    assert list(panels) == ["PGD", "FGSM (a weak attack)", "Gaussian noise"]
    means = {title: [drawn(panel, arm) for arm in STYLES] for title, panel in panels.items()}
    # Clean accuracy stands one factor of two left of the weakest disturbance.
    assert means["PGD"] == [
        near([[1 / 32, 0.92], [1 / 16, 0.15]]),
        near([[1 / 32, 0.82], [1 / 16, 0.35]]),
    ]
    assert means["FGSM (a weak attack)"] == [
        near([[1 / 32, 0.92], [1 / 16, 0.55]]),
        near([[1 / 32, 0.82], [1 / 16, 0.65]]),
    ]
    assert means["Gaussian noise"] == [near([[1 / 8, 0.92], [1 / 4, 0.75]]), near([[1 / 8, 0.82], [1 / 4, 0.80]])]
    pgd = panels["PGD"]
    assert drawn_seeds(pgd, "twicing") == [near([[1 / 32, 0.8], [1 / 16, 0.3]]), near([[1 / 32, 0.84], [1 / 16, 0.4]])]
    assert [text.get_text() for text in pgd.axes.get_xticklabels()] == ["clean", "1/16"]


def test_every_seed_and_the_mean_stand_at_twicing_minus_standard(tmp_path):
    # Differences -0.10, -0.06, -0.14: mean -0.1, sd 0.04, half width 2.4841 x 0.04.
    pgd = PRIMARY[0]["conditions"]
    records = [
        *one_by_seed(ACCURACY, [0.40, 0.50, 0.60], "standard", pgd),
        *one_by_seed(ACCURACY, [0.30, 0.44, 0.46], "twicing", pgd),
    ]
    rows = primary_rows(read_run(write_folder(tmp_path, records, primary=PRIMARY[:1])))
    (panel,) = figures.differences(rows, STYLES).panels
    dots, bar, mean, zero = panel.axes.lines
    assert dots.get_xdata().tolist() == pytest.approx([-0.10, -0.06, -0.14])
    assert list(bar.get_xdata()) == pytest.approx([-0.1994, -0.0006], abs=1e-4)
    assert list(mean.get_xdata()) == pytest.approx([-0.1])
    assert list(zero.get_xdata()) == [0, 0]
    assert panel.axes.get_xlabel() == "arm \N{MINUS SIGN} standard [share of images]"


def test_layers_stand_under_their_place_and_time_with_the_spread_over_seeds():
    place = {
        ("attention output", "initialisation"): 0.1,
        ("attention output", "trained"): 0.3,
        ("block output", "initialisation"): 0.5,
        ("block output", "trained"): 0.7,
    }
    records = [
        record
        for (where, when), low in place.items()
        for layer in (1, 2)
        for record in one_by_seed(
            "mean pairwise cosine",
            [low + 0.01 * layer, low + 0.01 * layer + 0.2],
            "twicing",
            {"layer": layer, "where": where, "when": when},
        )
    ]
    (picture,) = figures.by_layer(records, STYLES)
    assert picture.caption.startswith("Mean pairwise cosine, by layer.")
    for panel, ((where, when), low) in zip(picture.panels, place.items(), strict=True):
        assert panel.title == f"{where}s, {when}"
        assert drawn(panel, "twicing") == near([[1, low + 0.11], [2, low + 0.12]])
        # Two seeds 0.2 apart: sd = 0.2 / sqrt(2) with n - 1; n would give 0.1.
        (band,) = panel.axes.collections
        edges = band.get_paths()[0].vertices
        at_one = edges[edges[:, 0] == 1][:, 1]
        assert (at_one.min(), at_one.max()) == pytest.approx((low + 0.11 - 0.1414, low + 0.11 + 0.1414), abs=1e-4)


def curves():
    return [
        one_record(metric, value, seed, "twicing", {"epoch": epoch})
        for seed, (accuracies, losses, seconds) in enumerate(
            [([0.2, 0.6], [2.0, 1.0], [10.0, 20.0]), ([0.4, 0.8], [2.2, 1.4], [14.0, 28.0])]
        )
        for epoch in (1, 2)
        for metric, value in (
            (HELD_OUT, accuracies[epoch - 1]),
            ("training loss [nats]", losses[epoch - 1]),
            ("training time [s]", seconds[epoch - 1]),
        )
    ]


def test_training_by_epoch():
    loss, accuracy = training_figures.training(curves(), STYLES).panels
    assert (loss.title, accuracy.title) == ("training loss [nats]", HELD_OUT)
    assert drawn(loss, "twicing") == near([[1, 2.1], [2, 1.2]])
    assert drawn(accuracy, "twicing") == near([[1, 0.3], [2, 0.7]])


def test_seconds_are_those_of_the_training_steps():
    picture = training_figures.against_seconds(curves(), STYLES)
    (panel,) = picture.panels
    assert drawn(panel, "twicing") == near([[12, 0.3], [24, 0.7]])
    assert drawn_seeds(panel, "twicing") == [near([[10, 0.2], [20, 0.6]]), near([[14, 0.4], [28, 0.8]])]
    assert panel.axes.get_xlabel() == "seconds spent in training steps"
    assert "Evaluation between epochs is not counted" in picture.caption
    assert "wall-clock" not in picture.caption
