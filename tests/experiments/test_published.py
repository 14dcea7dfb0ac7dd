"""What the papers report: as they print it, whole, in a file that is checked, and beside ours only where it belongs."""

import copy
import dataclasses
import functools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from made_up_run import ACCURACY, one_by_seed, one_record, write_folder

from twicing.experiments import published
from twicing.experiments.evaluate.bench import IMAGENET_C
from twicing.experiments.evaluate.folder import EXTRA_ERROR, MCE
from twicing.experiments.findings import read_run
from twicing.experiments.published import protocol_differences, published_for, published_of, read_published
from twicing.experiments.published_beside import published_beside
from twicing.experiments.report import write_report
from twicing.training.recipe import imagenet_deit_tiny
from twicing.training.settings import settable_keys

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "published.toml"
# As config.json holds the recipe of a run on ImageNet, where the data say that there are 1,000 classes.
PROTOCOL = json.loads(json.dumps(dataclasses.asdict(imagenet_deit_tiny()))) | {"classes": 1000}
CLEAN = {"threat": "clean"}
COMPAT = {"threat": "pgd, paper_compat (unverified)", "eps": "4/255 normalised"}


def test_the_document_and_the_packaged_file_are_one():
    assert DOCUMENT.resolve() == Path(published.__file__).with_name("published.toml")
    assert read_published() == read_published(DOCUMENT)


def printed(table, model):
    return {one.says: one.printed for one in read_published() if one.table == table and one.model == model}


def test_every_number_of_the_main_table_is_there():
    imagenet = "ImageNet-1K, DeiT-tiny"
    rows = {
        "DeiT-tiny": "72.00 91.14 8.16 22.37 29.88 63.26 66.41 90.29 32.22 6.97 72.21 63.68",
        "DeiT-tiny, NeuTRENO": "72.44 91.39 8.85 23.83 31.43 65.96 66.98 90.48",
        "DeiT-tiny, Twicing [10-12]": "72.31 91.24 8.66 22.58 31.63 64.74 66.47 90.49 32.31 8.14 70.25 62.63",
        "DeiT-tiny, Twicing [7-12]": "72.45 91.35 8.67 22.90 31.60 64.79 66.48 90.52 32.68 8.10 69.98 62.35",
        "DeiT-tiny, Twicing [1-12]": "72.60 91.33 9.15 24.10 32.28 65.67 67.12 90.53 32.74 7.66 70.33 62.46",
    }
    for model, numbers in rows.items():
        assert list(printed(imagenet, model).values()) == numbers.split(), model


def test_every_number_of_fan_is_there():
    rows = {
        "FAN-tiny": "77.09 93.72 11.91 24.11 33.81 65.25 67.15 92.14 42.24 12.33 60.71 52.70",
        "FAN-tiny, Twicing": "77.18 94.02 12.80 28.86 35.52 67.23 68.89 93.75 42.36 60.48 52.21",
    }
    for model, numbers in rows.items():
        assert list(printed("ImageNet-1K, FAN-tiny", model).values()) == numbers.split(), model


def test_the_other_tables_are_there():
    found = {(one.table, one.model, one.says): one.value for one in read_published()}
    words = "WikiText-103, word level"
    test = "perplexity, test (lower is better)"
    perplexity = {"small (width 128)": (37.51, 36.69), "medium (width 256)": (26.17, 25.65)}
    for size, numbers in perplexity.items():
        assert (found[words, size, test], found[words, f"{size}, Twicing", test]) == numbers
    assert found[words, "linear attention, Twicing", test] == 40.61
    assert found["ADE20K, Segmenter with DeiT-tiny", "Segmenter, DeiT-tiny, Twicing", "mIoU"] == 35.12
    swap = [one for one in read_published() if "word swap" in one.says]
    assert [one.value for one in swap] == [55.17, 54.46]
    assert all(one.status.startswith("impossible: ") for one in swap)
    few = "WikiText-103, a subset of 10 million tokens"
    assert [printed(few, model)[test] for model in ("standard", "Twicing")] == ["72.16 +- .31", "69.64 +- .10"]
    cost = "Cost, DeiT-tiny at 224 pixels"
    assert list(printed(cost, "DeiT-tiny, Twicing [1-12]").values()) == ["9.14", "1.33", "5.7"]
    assert "just under 0.9" in {one.printed for one in read_published()}
    uncertain = [one for one in read_published() if one.note]
    assert "12.33 % (the row of this number is uncertain)" in [one.words for one in uncertain]


def test_nothing_is_called_reproduced_and_every_number_says_what_it_is():
    for one in read_published():
        assert re.match(r"(not reproduced|impossible): .{10}", one.status), one
        assert one.protocol
        assert "arXiv" in one.source
        assert one.unit
    same = Counter((one.table, one.model, one.says) for one in read_published())
    assert max(same.values()) == 1


