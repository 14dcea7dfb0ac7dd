"""The README's code runs, its links lead somewhere, and its commands exist."""

import re
from pathlib import Path

import pytest

from twicing.cli import main
from twicing.torchvision_import import mend_torchvision_import

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_code_runs_and_says_what_it_claims():
    mend_torchvision_import()
    assert len(CODE) == 1
    names = {}
    exec(compile(CODE[0], "README.md", "exec"), names)
    assert names["u"].shape == names["v"].shape
    assert names["twicing"].spec(names["model"]) == [], "undo() was said to bring the model back"
    assert (names["u"] - names["twicing"].twicing_attention(names["q"], names["k"], names["v"])).abs().max() < 1e-5


def test_the_first_screen_has_eight_lines_of_code():
    assert len([line for line in CODE[0].splitlines() if line.strip()]) == 8


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)|`((?:examples|docs|scripts)/[^`]+)`", README))
def test_what_it_points_to_is_there(target):
    path = target[0] or target[1]
    assert path.startswith("http") or (ROOT / path).exists()


def test_its_commands_are_understood(capsys):
    commands = re.findall(r"^    twicing (\w+)", README, flags=re.MULTILINE)
    assert {"compare", "train", "env"} <= set(commands)
    for command in set(commands):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
    assert "usage: twicing" in capsys.readouterr().out


def test_no_placeholder_is_left():
    assert "@@" not in README
