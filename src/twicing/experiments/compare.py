"""`twicing compare` and `twicing train`: the plan that each makes of its arguments, and what it tells at the end."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from twicing.experiments.arms import Arm, arms_of
from twicing.experiments.plan import Plan
from twicing.experiments.report import write_report
from twicing.experiments.results import BASELINE, read_records
from twicing.experiments.run import RESULTS, run_plan
from twicing.experiments.summary import print_summary
from twicing.mechanisms.registry import find_mechanism
from twicing.training.recipe import Recipe


def compare(
    recipe: Recipe,
    mechanisms: Sequence[str],
    *,
    seeds: int,
    layers: str,
    controls: bool,
    side_by_side: int,
    folder: Path,
    command: str,
    console: Console,
) -> Path:
    """Train every arm with every seed, or go on with what the folder holds; returns the report, folder/report.html.

    Written there: config.json, a folder per training (log, checkpoint, finished parts), results.jsonl, predictions.npz,
    report.html. Raises ValueError for settings that make no comparison, and what run_plan() raises.
    """
    if seeds < 1:
        raise ValueError(f"--seeds must be 1 or larger: got {seeds}.")
    plan = Plan(recipe, tuple(arms_of(mechanisms, layers, controls)), tuple(range(seeds)))
    run_plan(plan, folder, side_by_side=side_by_side, command=command, console=console)
    report = write_report(folder)
    print_summary(folder, console)
    return report


def train(
    recipe: Recipe,
    mechanism: str,
    *,
    layers: str,
    options: Mapping[str, Any],
    seed: int,
    folder: Path,
    command: str,
    console: Console,
) -> Path:
    """Train and evaluate one model, print its accuracies, and return folder/results.jsonl.

    Raises ValueError for a seed out of range or an unknown mechanism, and what run_plan() raises.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be 0 or larger and below 2^32: got {seed}.")
    find_mechanism(mechanism)
    if mechanism == BASELINE and (options or layers != "all"):
        raise ValueError(f"{BASELINE!r} is the model as it is: it takes neither --layers nor --options.")
    arm = Arm(mechanism, mechanism, layers, "The one that was asked for.", dict(options))
    run_plan(Plan(recipe, (arm,), (seed,)), folder, side_by_side=1, command=command, console=console)
    table = Table(title=f"{mechanism}, seed {seed}: {recipe.headline}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for record in read_records(folder / RESULTS):
        if "threat" in record.conditions or not record.conditions:
            conditions = ", ".join(str(value) for value in record.conditions.values())
            table.add_row(f"{record.metric} {conditions}".strip(), f"{record.value:.4f}")
    console.print(table)
    return folder / RESULTS


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
