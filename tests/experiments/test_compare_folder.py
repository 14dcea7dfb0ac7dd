"""Compare from end to end on a small model: what it writes, that jobs change nothing, what it refuses."""

import json
import shutil
import sys

import numpy as np
import pytest
from filelock import FileLock
from small_comparison import SMALL, arguments, command, numbers, right, run, stamps

from twicing.experiments.results import read_predictions, read_records
from twicing.experiments.trained import trained_jobs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "run"
    done = run(command(folder))
    assert done.returncode == 0, done.stderr
    return folder, done


def test_it_writes_what_it_promises(finished):
    folder, done = finished
    promised = {"config.json", "results.jsonl", "predictions.npz", "verdicts.json", "report.html"}
    assert promised <= {p.name for p in folder.iterdir()}
    verdicts = json.loads((folder / "verdicts.json").read_text())
    assert {arm: list(seeds) for arm, seeds in verdicts.items()} == {"standard": ["0"], "twicing": ["0"]}
    for arm in ("standard", "twicing"):
        for seed in (0, 1):
            assert {"last.ckpt", "log.txt", "training.json", "pgd.json", *(["masking.json"] if seed == 0 else [])} <= {
                p.name for p in (folder / f"{arm}-seed{seed}").iterdir()
            }
    assert str(folder / "report.html") in done.stdout.replace("\n", "")
    config = json.loads((folder / "config.json").read_text())
    assert config["command"].startswith("twicing compare digits --seeds 2")
    assert config["limits"].startswith("smoke demonstration: 1,797 images of 8 x 8 pixels")
    assert [arm["label"] for arm in config["arms"]] == ["standard", "twicing"]


def test_every_number_has_its_record(finished):
    folder, _ = finished
    records = read_records(folder / "results.jsonl")
    config = json.loads((folder / "config.json").read_text())
    for primary in config["primary"]:
        for arm in ("standard", "twicing"):
            found = [
                r
                for r in records
                if (r.metric, r.arm) == (primary["metric"], arm) and r.conditions == primary["conditions"]
            ]
            assert sorted(r.seed for r in found) == [0, 1], primary
    kinds = {(r.metric, r.conditions.get("when"), r.conditions.get("where")) for r in records}
    for metric in ("mean pairwise cosine", "distance to the mean token", "effective rank of centred tokens"):
        for when in ("initialisation", "trained"):
            assert {(metric, when, "attention output"), (metric, when, "block output")} <= kinds
    assert {r.conditions.get("threat") for r in records} >= {"clean", "noise", "fgsm", "pgd"}
    twiced = next(r for r in records if r.arm == "twicing")
    assert twiced.spec[0]["layers"] == [1, 2]
    assert twiced.versions["torch"]


def test_predictions_agree_with_the_accuracies(finished):
    folder, _ = finished
    predictions = read_predictions(folder / "predictions.npz")
    checked = 0
    for record in read_records(folder / "results.jsonl"):
        if record.conditions.get("threat") == "pgd" and "eps" in record.conditions:
            one = predictions[record.arm, record.seed]
            assert np.mean(one.correct[f"pgd eps={record.conditions['eps']}"]) == pytest.approx(record.value)
            assert len(one.positions(f"pgd eps={record.conditions['eps']}")) == record.n == 60
            checked += 1
    assert checked == 2 * 2 * 2
    indices = [tuple(predictions["standard", seed].index) for seed in (0, 1)]
    assert not set(indices[0]) & set(indices[1]), "two seeds hold out the same images"


def test_arms_are_paired(finished):
    folder, _ = finished
    initial = {
        (r.arm, r.seed, r.conditions["layer"]): r.value
        for r in read_records(folder / "results.jsonl")
        if r.metric == "mean pairwise cosine"
        and r.conditions.get("when") == "initialisation"
        and r.conditions.get("where") == "attention output"
    }
    # Before any twiced layer's output has mixed in, only the mechanism differs; over seeds the weights do.
    assert initial["standard", 0, 1] != initial["standard", 1, 1]
    twiced, standard = read_predictions(folder / "predictions.npz")["twicing", 0], None
    standard = read_predictions(folder / "predictions.npz")["standard", 0]
    assert twiced.index.tolist() == standard.index.tolist()


