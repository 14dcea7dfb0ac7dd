"""A value that is missing or of another kind is answered in one sentence, by this version of tyro too."""

import dataclasses
import re
import typing

import pytest

from twicing.cli_commands import BENCHES, COMMANDS

EVERY = {name: options for name, options in COMMANDS.items() if name != "bench"} | {
    f"bench {name}": options for name, options in BENCHES.items()
}


def options_of(*kinds):
    """Each option of every command whose hint is one of the kinds, as (command, option)."""
    return [
        (name, f"--{field.name.replace('_', '-')}")
        for name, options in EVERY.items()
        for field in dataclasses.fields(options)
        if typing.get_type_hints(options)[field.name] in kinds
    ]


def refused(done, sentence):
    assert done.returncode == 2
    assert done.stderr.startswith(f"twicing: {sentence}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("command", "option"), options_of(int, float, int | None, tuple[int, ...]), ids=lambda value: value
)
def test_a_number_that_is_none_is_answered_in_one_sentence(type_in, command, option):
    name = command.split()[0]
    model = ["model"] if name in ("diagnose", "evaluate", "analyze") else []
    done = type_in(*command.split(), *model, option, "two")
    refused(done, f"{option} takes ")
    assert re.search(rf"numbers?: got 'two'\. See twicing {command} --help\.$", done.stderr)


LISTS = [
    (name, f"--{field.name.replace('_', '-')}")
    for name, options in EVERY.items()
    for field in dataclasses.fields(options)
    if isinstance(field.default, tuple)
]


@pytest.mark.parametrize(("command", "option"), LISTS, ids=lambda value: value)
def test_a_list_of_nothing_is_answered_in_one_sentence(type_in, command, option):
    model = ["model"] if command in ("diagnose", "evaluate", "analyze") else []
    done = type_in(*command.split(), *model, option)
    refused(done, f"{option} takes ")
    assert done.stderr.endswith(f"s: got nothing. See twicing {command} --help.\n")


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["compare", "--seeds"], "--seeds takes a whole number: got nothing. See twicing compare --help."),
        (["compare", "--seeds", "1.5"], "--seeds takes a whole number: got '1.5'. "),
        (["compare", "--seeds="], "--seeds takes a whole number: got ''. "),
        (["compare", "--seeds", "-x"], "--seeds takes a whole number: got nothing. "),
        (["compare", "--layers", "all", "--jobs", "None", "--seeds", "2"], "--jobs takes a whole number: got 'None'. "),
        (["compare", "--layers", "--jobs", "None"], "--layers takes values: got nothing. See twicing compare --help."),
        (["theory", "--only", "--seed", "3"], "--only takes values: got nothing. See twicing theory --help."),
        (["theory", "--only", "-1", "--only"], "--only takes values: got nothing. "),
        (["bench", "decode", "--groups"], "--groups takes whole numbers: got nothing. See "),
        (["train", "digits", "--out"], "--out takes a value: got nothing. See twicing train --help."),
        (["train", "--num_nodes", "many"], "--num_nodes takes a whole number: got 'many'. "),
        (["bench", "decode", "--lengths", "1024", "4k"], "--lengths takes whole numbers: got '4k'. "),
        (["bench"], "bench needs to be told what: ops, decode, model, linear. See twicing bench --help."),
        (["diagnose"], "diagnose needs MODEL: a vision transformer of timm by name, a folder that "),
        (["evaluate", "--seed", "3"], "evaluate needs MODEL: a run folder, or a vision transformer of timm by name. "),
        (["--seeds", "3"], "a command comes before its options: got '--seeds' first. See twicing --help."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_missing_or_not_understood_is_answered_in_one_sentence(type_in, arguments, answer):
    refused(type_in(*arguments), answer)


def test_what_is_not_seen_here_is_answered_by_tyro(type_in, monkeypatch):
    monkeypatch.setattr("twicing.cli.wrong_value", lambda *_: "")
    done = type_in("compare", "--seeds", "x", "--layers")
    assert done.returncode == 2
    assert "Error parsing --seeds" in done.stderr
    assert "\ue000" not in done.stderr


def test_help_is_shown_in_spite_of_a_wrong_value(type_in):
    done = type_in("compare", "--seeds", "x", "--help")
    assert (done.returncode, done.stderr) == (0, "")