def test_a_number_is_found_for_its_own_quantity_only():
    def found(*quantity):
        return [one.value for one in published_for(*quantity)]

    deit = "imagenet_deit_tiny"
    assert found(deit, "standard", "all", ACCURACY, CLEAN) == [72.00]
    assert found(deit, "twicing", "all", ACCURACY, CLEAN) == [72.60]
    assert found(deit, "twicing", "1-12", ACCURACY, CLEAN) == [72.60]
    assert found(deit, "twicing", "10-12", ACCURACY, CLEAN) == [72.31]
    assert found(deit, "twicing", "10-12", ACCURACY, COMPAT) == [8.66]
    assert found(deit, "twicing", "1-6", ACCURACY, CLEAN) == []
    assert found(deit, "gfsa", "all", ACCURACY, CLEAN) == []
    assert found(deit, "twicing", "all", ACCURACY, {"threat": "pgd", "eps": "4/255"}) == []
    assert found(deit, "twicing", "all", "top-5 accuracy [share of images]", CLEAN) == [91.33]
    (mce,) = published_for(deit, "standard", "all", MCE, {"threat": IMAGENET_C})
    (extra,) = published_for(deit, "standard", "all", EXTRA_ERROR, {"threat": IMAGENET_C})
    assert (mce.value, mce.ours, extra.value) == (72.21, pytest.approx(0.7221), 63.68)
    assert found(deit, "twicing", "10-12", ACCURACY, {"threat": "ImageNet-A"}) == [8.14]
    assert found(deit, "twicing", "10-12", ACCURACY, {"threat": "ImageNet-R"}) == [32.31]
    for recipe in ("digits", "mnist", "cifar10", "imagefolder"):
        assert published_of(recipe, "twicing", "all") == []
    (one,) = published_for(deit, "twicing", "all", ACCURACY, CLEAN)
    assert one.ours == pytest.approx(0.7260)


def test_a_changed_protocol_is_named():
    (one,) = published_for("imagenet_deit_tiny", "standard", "all", ACCURACY, CLEAN)
    assert protocol_differences(one, PROTOCOL) == []
    assert protocol_differences(one, PROTOCOL | {"title": "another", "evaluation": {}}) == []
    assert protocol_differences(one, PROTOCOL | {"epochs": 5}) == ["epochs is 300 there and 5 here"]
    assert "classes is 1000 there and not recorded here" in protocol_differences(one, {"epochs": 300})


NO_PART_OF_THE_PROTOCOL = {
    "dataset": "where the same images are read from",
    "warmup_share": "not used beside cosine",
    "ema_decay": "the running mean of the weights is not evaluated",
    "augmentation.pad_crop": "refused for image files",
}


def test_every_setting_that_makes_another_training_is_another_protocol():
    (one,) = published_for("imagenet_deit_tiny", "standard", "all", ACCURACY, CLEAN)
    for key in settable_keys(imagenet_deit_tiny()):
        if key in NO_PART_OF_THE_PROTOCOL or key.startswith("evaluation."):
            continue
        changed = copy.deepcopy(PROTOCOL)
        *parts, name = key.split(".")
        changed_part = functools.reduce(lambda part, inner: part[inner], parts, changed)
        changed_part[name] = "another"
        (difference,) = protocol_differences(one, changed)
        assert difference.startswith(f"{key} is ")
        assert difference.endswith("there and another here")


def imagenet(arm, values, conditions=CLEAN, **changes):
    layers = arm.partition("[")[2].rstrip("]") or "all"
    fields = {"recipe": "imagenet_deit_tiny", "mechanism": arm.split()[0], "layers": layers}
    return one_by_seed(ACCURACY, values, arm, conditions, **fields | changes)


def config_of(arms, **changes):
    entry = {"options": {}, "control": False, "meaning": ""}
    listed = [entry | {"label": arm, "mechanism": arm.split()[0], "layers": layers} for arm, layers in arms.items()]
    return {"recipe_name": "imagenet_deit_tiny", "recipe": PROTOCOL, "primary": [], "arms": listed} | changes


ARMS = {"standard": "all", "twicing [10-12]": "10-12", "twicing [1-12]": "1-12"}
OURS = [
    *imagenet("standard", [0.70, 0.72]),
    *imagenet("twicing [10-12]", [0.60, 0.62]),
    *imagenet("twicing [1-12]", [0.50, 0.54]),
    *imagenet("twicing [1-12]", [0.05, 0.07], COMPAT),
    *imagenet("twicing [1-12]", [0.2, 0.2], {"threat": "pgd", "eps": "4/255"}),
]


def text_of(folder):
    page = write_report(folder).read_text()
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.replace("&nbsp;", " ")))


