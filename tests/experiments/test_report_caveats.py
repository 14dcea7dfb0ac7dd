"""What a page says of its own limits: overlapping folds, blind attacks, missing eps50, and mixed versions."""

import io
import json
import re

import pytest
from made_up_run import ACCURACY, EPS50_PRIMARY, one_by_seed, one_record, write_folder
from rich.console import Console

from twicing.experiments.findings import read_run
from twicing.experiments.report import write_report
from twicing.experiments.sentences import caveats, remarks
from twicing.experiments.summary import print_summary

CLEAN, PGD, FGSM = {"threat": "clean"}, {"threat": "pgd", "eps": "1/16"}, {"threat": "fgsm", "eps": "1/16"}
EPS50, BLIND = "eps50 [share of pixel range]", "share of zero gradients"
BOTH = [one_record(ACCURACY, 0.5, seed, arm, CLEAN) for seed in (0, 1) for arm in ("standard", "twicing")]


def said(folder, records, **changes):
    return " ".join(caveats(read_run(write_folder(folder, records, **{"primary": []} | changes)), []))


def text_of(folder, records, **changes):
    page = write_report(write_folder(folder, records, **{"primary": []} | changes)).read_text()
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def made_with(folder, records, **changes):
    page = text_of(folder, records, **changes)
    return page[page.index("Made with") :]


def test_folds_overlap_and_the_page_says_so(tmp_path):
    sentence = (
        "their training sets overlap: the differences are not independent, and a t interval tends to be too narrow"
    )
    assert sentence in said(tmp_path / "folds", BOTH, recipe={"folds": 6})
    assert sentence in text_of(tmp_path / "page", BOTH, recipe={"folds": 6})
    assert "overlap" not in said(tmp_path / "none", BOTH, recipe={"epochs": 2})


def test_a_blind_attack_is_named_with_its_arms(tmp_path):
    records = [
        *BOTH,
        *one_by_seed(BLIND, [0.55, 0.83], "twicing", FGSM),
        *one_by_seed(BLIND, [0.5, 0.1], "standard", FGSM),
    ]
    sentence = (
        "The attack was blind there: FGSM at eps 1/16 on twicing met gradients of which more than half of the entries "
        "are exactly zero (up to 83 %), so the accuracy that it left says nothing about robustness."
    )
    assert sentence in said(tmp_path / "blind", records)
    seeing = [*BOTH, *one_by_seed(BLIND, [0.5, 0.1], "standard", FGSM)]
    assert "blind" not in said(tmp_path / "seeing", seeing)


def test_models_without_eps50_are_named(tmp_path):
    pgd = [one_record(ACCURACY, 0.5, seed, arm, PGD) for seed in (0, 1) for arm in ("standard", "twicing")]
    have = [one_record(EPS50, 1 / 32, seed, "standard", {"threat": "pgd"}) for seed in (0, 1)]
    have.append(one_record(EPS50, 1 / 16, 0, "twicing", {"threat": "pgd"}))
    sentence = (
        "eps50 has no value for {}, where more than half of the images withstood a change of the whole pixel range, "
        "as only masked gradients let them; its comparisons leave out these models."
    )
    assert sentence.format("twicing seed 1") in said(tmp_path / "one", [*pgd, *have])
    assert "eps50" not in said(tmp_path / "never-measured", pgd)
    complete = [*have, one_record(EPS50, 1 / 16, 1, "twicing", {"threat": "pgd"})]
    assert "eps50 has no value" not in said(tmp_path / "complete", [*pgd, *complete])
    assert "eps50 is the eps at which PGD fools half" in said(tmp_path / "complete", [*pgd, *complete])
    # Declared as primary and had by none: then silence would look as if it had not been asked for.
    everyone = "standard seed 0, standard seed 1, twicing seed 0, twicing seed 1"
    assert sentence.format(everyone) in said(tmp_path / "nobody", pgd, primary=[EPS50_PRIMARY])


@pytest.mark.parametrize(
    ("jobs", "said"), [(1, "Trainings ran one after another;"), (3, "3 trainings ran side by side;")]
)
def test_seconds_are_told_with_what_ran_beside_them(tmp_path, jobs, said):
    text = text_of(tmp_path, one_by_seed("training time [s per step]", [0.1, 0.2]), jobs=jobs)
    assert f"{said} seconds depend on the load of the machine." in text


def test_a_perplexity_is_printed_with_its_unit_and_its_way(tmp_path):
    metric = "test perplexity per word, segments"
    primary = [{"name": "test perplexity", "metric": metric, "conditions": CLEAN, "better": "lower"}]
    write_folder(tmp_path, one_by_seed(metric, [50.0, 51.0], "standard", CLEAN), primary=primary, limits="a text")
    screen = io.StringIO()
    print_summary(tmp_path, Console(file=screen, width=200))
    assert "\nTest perplexity (per word, segments)" in screen.getvalue()
    assert "\nA text.\n" in screen.getvalue()


def test_an_eps50_of_zero_says_why(tmp_path):
    why = "half of the attacked images or more are wrong before any change."
    some = [*one_by_seed(EPS50, [0.0, 1 / 16], "standard", PGD), *one_by_seed(EPS50, [1 / 16, 0.0], "twicing", PGD)]
    run = read_run(write_folder(tmp_path / "some", some, primary=[]))
    assert f"eps50 is 0 for standard seed 0, twicing seed 1: {why}" in caveats(run, [])
    every = one_by_seed(EPS50, [0.0, 0.0], "standard", PGD)
    assert f"eps50 is 0: {why}" in remarks(every, [])
    assert remarks(one_by_seed(EPS50, [0.01], "standard", PGD), []) == []
    screen = io.StringIO()
    print_summary(tmp_path / "some", Console(file=screen, width=200))
    assert f"- eps50 is 0 for standard seed 0, twicing seed 1: {why}" in screen.getvalue()