def test_the_numbers_are_the_same_for_any_number_of_jobs(finished, tmp_path):
    folder, _ = finished
    done = run(command(tmp_path / "one", jobs=1))
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path / "one") == numbers(folder)
    assert right(tmp_path / "one") == right(folder)


def test_a_second_call_computes_nothing_again(finished, type_in):
    folder, _ = finished
    before = stamps(folder)
    assert type_in(*arguments(folder)).returncode == 0
    assert stamps(folder) == before


def test_a_folder_of_another_comparison_is_refused(finished, type_in):
    folder, _ = finished
    done = type_in(*arguments(folder)[: -len(SMALL)], *SMALL[1:], "epochs=2")
    assert done.returncode == 1
    assert "holds another comparison (recipe.epochs: 3 there, 2 here)" in done.stderr
    assert "Traceback" not in done.stderr
    more = type_in(*arguments(folder), "--controls")
    assert "(arms: standard, twicing there, standard, twicing, standard-equal-time" in more.stderr


def test_a_folder_of_something_else_is_refused(tmp_path, type_in):
    (tmp_path / "thesis.txt").write_text("mine")
    done = type_in(*arguments(tmp_path))
    assert done.returncode == 1
    assert "is not empty and holds no comparison: name another folder with --out." in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_unwritable_folder_is_one_sentence(tmp_path, type_in):
    (tmp_path / "file").write_text("")
    done = type_in(*arguments(tmp_path / "file" / "run"))
    assert done.returncode == 1
    assert done.stderr.startswith("twicing: cannot read or write")
    assert "Traceback" not in done.stderr


def test_controls_run_to_the_end_and_are_told(tmp_path):
    """Also: an own mechanism by import path from the current folder, a folder with blanks, one seed."""
    (tmp_path / "mine.py").write_text(OWN_MECHANISM)
    folder = tmp_path / "with blanks and ü"
    controlled = [
        *(sys.executable, "-m", "twicing.cli", "compare", "digits", "--seeds", "1", "--out", str(folder), "--controls"),
        *("--mechanisms", "mine:Mine", "--set", "epochs=1", "depth=2", "width=16", "heads=2", "batch_size=128"),
        *("evaluation.eps=1/16", "evaluation.pgd_steps=2", "evaluation.probes=30", "evaluation.verdict_seeds=0"),
    ]
    done = run(controlled, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = read_records(folder / "results.jsonl")
    controls = ["standard-equal-time", "standard-wide", "two-attentions", "smooth-more", "standard (other seeds)"]
    arms = ["standard", "mine:Mine", *controls]
    assert {record.arm for record in records} == set(arms)
    indices = {tuple(one.index) for one in read_predictions(folder / "predictions.npz").values()}
    assert len(indices) == 1, "the arms of a seed have to be tested on the same images"
    spec = next(record.spec for record in records if record.arm == "smooth-more")
    assert spec[0]["options"]["gain"] == -1
    first = [
        next(r.value for r in records if r.arm == arm and r.metric == "mean pairwise cosine")
        for arm in (arms[0], arms[-1])
    ]
    assert first[0] != first[1], "other seeds have to mean other weights"


OWN_MECHANISM = """
from twicing.mechanisms.base import Mechanism

class Mine(Mechanism):
    def forward(self, query, key, value, *, attn_mask=None, is_causal=False, scale=None, dropout_p=0.0,
                enable_gqa=False, context=None):
        return value
"""


def test_two_at_once_in_one_folder_are_refused(finished, type_in):
    folder, _ = finished
    with FileLock(folder / ".lock"):
        done = type_in(*arguments(folder))
    assert done.returncode == 1
    assert f"another twicing command is at work in {folder}: wait for it, or use --out." in done.stderr


def test_a_folder_begun_with_other_versions_says_so(finished, tmp_path, type_in):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    config = json.loads((copy / "config.json").read_text())
    config["versions"]["torch"] = "1.0.0"
    (copy / "config.json").write_text(json.dumps(config))
    done = type_in(*arguments(copy))
    assert done.returncode == 0, done.stderr
    assert 'was begun elsewhere (versions.torch: "1.0.0" there' in " ".join(done.stdout.split())


def test_a_broken_config_is_not_to_be_deleted(tmp_path):
    (tmp_path / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON, got a broken file .*: name another folder"):
        trained_jobs(tmp_path, None)
