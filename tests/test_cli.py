"""The command line: help that teaches, and one sentence for everything that is wrong."""

import subprocess
import sys

import pytest


@pytest.fixture
def run(type_in):
    return type_in


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["train", "--help"], ["env", "--help"]])
def test_help_is_there(run, arguments):
    done = run(*arguments)
    assert done.returncode == 0
    assert "usage: twicing" in done.stdout
    assert done.stderr == ""


def test_env_prints_versions(run):
    done = run("env")
    assert done.returncode == 0
    for name in ("python", "torch", "twicing", "commit", "device", "threads", "system"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "digit"], "unknown recipe 'digit': did you mean 'digits'? Known are 'digits', "),
        (["compare", "--mechanisms", "standard", "twicng"], "'twicng'"),
        (["compare", "--mechanisms", "standard"], "there is nothing to compare 'standard' with"),
        (["compare", "--mechanisms", "twicing", "twicing"], "each mechanism is named once: got twicing"),
        (["compare", "--seeds", "0"], "--seeds must be 1 or larger: got 0."),
        (["compare", "--jobs", "0"], "--jobs must be 1 or larger: got 0."),
        (["compare", "--layers", "10-99"], "99"),
        (["compare", "--mechanisms", "twicing@"], "a placement is NAME@LAYERS"),
        (["compare", "mnist"], "mnist needs --data-dir"),
        (["compare", "--data-dir", "."], "--data-dir"),
        (["train", "digits", "--devices", "2"], "torchrun"),
        (["train", "digits", "--precision", "7"], "precision"),
        (["train", "digits", "--set", "epoch=3"], "unknown key 'epoch': did you mean 'epochs'? Known are "),
        (["train", "digits", "--mechanism", "twicing", "--options", "gian=1"], "gain"),
        (
            ["train", "digits", "--mechanism", "twicing", "--options", "gain=nan"],
            "'twicing' cannot be built: The option",
        ),
        (["train", "digits", "--mechanism", "twicing", "--options", "order=1.5"], "order must be an integer"),
        (["train", "digits", "--mechanism", "os.path:join"], "The mechanism 'os.path:join' cannot be built: "),
        (["compare", "--set", "evaluation.pgd_steps=0"], "steps and restarts must be 1 or more"),
        (["train", "digits", "--options", "gain=1"], "'standard' is the model as it is"),
        (["train", "digits", "--seed", "-1"], "--seed must be 0 or larger and below 2^32: got -1."),
        (["diagnose", "deit_tiny_patch16_224", "--seed", "-1"], "--seed must be 0 or larger and below 2^32: got -1."),
        (["theory", "--seed", "4294967296"], "--seed must be 0 or larger and below 2^32: got 4294967296."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_sentence(run, arguments, message, tmp_path):
    out = tmp_path / "run"
    done = run(*arguments, "--out", str(out))
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("twicing: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not out.exists(), "a refused command leaves nothing behind"


def test_train_writes_its_results(run, tmp_path):
    out = tmp_path / "run"
    done = run(
        *("train", "digits", "--mechanism", "twicing", "--layers", "2", "--options", "gain=0.5", "--out", str(out)),
        *("--set", "epochs=1", "depth=2", "width=16", "heads=2", "batch_size=128", "evaluation.pgd_steps=2"),
        *("evaluation.probes=30", "evaluation.verdict_seeds=0"),
    )
    assert done.returncode == 0, done.stderr
    assert str(out / "results.jsonl") in done.stdout.replace("\n", "")
    assert "accuracy [share of images] clean" in " ".join(done.stdout.split())
    # After an epoch of so small a model most images are wrong.
    assert "- eps50 is 0: half of the attacked images or more are wrong before any change." in done.stdout.replace(
        "\n", " "
    )
    assert '"layers": [2]' in (out / "results.jsonl").read_text()
    assert '"gain": 0.5' in (out / "results.jsonl").read_text()


def test_a_text_that_is_not_there_leaves_no_folder(run, tmp_path):
    done = run("train", "ptb", "--data-dir", str(tmp_path / "nope"), "--out", str(tmp_path / "run"))
    assert done.returncode == 1
    assert "nope does not exist: give a text file, or a folder" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_pipe_that_broke_in_the_work_is_told(run, monkeypatch):
    def broken(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("twicing.cli_run._print_environment", broken)
    done = run("env")
    assert done.returncode == 1
    assert done.stderr.startswith("twicing: another process ended too early")
    assert done.stderr.count("\n") == 1


def test_a_missing_package_is_one_sentence():
    code = "import sys; sys.modules['tyro'] = None; import twicing.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "twicing: the commands need tyro, which is missing: pip install 'twicing[lab]'"
