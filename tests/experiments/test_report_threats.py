"""Attacks side by side, transfer, corruptions and the papers' attack: their numbers, worked out by hand."""

import json
import re

import pytest
from made_up_run import ACCURACY, make_verdicts, one_by_seed, one_record, write_folder

from twicing.experiments import corruption_bars, figures
from twicing.experiments.attack_tables import stronger_attacks, transfer_matrices
from twicing.experiments.drawing import arm_styles
from twicing.experiments.findings import read_run
from twicing.experiments.report import write_report
from twicing.experiments.sentences import caveats

STYLES = arm_styles(("standard", "twicing"))
MEAN_CORRUPTED = "mean corruption accuracy [share of images]"
COMPAT = "pgd, paper_compat (unverified)"


def at(threat, eps="1/16", **more):
    return {"threat": threat, "eps": eps} | more


def corrupted(kind, severity):
    return {"threat": "corruption", "kind": kind, "severity": severity}


def means(table):
    return {
        label: [None if cell.mean is None else round(cell.mean, 6) for cell in cells] for label, cells in table.lines
    }


def run_of(folder, records):
    return read_run(write_folder(folder, records, primary=[]))


def section(folder, records, heading):
    page = write_report(write_folder(folder, records, primary=[])).read_text()
    part = page[page.index(f"<h2>{heading}") :]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", part[: part.index("</section>")]))


def test_attacks_stand_side_by_side_at_the_eps_that_they_share(tmp_path):
    records = [
        *one_by_seed(ACCURACY, [0.5, 0.6], "standard", at("pgd"), n=300),
        *one_by_seed(ACCURACY, [0.4, 0.6], "twicing", at("pgd"), n=300),
        *one_by_seed(ACCURACY, [0.9, 0.9], "standard", at("pgd", "1/64"), n=300),
        *one_by_seed(ACCURACY, [0.45, 0.55], "standard", at("autoattack"), n=100),
        *one_by_seed(ACCURACY, [0.3, 0.2], "twicing", at("spsa"), n=100),
        *one_by_seed(ACCURACY, [0.1, 0.1], "twicing", at("spsa", "1/8"), n=100),
    ]
    sixteenth, eighth = stronger_attacks(run_of(tmp_path / "run", records))
    assert (sixteenth.title, eighth.title) == ("eps 1/16", "eps 1/8")
    assert sixteenth.columns == ("PGD, 300 images", "SPSA, 100 images", "AutoAttack, 100 images")
    assert means(sixteenth) == {"standard": [0.55, None, 0.5], "twicing": [0.5, 0.25, None]}
    assert means(eighth) == {"standard": [None], "twicing": [0.1]}
    sd = dict(sixteenth.lines)["twicing"][0].sd
    assert sd == pytest.approx(0.2 / 2**0.5)
    text = section(tmp_path / "page", records, "Attacks side by side")
    assert "twicing 0.500 ± 0.141 0.250 ± 0.071 –" in text  # noqa: RUF001
    assert stronger_attacks(run_of(tmp_path / "pgd-alone", records[:3])) == []


def transfers(n=200):
    return [
        *one_by_seed(ACCURACY, [0.30, 0.40], "standard", at("pgd"), n=n),
        *one_by_seed(ACCURACY, [0.20, 0.20], "twicing", at("pgd"), n=n),
        *one_by_seed(ACCURACY, [0.70, 0.80], "standard", at("transfer") | {"from": "twicing"}, n=200),
        *one_by_seed(ACCURACY, [0.60, 0.62], "twicing", at("transfer") | {"from": "standard"}, n=200),
    ]


def test_transfer_has_the_attacked_in_rows_and_the_makers_in_columns(tmp_path):
    (table,) = transfer_matrices(run_of(tmp_path / "run", transfers()))
    assert (table.title, table.images, table.columns) == ("eps 1/16", "200 images", ("standard", "twicing"))
    assert means(table) == {"standard": [0.35, 0.75], "twicing": [0.61, 0.20]}
    assert [[cell.own for cell in cells] for _, cells in table.lines] == [[True, False], [False, True]]
    text = section(tmp_path / "page", transfers(), "Transfer between arms")
    assert "standard 0.350 ± 0.071 0.750 ± 0.071" in text
    # A transfer is between two arms; as a difference to standard it would say nothing.
    exploratory = section(tmp_path / "page", transfers(), "Exploratory")
    assert "threat pgd" in exploratory
    assert "transfer" not in exploratory


