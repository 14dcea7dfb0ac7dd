"""The command line: arguments in, one call each, and every expected error as one sentence."""

from __future__ import annotations

import dataclasses
import io
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import tyro
    from tyro.conf import Positional, arg
except ModuleNotFoundError as error:
    raise SystemExit(f"twicing: the commands need {error.name}, which is missing: pip install 'twicing[lab]'") from None

from twicing.cli_help import SUBCOMMANDS, Wrapped, subcommands
from twicing.cli_unknown import typed_command, unknown_word
from twicing.cli_values import empty_list, wrong_value
from twicing.experiments.analyze.options import Analyze
from twicing.experiments.bench.linear_options import LinearOptions
from twicing.experiments.bench.options import DecodeOptions, ModelOptions, OpsOptions
from twicing.experiments.diagnose.options import Diagnose
from twicing.experiments.evaluate.options import Evaluate
from twicing.experiments.theory.options import TheoryOptions
from twicing.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from twicing.experiments.plan import AnyRecipe, Resources

Settings = Annotated[
    tuple[str, ...],
    arg(metavar="KEY=VALUE", help="Change the recipe, as in --set epochs=5 evaluation.eps=1/16,1/8."),
]


@dataclass(frozen=True)
class Compare:
    """Train standard attention and other mechanisms side by side, and report what is shown and what is not.

    Every mechanism is trained once per seed, on the same data in the same order from the same weights; differences
    are paired by seed. Writes a folder with config, logs, checkpoints, results.jsonl, predictions.npz and report.html.
    Interrupted, it goes on where it stopped when the same command is given again.

    Example: twicing compare digits --mechanisms standard twicing --seeds 6 --controls
    """

    recipe: Positional[str] = "digits"
    """What to train on what. Images: digits (scikit-learn's handwritten digits, no download), mnist, cifar10,
    imagefolder, imagenet_deit_tiny. Language: text_demo (Python's own documentation, no download), ptb, imdb_lm,
    wikitext103_10m, wikitext103_small, wikitext103_medium, wikitext103_linear. All but the two read --data-dir."""
    mechanisms: tuple[str, ...] = ("standard", "twicing")
    """Mechanisms by name, or your own by import path, as in my_pkg.my_file:MyAttention, which is checked before it
    trains. NAME@LAYERS places one, as in twicing@10-12."""
    seeds: int = 6
    """How many seeds; fewer than five can hardly show anything."""
    layers: tuple[str, ...] = ("all",)
    """Where to put the mechanisms, counted from 1: all, 10-12, first-3, last-3, or 1,2,3. Several placements are
    several arms: --layers 1-3 10-12 7-12 1-12."""
    controls: bool = False
    """Add the five controls: standard for equal time, standard widened to equal multiply-adds, two attentions a block,
    smooth-more (A^2 V), and standard against standard with other seeds (the noise floor)."""
    data_dir: Path | None = None
    """Where the recipe's data are: mnist.npz or its folder; train and test folders of images, or archives of them; the
    folder with train, valid and test texts."""
    jobs: int | None = None
    """Trainings side by side, each on one thread; as many as there are cores by default. Changes no result."""
    accelerator: str | None = None
    """cpu, gpu or auto; the CPU by default for small images."""
    precision: str = "32-true"
    """Lightning's: 32-true, bf16-mixed, 16-mixed."""
    workers: int | None = None
    """Processes that read and augment the images of one training; by the recipe by default."""
    out: Path | None = None
    """The run folder; runs/RECIPE by default."""
    set: Settings = ()


@dataclass(frozen=True)
class Train:
    """Train one model of a recipe with one mechanism, and evaluate it.

    Several devices: torchrun --nproc-per-node 8 -m twicing train imagenet_deit_tiny --data-dir DIR --devices 8 ...

    Example: twicing train digits --mechanism twicing --layers 10-12 --set epochs=5 --options gain=0.5
    """

    recipe: Positional[str] = "digits"
    """What to train on what: digits, mnist, cifar10, imagefolder, imagenet_deit_tiny; text_demo, ptb, imdb_lm,
    wikitext103_10m, wikitext103_small, wikitext103_medium, wikitext103_linear."""
    mechanism: str = "standard"
    """A mechanism by name, or your own by import path, as in my_pkg.my_file:MyAttention."""
    layers: str = "all"
    """Where to put it, counted from 1: all, 10-12, first-3, last-3, or 1,2,3."""
    options: Annotated[
        tuple[str, ...], arg(metavar="NAME=VALUE", help="Options of the mechanism, as in --options gain=0.5 order=3.")
    ] = ()
    seed: int = 0
    """Decides weights, data order, and the fold that is held out."""
    data_dir: Path | None = None
    """Where the recipe's data are: mnist.npz or its folder; train and test folders of images, or archives of them; the
    folder with train, valid and test texts."""
    accelerator: str | None = None
    """cpu, gpu or auto; the CPU by default for small images."""
    precision: str = "32-true"
    """Lightning's: 32-true, bf16-mixed, 16-mixed."""
    devices: str = "auto"
    """Processes on this machine, as many as torchrun started. The batch is divided among them."""
    num_nodes: int = 1
    """Machines, each with its own torchrun."""
    strategy: str = "auto"
    """Lightning's: ddp or fsdp for several devices."""
    workers: int | None = None
    """Processes that read and augment the images; by the recipe by default."""
    out: Path | None = None
    """The run folder; runs/train-RECIPE-MECHANISM by default."""
    set: Settings = ()


