import dataclasses
import json
import os
import platform
import subprocess
from importlib import metadata

import numpy as np
import pytest
import torch
from made_up_run import make_records

from twicing.experiments import results
from twicing.experiments.results import (
    Correctness,
    Record,
    environment,
    read_json,
    read_predictions,
    read_records,
    replace_file,
    select,
    threat_key,
    value_by_seed,
    write_json,
    write_predictions,
    write_records,
)


@pytest.fixture
def record():
    return make_records(seeds=[0], layers=1, epochs=1)[0][0]


def test_records_come_back_as_they_were_written(tmp_path):
    records, _ = make_records(seeds=range(2), layers=2, epochs=2)
    records[0] = dataclasses.replace(
        records[0], arm="a line\u2028separator, <b> and ü", published={"value": 8.66, "protocol": "normalised inputs"}
    )
    write_records(tmp_path / "results.jsonl", records)
    assert read_records(tmp_path / "results.jsonl") == records


def test_reading_names_file_and_line(tmp_path, record):
    path = tmp_path / "results.jsonl"
    write_records(path, [record])
    good = path.read_text()
    entry = json.loads(good)
    wrong = {
        "broken line": ('{"metric": "acc', r"results\.jsonl, line 2: expected one JSON object, got a broken line"),
        "no object": ("[1, 2]", r"line 2: expected one JSON object, got list"),
        "unknown key": (json.dumps(entry | {"sead": 3}), r"line 2: .*unknown: sead; missing: none"),
        "missing key": (
            json.dumps({key: value for key, value in entry.items() if key != "seed"}),
            r"line 2: .*unknown: none; missing: seed\).*another version",
        ),
        "not a number": (json.dumps(entry | {"value": float("nan")}), r"line 2: a record's value is to be a finite"),
    }
    for line, message in wrong.values():
        path.write_text(f"{good}{line}\n")
        with pytest.raises(ValueError, match=message):
            read_records(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", True], ids=str)
def test_a_value_that_is_no_finite_number_is_refused(record, value):
    with pytest.raises(ValueError, match=r"value is to be a finite number: got .* If the run diverged"):
        dataclasses.replace(record, value=value)


def test_whole_numbers_are_asked_for(record):
    with pytest.raises(ValueError, match=r"seed is to be a whole number: got 1\.5"):
        dataclasses.replace(record, seed=1.5)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, record):
    path = tmp_path / "results.jsonl"
    write_records(path, [record])
    before = path.read_bytes()

    def fail(file):
        file.write(b"half of it")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.jsonl"]


def test_json_refuses_not_a_number_and_keeps_order(tmp_path):
    write_json(tmp_path / "config.json", {"b": 1, "a": ["ü"]})
    assert json.loads((tmp_path / "config.json").read_text()) == {"b": 1, "a": ["ü"]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "config.json", {"b": float("nan")})