def test_pgd_on_other_images_is_not_on_the_diagonal(tmp_path):
    (table,) = transfer_matrices(run_of(tmp_path, transfers(n=300)))
    assert means(table) == {"standard": [None, 0.75], "twicing": [0.61, None]}
    assert [[cell.own for cell in cells] for _, cells in table.lines] == [[True, False], [False, True]]


def test_the_longest_attack_of_the_verdict_is_on_the_diagonal_then(tmp_path):
    left = {"clean": 0.9, "PGD-20": 0.3, "PGD-100 x 5": 0.25, "PGD, any change": 0.0}
    verdicts = make_verdicts(("standard", "twicing"), failed=())
    for of_arm, changes in (("standard", {}), ("twicing", {"eps": "1/8"})):
        for seed, more in (("0", 0.0), ("1", 0.1)):
            accuracies = {name: value + more for name, value in left.items()}
            verdicts[of_arm][seed] |= {"images": 200, "accuracies": accuracies} | changes
    folder = write_folder(tmp_path, transfers(n=300), primary=[])
    (folder / "verdicts.json").write_text(json.dumps(verdicts))
    (table,) = transfer_matrices(read_run(folder))
    # Twicing was examined at another eps.
    assert means(table) == {"standard": [0.3, 0.75], "twicing": [0.61, None]}


def corruptions():
    values = {
        # kind, severity: standard over two seeds, twicing over two seeds
        ("gaussian_noise", 1): ([0.9, 0.8], [0.7, 0.7]),
        ("gaussian_noise", 5): ([0.5, 0.6], [0.3, 0.5]),
        ("jpeg", 1): ([0.8, 0.8], [0.9, 0.9]),
        ("jpeg", 5): ([0.6, 0.4], [0.7, 0.9]),
    }
    return [
        record
        for (kind, severity), by_arm in values.items()
        for arm, of_seeds in zip(STYLES, by_arm, strict=True)
        for record in one_by_seed(ACCURACY, of_seeds, arm, corrupted(kind, severity), n=150)
    ]


def test_corruptions_are_averaged_over_severities_within_a_seed():
    assert corruption_bars.by_kind(corruptions()) == {
        "gaussian_noise": {
            "standard": pytest.approx({0: 0.7, 1: 0.7}),
            "twicing": pytest.approx({0: 0.5, 1: 0.6}),
        },
        "jpeg": {"standard": pytest.approx({0: 0.7, 1: 0.6}), "twicing": pytest.approx({0: 0.8, 1: 0.9})},
    }


def test_a_seed_without_its_hardest_severity_is_left_out():
    whole = corruptions()
    cut = [one for one in whole if (one.arm, one.seed, one.conditions["severity"]) != ("twicing", 0, 5)]
    found = corruption_bars.by_kind(cut)
    assert found["jpeg"]["twicing"] == pytest.approx({1: 0.9})
    assert found["jpeg"]["standard"] == pytest.approx({0: 0.7, 1: 0.6})


def test_the_bars_and_the_table_hold_these_means(tmp_path):
    picture = corruption_bars.bars(corruptions(), STYLES)
    assert picture.caption.startswith("Generated, not ImageNet-C.")
    assert "severities 1, 5" in picture.caption
    assert [panel.title for panel in picture.panels] == ["gaussian noise", "jpeg"]
    widths = [[bar.get_width() for bar in panel.axes.patches] for panel in picture.panels]
    assert widths == [pytest.approx([0.7, 0.55]), pytest.approx([0.65, 0.85])]
    colors = [line.get_color() for line in picture.panels[0].axes.lines]
    assert colors == [style.color for style in STYLES.values()]
    assert list(picture.panels[1].axes.lines[1].get_xdata()) == pytest.approx([0.8, 0.9])

    total = one_by_seed(MEAN_CORRUPTED, [0.71, 0.73], "twicing", {}, n=150)
    records = [*corruptions(), *total]
    table = corruption_bars.table(run_of(tmp_path / "run", records))
    assert table.columns == ("gaussian noise", "jpeg", "mean of all")
    assert means(table) == {"standard": [0.7, 0.65, None], "twicing": [0.55, 0.85, 0.72]}
    without = corruption_bars.table(run_of(tmp_path / "without", corruptions()))
    assert without.columns == ("gaussian noise", "jpeg")
    text = section(tmp_path / "page", records, "Corruptions (generated, not ImageNet-C)")
    assert "twicing 0.550 ± 0.071 0.850 ± 0.071 0.720 ± 0.014" in text
    assert "150 images a severity" in text


