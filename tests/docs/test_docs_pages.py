"""docs/: every Python block of every page runs, every command is understood, and what a page names is there."""

import re
import shlex
from pathlib import Path

import pytest

from twicing.cli import _read
from twicing.mechanisms import find_mechanism, known_mechanisms

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
# The blocks of these run in tests of their own, which look at what they print and make.
RUN_ELSEWHERE = {
    "own_mechanism.md": ROOT / "tests" / "mechanisms" / "test_own_mechanism_page.py",
    "theory.md": ROOT / "tests" / "experiments" / "test_theory_run.py",
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
COMMANDS = [
    (page, found.strip())
    for page, text in (PAGES | {"../README.md": (ROOT / "README.md").read_text(encoding="utf-8")}).items()
    # On lines of their own, and with their options in the text.
    for found in [
        *re.findall(r"^    (twicing [a-z].*?)(?:\s{2,}#.*)?$", text, flags=re.MULTILINE),
        *re.findall(r"`(twicing [a-z]+ [^`\n]*--[^`\n]*)`", text),
    ]
]


def blocks(page):
    """(the code, the line it begins in) of each Python block."""
    text = PAGES[page]
    found = [(one[2], text[: one.start(2)].count("\n")) for one in FENCE.finditer(text) if one[1] == "python"]
    assert len(found) == text.count("```python"), "a block that does not begin at the margin would not be run"
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page not in RUN_ELSEWHERE and "```python" in PAGES[page]])
def test_the_code_of_the_page_runs(page, tmp_path, monkeypatch):
    """Blocks in order, in one namespace, as a reader would type them."""
    if "import transformers" in PAGES[page] or "from transformers" in PAGES[page]:
        pytest.importorskip("transformers", reason="Hugging Face transformers are not installed: twicing[hf]")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code, line in blocks(page):
        # With the lines before it, so that an error names the line of the page.
        exec(compile("\n" * line + code, str(DOCS / page), "exec"), names)


@pytest.mark.parametrize("page", RUN_ELSEWHERE)
def test_the_code_of_the_other_pages_runs_elsewhere(page):
    test = RUN_ELSEWHERE[page].read_text(encoding="utf-8")
    assert f'"{page}"' in test
    assert "```python" in test
    assert re.search(r"exec\(|import_module\(", test)


def test_fenced_blocks_are_python_or_said_to_be_something_else():
    for page, text in PAGES.items():
        for one in FENCE.finditer(text):
            assert one[1] in ("python", "text"), f"{page} has a block of {one[1] or 'no language'}"


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_the_commands_are_understood(page, command):
    """With their options, as the command line would read them; nothing is run."""
    try:
        _read(shlex.split(command)[1:])
    except SystemExit:
        pytest.fail(f"docs/{page} has a command that the command line does not know: {command}")


def test_there_are_commands():
    assert {"compare", "diagnose", "bench", "theory"} <= {command.split()[1] for _, command in COMMANDS}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:examples|scripts|docs|benchmarks|tests)/[\w./-]+)`", PAGES[page])
    sources = re.findall(r"`((?:ops|analysis|adapters|mechanisms|classical|experiments)/[\w/]+\.py)`", PAGES[page])
    missing = [path for path in named if not (ROOT / path).exists()]
    missing += [path for path in sources if not (ROOT / "src" / "twicing" / path).exists()]
    assert missing == []


def test_the_page_on_conversion_names_every_mechanism():
    (listed,) = re.findall(r"\* \*\*Mechanisms\*\* by name: (.*?);", PAGES["convert.md"], flags=re.DOTALL)
    ours = [name for name in known_mechanisms() if find_mechanism(name).__module__.startswith("twicing.")]
    assert sorted(re.findall(r"`([\w-]+)`", listed)) == ours
