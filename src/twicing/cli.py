"""The command line: arguments in, one call each, and every expected error as one sentence."""

import io
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout

try:
    import tyro
except ModuleNotFoundError as error:
    raise SystemExit(f"twicing: the commands need {error.name}, which is missing: pip install 'twicing[lab]'") from None

from twicing.cli_commands import COMMANDS, PARTS, Command
from twicing.cli_help import Wrapped, subcommands
from twicing.cli_run import run
from twicing.cli_unknown import typed_command, unknown_word
from twicing.cli_values import empty_list, wrong_value
from twicing.version import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `twicing` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        run(_read(given or ["--help"]), shlex.join(["twicing", *given]))
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


if __name__ == "__main__":
    main()
