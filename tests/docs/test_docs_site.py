"""The site builds without a warning, takes nothing from other hosts, and its API page has what its docstrings say."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the site needs mkdocs-material and mkdocstrings: twicing[dev]")
pytest.importorskip("mkdocstrings", reason="the site needs mkdocs-material and mkdocstrings: twicing[dev]")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. The results are made by a script from finished runs; without them their page is empty."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "src").symlink_to(ROOT / "src")
    results = folder / "docs" / "results.md"
    if not results.exists():
        results.write_text("# Results\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder / "site"


class Loads(HTMLParser):
    """What a browser would fetch for a page."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "video", "audio"):
            self.addresses.append(named.get("src"))
        if tag == "link" and named.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(named.get("href"))


@pytest.mark.slow
def test_every_page_is_there_and_loads_nothing_from_elsewhere(site):
    pages = sorted(path.relative_to(site).parent.as_posix() for path in site.rglob("index.html"))
    wanted = {".", "formula", "convert", "compare", "diagnose", "performance", "theory", "results", "own_mechanism"}
    assert wanted | {"api"} == set(pages)
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        reader = Loads()
        reader.feed(text)
        assert not [address for address in reader.addresses if address and re.match(r"(https?:)?//", address)], path
        assert not re.search(r"@import|url\(['\"]?https?:", text), path
        assert "fonts.g" not in text
        assert "analytics" not in text


@pytest.mark.slow
def test_the_api_page_has_signatures_and_lists(site):
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(names) > 40
    for name in names:
        assert re.search(rf'id="{re.escape(name)}"', text), f"{name} has no entry"
    assert re.search(r"<li>\s*<p><code>query, key</code>: \[\.\.\., H, N, D\]|<li><code>query, key</code>: \[", text)
    assert not (site / "docstrings.py").exists()
    assert not (site / "published.toml").exists()


@pytest.mark.slow
def test_every_public_name_is_on_the_api_page(site):
    import twicing

    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in set(twicing.__all__) - {"__version__"}:
        assert f'id="twicing.{name}"' in text, name


@pytest.fixture(scope="module")
def as_markdown():
    pytest.importorskip("griffe")
    specification = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.as_markdown


def test_a_docstring_becomes_lists_paragraphs_and_formulas(as_markdown):
    text = (
        "What it is, with (**options) and (**more).\n\n    u = A v\n\nquery, key: [..., H, N, D].\nscale: a number,\n"
        "    or None: `**kept**`.\nReturns U.\nRaises ValueError.\nIt: is no item.\n\nMore."
    )
    assert as_markdown(text) == (
        "What it is, with (\\*\\*options) and (\\*\\*more).\n\n    u = A v\n\n* `query, key`: [..., H, N, D].\n"
        "* `scale`: a number,\n    or None: `**kept**`.\n\nReturns U.\n\nRaises ValueError.\nIt: is no item.\n\nMore."
    )


def test_an_item_right_after_a_sentence_begins_a_list(as_markdown):
    assert (
        as_markdown("It has these.\nname: one.\nand more text.") == "It has these.\n\n* `name`: one.\n\nand more text."
    )
