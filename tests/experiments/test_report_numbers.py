"""Every number of the page and of the terminal, against values worked out by hand from a few made-up records."""

import io
import re
from math import exp

import numpy as np
import pytest
from made_up_run import ACCURACY, PRIMARY, one_by_seed, one_record, write_folder
from rich.console import Console

from twicing.experiments.costs import costs
from twicing.experiments.findings import exploratory_measures, primary_rows, read_run
from twicing.experiments.report import write_report
from twicing.experiments.results import Correctness
from twicing.experiments.results_table import results_markdown
from twicing.experiments.sentences import caveats, fewest_pairs, in_short
from twicing.experiments.summary import print_summary

OTHER_SEEDS = "standard (other seeds)"
STEP = "training time [s per step]"
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
CLEAN, PGD, FGSM = {"threat": "clean"}, {"threat": "pgd", "eps": "1/16"}, {"threat": "fgsm", "eps": "1/16"}

# Three seeds: t(0.975, 2) = 4.3027, so a half width is 4.3027 / sqrt(3) = 2.4841 standard deviations.
# PGD: twicing - standard = -0.10, -0.06, -0.14: mean -0.1, sd 0.04, half width 0.09937,
#      t = 4.3301 and p = 1 - t / sqrt(t^2 + 2) = 0.0494.
#      other seeds - standard = 0.05, 0.02, 0.08: mean 0.05, sd 0.03, half width 0.0745.
# FGSM: 0.30, 0.31, 0.29: mean 0.3, sd 0.01, half width 0.0248.
# Steps: ratios 2, 2.5, 1.5: logarithms of mean 0.67163, sd 0.25609, half width 0.63617.
RECORDS = [
    *one_by_seed(ACCURACY, [0.40, 0.50, 0.60], "standard", PGD, n=77),
    *one_by_seed(ACCURACY, [0.30, 0.44, 0.46], "twicing", PGD, n=77),
    *one_by_seed(ACCURACY, [0.45, 0.52, 0.68], OTHER_SEEDS, PGD, n=77),
    *one_by_seed(ACCURACY, [0.50, 0.60, 0.70], "standard", FGSM, n=77),
    *one_by_seed(ACCURACY, [0.80, 0.91, 0.99], "twicing", FGSM, n=77),
    *one_by_seed(ACCURACY, [1.0, 1.0, 1.0], "standard", CLEAN),
    *one_by_seed(ACCURACY, [1.0, 1.0, 1.0], "twicing", CLEAN),
    *one_by_seed(STEP, [0.02, 0.02, 0.02], "standard"),
    *one_by_seed(STEP, [0.04, 0.05, 0.03], "twicing"),
    *one_by_seed(STEP, [0.06, 0.06, 0.06], OTHER_SEEDS),
]
PGD_SENTENCE = (
    "PGD accuracy at eps 1/16: standard 0.500; twicing 0.400, "
    "difference shown: lower (worse) by 0.100, 95 % interval [-0.199, -0.00063], Holm-corrected p = 0.049; "
    "robustness not established, as gradient masking was not looked for."
)
DOUBT = "; robustness not established, as gradient masking was not looked for"
COST_SENTENCE = "A training step takes 1.96 times as long with twicing (95 % interval 1.04 to 3.70)."


def answers():
    """One seed, 100 images: under PGD twicing loses 50 of the 60 that standard has right; clean, all are right."""
    right = np.arange(100)
    return [
        Correctness(arm, 0, right, {"clean": right >= 0, "pgd eps=1/16": right < few})
        for arm, few in (("standard", 60), ("twicing", 10))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("by-hand"), RECORDS, answers(), primary=PRIMARY[:1])


@pytest.fixture(scope="module")
def run(folder):
    return read_run(folder)


@pytest.fixture(scope="module")
def page(folder):
    return write_report(folder).read_text()


def table(page, heading):
    """The first row of every arm in the table under a heading, cell by cell, as text."""
    section = page[page.index(f"<h2>{heading}</h2>") :]
    body = section[: section.index("</section>")]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in body.split("<tr>")[2:]]
    found = {}
    for row in rows:
        arm, *cells = (re.sub(r"<[^>]*>", "", one).replace("&nbsp;", " ").strip(" ●■▲◆✕") for one in row)
        found.setdefault(arm, cells)
    return found


