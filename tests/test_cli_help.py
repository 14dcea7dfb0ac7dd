"""Help reads as prose at 80 columns."""

import re
import subprocess
import sys
from itertools import pairwise, takewhile

import pytest

from twicing.adapters.layers import chosen_layers
from twicing.cli_commands import BENCHES, COMMANDS
from twicing.version import __version__

HELP = [[], *([name] for name in COMMANDS), *(["bench", name] for name in BENCHES)]
BOX = "│ "


@pytest.fixture
def shown(type_in, monkeypatch):
    """The help of a command on a terminal of 80 columns, as lines."""
    monkeypatch.setenv("COLUMNS", "80")

    def lines(*arguments):
        done = type_in(*arguments, "--help")
        assert done.returncode == 0
        assert done.stderr == ""
        return done.stdout.splitlines()

    return lines


def broken_too_early(lines):
    """Pairs of lines of one paragraph of which the second one's first word would have fitted on the first."""
    found, column = [], 0
    for place, (line, following) in enumerate(pairwise(lines)):
        if line.startswith("╭"):
            column = column_of_help(lines[place + 1 :])
        elif line.startswith(BOX) and following.startswith(BOX):
            inside, after = line[2:-2], following[2:-2]
            # Where an option's name reaches into the column, its help begins on the next line.
            if not after[:column].strip() and inside[column - 2 : column] == "  ":
                found += [(line, following)] if fits(inside[column:], after, len(inside) - column) else []
        elif line[:1].isalpha() and following and not line.startswith("usage:") and not following.startswith("╭"):
            continued = line.endswith("\\")
            found += [(line, following)] if fits(line.removesuffix("\\"), following, 80 - 2 * continued) else []
    return found


def column_of_help(lines):
    """Where help begins in the box whose lines come first."""
    box = [line[2:-2] for line in takewhile(lambda line: line.startswith(BOX), lines)]
    indented = [len(line) - len(line.lstrip()) for line in box if line.startswith("    ")]
    return min(indented, default=0)


def fits(text, following, room):
    return len(text.rstrip()) + 1 + len(following.split()[0]) <= room


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_reads_as_prose(shown, arguments):
    lines = shown(*arguments)
    assert lines[0].startswith("usage: twicing")
    assert max(map(len, lines)) <= 80
    assert broken_too_early(lines) == []
    assert not any(re.fullmatch(r"│ +│", line) for line in lines), "a box without words in a line"
    text = "\n".join(lines)
    assert not re.search(r"None|\bSTR\b|\bINT\b|FLOAT|\{fixed\}|default: \)|\[\.\.\.|''|\ue000", text)


def test_breaks_are_noticed():
    top, full = "╭───────────────────────────────╮", "│             comparisons.      │"
    for after in ("│             the runs.         │", "│                 the runs.     │"):
        early = ["│ --out PATH  The folder of     │", after, full]
        assert broken_too_early([top, *early]) == [tuple(early[:2])]
    assert broken_too_early([top, "│ --out PATH  The folder of     │", full]) == []
    assert broken_too_early(["A paragraph.", "Broken."]) == [("A paragraph.", "Broken.")]


def test_a_command_says_more_of_itself_than_of_others(shown):
    together = " ".join(" ".join(shown()).split())
    alone = " ".join(" ".join(shown("compare")).split())
    assert "Every mechanism is trained once per seed, on the same data" in alone
    assert "Every mechanism is trained once per seed" not in together
    assert "Train standard attention and other mechanisms side by side" in together


@pytest.mark.parametrize(
    "arguments", [["compare"], ["train"], ["diagnose"], ["analyze"], ["evaluate"], ["bench", "model"]], ids=" ".join
)
def test_every_form_of_layers_is_named_and_understood(shown, arguments):
    text = " ".join(" ".join(line.strip("│ ") for line in shown(*arguments)).split())
    forms = ("all", "10-12", "first-3", "last-3", "1,2,3")
    assert f"counted from 1: {', '.join(forms[:-1])}, or {forms[-1]}" in text
    assert all(chosen_layers(form, 12) for form in forms)


def test_values_are_called_by_words(shown):
    text = "\n".join(shown("compare"))
    for option in ("[RECIPE]", "--mechanisms MECHANISM ...", "--seeds N ", "--data-dir PATH", "--set KEY=VALUE ..."):
        assert option in text
    assert "(default: standard twicing)" in text
    assert "evaluation.eps=1/16,1/8" in text
    assert "--convert MECHANISM" in "\n".join(shown("diagnose"))
    assert "[MODEL ...]" in shown("analyze")[0] or "MODEL ..." in shown("analyze")[0]


def test_without_a_command_it_is_the_help(type_in, shown):
    assert type_in().stdout.splitlines() == shown()


def test_the_version_is_told(type_in):
    done = type_in("--version")
    assert (done.returncode, done.stdout) == (0, f"twicing {__version__}\n")


@pytest.mark.parametrize("arguments", [["compare", "--help"], ["env"]], ids=" ".join)
def test_a_reader_that_has_enough_ends_it_without_a_traceback(arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "twicing", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 1
