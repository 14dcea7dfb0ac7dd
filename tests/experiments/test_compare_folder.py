"""Compare from end to end on a small model: what it writes, that jobs and kills change nothing, what it refuses."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from twicing.experiments.results import read_predictions, read_records

SMALL = [
    "epochs=3",
    "depth=2",
    "width=16",
    "heads=2",
    "batch_size=64",
    "evaluation.eps=1/64,1/16",
    "evaluation.pgd_steps=4",
    "evaluation.probes=60",
    "evaluation.verdict_images=20",
    "evaluation.spsa_images=2",
    "evaluation.spsa_iterations=2",
    "evaluation.spsa_samples=4",
]


def command(folder, *more, jobs=2):
    return [
        *(sys.executable, "-m", "twicing.cli", "compare", "digits", "--seeds", "2", "--out", str(folder)),
        *("--jobs", str(jobs), "--set", *SMALL, *more),
    ]


def run(arguments, **options):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False, **options)


def numbers(folder):
    """All records but for what depends on the clock."""
    timed = ("training time [s]", "training time [s per step]")
    return [
        (r.arm, r.seed, r.metric, sorted(r.conditions.items(), key=str), r.value, r.n)
        for r in read_records(folder / "results.jsonl")
        if r.metric not in timed
    ]


def right(folder):
    found = read_predictions(folder / "predictions.npz")
    return {(key, threat): one.correct[threat].tobytes() for key, one in found.items() for threat in one.correct}


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


def test_a_second_call_computes_nothing_again(finished):
    folder, _ = finished
    before = stamps(folder)
    started = time.monotonic()
    assert run(command(folder)).returncode == 0
    assert stamps(folder) == before
    assert time.monotonic() - started < 30


def stamps(folder):
    """When each finished part and checkpoint was written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.glob("*-seed*/*")
        if path.suffix in (".json", ".ckpt")
    }


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_the_same_numbers(finished, tmp_path):
    folder, _ = finished
    draws = random.Random(20261121)
    killed = tmp_path / "killed"
    kills = 0
    for _ in range(4):
        before = stamps(killed)
        process = subprocess.Popen(
            command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 60
        # Once it has got on (a part or an epoch more than before), at a random moment.
        while stamps(killed) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draws.uniform(0, 0.4))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        parts = {name: stamp for name, stamp in before.items() if name.endswith(".json")}
        after = stamps(killed)
        assert {name: after[name] for name in parts} == parts, "a finished part was computed again"
    assert kills >= 2, "the runs were over before they could be killed: the test has to be made longer"
    assert wait_until(lambda: not workers_of(killed)), "workers live on without their parent"
    done = run(command(killed))
    assert done.returncode == 0, done.stderr
    assert numbers(killed) == numbers(folder)
    assert right(killed) == right(folder)


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def workers_of(folder):
    """Processes that have a log of the folder open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            open_files = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(name.startswith(str(folder)) and name.endswith("log.txt") for name in open_files):
            found.append(process.name)
    return found


def test_ctrl_c_stops_with_a_sentence_and_nothing_is_lost(tmp_path):
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(
        command(stopped), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert wait_until(lambda: bool(stamps(stopped)) or process.poll() is not None, 60)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "Stopped. What is finished is kept; the same command goes on from there."
    kept = {name for name in stamps(stopped) if name.endswith(".json")}
    assert wait_until(lambda: not workers_of(stopped))
    assert kept


def test_a_folder_of_another_comparison_is_refused(finished):
    folder, _ = finished
    done = run([*command(folder)[: -len(SMALL)], *SMALL[1:], "epochs=2"])
    assert done.returncode == 1
    assert "holds another comparison (recipe.epochs: 3 there, 2 here)" in done.stderr
    assert "Traceback" not in done.stderr
    more = run(command(folder, "--controls"))
    assert "(arms: standard, twicing there, standard, twicing, standard-equal-time" in more.stderr


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = run(command(tmp_path))
    assert done.returncode == 1
    assert "is not empty and holds no comparison: name another folder with --out." in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_failing_training_is_one_sentence(tmp_path):
    done = run(command(tmp_path / "run", "learning_rate=1e30"))
    assert done.returncode == 1
    assert "failed: the training diverged: the loss of epoch" in done.stderr
    assert "log.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(command(tmp_path / "file" / "run"))
    assert done.returncode == 1
    assert done.stderr.startswith("twicing: cannot read or write")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("limit", [500, 20_000], ids=["no room for config.json", "no room for a checkpoint"])
def test_a_full_disk_is_one_sentence(tmp_path, limit):
    # A limit on the size of a file fails in the same call as a full disk does.
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run(command(tmp_path / "run"), preexec_fn=fill)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    unfinished = [path.name for path in tmp_path.rglob(".*") if path.name != ".lock"]
    assert unfinished == [], "half-written files are left behind"


def test_controls_run_to_the_end_and_are_told(tmp_path):
    """Also: an own mechanism by import path from the current folder, a folder with blanks, one seed."""
    (tmp_path / "mine.py").write_text(OWN_MECHANISM)
    folder = tmp_path / "with blanks and ü"
    arguments = [
        *(sys.executable, "-m", "twicing.cli", "compare", "digits", "--seeds", "1", "--out", str(folder), "--controls"),
        *("--mechanisms", "mine:Mine", "--set", "epochs=1", "depth=2", "width=16", "heads=2", "batch_size=128"),
        *("evaluation.eps=1/16", "evaluation.pgd_steps=2", "evaluation.probes=30", "evaluation.verdict_seeds=0"),
    ]
    done = run(arguments, cwd=tmp_path)
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


def test_two_at_once_in_one_folder_are_refused(finished):
    folder, _ = finished
    with FileLock(folder / ".lock"):
        done = run(command(folder))
    assert done.returncode == 1
    assert f"another twicing command is at work in {folder}: wait for it, or use --out." in done.stderr


def test_a_folder_begun_with_other_versions_says_so(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    config = json.loads((copy / "config.json").read_text())
    config["versions"]["torch"] = "1.0.0"
    (copy / "config.json").write_text(json.dumps(config))
    done = run(command(copy))
    assert done.returncode == 0, done.stderr
    assert 'was begun elsewhere (versions.torch: "1.0.0" there' in " ".join(done.stdout.split())


@pytest.mark.slow
def test_a_killed_worker_is_an_error_and_ends_the_others(tmp_path):
    """As when memory runs out; the parent notices, says which one, and leaves no process behind."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(folder, "epochs=200"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert wait_until(lambda: len(workers_of(folder)) == 2, 60), "trainings are not side by side"
        assert wait_until(lambda: len(stamps(folder)) >= 2, 60)
        os.kill(int(workers_of(folder)[0]), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "did not finish: it was killed by signal 9, as happens when memory runs out" in errors
    assert len(errors.strip().splitlines()) == 1
    assert wait_until(lambda: not workers_of(folder), 5)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_workers_end_with_their_parent_even_while_they_are_silent(tmp_path, end):
    """A worker in a long attack writes no message, so that no broken pipe tells it that its parent is gone."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(folder, "epochs=1", "evaluation.pgd_steps=1000000"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert wait_until(lambda: len(list(folder.glob("*/fgsm.json"))) == 2, 60)
        time.sleep(0.5)
        assert len(workers_of(folder)) == 2
        process.send_signal(end)
        process.wait(30)
    finally:
        process.kill()
    assert wait_until(lambda: not workers_of(folder), 5)