@pytest.mark.parametrize(
    ("modes", "became", "targets"),
    [
        (("inputs only", "inputs and targets", "paper_compat"), "<unk>", '"inputs and targets" and "paper_compat"'),
        (("inputs only", "paper_compat"), "<unk>", '"paper_compat"'),
        (("inputs only",), "<unk>", ""),
        (("inputs only", "paper_compat"), "the characters", ""),
    ],
)
def test_swapped_targets_that_are_easy_to_predict_are_no_stress_test(tmp_path, modes, became, targets):
    swaps = [{"threat": "word swap", "mode": mode, "share": share} for mode in modes for share in ("0.01", "0.04")]
    metric = "test perplexity per word, segments"
    records = [one_record(metric, 50.0, 0, "standard", where) for where in [{"threat": "clean"}, *swaps]]
    note = f'Word swap: "AAA" is not in the vocabulary and became {became}.'
    folder = write_folder(tmp_path, records, primary=[])
    (folder / "notes.json").write_text(json.dumps([note]), encoding="utf-8")
    sentence = (
        f"<unk> is common and easy to predict, so that swapping targets too ({targets}) can lower perplexity: "
        'of the word swaps only "inputs only" is a stress test here.'
    )
    said = caveats(read_run(folder), [])
    assert note in said
    assert [one for one in said if "stress test" in one] == ([sentence] if targets else [])
    section = (
        write_report(folder).read_text(encoding="utf-8").partition("<h2>Word swap</h2>")[2].partition("<figure")[0]
    )
    assert ("is a stress test here." in section) == bool(targets)


def test_metrics_nobody_knew_of_are_exploratory(tmp_path):
    records = [
        *one_by_seed(EPS50, [1 / 32, 1 / 16], "standard", {"threat": "pgd"}),
        *one_by_seed(EPS50, [1 / 16, 1 / 16], "twicing", {"threat": "pgd"}),
        *one_by_seed(BLIND, [0.25, 0.5], "standard", FGSM),
        *one_by_seed(BLIND, [0.5, 0.5], "twicing", FGSM),
    ]
    page = text_of(tmp_path, records)
    exploratory = page[page.index("Exploratory, uncorrected") : page.index("What this could not have shown")]
    assert "Accuracy, attacks and time: 2 comparisons" in exploratory
    assert "eps50 [share of pixel range], threat pgd" in exploratory
    assert "share of zero gradients, threat fgsm, eps 1/16" in exploratory


def test_versions_and_commit_are_those_of_the_records(tmp_path):
    page = made_with(tmp_path, BOTH, versions={"torch": "0.0"}, commit="of the configuration")
    assert " torch 7.1 numpy 9.2 commit c0ffee device CPU, made up jobs 2 " in page
    assert "The records differ" not in page
    assert "of the configuration" not in page


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"versions": {"torch": "7.2", "numpy": "9.2"}}, "torch (7.1 and 7.2)"),
        ({"versions": {"torch": "7.1"}}, "numpy (9.2 and not recorded)"),
        ({"commit": None}, "commit (c0ffee and not known (installed without git))"),
        ({"commit": "c0ffee+changes"}, "commit (c0ffee and c0ffee+changes)"),
        ({"device": "GPU"}, "device (CPU, made up and GPU)"),
    ],
    ids=["version", "package", "no-commit", "edited", "device"],
)
def test_a_run_resumed_under_other_versions_says_so(tmp_path, changes, difference):
    later = one_record(ACCURACY, 0.5, 2, "standard", CLEAN, **changes)
    assert (
        f"The records differ in {difference}: this run was resumed elsewhere or after a change, and a difference "
        "between arms may come from that alone."
    ) in made_with(tmp_path, [*BOTH, later])


def test_the_method_names_the_initialisation(tmp_path):
    weights = "Xavier-uniform weights, with which tokens are alike"
    assert f"is evaluated. Initialisation: {weights}. " in text_of(
        tmp_path / "named", BOTH, recipe={"initialisation": weights}
    )
    assert "Initialisation" not in text_of(tmp_path / "not", BOTH, recipe={})


def test_a_configuration_that_is_no_text_is_one_sentence(tmp_path):
    folder = write_folder(tmp_path, BOTH)
    (folder / "config.json").write_bytes(b"\xff\xfe\x00" + json.dumps({}).encode())
    with pytest.raises(ValueError, match=r"config\.json is broken .*in another folder"):
        read_run(folder)


def test_attacks_on_fewer_images_say_so(tmp_path):
    def records(attacked):
        both = [(seed, arm) for seed in (0, 1) for arm in ("standard", "twicing")]
        return [
            one_record(ACCURACY, 0.5, *one, where, n=n) for one in both for where, n in ((CLEAN, 90), (PGD, attacked))
        ]

    sentence = "Attacks worked on 40 of the 90 held-out images, the same ones for every arm"
    assert sentence in said(tmp_path / "fewer", records(40))
    assert "Attacks worked on" not in said(tmp_path / "all", records(90))


def test_the_attack_of_the_papers_is_unverified(tmp_path):
    compat = {"threat": "pgd, paper_compat (unverified)", "eps": "4/255 normalised"}
    records = [*BOTH, *one_by_seed(ACCURACY, [0.5, 0.6], "twicing", compat)]
    assert "The paper_compat attack is unverified" in said(tmp_path / "with", records)
    assert "unverified" not in said(tmp_path / "without", BOTH)
