"""The command line: arguments in, one call each, and every expected error as one sentence."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import tyro
    from tyro.conf import Positional, arg
except ModuleNotFoundError as error:
    raise SystemExit(f"twicing: the commands need {error.name}, which is missing: pip install 'twicing[lab]'") from None

from twicing.experiments.bench.options import DecodeOptions, ModelOptions, OpsOptions

if TYPE_CHECKING:
    from rich.console import Console

Settings = Annotated[
    tuple[str, ...],
    arg(metavar="KEY=VALUE", help="Change the recipe, as in --set epochs=5 evaluation.eps=1/16,1/8."),
]


@dataclass(frozen=True)
class Compare:
    """Train standard attention and other mechanisms side by side, and report what is shown and what is not.

    Every mechanism is trained once per seed, on the same images in the same order from the same weights; differences
    are paired by seed. Writes a folder with config, logs, checkpoints, results.jsonl, predictions.npz and report.html.
    Interrupted, it goes on where it stopped when the same command is given again.

    Example: twicing compare digits --mechanisms standard twicing --seeds 6 --controls
    """

    recipe: Positional[str] = "digits"
    """What to train on what. There is: digits (scikit-learn's handwritten digits, no download)."""
    mechanisms: tuple[str, ...] = ("standard", "twicing")
    """Mechanisms by name, or your own by import path, as in my_pkg.my_file:MyAttention."""
    seeds: int = 6
    """How many seeds; fewer than five can hardly show anything."""
    layers: str = "all"
    """Where to put the mechanisms, counted from 1: all, 10-12, last-3, or 1,2,3."""
    controls: bool = False
    """Add the controls: smooth-more (A^2 V), and standard against standard with other seeds (the noise floor)."""
    jobs: int | None = None
    """Trainings side by side, each on one thread; as many as there are cores by default. Changes no result."""
    out: Path | None = None
    """The run folder; runs/RECIPE by default."""
    set: Settings = ()


@dataclass(frozen=True)
class Train:
    """Train one model of a recipe with one mechanism, and evaluate it.

    Example: twicing train digits --mechanism twicing --layers 10-12 --set epochs=5 --options gain=0.5
    """

    recipe: Positional[str] = "digits"
    """What to train on what. There is: digits."""
    mechanism: str = "standard"
    """A mechanism by name, or your own by import path, as in my_pkg.my_file:MyAttention."""
    layers: str = "all"
    """Where to put it, counted from 1: all, 10-12, last-3, or 1,2,3."""
    options: Annotated[
        tuple[str, ...], arg(metavar="NAME=VALUE", help="Options of the mechanism, as in --options gain=0.5 order=3.")
    ] = ()
    seed: int = 0
    """Decides weights, data order, and the fold that is held out."""
    out: Path | None = None
    """The run folder; runs/train-RECIPE-MECHANISM by default."""
    set: Settings = ()


@dataclass(frozen=True)
class Env:
    """Print versions, device and commit, to paste into a bug report."""


@dataclass(frozen=True)
class Bench:
    """Time attention, cached decoding or a model: correctness first, every ratio taken in one run.

    Writes a CSV with machine, versions and commit, and a plot.

    Example: twicing bench ops
    """

    what: (
        Annotated[OpsOptions, tyro.conf.subcommand("ops")]
        | Annotated[DecodeOptions, tyro.conf.subcommand("decode")]
        | Annotated[ModelOptions, tyro.conf.subcommand("model")]
    )


Command = (
    Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Env, tyro.conf.subcommand("env")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `twicing` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = tyro.cli(
        Command,
        prog="twicing",
        description="Twicing Attention and its relatives: fair comparisons from the command line.",
        args=given,
        # --shapes, not --what.shapes
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )
    try:
        _run(command, shlex.join(["twicing", *given]))
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept; the same command goes on from there.", file=sys.stderr)
        raise SystemExit(130) from None
    except ModuleNotFoundError as error:
        raise SystemExit(f"twicing: {error.name} is missing: pip install 'twicing[lab]'") from None
    except (ValueError, ImportError) as error:
        raise SystemExit(f"twicing: {error}") from None
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise SystemExit(
            f"twicing: cannot read or write{where} ({error.strerror or error}): make room or choose another --out."
        ) from None


def _run(command: Compare | Train | Bench | Env, typed: str) -> None:
    # Imported here, so that --help and a misspelt option answer at once.
    from rich.console import Console

    console = Console()
    if isinstance(command, Env):
        _print_environment(console)
        return
    if isinstance(command, Bench):
        _bench(command.what, console)
        return
    from twicing.experiments.compare import compare, cores, train
    from twicing.experiments.processes import JobFailedError
    from twicing.training.recipe import find_recipe
    from twicing.training.settings import apply_settings, parse_options

    # A mechanism by import path may be a file in the current folder, which a console script does not look into.
    if "" not in sys.path:
        sys.path.insert(0, "")
    recipe = apply_settings(find_recipe(command.recipe), command.set)
    try:
        if isinstance(command, Compare):
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
            )
        else:
            results = train(
                recipe,
                command.mechanism,
                layers=command.layers,
                options=parse_options(command.options),
                seed=command.seed,
                folder=command.out or Path("runs") / f"train-{recipe.name}-{command.mechanism.replace(':', '-')}",
                command=typed,
                console=console,
            )
            print(f"Results: {results}")
    except JobFailedError as error:
        raise SystemExit(f"twicing: {error}") from None


def _bench(options: OpsOptions | DecodeOptions | ModelOptions, console: Console) -> None:
    from twicing.experiments.bench.rich_screen import RichScreen

    screen = RichScreen(console)
    if isinstance(options, OpsOptions):
        from twicing.experiments.bench.ops import bench_ops

        finished = bench_ops(options, screen)
    elif isinstance(options, DecodeOptions):
        from twicing.experiments.bench.decode import bench_decode

        finished = bench_decode(options, screen)
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


if __name__ == "__main__":
    main()