def test_the_primary_table(page):
    found = table(page, "Primary metrics")
    assert found["standard"][:3] == ["3", "0.500", "0.100"]
    bootstrap = found["twicing"].pop(5)
    assert found["twicing"] == [
        "3",
        "0.400",
        "0.087",
        f"{MINUS}0.100",
        f"[{MINUS}0.199, {MINUS}0.00063]",
        "0.049",
        f"difference shown: lower (worse) by 0.100{DOUBT}",
    ]
    # 100 images of which 50 are lost: Binomial(100, 1/2) has its quantiles 2.5 % and 97.5 % at 40 and 60.
    low, high = (float(end.replace(MINUS, "-")) for end in bootstrap.strip("[]").split(", "))
    assert (low, high) == pytest.approx((-0.60, -0.40), abs=0.0101)
    control = found[f"{OTHER_SEEDS} noise floor"]
    assert control[1:5] == ["0.550", "0.118", "+0.050", f"[{MINUS}0.025, +0.125]"]
    assert control[6] == DASH


def test_the_primary_table_has_the_corrected_p(tmp_path):
    # Clean accuracy has no spread and no p, and still counts: Holm's p is 2 x 0.0494, Bonferroni's t(0.9875, 2) 6.2053.
    row = table(write_report(write_folder(tmp_path, RECORDS, primary=PRIMARY[:2])).read_text(), "Primary metrics")
    assert row["twicing"][4:] == [
        f"[{MINUS}0.199, {MINUS}0.00063]",
        "0.099",
        "no difference shown (smallest showable: ±0.143 after correction for 2 comparisons; "
        "the uncorrected interval excludes zero)",
    ]


def test_the_cost_table(page):
    found = table(page, "Cost")
    assert found["standard"] == ["0.020", "0", DASH, DASH]
    assert found["twicing"] == ["0.040", "0.010", "1.96", "[1.04, 3.70]"]
    assert found[OTHER_SEEDS] == ["0.060", "0", "3.00", "the same on every seed, no interval"]


def test_the_exploratory_table(page):
    fgsm = page[page.index('<td class="words">accuracy [share of images], threat fgsm, eps 1/16</td>') :]
    row = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", fgsm[: fgsm.index("</tr>")])
    words = f"difference shown: higher (better) by 0.300{DOUBT}"
    assert row[2:] == ["0.900", "0.095", "+0.300", "[+0.275, +0.325]", words]


def test_which_direction_is_better_outside_the_primaries(tmp_path):
    metrics = {
        ACCURACY: "higher",
        "eps50 [share of pixel range]": "higher",
        "top-5 accuracy [share of images]": "higher",
        "mean corruption accuracy [share of images]": "higher",
        STEP: "lower",
        "share of zero gradients": "neither",
        "mean pairwise cosine": "neither",
        "a metric of next year [m]": "neither",
    }
    run = read_run(write_folder(tmp_path, [one_record(metric, 0.5) for metric in metrics], primary=[]))
    assert {measure.metric: measure.better for measure in exploratory_measures(run)} == metrics


def test_the_sentences(run):
    assert in_short(run, primary_rows(run)) == [
        "With 3 seeds, which is fewer than the 5 this library asks for, a mean difference smaller than 2.5 times the "
        "spread between seeds (the standard deviation of the paired differences) could not have been shown, even if "
        "it is real.",
        PGD_SENTENCE,
        "Gradient masking was not looked for, so robustness not established.",
        COST_SENTENCE,
        "Noise floor: standard with other seeds differs from standard by +0.050 in PGD accuracy at eps 1/16 "
        "(95 % interval [-0.025, +0.125]).",
    ]


def test_the_cost_is_a_ratio_to_standard_with_both_ends(run):
    twicing = next(cost for cost in costs(run) if cost.arm.label == "twicing")
    assert (twicing.ratio, twicing.low, twicing.high) == pytest.approx((1.95743, 1.03610, 3.69804), rel=1e-4)
    assert twicing.no_interval == ""


