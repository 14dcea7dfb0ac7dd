"""The commands that there are: what each can be told is in the options of its experiment."""

from dataclasses import dataclass, field

from twicing.cli_help import SUBCOMMANDS
from twicing.experiments.analyze.options import Analyze
from twicing.experiments.bench.linear_options import LinearOptions
from twicing.experiments.bench.options import DecodeOptions, ModelOptions, OpsOptions
from twicing.experiments.compare_options import Compare, Train
from twicing.experiments.diagnose.options import Diagnose
from twicing.experiments.evaluate.options import Evaluate
from twicing.experiments.theory.options import TheoryOptions


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
