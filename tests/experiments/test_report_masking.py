"""No report calls an arm more robust without its verdict on gradient masking, or the lack of one, beside it."""

import io
import json
import re

import pytest
from made_up_run import ACCURACY, EPS50_PRIMARY, PRIMARY, make_verdicts, one_by_seed, write_folder
from rich.console import Console

from twicing.experiments.findings import exploratory_measures, exploratory_rows, primary_rows, read_run
from twicing.experiments.masking_verdicts import doubt, read_verdicts, verdict_on
from twicing.experiments.report import write_report
from twicing.experiments.results_table import results_markdown
from twicing.experiments.sentences import caveats, in_short, masking_sentence
from twicing.experiments.summary import print_summary

ARMS = ("standard", "twicing", "neutreno")
EPS50 = EPS50_PRIMARY["metric"]
PGD, CLEAN = {"threat": "pgd", "eps": "1/16"}, {"threat": "clean"}
ATTACKED = ("pgd", "fgsm", "spsa", "autoattack", "transfer", "pgd, paper_compat (unverified)")
FAILED = "robustness not established, as the verdict on gradient masking failed for {}"
UNKNOWN = "robustness not established, as gradient masking was not looked for"
REASON = "SPSA (seed 0: SPSA leaves 20 of 100 images right)"

# Every arm but standard is better by 0.1 or 0.01, out of any doubt that a t test knows of.
RECORDS = [
    *one_by_seed(EPS50, [0.050, 0.051, 0.049], "standard", {"threat": "pgd"}),
    *one_by_seed(EPS50, [0.060, 0.0615, 0.0585], "twicing", {"threat": "pgd"}),
    *one_by_seed(EPS50, [0.060, 0.0616, 0.0585], "neutreno", {"threat": "pgd"}),
    *one_by_seed(ACCURACY, [0.50, 0.51, 0.49], "standard", PGD),
    *one_by_seed(ACCURACY, [0.60, 0.615, 0.585], "twicing", PGD),
    *one_by_seed(ACCURACY, [0.60, 0.615, 0.585], "neutreno", PGD),
    *one_by_seed(ACCURACY, [0.80, 0.81, 0.79], "standard", CLEAN),
    *one_by_seed(ACCURACY, [0.90, 0.915, 0.885], "twicing", CLEAN),
    *one_by_seed(ACCURACY, [0.90, 0.915, 0.885], "neutreno", CLEAN),
]


def folder_with(folder, verdicts, records=RECORDS, primary=(EPS50_PRIMARY, PRIMARY[1])):
    write_folder(folder, records, primary=list(primary))
    if verdicts is not None:
        (folder / "verdicts.json").write_text(json.dumps(verdicts))
    return folder


def said_everywhere(folder):
    """The page, the terminal and the section of docs/results.md, as text."""
    console = Console(width=80, record=True, color_system=None, file=io.StringIO())
    print_summary(folder, console)
    page = re.sub(r"<[^>]*>", " ", write_report(folder).read_text().replace("&nbsp;", " ").replace("&#39;", "'"))
    return [" ".join(text.split()) for text in (page, console.export_text(), results_markdown(folder))]


def test_without_verdicts_nothing_is_called_more_robust(tmp_path):
    folder = folder_with(tmp_path, None)
    rows = primary_rows(read_run(folder))
    for row in rows:
        if row.arm.label != "standard":
            of_attack = row.measure.metric == EPS50
            assert row.conclusion.startswith("difference shown: higher (better)")
            assert (UNKNOWN in row.conclusion) == (UNKNOWN in row.verdict) == of_attack
    for text in said_everywhere(folder):
        claims = re.findall(r"difference shown: higher \(better\) by 0\.01\d[^;]*(; robustness[^.;|]*)?", text)
        assert len(claims) >= 2
        assert all(UNKNOWN in claim for claim in claims)
    assert masking_sentence(read_run(folder)) == "Gradient masking was not looked for, so robustness not established."


