"""`twicing theory`: the files that it writes, and what it says when a claim does not hold."""

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from twicing.experiments.theory import run as theory_run
from twicing.experiments.theory.options import TheoryOptions
from twicing.experiments.theory.run import CLAIM_COLUMNS, run

ONLY = ("snr", "least-squares")
DOCS = Path(__file__).parents[2] / "docs" / "theory.md"


def told():
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("theory") / "new" / "folder"
    console = told()
    assert run(TheoryOptions(only=ONLY, out=out), console) is True
    (out / "said.txt").write_text(console.file.getvalue())
    return out


def test_it_says_what_held(folder):
    said = (folder / "said.txt").read_text()
    assert "7 claims: all hold." in said
    assert str(folder / "theory.html") in said
    assert "FAILS" not in said


def test_the_numbers_are_all_there(folder):
    found = json.loads((folder / "results.json").read_text())
    assert list(found["experiments"]) == ["least-squares", "snr"]
    assert found["made_with"]["seed"] == "0"
    assert "torch" in found["made_with"]
    snr = found["experiments"]["snr"]
    assert len(snr["numbers"]["sharp"]["residual"]) == len(snr["numbers"]["noises"])
    rows = list(csv.DictReader(io.StringIO((folder / "claims.csv").read_text())))
    assert tuple(rows[0]) == CLAIM_COLUMNS
    claims = [claim for one in found["experiments"].values() for claim in one["claims"]]
    assert [row["measured"] for row in rows] == [claim["measured"] for claim in claims]
    assert {row["holds"] for row in rows} == {"True"}


class Page(HTMLParser):
    """Tags that are not closed, ids, and what a page would load."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.loads, self.tags = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.add(tag)
        self.ids += [named["id"]] if "id" in named else []
        self.loads += [named[key] for key in ("src", "href", "xlink:href") if key in named and tag != "a"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(folder):
    text = (folder / "theory.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert {"least-squares", "snr"} <= set(page.ids)
    assert "script" not in page.tags
    assert all(one.startswith(("#", "data:")) for one in page.loads)
    assert "all borne out by the numbers" in text
    assert "does not hold" not in text
    assert re.search(r"var\(--arm-1, #0072b2\)", text)


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    run(TheoryOptions(only=ONLY, out=tmp_path), told())
    for name in ("theory.html", "results.json", "claims.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_another_seed_gives_other_numbers(folder, tmp_path):
    run(TheoryOptions(only=ONLY, seed=3, out=tmp_path), told())
    assert (tmp_path / "claims.csv").read_bytes() != (folder / "claims.csv").read_bytes()


def test_a_claim_that_fails_is_told_everywhere(tmp_path, monkeypatch):
    (one,) = theory_run.chosen(["snr"])

    def claims(numbers):
        first, *others = one.claims(numbers)
        return (dataclasses.replace(first, holds=False, statement="A <b>wrong</b> one."), *others)

    monkeypatch.setattr(theory_run, "chosen", lambda names: [dataclasses.replace(one, claims=claims)])
    console = told()
    assert run(TheoryOptions(out=tmp_path), console) is False
    said = console.file.getvalue()
    assert "FAILS" in said
    assert "4 claims: 1 do not hold" in said
    page = (tmp_path / "theory.html").read_text()
    assert "1 of them <strong>not borne out by the numbers</strong>" in page
    assert page.count("A &lt;b&gt;wrong&lt;/b&gt; one.") == 2
    assert 'class="holds fails">does not hold' in page


def test_threads_are_given_back(tmp_path):
    torch.set_num_threads(2)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        (one,) = theory_run.chosen(["least-squares"])

        def measure(seed):
            seen.append(torch.get_num_threads())
            return one.measure(seed)

        patch.setattr(theory_run, "chosen", lambda names: [dataclasses.replace(one, measure=measure)])
        run(TheoryOptions(out=tmp_path), told())
    assert seen == [1]
    assert torch.get_num_threads() == 2


def test_an_unknown_experiment_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="no experiment 'bises'"):
        run(TheoryOptions(only=("bises",), out=tmp_path / "out"), told())
    assert not (tmp_path / "out").exists()


BLOCKS = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_documentation_has_code():
    assert len(BLOCKS) >= 10


@pytest.mark.parametrize("place", range(len(BLOCKS)))
def test_its_code_runs_and_says_what_it_claims(place):
    """Each block stands alone, and asserts what the text beside it says."""
    assert "assert " in BLOCKS[place]
    exec(compile(BLOCKS[place], f"docs/theory.md, block {place + 1}", "exec"), {})


@pytest.mark.parametrize("path", re.findall(r"`((?:classical|ops|experiments)/[\w/]+\.py)`", DOCS.read_text()))
def test_what_the_documentation_points_to_is_there(path):
    assert (DOCS.parents[1] / "src" / "twicing" / path).exists()
