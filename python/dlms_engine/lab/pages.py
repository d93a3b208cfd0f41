"""Paragraphs, tables and pictures as markdown, and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

_WORDS = ("solver", "builds on")
"""Columns of words, which stand on the left."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 0.85rem; }
td, th { padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; }
td.words, th.words { text-align: left; }
tr.learned td { background: #fbf3f5; }
img { max-width: 100%; }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #e6e6e6; }
  tr.learned td { background: #2a1d22; }
  img { background: #fff; }
}
"""


class Table:
    """Lines of cells under a head; columns that no line fills are left out.

    Args:
        lines: (is it about a learned solver, one cell a column).
    """

    def __init__(self, head: Sequence[str], lines: Iterable[tuple[bool, Sequence[str]]]) -> None:
        held = list(lines)
        every = range(len(head))
        filled = [i for i in every if not held or any(cells[i] for _, cells in held)]
        self.head = [head[i] for i in filled]
        self.lines = [(learned, [cells[i] for i in filled]) for learned, cells in held]

    def markdown(self) -> str:
        rule = ("---" if name in _WORDS else "---:" for name in self.head)
        found = ["| " + " | ".join(self.head) + " |", "|" + "|".join(rule) + "|"]
        for learned, cells in self.lines:
            shown = [
                f"**{cell}**" if learned and name == "solver" else cell
                for name, cell in zip(self.head, cells, strict=True)
            ]
            found.append("| " + " | ".join(shown) + " |")
        return "\n".join(found)

    def html(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            kinds = (' class="words"' if name in _WORDS else "" for name in self.head)
            both = zip(kinds, cells, strict=True)
            return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in both)

        rows = (
            f'<tr class="{"learned" if learned else "handcrafted"}">{line(cells, "td")}</tr>'
            for learned, cells in self.lines
        )
        head = line(self.head, "th")
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def markdown_page(parts: Iterable[str | Table]) -> str:
    """Paragraphs (a line that begins with ``## `` is a heading) and tables."""
    found = (part.markdown() if isinstance(part, Table) else part for part in parts)
    return "\n\n".join(found) + "\n"


def html_page(title: str, parts: Iterable[str | Table | Path], *, command: str = "") -> str:
    """One file: paragraphs and headings as for ``markdown_page``, tables, pictures read from disk."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            f"<p><code>{html.escape(command)}</code></p>" if command else "",
            *map(_html, parts),
            "</body></html>",
        ]
    )


def _html(part: str | Table | Path) -> str:
    if isinstance(part, Table):
        return part.html()
    if isinstance(part, Path):
        data = base64.b64encode(part.read_bytes()).decode("ascii")
        name = html.escape(part.stem.replace("-", " "))
        return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>'
    if part.startswith("## "):
        return f"<h2>{html.escape(part[3:])}</h2>"
    if part.startswith("- "):
        items = (html.escape(line[2:]) for line in part.splitlines())
        return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"
    return f"<p>{html.escape(part)}</p>"


def number(value: float) -> str:
    """Four significant digits, no exponent for ordinary sizes."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if 0.01 <= abs(value) < 1 or value == 0 else f"{value:.4g}"
