import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from made_up_run import PRIMARY, make_run_folder
from rich.console import Console
from scipy import stats

from twicing.experiments import figures, training_figures
from twicing.experiments.drawing import arm_styles
from twicing.experiments.findings import primary_rows, read_run
from twicing.experiments.report import flatten, typeset, write_report
from twicing.experiments.results import read_records, select, write_records
from twicing.experiments.sentences import in_short
from twicing.experiments.summary import print_summary

FOUR = ("standard", "twicing", "smooth-more", "standard (other seeds)")
MINUS = "\N{MINUS SIGN}"
VOID = {"meta", "br", "hr", "img", "input", "link"}


def quick(record):
    """Keeps what the primary metrics, FGSM and the cost need: the other figures take most of the time of a page."""
    primary = any((record.metric, record.conditions) == (one["metric"], one["conditions"]) for one in PRIMARY)
    return primary or record.metric.endswith("per step]") or record.conditions == {"threat": "fgsm", "eps": "1/16"}


def write(folder, **options):
    return write_report(make_run_folder(folder, **{"keep": quick} | options)).read_text()


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.replace("&nbsp;", " ")))


def replace_records(folder, change):
    path = folder / "results.jsonl"
    write_records(path, [one for record in read_records(path) for one in change(record)])


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return make_run_folder(tmp_path_factory.mktemp("four"), FOUR)


@pytest.fixture(scope="module")
def page(four):
    return write_report(four).read_text()


