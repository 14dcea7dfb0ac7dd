"""`twicing compare` and `twicing train`: the plan that each makes of its arguments, and what it tells at the end."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twicing.experiments.arms import Arm, arms_under_test, refuse_nothing_to_compare
from twicing.experiments.controls import controlled_arm, controls_of, refuse_other_baseline, with_equal_time
from twicing.experiments.equal_time import step_time_ratio
from twicing.experiments.findings import read_run
from twicing.experiments.plan import CONFIG, AnyRecipe, Plan, Resources
from twicing.experiments.programmes import programme_of
from twicing.experiments.report import write_report
from twicing.experiments.results import BASELINE, read_json
from twicing.experiments.run import RESULTS, follow_training, run_plan
from twicing.experiments.sentences import remarks
from twicing.experiments.summary import print_summary
from twicing.mechanisms.registry import find_mechanism
from twicing.training.hardware import process_rank
from twicing.training.language_data import find_text
from twicing.training.recipe import Recipe
from twicing.training.split import with_classes


def compare(
    recipe: AnyRecipe,
    mechanisms: Sequence[str],
    *,
    seeds: int,
    layers: Sequence[str],
    controls: bool,
    side_by_side: int,
    folder: Path,
    command: str,
    console: Console,
    resources: Resources | None = None,
) -> Path:
    """Train every arm with every seed, or go on with what the folder holds; returns the report, folder/report.html.

    layers: placements; every mechanism is tried in each of them, but for those named as NAME@LAYERS.
    Written there: config.json, a folder per training (log, checkpoint, finished parts), results.jsonl, predictions.npz,
    verdicts.json, report.html. Raises ValueError for settings that make no comparison, and what run_plan() raises.
    """
    if seeds < 1:
        raise ValueError(f"--seeds must be 1 or larger: got {seeds}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "a comparison starts its trainings itself, side by side on one machine: run it without torchrun, "
            "or train one model on several devices with `twicing train`."
        )
    recipe = _complete(recipe, resources)
    arms = arms_under_test(mechanisms, layers, programme_of(recipe).options, recipe.baseline)
    if controls:
        refuse_other_baseline(recipe)
        arms += controls_of(recipe, arms, _equal_time(recipe, arms, folder, console, resources or Resources()))
    refuse_nothing_to_compare(arms)
    plan = Plan(recipe, tuple(arms), tuple(range(seeds)))
    run_plan(plan, folder, side_by_side=side_by_side, command=command, console=console, resources=resources)
    report = write_report(folder)
    print_summary(folder, console)
    return report


def _equal_time(recipe: AnyRecipe, arms: Sequence[Arm], folder: Path, console: Console, resources: Resources) -> float:
    """The step time of the controlled arm against standard's: measured, or as the folder's comparison measured it."""
    config = folder / CONFIG
    found = read_json(config, remedy="name another folder with --out") if config.exists() else None
    known = with_equal_time(found) if isinstance(found, dict) else None
    if known is not None:
        return known
    arm = controlled_arm(arms, recipe.depth)
    with console.status(f"Timing steps of {arm.label} against standard ..."):
        return step_time_ratio(
            recipe,
            arm,
            data_dir=resources.data_dir,
            device=resources.device,
            precision=resources.hardware.precision,
        )


def train(
    recipe: AnyRecipe,
    mechanism: str,
    *,
    layers: str,
    options: Mapping[str, Any],
    seed: int,
    folder: Path,
    command: str,
    console: Console,
    resources: Resources | None = None,
) -> Path:
    """Train and evaluate one model, print what was measured, and return folder/results.jsonl.

    Started by torchrun, the first process does all of this, and the others take part in the training alone.
    Raises ValueError for a seed out of range or an unknown mechanism, and what run_plan() raises.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be 0 or larger and below 2^32: got {seed}.")
    find_mechanism(mechanism)
    if mechanism == BASELINE and (options or layers != "all"):
        raise ValueError(f"{BASELINE!r} is the model as it is: it takes neither --layers nor --options.")
    arm = Arm(mechanism, mechanism, layers, "The one that was asked for.", dict(options))
    plan = Plan(_complete(recipe, resources), (arm,), (seed,))
    if process_rank():
        follow_training(plan, folder, resources or Resources())
        return folder / RESULTS
    run_plan(plan, folder, side_by_side=1, command=command, console=console, resources=resources)
    table = Table(title=f"{mechanism}, seed {seed}: {recipe.headline}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    run = read_run(folder)
    for record in run.records:
        if "threat" in record.conditions or not record.conditions:
            conditions = ", ".join(str(value) for value in record.conditions.values())
            # Units stand in brackets, which rich would take for markup.
            table.add_row(escape(f"{record.metric} {conditions}".strip()), f"{record.value:.4f}")
    console.print(table)
    for sentence in remarks(run.records, run.notes):
        console.print(f"- {escape(sentence)}", highlight=False)
    return folder / RESULTS


def _complete(recipe: AnyRecipe, resources: Resources | None) -> AnyRecipe:
    """The recipe with what its data decide. Data that are not there are refused here, before a folder is made."""
    data_dir = resources.data_dir if resources else None
    if isinstance(recipe, Recipe):
        return with_classes(recipe, data_dir)
    find_text(recipe, data_dir)
    return recipe


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
