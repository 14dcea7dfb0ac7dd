"""For the API page: our docstrings as Markdown, where `name: meaning` lines become a list.

An extension of griffe, which reads the sources for mkdocstrings.
"""

import re
from typing import Any

import griffe

# "query, key: [..., H, N, D]", with further lines indented by four.
ITEM = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)")
INDENT = "    "
PARAGRAPH = re.compile(r"(Returns|Raises|Source|Example)\b")


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring when it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """The docstring with lists for its `name: meaning` lines, and paragraphs for what it returns and raises.

    Blocks that are indented after an empty line are formulas, and stay as they are: Markdown shows them as code.
    """
    lines: list[str] = []
    in_item = False
    for line in text.splitlines():
        item = ITEM.fullmatch(line)
        if item:
            if lines and lines[-1] and not in_item:
                lines.append("")
            lines.append(f"* `{item[1]}`: {_plain(item[2])}")
            in_item = True
        elif in_item and line.startswith(INDENT):
            lines.append(f"{INDENT}{_plain(line.strip())}")
        elif line.startswith(INDENT) or not line:
            in_item = False
            lines.append(line)
        else:
            if lines and lines[-1] and (in_item or PARAGRAPH.match(line)):
                lines.append("")
            in_item = False
            lines.append(_plain(line))
    return "\n".join(lines)


def _plain(line: str) -> str:
    """Without Markdown's bold, which two `**options` in a sentence would make."""
    return line if "`" in line else line.replace("**", r"\*\*")