@pytest.mark.parametrize(("spread", "known"), [(0.2758, True), (0.2826, False)])
def test_an_interval_over_more_than_a_factor_of_four_is_not_shown(tmp_path, spread, known):
    # t(0.975, 2) / sqrt(3) = 2.4841: from low to high it is a factor of exp(2 x 2.4841 x spread), 3.94 and 4.07.
    records = [
        *one_by_seed(STEP, [0.1, 0.1, 0.1]),
        *one_by_seed(STEP, [0.2 * exp(change) for change in (-spread, 0.0, spread)], "twicing"),
    ]
    cost = costs(read_run(write_folder(tmp_path, records, primary=[])))[1]
    assert cost.ratio == pytest.approx(2)
    assert (cost.low is not None, cost.high is not None) == (known, known)
    assert cost.no_interval == ("" if known else "interval not known from 3 seeds")
    if known:
        assert cost.high / cost.low == pytest.approx(exp(2 * 2.4841 * spread), rel=1e-3)


def test_two_seeds_give_no_interval_of_cost_anywhere(tmp_path):
    records = [*one_by_seed(STEP, [0.1, 0.1]), *one_by_seed(STEP, [0.2, 0.201], "twicing")]
    folder = write_folder(tmp_path, records, primary=[])
    said = "interval not known from 2 seeds"
    assert f"A training step takes 2.00 times as long with twicing ({said})." in in_short(read_run(folder), [])
    assert f'<td class="n">{said}</td>' in write_report(folder).read_text(encoding="utf-8")
    assert f"| 2.00 ({said}) |" in results_markdown(folder)


@pytest.mark.parametrize(
    ("standard", "twicing", "said"),
    [
        ([0.02], [0.05], "2.50 times as long with twicing (one seed, no interval)."),
        ([0.02], [0.05, 0.07], "2.50 times as long with twicing (one seed, no interval)."),
        ([0.02, 0.04], [0.01, 0.02], "0.50 times as long with twicing (the same on every seed, no interval)."),
    ],
    ids=["one-seed", "one-pair", "no-spread"],
)
def test_a_cost_without_an_interval_says_why(tmp_path, standard, twicing, said):
    records = [*one_by_seed(STEP, standard), *one_by_seed(STEP, twicing, "twicing")]
    run = read_run(write_folder(tmp_path, records, primary=[]))
    assert f"A training step takes {said}" in in_short(run, [])


def test_what_could_not_have_been_shown_is_the_half_width(run):
    said = caveats(run, primary_rows(run))
    assert "PGD accuracy at eps 1/16, twicing: a mean difference below +-0.099 (uncorrected)." in said
    assert not any(OTHER_SEEDS in sentence for sentence in said)


def test_the_comparison_with_the_fewest_seeds_counts(tmp_path):
    records = [
        *one_by_seed(ACCURACY, [0.4, 0.5, 0.6], "standard", PGD),
        *one_by_seed(ACCURACY, [0.4, 0.6, 0.9], "twicing", PGD),
        *one_by_seed(ACCURACY, [0.4], OTHER_SEEDS, PGD),
        *one_by_seed(ACCURACY, [0.9, 0.8, 0.8], "standard", CLEAN),
        *one_by_seed(ACCURACY, [0.9, 0.9], "twicing", CLEAN),
    ]
    run = read_run(write_folder(tmp_path, records, primary=PRIMARY[:2]))
    rows = primary_rows(run)
    assert fewest_pairs(run, rows) == 2
    assert in_short(run, rows)[0].startswith("With 2 seeds, ")
    assert caveats(run, rows)[0].startswith("With 2 seeds, ")


def test_the_method_counts_the_held_out_images(page):
    assert "3 seeds (0, 1, 2), 300 held-out images per seed, of which attacks worked on 77." in page


def test_the_terminal_says_the_same_numbers(folder):
    console = Console(width=80, record=True, color_system=None, file=io.StringIO())
    print_summary(folder, console)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    start = lines.index("PGD accuracy at eps 1/16")
    assert lines[start + 1 : start + 5] == [
        "arm mean sd difference 95 % interval",
        "standard 0.500 0.100",
        "twicing 0.400 0.087 -0.100 [-0.199, -0.00063]",
        f"{OTHER_SEEDS} (control) 0.550 0.118 +0.050 [-0.025, +0.125]",
    ]
    said = " ".join(lines)
    assert f"- {PGD_SENTENCE}" in said
    assert f"- {COST_SENTENCE}" in said