def test_corruptions_are_explored_under_their_own_heading_and_carry_their_caveat(tmp_path):
    records = [*corruptions(), *one_by_seed(MEAN_CORRUPTED, [0.7, 0.72], "twicing", {})]
    text = section(tmp_path, records, "Exploratory")
    general, of_kinds = text.split("Corruptions, generated: ")
    assert of_kinds.startswith("4 comparisons")
    assert "mean corruption accuracy [share of images]" in general
    assert "are not ImageNet-C: no mCE can be made of them" in " ".join(caveats(read_run(tmp_path), []))


def test_the_papers_attack_stands_apart_in_its_own_units():
    records = [
        *one_by_seed(ACCURACY, [0.9, 0.8], "twicing", {"threat": "clean"}),
        *one_by_seed(ACCURACY, [0.5, 0.7], "twicing", {"threat": COMPAT, "eps": "2/255 normalised"}),
        *one_by_seed(ACCURACY, [0.3, 0.4], "twicing", {"threat": COMPAT, "eps": "4/255 normalised"}),
    ]
    picture = figures.paper_compat(records, STYLES, [0.229, 0.224, 0.225])
    (panel,) = picture.panels
    assert "unverified" in panel.title
    assert picture.caption.startswith("Unverified")
    mean = next(line for line in panel.axes.lines if line.get_marker() == STYLES["twicing"].marker)
    assert mean.get_xydata().tolist() == [
        pytest.approx(point) for point in ([0, 0.85], [2 / 255, 0.6], [4 / 255, 0.35])
    ]
    # 4/255 of a normalised unit is 4 x .226 = 0.904 steps of a pixel.
    assert [text.get_text() for text in panel.axes.get_xticklabels()] == ["clean", "2\n0.45", "4\n0.9"]
    assert panel.axes.get_xscale() == "linear"
    bare = figures.paper_compat(records, STYLES, ())
    assert [text.get_text() for text in bare.panels[0].axes.get_xticklabels()] == ["clean", "2", "4"]
    assert figures.paper_compat(records[:2], STYLES, ()) is None
    # It never mixes with PGD in pixels.
    assert figures.accuracy_against_strength(records, STYLES) is None


def test_sizes_of_pixels_are_spelt_as_the_recipe_spells_them():
    records = [one_record(ACCURACY, 0.5, 0, "twicing", at("pgd", eps)) for eps in ("1/255", "1/16/255", "1/2/255")]
    (panel,) = figures.accuracy_against_strength(records, STYLES).panels
    assert [text.get_text() for text in panel.axes.get_xticklabels()] == ["1/16", "1/2", "1"]
    assert panel.axes.get_xlabel() == "eps, in steps of 1/255"
    mean = next(line for line in panel.axes.lines if line.get_marker() == STYLES["twicing"].marker)
    assert mean.get_xdata().tolist() == pytest.approx([1 / 16 / 255, 1 / 2 / 255, 1 / 255])


def test_one_eps_of_spsa_is_a_table_and_no_curve():
    of_pgd = [one_record(ACCURACY, 0.5, 0, "twicing", at("pgd"))]
    spsa = [one_record(ACCURACY, 0.5, 0, "twicing", at("spsa", eps)) for eps in ("1/16", "1/8")]
    assert [panel.title for panel in figures.accuracy_against_strength([*of_pgd, spsa[0]], STYLES).panels] == ["PGD"]
    both = figures.accuracy_against_strength([*of_pgd, *spsa], STYLES)
    assert [panel.title for panel in both.panels] == ["PGD", "SPSA (without gradients)"]


def test_the_caption_names_the_headline():
    of_pgd = [one_record(ACCURACY, 0.5, 0, "twicing", at("pgd"))]
    half = one_record("eps50 [share of pixel range]", 0.06, 0, "twicing", {"threat": "pgd"})
    assert "PGD is the headline" in figures.accuracy_against_strength(of_pgd, STYLES).caption
    caption = figures.accuracy_against_strength([*of_pgd, half], STYLES).caption
    assert "The headline is eps50" in caption
    assert "PGD is the headline" not in caption
