"""A comparison that takes seconds, the commands that make it, and what is looked up in its folder."""

import signal
import subprocess
import sys

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
    """Its command line, for a process of its own."""
    return [sys.executable, "-m", "twicing.cli", *arguments(folder, *more, jobs=jobs)]


def arguments(folder, *more, jobs=2):
    """What is typed behind the name of the program; more: further settings."""
    return [
        *("compare", "digits", "--seeds", "2", "--out", str(folder)),
        *("--jobs", str(jobs), "--set", *SMALL, *more),
    ]


def started(command_line, **streams):
    """Start it in a group of its own, where it hears Ctrl-C: who started the tests may have let it ignore that."""
    return subprocess.Popen(
        command_line, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **streams
    )


def run(command_line, **options):
    """Run it to its end."""
    return subprocess.run(command_line, capture_output=True, text=True, timeout=120, check=False, **options)


def numbers(folder):
    """All records but for what depends on the clock."""
    timed = ("training time [s]", "training time [s per step]")
    return [
        (r.arm, r.seed, r.metric, sorted(r.conditions.items(), key=str), r.value, r.n)
        for r in read_records(folder / "results.jsonl")
        if r.metric not in timed
    ]


def right(folder):
    """Which images were right, by model and threat."""
    found = read_predictions(folder / "predictions.npz")
    return {(key, threat): one.correct[threat].tobytes() for key, one in found.items() for threat in one.correct}


def stamps(folder):
    """When each finished part and checkpoint was written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.glob("*-seed*/*")
        if path.suffix in (".json", ".ckpt")
    }