def test_json_comes_back_and_a_broken_file_is_named_with_the_remedy(tmp_path):
    path = tmp_path / "clean.json"
    write_json(path, {"ü": [1, None]})
    assert read_json(path) == {"ü": [1, None]}
    for broken in (path.read_bytes()[:7], b"", b"\xff\xfe{}"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"clean\.json: .*broken.*: delete it and run the same command again"):
            read_json(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_json(path)


def test_select_asks_for_some_conditions_and_allows_others():
    records, _ = make_records(seeds=range(2), layers=3, epochs=1)
    found = select(records, metric="mean pairwise cosine", arm="twicing", conditions={"layer": 2, "when": "trained"})
    assert [(one.seed, one.conditions["where"]) for one in found] == [
        (0, "attention output"),
        (0, "block output"),
        (1, "attention output"),
        (1, "block output"),
    ]
    assert select(records, conditions={"no such": None}) == []


def test_incomplete_conditions_are_an_error_not_a_silent_choice():
    records, _ = make_records(seeds=range(2), layers=1, epochs=1)
    metric = "accuracy [share of images]"
    complete = value_by_seed(records, metric, "standard", {"threat": "pgd", "eps": "1/16"})
    assert list(complete) == [0, 1]
    with pytest.raises(ValueError, match=r"expected one value .* seed 0, got several.*Name every condition"):
        value_by_seed(records, metric, "standard", {"threat": "pgd"})


def test_predictions_come_back_as_they_were_written(tmp_path):
    _, answers = make_records(seeds=range(2), layers=1, epochs=1)
    write_predictions(tmp_path / "predictions.npz", answers)
    found = read_predictions(tmp_path / "predictions.npz")
    assert set(found) == {(arm, seed) for arm in ("standard", "twicing") for seed in (0, 1)}
    for one in answers:
        again = found[one.arm, one.seed]
        np.testing.assert_array_equal(again.index, one.index)
        assert set(again.correct) == set(one.correct)
        for key, right in one.correct.items():
            assert again.correct[key].dtype == np.bool_
            np.testing.assert_array_equal(again.correct[key], right)


def test_predictions_have_the_keys_of_the_format(tmp_path):
    one = Correctness(
        "standard", 3, np.arange(2), {threat_key({"threat": "pgd", "eps": "1/16"}): np.array([True, False])}
    )
    write_predictions(tmp_path / "predictions.npz", [one])
    with np.load(tmp_path / "predictions.npz") as arrays:
        assert sorted(arrays.files) == ["standard|seed3|index", "standard|seed3|pgd eps=1/16"]


def test_predictions_that_cannot_be_told_apart_or_paired_are_refused(tmp_path):
    path = tmp_path / "predictions.npz"
    with pytest.raises(ValueError, match=r"must not contain '\|'.*Rename the arm"):
        write_predictions(path, [Correctness("a|b", 0, np.arange(2), {})])
    with pytest.raises(ValueError, match=r"expected one answer per image, \(2,\), got \(3,\)"):
        write_predictions(path, [Correctness("a", 0, np.arange(2), {"clean": np.ones(3, dtype=bool)})])
    np.savez(path, **{"standard|seed0|clean": np.ones(2)})
    with pytest.raises(ValueError, match="'standard', seed 0 has no 'index'"):
        read_predictions(path)
    np.savez(path, weights=np.ones(2))
    with pytest.raises(ValueError, match=r"got 'weights'\. Is it another file"):
        read_predictions(path)


def test_threat_keys():
    assert threat_key({"threat": "clean"}) == "clean"
    assert threat_key({"eps": "1/16", "threat": "pgd"}) == "pgd eps=1/16"


def test_environment_says_where_numbers_were_made():
    found = environment()
    assert {"python", "torch", "numpy"} <= set(found.versions)
    assert found.device.startswith("CPU, ")
    assert found.threads == 1
    assert found.commit is None or len(found.commit.removesuffix("+changes")) == 40


def test_every_version_is_the_packages_own():
    versions = environment().versions
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__
    assert versions["numpy"] == np.__version__
    assert versions["torchvision"] == metadata.version("torchvision")
    assert versions["twicing"] == metadata.version("twicing")


def test_the_commit_says_when_the_source_was_edited(tmp_path, monkeypatch):
    # A hook of git sets variables that would lead git to another repository.
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    package = tmp_path / "src" / "twicing"
    (package / "experiments").mkdir(parents=True)
    (package / "version.py").write_text("1\n")
    monkeypatch.setattr(results, "__file__", str(package / "experiments" / "results.py"))

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert environment().commit is None
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "someone else's repository")
    assert environment().commit is None
    git("add", ".")
    git("commit", "--quiet", "--message", "the library's own")
    commit = git("rev-parse", "HEAD")
    assert environment().commit == commit
    (tmp_path / "notes.txt").write_text("outside of the package\n")
    assert environment().commit == commit
    (package / "version.py").write_text("2\n")
    assert environment().commit == f"{commit}+changes"


def test_every_field_of_a_record_is_written(tmp_path, record):
    write_records(tmp_path / "results.jsonl", [record])
    assert set(json.loads((tmp_path / "results.jsonl").read_text())) == {one.name for one in dataclasses.fields(Record)}