class Checker(HTMLParser):
    """Balanced tags, ids that occur once, every address, and which elements hold a figure."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses, self.tags, self.svgs = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [
            (tag, value) for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")
        ]
        self.svgs += [given] if tag == "svg" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_pages_on_the_same_models_are_linked_where_they_are_there(tmp_path):
    folder = make_run_folder(tmp_path, keep=quick)
    assert "More on these models" not in write_report(folder).read_text()
    for name in ("diagnosis", "analysis"):
        (folder / name).mkdir()
    (folder / "diagnosis" / "diagnosis.html").write_text("")
    assert '<a href="diagnosis/diagnosis.html">whether they collapse</a>.</p>' in write_report(folder).read_text()
    (folder / "analysis" / "analysis.html").write_text("")
    page = write_report(folder).read_text()
    assert (
        'More on these models: <a href="diagnosis/diagnosis.html">whether they collapse</a>, '
        '<a href="analysis/analysis.html">what attention is like inside</a>.</p>'
    ) in page


def test_the_page_is_one_file_without_scripts(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert not {"script", "link", "img", "iframe", "object"} & set(checker.tags)
    assert len(checker.ids) == len(set(checker.ids))
    inside = {f"#{one}" for one in checker.ids}
    for tag, address in checker.addresses:
        assert address in inside or (tag == "a" and address.startswith("https://arxiv.org/abs/"))
    for address in re.findall(r"url\(([^)]*)\)", page):
        assert address in inside
    assert "@import" not in page
    assert "javascript:" not in page


def test_every_picture_can_be_read_aloud(page):
    checker = Checker()
    checker.feed(page)
    assert len(checker.svgs) > 15
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in checker.svgs)
    assert page.count("<svg") == len(re.findall(r"<svg[^>]*><title>", page))
    assert page.count("<figure") == page.count("<figcaption") == 7


def test_the_order_of_the_page(page):
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "In short",
        "Primary metrics",
        "Every seed",
        "Accuracy under disturbance",
        "Gradient masking",
        "Similarity and rank of tokens, by layer",
        "Training",
        "Cost",
        "Exploratory, uncorrected",
        "Controls",
        "What this could not have shown",
        "Method",
        "Made with",
    ]
    limits = "it says nothing about ImageNet"
    assert page.index(limits) < page.index("<h2>")
    assert text_of(page).count(limits) >= 2
    for said in ("weak attack", "PGD is the headline", "seeds fixed", "chose no epoch", "twicing compare digits"):
        assert said in text_of(page)
    assert "attack.eps" in page
    assert "1/64, 1/32, 1/16, 1/8, 1/4" in page


def test_the_same_folder_gives_the_same_bytes(four, page):
    assert write_report(four).read_text() == page


def test_numbers_are_those_of_the_records(four, page):
    records = read_records(four / "results.jsonl")
    where = PRIMARY[2]["conditions"]
    value = {
        arm: [one.value for one in select(records, metric="mean pairwise cosine", arm=arm, conditions=where)]
        for arm in FOUR
    }
    d = np.subtract(value["twicing"], value["standard"])
    low, high = stats.t.interval(0.95, 5, loc=d.mean(), scale=stats.sem(d))
    row = (
        text_of(page[page.index("Similarity after the last block <span") :]).split("twicing")[1].split("smooth-more")[0]
    )
    spread = np.std(value["twicing"], ddof=1)
    expected = f"6 {np.mean(value['twicing']):.3f} {spread:.3f} {d.mean():.3f} [{low:.3f}, {high:.3f}]"
    assert expected.replace("-", MINUS) in row
    assert f"lower by {abs(d.mean()):.3f}" in row


def test_sentences_come_from_the_statistics(four, page):
    run = read_run(four)
    sentences = in_short(run, primary_rows(run))
    assert 3 <= len(sentences) <= 6
    for sentence in sentences:
        assert str(typeset(sentence)) in page
    assert sentences[0].startswith("PGD accuracy at eps 1/16: standard 0.3")
    assert "no difference shown (smallest showable: +-" in sentences[0]
    assert "difference shown: lower by" in sentences[2]
    assert "not by itself a benefit" in sentences[2]
    assert sentences[3] == "Gradient masking was not looked for, so robustness not established."
    assert "as long with twicing (95 % interval" in sentences[4]
    assert sentences[5].startswith("Noise floor: standard with other seeds differs from standard by")


def test_controls_are_outside_the_corrected_family(four, page):
    rows = primary_rows(read_run(four))
    assert {row.arm.label for row in rows if row.corrected is not None} == {"twicing"}
    assert "Holm's correction is over 3 comparisons" in page.replace("&#39;", "'")
    smooth = next(row for row in rows if row.arm.label == "smooth-more" and row.measure.better == "neither")
    assert "exploratory, uncorrected p" in smooth.verdict


def test_every_mechanism_enters_the_family(tmp_path):
    arms = ("standard", "twicing", "other")
    rows = primary_rows(read_run(make_run_folder(tmp_path, arms)))
    p = [row.difference.p for row in rows if row.arm.label != "standard"]
    corrected = [row.corrected for row in rows if row.arm.label != "standard"]
    assert min(corrected) == pytest.approx(6 * min(p))


def test_a_planned_arm_without_results_still_counts(tmp_path):
    folder = make_run_folder(
        tmp_path, ("standard", "twicing", "other"), keep=lambda one: quick(one) and one.arm != "other"
    )
    corrected = [row.corrected for row in primary_rows(read_run(folder)) if row.corrected is not None]
    assert len(corrected) == 3
    smallest = min(row.difference.p for row in primary_rows(read_run(folder)) if row.arm.label == "twicing")
    assert min(corrected) == pytest.approx(6 * smallest)
    page = text_of(write_report(folder).read_text())
    assert "other has no results for seed 0, 1, 2, 3, 4, 5" in page
    assert "correction is over 6 comparisons" in page


def test_a_missing_seed_is_named_and_left_out_of_the_pairs(tmp_path):
    page = write(tmp_path, keep=lambda one: quick(one) and (one.arm, one.seed) != ("twicing", 4))
    assert "twicing has no results for seed 4" in text_of(page)
    rows = primary_rows(read_run(tmp_path))
    assert {row.difference.seeds for row in rows if row.difference} == {(0, 1, 2, 3, 5)}


@pytest.mark.parametrize(("n", "said"), [(1, "no difference of any size"), (2, "With 2 seeds, which is fewer")])
def test_few_seeds_say_so_first(tmp_path, n, said):
    page = write(tmp_path, seeds=range(n))
    assert said in text_of(page[page.index("<li>") : page.index("</li>")])
    assert "nan" not in text_of(page).lower().split()
    if n == 1:
        assert "nothing can be shown with one seed: no interval" in page


MISSING = {
    "no records but clean": {"keep": lambda one: one.conditions == {"threat": "clean"}},
    "only pgd": {"keep": lambda one: one.conditions.get("threat") == "pgd"},
    "no seconds": {"keep": lambda one: "layer" not in one.conditions and "time" not in one.metric},
    "no standard": {"keep": lambda one: quick(one) and one.arm != "standard"},
    "standard alone": {"keep": lambda one: quick(one) and one.arm == "standard"},
    "no records": {"keep": lambda one: False},
    "no predictions": {"predictions": False},
    "no primary": {"primary": []},
    "no recipe": {"recipe": {}},
    "no command": {"command": ""},
}


@pytest.mark.parametrize("options", MISSING.values(), ids=MISSING.keys())
def test_missing_parts_are_left_out(tmp_path, options):
    page = write(tmp_path, **options)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert "<h2>What this could not have shown</h2>" in page
    assert not re.search(r"\bnan\b|None", text_of(page))


def test_nothing_is_said_of_what_was_not_measured(tmp_path):
    page = text_of(write(tmp_path, keep=lambda one: one.conditions == {"threat": "clean"}))
    assert "not compared, because results are missing" in page
    assert "FGSM" not in page
    assert "Bootstrap" in page
    assert "Noise floor" not in page
    assert "as long with" not in page


def test_a_hostile_label_is_only_text(tmp_path):
    label = "<script>alert('$x$')</script>"
    page = write(tmp_path, arms=("standard", label))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 5


def test_only_points_below_two_percent_in_every_arm_are_floor(tmp_path):
    def panel(low, threat="pgd"):
        def change(record):
            if record.conditions == {"threat": "pgd", "eps": "1/4"}:
                return [record.__class__(**{**vars(record), "value": low[record.arm]})]
            return [record] if record.metric.startswith("accuracy") else []

        folder = make_run_folder(tmp_path / str(len(list(tmp_path.iterdir()))))
        replace_records(folder, change)
        records = read_records(folder / "results.jsonl")
        return figures.accuracy_against_strength(records, arm_styles(["standard", "twicing"])).panels[0]

    def floors(low):
        return [text.xy[0] for text in panel(low).axes.texts if text.get_text() == "floor"]

    assert floors({"standard": 0.0, "twicing": 0.019}) == [0.25]
    assert floors({"standard": 0.0, "twicing": 0.021}) == []


def test_an_arm_has_one_colour_and_marker_everywhere(four):
    run = read_run(four)
    styles = arm_styles([arm.label for arm in run.arms])
    assert len({style.color for style in styles.values()}) == len({style.marker for style in styles.values()}) == 4
    only = training_figures.training([one for one in run.records if one.arm == "twicing"], styles)
    drawn = only.panels[0].svg()
    assert "var(--arm-1" in drawn
    assert "var(--arm-0" not in drawn


def test_a_panel_also_stands_alone(four):
    records = read_records(four / "results.jsonl")
    for picture in figures.by_layer(records, arm_styles(FOUR))[:1]:
        for panel in picture.panels:
            assert ElementTree.fromstring(str(panel.svg())).tag == "{http://www.w3.org/2000/svg}svg"


def test_primaries_are_not_exploratory_too(page):
    exploratory = text_of(page[page.index("<h2>Exploratory") : page.index("<h2>Controls")])
    assert "accuracy [share of images], threat fgsm, eps 1/16" in exploratory
    assert "accuracy [share of images], threat pgd, eps 1/16 " not in exploratory
    assert "epoch" not in exploratory
    assert "<details>" in page
    assert "<details open" not in page


def test_the_bootstrap_has_its_own_name_and_needs_predictions(tmp_path, page):
    assert "Bootstrap over images, seeds fixed" in page
    assert "Bootstrap" not in write(tmp_path, predictions=False)


def test_too_many_primaries_are_refused(tmp_path):
    folder = make_run_folder(tmp_path, keep=quick, primary=[*PRIMARY, PRIMARY[0]])
    with pytest.raises(ValueError, match="at most 3 primary metrics, got 4"):
        write_report(folder)


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a run folder with config\.json, found none in .*compare"):
        write_report(tmp_path)


def test_a_broken_configuration_is_one_sentence(tmp_path):
    folder = make_run_folder(tmp_path, keep=quick)
    (folder / "config.json").write_text('{"name": ')
    with pytest.raises(ValueError, match=r"config\.json is broken .*in another folder"):
        write_report(folder)


def test_published_values_stand_with_protocol_and_status(tmp_path):
    published = {"value": 8.66, "protocol": "normalised inputs", "source": "arXiv 2503.00687", "status": "as printed"}

    def change(record):
        return [record.__class__(**{**vars(record), "published": published})]

    folder = make_run_folder(tmp_path, keep=lambda one: one.conditions == {"threat": "clean"})
    replace_records(folder, change)
    page = text_of(write_report(folder).read_text())
    published = page[page.index("Published values") : page.index("Method")]
    line = r"standard accuracy \[share of images\], threat clean 0\.9\d\d 0\.0\d+ 6 8\.66 normalised"
    assert re.search(line, published)
    assert "normalised inputs arXiv 2503.00687 as printed" in published
    # One line for each arm, whatever the number of seeds.
    assert published.count("8.66") == 2


def test_signs_are_typeset_and_text_is_escaped():
    assert (
        typeset("a < b (-0.5), [-1, +2] +-0.1, smooth-more")
        == f"a &lt; b ({MINUS}0.5), [{MINUS}1, +2] ±0.1, smooth-more"
    )


def test_settings_are_flattened():
    settings = {"steps": 5, "attack": {"eps": ["1/16", "1/8"], "norm": None}, "empty": []}
    assert flatten(settings) == [
        ("steps", "5"),
        ("attack.eps", "1/16, 1/8"),
        ("attack.norm", "none"),
        ("empty", "none"),
    ]


@pytest.mark.parametrize(
    "arms", [("standard", "twicing"), FOUR, ("standard", "[bold]odd")], ids=["two", "four", "markup"]
)
def test_the_summary_fits_80_columns_and_needs_no_colour(tmp_path, arms):
    folder = make_run_folder(tmp_path, arms, keep=quick)
    console = Console(width=80, record=True, color_system=None, file=io.StringIO())
    print_summary(folder, console)
    said = console.export_text()
    for line in said.splitlines():
        assert len(line.rstrip()) <= 80 or line.startswith("Report: ")
    assert str(folder / "report.html") in said
    for sentence in in_short(run := read_run(folder), primary_rows(run)):
        assert sentence in " ".join(said.split())
    assert all(arm in said for arm in arms)
    assert "95 % interval" in said