@dataclass(frozen=True)
class Env:
    """Print versions, device and commit, to paste into a bug report."""


BENCHES: dict[str, type] = {
    "ops": OpsOptions,
    "decode": DecodeOptions,
    "model": ModelOptions,
    "linear": LinearOptions,
}


@dataclass(frozen=True)
class Bench:
    """Time attention, cached decoding or a model: correctness first, every ratio taken in one run.

    Writes a CSV with machine, versions and commit, and a plot.

    Example: twicing bench ops
    """

    what: OpsOptions | DecodeOptions | ModelOptions | LinearOptions = field(metadata={SUBCOMMANDS: BENCHES})


Command = Diagnose | Compare | Train | Evaluate | Analyze | TheoryOptions | Bench | Env
COMMANDS: dict[str, type] = {
    "diagnose": Diagnose,
    "compare": Compare,
    "train": Train,
    "evaluate": Evaluate,
    "analyze": Analyze,
    "theory": TheoryOptions,
    "bench": Bench,
    "env": Env,
}
# The commands of a command.
PARTS = {"bench": BENCHES}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `twicing` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _run(_read(given or ["--help"]), shlex.join(["twicing", *given]))
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept; the same command goes on from there.", file=sys.stderr)
        raise SystemExit(130) from None
    except ModuleNotFoundError as error:
        raise SystemExit(f"twicing: {error.name} is missing: pip install 'twicing[lab]'") from None
    except (ValueError, ImportError) as error:
        raise SystemExit(f"twicing: {error}") from None
    except BrokenPipeError:
        # Not the one to our reader, as in `twicing env | head`: rich's console ends that quietly.
        raise SystemExit(
            "twicing: another process ended too early, perhaps for lack of memory: give the same command again."
        ) from None
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise SystemExit(
            f"twicing: cannot read or write{where} ({error.strerror or error}): make room or choose another --out."
        ) from None


def _read(given: list[str]) -> Command:
    """The command that was typed, with its options. What is misspelt ends the program with code 2, as tyro does."""
    if given[0] == "--version":
        print(f"twicing {__version__}")
        raise SystemExit(0)
    wrong = unknown_word(COMMANDS, given, PARTS)
    if not wrong:
        refusal = io.StringIO()
        try:
            command, left_over = _parsed(given, refusal)
        except SystemExit as end:
            wrong = wrong_value(COMMANDS, given, PARTS) if end.code else ""
            if not wrong:
                print(refusal.getvalue(), file=sys.stderr, end="")
                raise
        else:
            wrong = empty_list(COMMANDS, given, PARTS)
            if left_over:
                name = typed_command(COMMANDS, given, PARTS).name
                wrong = f"{name} does not take {left_over[0]!r}: see twicing {name} --help."
            if not wrong:
                return command
    print(f"twicing: {wrong}", file=sys.stderr)
    raise SystemExit(2)


def _parsed(given: list[str], refusal: io.StringIO) -> tuple[Command, list[str]]:
    """What tyro makes of the words, and the words that it could not use. It exits after its help or a refusal."""
    try:
        with redirect_stdout(Wrapped(sys.stdout)), redirect_stderr(Wrapped(refusal)):
            return tyro.cli(
                subcommands(COMMANDS, given),
                prog="twicing",
                description="Twicing Attention and its relatives: fair comparisons from the command line. "
                "`twicing --version` prints the version.",
                args=given,
                return_unknown_args=True,
                # --shapes, not --what.shapes; an option is left out, not given as None
                config=(
                    tyro.conf.OmitSubcommandPrefixes,
                    tyro.conf.OmitArgPrefixes,
                    tyro.conf.DisallowNone,
                    tyro.conf.PositionalMetavarFromFieldName,
                ),
            )
    except BrokenPipeError:
        # Whoever reads the help, as in `twicing compare --help | head`, has enough. Nothing is left to be flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _run(command: Command, typed: str) -> None:
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
        from twicing.experiments.theory.run import run

        if not run(command, console):
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


if __name__ == "__main__":
    main()
