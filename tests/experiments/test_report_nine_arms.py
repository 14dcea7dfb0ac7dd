"""A page with nine arms, of which five are controls: every arm keeps a look of its own, and Holm's family its size."""

import re

import pytest
from made_up_run import CONTROLS, NINE, TESTED, make_nine
from test_report import Checker, text_of

from twicing.experiments import figures, training_figures
from twicing.experiments.drawing import PALETTE, arm_styles
from twicing.experiments.findings import family_size, primary_rows, read_run
from twicing.experiments.report import write_report
from twicing.experiments.sentences import in_short


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    return make_nine(tmp_path_factory.mktemp("nine"))


@pytest.fixture(scope="module")
def page(nine):
    return write_report(nine).read_text()


def test_the_page_is_sound_and_has_every_section(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in checker.svgs)
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "In short",
        "Primary metrics",
        "Every seed",
        "Accuracy under disturbance",
        "Gradient masking",
        "Attacks side by side",
        "Transfer between arms",
        "The attack of the papers, unverified",
        "Corruptions (generated, not ImageNet-C)",
        "Similarity and rank of tokens, by layer",
        "Training",
        "Cost",
        "Exploratory, uncorrected",
        "Controls",
        "What this could not have shown",
        "Method",
        "Made with",
    ]
    assert not re.search(r"\bnan\b|None", text_of(page))


def test_placements_are_tested_and_controls_are_not(nine, page):
    run = read_run(nine)
    assert family_size(run) == 3 * 3
    corrected = {row.arm.label for row in primary_rows(run) if row.corrected is not None}
    assert corrected == set(TESTED) - {"standard"}
    assert "Holm's correction is over 9 comparisons" in page.replace("&#39;", "'")


def test_the_headline_is_eps50(nine):
    run = read_run(nine)
    first = in_short(run, primary_rows(run))[1]
    # Three seeds: what could not be shown is said before.
    means = {
        row.arm.label: row.mean for row in primary_rows(run) if row.measure.name == "eps50" and row.arm.label in TESTED
    }
    assert first.startswith(f"eps50: standard {means['standard']:.4f} ({255 * means['standard']:.2f}/255); neutreno ")
    assert f"twicing [1-12] {means['twicing [1-12]']:.4f} ({255 * means['twicing [1-12]']:.2f}/255), " in first
    assert not any(label in first for label in CONTROLS)


def test_every_arm_has_a_look_of_its_own():
    styles = arm_styles(NINE, CONTROLS)
    assert list(styles) == list(NINE)
    looks = {(style.color, style.marker) for style in styles.values()}
    assert len(looks) == len({style.sign for style in styles.values()}) == len(NINE)
    assert all((styles[label].line == "solid") != (label in CONTROLS) for label in NINE)
    assert len({styles[label].line for label in CONTROLS}) == len(CONTROLS)
    assert max(styles[label].weight for label in CONTROLS) < min(styles[label].weight for label in TESTED)
    # A control beside them changes nothing about the tested ones.
    assert {label: arm_styles(TESTED)[label] for label in TESTED} == {label: styles[label] for label in TESTED}


def test_more_arms_than_colours_still_differ():
    many = [f"arm {place}" for place in range(17)]
    styles = arm_styles(many, many[9:])
    assert len({(one.color, one.marker, one.line) for one in styles.values()}) == len(many)
    assert len({(one.color, one.marker) for one in styles.values() if not one.control}) == 9
    # The same colour again: its line is another one too.
    assert [styles[label].line == "solid" for label in many[:9]] == [True] * 6 + [False] * 3


def test_every_colour_is_a_variable_of_the_page_in_both_themes(page):
    css = page[page.index("<style>") : page.index("</style>")]
    light, dark = css.split("prefers-color-scheme: dark")
    for place, color in enumerate(PALETTE):
        assert f"--arm-{place}: {color};" in light
        assert re.search(rf"--arm-{place}: #[0-9a-f]{{6}};", dark)
    styles = arm_styles(NINE, CONTROLS)
    for label, style in styles.items():
        assert PALETTE[int(style.name.removeprefix("arm-"))] == style.color
        assert f'<b style="color: var(--{style.name})">{style.sign}</b> {label}<' in page


def test_controls_have_no_lines_of_seeds(nine):
    run = read_run(nine)
    picture = training_figures.training(run.records, arm_styles(NINE, CONTROLS))
    styles = arm_styles(NINE, CONTROLS)
    seconds = training_figures.against_seconds(run.records, styles)
    for panel in (picture.panels[0], seconds.panels[0]):
        lines = {label: [one for one in panel.axes.lines if one.get_color() == styles[label].color] for label in NINE}
        assert {label: len(drawn) for label, drawn in lines.items()} == {
            label: 1 if label in CONTROLS else 1 + len(run.seeds) for label in NINE
        }
    assert "of the controls, broken and muted, only the mean is drawn" in picture.caption
    only = training_figures.training(run.records, arm_styles(TESTED))
    assert "of the controls" not in only.caption


def test_controls_lie_below_what_is_tested(nine):
    run = read_run(nine)
    styles = arm_styles(NINE, CONTROLS)
    axes = training_figures.training(run.records, styles).panels[0].axes
    order = {label: max(one.zorder for one in axes.lines if one.get_color() == styles[label].color) for label in NINE}
    assert max(order[label] for label in CONTROLS) < min(order[label] for label in TESTED)


def test_controls_have_no_bands(nine):
    run = read_run(nine)
    picture = figures.by_layer(run.records, arm_styles(NINE, CONTROLS))[0]
    assert [len(panel.axes.collections) for panel in picture.panels] == [len(TESTED)] * 4
    assert picture.caption.endswith("one standard deviation over seeds (controls have none).")
    assert figures.by_layer(run.records, arm_styles(TESTED))[0].caption.endswith("standard deviation over seeds.")