@pytest.mark.parametrize("threat", ATTACKED)
def test_every_attack_is_doubted_and_nothing_else(tmp_path, threat):
    where = {"threat": threat, "eps": "1/8"}
    records = [
        *one_by_seed(ACCURACY, [0.5, 0.51, 0.49], "standard", where),
        *one_by_seed(ACCURACY, [0.6, 0.615, 0.585], "twicing", where),
        *one_by_seed(ACCURACY, [0.5, 0.51, 0.49], "standard", {"threat": "noise", "sd": "1/8"}),
        *one_by_seed(ACCURACY, [0.6, 0.615, 0.585], "twicing", {"threat": "noise", "sd": "1/8"}),
        *one_by_seed("share of zero gradients", [0.5, 0.51, 0.49], "standard", where),
        *one_by_seed("share of zero gradients", [0.6, 0.615, 0.585], "twicing", where),
    ]
    run = read_run(folder_with(tmp_path, None, records, primary=[]))
    attacked, noisy, zeros = exploratory_rows(run, exploratory_measures(run))
    assert UNKNOWN in attacked.conclusion
    assert UNKNOWN not in noisy.conclusion + zeros.conclusion
    assert masking_sentence(run)


def test_a_verdict_that_passed_takes_the_doubt_away(tmp_path):
    folder = folder_with(tmp_path, make_verdicts(ARMS, seeds=(0, 1, 2), failed=()))
    assert all("not established" not in row.verdict for row in primary_rows(read_run(folder)))
    run = read_run(folder)
    assert masking_sentence(run) == "No sign of gradient masking in any arm."
    assert not any("some seeds only" in sentence for sentence in caveats(run, []))
    for text in said_everywhere(folder):
        assert "as gradient masking was not looked for" not in text
        assert "o sign of gradient masking" in text


def test_a_verdict_that_failed_is_named_with_its_reason(tmp_path):
    folder = folder_with(tmp_path, make_verdicts(ARMS, failed=("twicing",)))
    by_arm = {row.arm.label: row.conclusion for row in primary_rows(read_run(folder)) if row.measure.metric == EPS50}
    assert FAILED.format("twicing") in by_arm["twicing"]
    assert "not established" not in by_arm["neutreno"]
    sentence = (
        f"Robustness not established for twicing: {REASON}; no sign of gradient masking in the other arms "
        "(standard, neutreno)."
    )
    run = read_run(folder)
    assert masking_sentence(run) == sentence
    assert sentence in in_short(run, primary_rows(run))
    for text in said_everywhere(folder):
        assert FAILED.format("twicing") in text
        assert REASON in text


def test_a_failed_baseline_makes_every_comparison_doubtful(tmp_path):
    folder = folder_with(tmp_path, make_verdicts(ARMS, failed=("standard",)))
    rows = [row for row in primary_rows(read_run(folder)) if row.measure.metric == EPS50]
    assert all(FAILED.format("standard") in row.conclusion for row in rows if row.arm.label != "standard")


def test_one_arm_that_nobody_looked_at_is_named(tmp_path):
    run = read_run(folder_with(tmp_path, make_verdicts(("standard", "twicing"), failed=())))
    assert masking_sentence(run) == (
        "Gradient masking was not looked for in neutreno; no sign of gradient masking in the other arms "
        "(standard, twicing)."
    )
    by_arm = {row.arm.label: row.conclusion for row in primary_rows(run) if row.measure.metric == EPS50}
    assert by_arm["neutreno"].endswith(f"{UNKNOWN} in neutreno")
    assert "not established" not in by_arm["twicing"]
    assert "looked for in some seeds only of standard, twicing, on 100 images each" in " ".join(caveats(run, []))


def test_a_doubt_is_empty_only_where_every_side_passed(tmp_path):
    (tmp_path / "verdicts.json").write_text(json.dumps(make_verdicts(ARMS, failed=("twicing",))))
    verdicts = read_verdicts(tmp_path)
    assert doubt(verdicts, "standard", "neutreno") == ""
    assert doubt(verdicts, "standard", "twicing") == FAILED.format("twicing")
    assert doubt(verdicts, "twicing", "other") == (
        f"{FAILED.format('twicing')}, and gradient masking was not looked for in other"
    )
    assert doubt({}, "standard", "twicing") == UNKNOWN
    assert verdict_on({}, "standard").passed is None
    assert verdict_on({}, "standard").words == "gradient masking was not looked for"


