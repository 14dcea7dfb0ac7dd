"""From a command that was typed to the one call that does it. What a command needs is imported when it runs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twicing.cli_commands import Bench, Command, Env
from twicing.experiments.analyze.options import Analyze
from twicing.experiments.bench.linear_options import LinearOptions
from twicing.experiments.bench.options import DecodeOptions, ModelOptions, OpsOptions
from twicing.experiments.compare_options import Compare, Train
from twicing.experiments.diagnose.options import Diagnose
from twicing.experiments.evaluate.options import Evaluate
from twicing.experiments.theory.options import TheoryOptions

if TYPE_CHECKING:
    from rich.console import Console

    from twicing.experiments.plan import AnyRecipe, Resources


def run(command: Command, typed: str) -> None:
    """Do it. typed: the whole command line, for records and reports."""
    # Imported here, so that --help and a misspelt option answer at once.
    from rich.console import Console

    seed = getattr(command, "seed", 0)
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be 0 or larger and below 2^32: got {seed}.")
    console = Console()
    if isinstance(command, Env):
        _print_environment(console)
        return
    if isinstance(command, Bench):
        _bench(command.what, console)
        return
    if isinstance(command, TheoryOptions):
        from twicing.experiments.theory.run import run as theory

        if not theory(command, console):
            raise SystemExit(1)
        return
    # A mechanism by import path may be a file in the current folder, which a console script does not look into.
    if "" not in sys.path:
        sys.path.insert(0, "")
    if isinstance(command, Evaluate | Diagnose | Analyze):
        _look_at(command, console, typed)
        return
    from twicing.experiments.processes import JobFailedError

    try:
        _compare(command, console, typed) if isinstance(command, Compare) else _train(command, console, typed)
    except JobFailedError as error:
        raise SystemExit(f"twicing: {error}") from None


def _compare(command: Compare, console: Console, typed: str) -> None:
    from twicing.experiments.compare import compare, cores
    from twicing.experiments.programmes import find_any_recipe
    from twicing.training.settings import apply_settings

    recipe = apply_settings(find_any_recipe(command.recipe), command.set)
    compare(
        recipe,
        command.mechanisms,
        seeds=command.seeds,
        layers=command.layers,
        controls=command.controls,
        side_by_side=cores() if command.jobs is None else command.jobs,
        folder=command.out or Path("runs") / recipe.name,
        command=typed,
        console=console,
        resources=_resources(recipe, command, devices="auto", num_nodes=1, strategy="auto"),
    )


def _train(command: Train, console: Console, typed: str) -> None:
    from twicing.experiments.compare import train
    from twicing.experiments.programmes import find_any_recipe
    from twicing.training.hardware import process_rank
    from twicing.training.settings import apply_settings, parse_options

    recipe = apply_settings(find_any_recipe(command.recipe), command.set)
    hardware = {"devices": command.devices, "num_nodes": command.num_nodes, "strategy": command.strategy}
    results = train(
        recipe,
        command.mechanism,
        layers=command.layers,
        options=parse_options(command.options),
        seed=command.seed,
        folder=command.out or Path("runs") / f"train-{recipe.name}-{command.mechanism.replace(':', '-')}",
        command=typed,
        console=console,
        resources=_resources(recipe, command, **hardware),
    )
    if not process_rank():
        console.print(f"Results: {results}", markup=False, highlight=False, soft_wrap=True)


def _resources(recipe: AnyRecipe, command: Compare | Train, **hardware: Any) -> Resources:
    from twicing.experiments.plan import Resources
    from twicing.training.hardware import default_hardware

    chosen = {"accelerator": command.accelerator, "workers": command.workers, "precision": command.precision}
    given = {name: value for name, value in (chosen | hardware).items() if value is not None}
    return Resources(command.data_dir, hardware=dataclasses.replace(default_hardware(recipe), **given))


def _look_at(command: Evaluate | Diagnose | Analyze, console: Console, typed: str) -> None:
    if isinstance(command, Evaluate):
        from twicing.experiments.evaluate.run import evaluate

        evaluate(command, console, typed)
    elif isinstance(command, Diagnose):
        from twicing.experiments.diagnose.run import run as diagnose

        diagnose(command, typed, console)
    else:
        from twicing.experiments.analyze.run import run as analyze

        analyze(command, typed, console)


def _bench(options: OpsOptions | DecodeOptions | ModelOptions | LinearOptions, console: Console) -> None:
    from twicing.experiments.bench.rich_screen import RichScreen

    screen = RichScreen(console)
    if isinstance(options, OpsOptions):
        from twicing.experiments.bench.ops import bench_ops

        finished = bench_ops(options, screen)
    elif isinstance(options, DecodeOptions):
        from twicing.experiments.bench.decode import bench_decode

        finished = bench_decode(options, screen)
    elif isinstance(options, LinearOptions):
        from twicing.experiments.bench.linear import bench_linear

        finished = bench_linear(options, screen)
    else:
        from twicing.experiments.bench.model import bench_model

        finished = bench_model(options, screen)
    if not finished:
        raise SystemExit(130)


def _print_environment(console: Console) -> None:
    import platform

    from twicing.experiments.results import environment

    here = environment()
    for name, version in {**here.versions, "commit": here.commit or "unknown (not a git checkout)"}.items():
        console.print(f"{name:14}{version}", highlight=False, markup=False)
    console.print(f"{'device':14}{here.device}", highlight=False, markup=False)
    console.print(f"{'threads':14}{here.threads}", highlight=False, markup=False)
    console.print(f"{'system':14}{platform.platform()}", highlight=False, markup=False)