def test_published_numbers_stand_beside_those_of_the_same_protocol(tmp_path):
    folder = write_folder(tmp_path, OURS, **config_of(ARMS))
    lines, differences = published_beside(read_run(folder))
    assert differences == []
    assert [(one.arm, one.says, round(one.mean, 4), one.seeds, one.printed) for one in lines] == [
        ("standard", "top-1 accuracy", 0.71, 2, "72.00 %"),
        ("twicing [10-12]", "top-1 accuracy", 0.61, 2, "72.31 %"),
        ("twicing [1-12]", "top-1 accuracy", 0.52, 2, "72.60 %"),
        ("twicing [1-12]", "top-1 accuracy under PGD at 4/255", 0.06, 2, "9.15 %"),
    ]
    text = text_of(folder)
    shown = text[text.index("Published values") : text.index("Method")]
    assert "twicing [1-12] top-1 accuracy 0.520 0.028 2 72.60 % DeiT recipe, 300 epochs" in shown
    assert shown.count("not reproduced: it needs ImageNet and GPU days") == 4


def test_another_protocol_has_no_numbers_beside_it_and_says_why(tmp_path):
    folder = write_folder(tmp_path, OURS, **config_of(ARMS, recipe=PROTOCOL | {"epochs": 5, "classes": 10}))
    lines, differences = published_beside(read_run(folder))
    assert lines == []
    assert differences == ["epochs is 300 there and 5 here", "classes is 1000 there and 10 here"]
    text = text_of(folder)
    assert "do not stand beside these, as the protocol is another one: epochs is 300 there and 5 here; classes" in text
    assert "72.60" not in text


def test_our_own_recipes_have_no_published_numbers(tmp_path):
    folder = write_folder(tmp_path, OURS, **config_of(ARMS, recipe_name="cifar10"))
    assert published_beside(read_run(folder)) == ([], [])
    assert "Published values" not in text_of(folder)


@pytest.mark.parametrize("changes", [{"control": True}, {"options": {"gain": 0.5}}], ids=["control", "option"])
def test_a_changed_mechanism_is_not_the_papers(tmp_path, changes):
    config = config_of(ARMS)
    config["arms"][2] |= changes
    lines, _ = published_beside(read_run(write_folder(tmp_path, OURS, **config)))
    assert {one.arm for one in lines} == {"standard", "twicing [10-12]"}


def test_a_record_that_brings_its_own_takes_the_place(tmp_path):
    own = {"value": 71.5, "protocol": "ours", "source": "a table", "status": "reproduced"}
    records = [*imagenet("standard", [0.70, 0.72], published=own), *imagenet("twicing [10-12]", [0.6, 0.6])]
    lines, _ = published_beside(read_run(write_folder(tmp_path, records, **config_of(ARMS))))
    assert [(one.arm, one.printed, one.status.split(":")[0]) for one in lines] == [
        ("standard", "71.5", "reproduced"),
        ("twicing [10-12]", "72.31 %", "not reproduced"),
    ]
    bare = [one_record(ACCURACY, 0.5, published={"value": 1})]
    (line,), _ = published_beside(read_run(write_folder(tmp_path / "bare", bare, primary=[])))
    assert (line.printed, line.protocol, line.status) == ("1", "not recorded", "not recorded")


TABLE = """[[table]]
name = "t"
source = "arXiv 1"
protocol = "p"
status = "not reproduced: no time"
[table.columns]
a = { says = "accuracy", unit = "%" }
[[table.rows]]
model = "m"
mechanism = "standard"
layers = "all"
values = { a = 1.5 }
"""
WRONG = {
    "no TOML": (TABLE + "= 3", r"file\.toml: expected TOML, got a broken file"),
    "nothing": ("title = 'x'", r"file\.toml: expected tables of published values, got none"),
    "a key of a table": (
        TABLE.replace('source = "arXiv 1"', 'sauce = "x"'),
        r"table 't': its keys do not fit \(missing: source; unknown: sauce\)",
    ),
    "a key of a column": (TABLE.replace("unit", "unity"), r"column 'a': .*missing: unit; unknown: unity"),
    "a key of a row": (TABLE.replace("model", "modell"), r"row None: .*missing: model; unknown: modell"),
    "a value without a column": (TABLE.replace("{ a = 1.5 }", "{ b = 1.5 }"), r"row 'm': the value 'b' belongs to no"),
    "text": (TABLE.replace("a = 1.5 ", 'a = "1.5" '), r"value 'a': expected a number .* got '1\.5'"),
    "nan": (TABLE.replace("a = 1.5 ", "a = nan "), r"value 'a': expected a number .* got nan"),
    "a key of a value": (TABLE.replace("a = 1.5 ", "a = {value = 1.5, sd = 2} "), r"value 'a': .*unknown: sd"),
    "an odd status": (TABLE.replace("not reproduced: no time", "fine"), r"expected a status, .* got 'fine'"),
    "no reason": (TABLE.replace(": no time", ""), r"expected a status, .* got 'not reproduced'"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_is_one_sentence(tmp_path, text, message):
    (tmp_path / "file.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_published(tmp_path / "file.toml")


def test_a_file_of_ones_own_is_read(tmp_path):
    (tmp_path / "file.toml").write_text(TABLE)
    (one,) = read_published(tmp_path / "file.toml")
    assert (one.words, one.metric, one.recipe) == ("1.50 %", None, None)
    assert published_for("digits", "standard", "all", ACCURACY, CLEAN, among=[one]) == []