def test_where_nothing_is_claimed_nothing_is_doubted(tmp_path):
    records = [
        *one_by_seed(EPS50, [0.05, 0.06, 0.04], "standard", {"threat": "pgd"}),
        *one_by_seed(EPS50, [0.06, 0.04, 0.05], "twicing", {"threat": "pgd"}),
    ]
    (row,) = (
        row
        for row in primary_rows(read_run(folder_with(tmp_path, None, records, [EPS50_PRIMARY])))
        if row.arm.label == "twicing"
    )
    assert row.conclusion.startswith("no difference shown")
    assert "not established" not in row.conclusion


def test_without_attacks_masking_is_no_topic(tmp_path):
    records = [record for record in RECORDS if record.conditions == CLEAN]
    folder = folder_with(tmp_path, None, records, [PRIMARY[1]])
    assert masking_sentence(read_run(folder)) == ""
    for text in said_everywhere(folder):
        assert "radient masking" not in text


def test_the_page_shows_every_check(tmp_path):
    page = write_report(folder_with(tmp_path, make_verdicts(ARMS, failed=("twicing",)))).read_text()
    section = page[page.index("<h2>Gradient masking</h2>") :]
    section = section[: section.index("</section>")]
    assert section.count("<strong>no</strong>") == 1
    assert section.count(">yes<") == 2 * 2 * len(ARMS) - 1
    assert "PGD-100 with 5 restarts leaves 31 of 100 images right" in section
    head = section[: section.index("<details>")]
    verdict = re.search(r"twicing</th><td class=\"words\">(.*?)</td>(.*?)</tr>", head)
    assert verdict[1] == f"robustness not established: {REASON}"
    assert re.sub(r"<[^>]*>", " ", verdict[2]).split() == ["0,", "1", "100", "1/16"]


def test_the_same_failure_on_several_seeds_is_told_once_in_the_order_of_numbers(tmp_path):
    def entry(seed):
        seen = f"SPSA leaves {seed} of 100 images right."
        checks = [{"name": "SPSA", "passed": False, "seen": seen}]
        return {"passed": False, "eps": "1/16", "images": 100, "sentence": "", "checks": checks}

    (tmp_path / "verdicts.json").write_text(json.dumps({"twicing": {str(seed): entry(seed) for seed in (10, 2, 1)}}))
    one = read_verdicts(tmp_path)["twicing"]
    assert [verdict.seed for verdict in one.seeds] == [1, 2, 10]
    assert one.reason == "SPSA (seeds 1, 2, 10: SPSA leaves 1 of 100 images right)"


WRONG = {
    "a list": ([], r"verdicts\.json, the file: expected an object, got \[\]\. Delete the file"),
    "no seeds": ({"twicing": 3}, r"arm 'twicing': expected an object, got 3"),
    "no checks": ({"twicing": {"0": {"passed": True, "eps": "1/16", "images": 9}}}, r"seed 0: .*incomplete.*'checks'"),
    "words for truth": (
        {"twicing": {"0": {"passed": "yes", "eps": "1/16", "images": 9, "checks": []}}},
        r"expected true or false, got 'yes'",
    ),
    "a seed by name": (
        {"twicing": {"first": {"passed": True, "eps": "1/16", "images": 9, "checks": []}}},
        r"seed first: a verdict is incomplete or of another form",
    ),
    "passed in spite of a failure": (
        {
            "twicing": {
                "0": {
                    "passed": True,
                    "eps": "1/16",
                    "images": 9,
                    "checks": [{"name": "SPSA", "passed": False, "seen": "x"}],
                }
            }
        },
        r"passed is True, and of its 1 checks 1 failed",
    ),
    "failed without a reason": (
        {"twicing": {"0": {"passed": False, "eps": "1/16", "images": 9, "checks": []}}},
        r"passed is False, and of its 0 checks 0 failed",
    ),
}


@pytest.mark.parametrize(("verdicts", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_is_one_sentence(tmp_path, verdicts, message):
    (tmp_path / "verdicts.json").write_text(json.dumps(verdicts))
    with pytest.raises(ValueError, match=message):
        read_verdicts(tmp_path)
